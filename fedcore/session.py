"""One run from its first node to its last checkpoint, whatever kind of strategy it has."""
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict

from fedcore.background import BackgroundSaver
from fedcore.checkpoint import Checkpoints, Frozen, freeze
from fedcore.clock import Event
from fedcore.errors import AllNodesFailed, NothingCanHappen, StoppedEarly, UnusableCheckpoint
from fedcore.exchange import HubGrid
from fedcore.hub import Hub
from fedcore.payload import CONFIG, INFO, wire_bytes
from fedcore.tasks import NODE_GONE, Answer, Failure, Node, Replies, Task

logger = logging.getLogger("fedcore")

# How long the clients may take for the evaluation after the end; whoever has not answered by then is left out.
LAST_EVALUATION_S = 600.0


class Saveable(Protocol):
    """Something whose state goes into a checkpoint."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def facts_of(content: RecordDict) -> dict[str, Any]:
    """Return what a node's answer to a query says of it."""
    facts: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, MetricRecord) or (name == INFO and isinstance(record, ConfigRecord)):
            facts.update(record.items())
    return facts


@dataclass(frozen=True)
class Snapshot:
    """The run at one moment, and what the grid calls that moment, if it wants to know what becomes of it."""

    tree: Frozen
    grid: HubGrid
    mark: int | None

    def note(self, what: str) -> None:
        """Tell the grid: `saving`, `saved` (clients may forget what it holds), `unsaved`."""
        if self.mark is not None:
            getattr(self.grid, what)(self.mark)


class Session:
    """Opens a run, saves it at safe points, and says when it is over.

    Args:
        hub: what the strategy acts through.
        strategy: saved and restored with the hub.
        checkpoints: where to save; None saves nothing.
        save_every_s: wall seconds between checkpoints; 0 saves at every safe point.
        interrupted: asked at every safe point; once it says yes, the run is saved and ends.
        in_background: write checkpoints while the run goes on, as real time does not wait for a disk.
        engine: what carries messages; a run is continued on the engine that it began on.
    """

    def __init__(
        self,
        hub: Hub,
        strategy: Saveable,
        checkpoints: Checkpoints | None = None,
        save_every_s: float = 30.0,
        interrupted: Callable[[], bool] = lambda: False,
        in_background: bool = False,
        engine: str = "",
    ):
        self.hub, self.strategy, self.checkpoints = hub, strategy, checkpoints
        self.save_every_s, self.interrupted = save_every_s, interrupted
        self.resumed = False
        self.engine = engine
        self._saver = BackgroundSaver(checkpoints) if checkpoints is not None and in_background else None
        self._saved_at = time.monotonic()
        self._remembered: Snapshot | None = None
        self.clients: dict[int, dict[str, Any]] = {}    # what each partition said about itself

    # ---- nodes --------------------------------------------------------------------------------------------------

    def open(self, introduce: bool = True) -> None:
        """Wait for the nodes, learn who they are, and start the clock.

        Args:
            introduce: ask every node for its partition and its number of examples; a grid that knows the partitions
                itself makes that unnecessary for strategies that do without.

        Raises:
            NothingCanHappen: fewer nodes than needed are there, and no more will come.
            StoppedEarly: the user does not want to wait any longer.
        """
        hub, options = self.hub, self.hub.options
        waited_until = None if options.ready_timeout_s is None else hub.grid.now + options.ready_timeout_s
        while True:
            ids = sorted(hub.grid.get_node_ids())
            least = options.min_nodes or options.expected or max(1, len(ids))
            if len(ids) >= least:
                break
            event = hub.grid.next_event(waited_until)
            if event is not None and event.kind == "wake" and self.interrupted():
                raise StoppedEarly(f"Stopped while {len(ids)} of {least} clients were here: nothing was trained.")
            if event is None or event.kind == "time":
                raise NothingCanHappen(f"{len(ids)} nodes are here, but the run needs {least}. Start more clients.")
        hub.expected = options.expected or len(ids)
        partition_of = getattr(hub.grid, "partition_of", None)
        # Real clients say who they are when they connect: to know it costs nothing.
        if introduce or partition_of is None or self._saver is not None:
            self._introduce(ids, billed=introduce or partition_of is None)
        else:
            hub.add_nodes([(Node(node_id, partition_of(node_id), 1, 0.0), "") for node_id in ids])
        hub.start_clock()
        hub.recorder.metric(0.0, "start", version=0, nodes=len(hub.nodes), num_params=hub.model.layout.num_params)
        hub.evaluate()
        hub.finish_polls()

    def _introduce(self, node_ids: Sequence[int], billed: bool) -> None:
        """Learn who the first nodes are: from the grid where it can tell without a message, else by asking them.

        Args:
            billed: count what they say of themselves, as the simulator does for strategies that need to know it.
        """
        introduction_of = getattr(self.hub.grid, "introduction", lambda _: None)
        asked = []
        for index, node_id in enumerate(node_ids):
            node, content = self._stranger(node_id, index), introduction_of(node_id)
            if content is None:
                asked.append(self._query(node))
            else:
                if billed:
                    self.hub.totals["bytes_up"] += wire_bytes(content)    # as the answer that it stands for
                self._admit(node, content)
        ready_s = self.hub.options.ready_timeout_s
        replies = self.hub.collect(asked, deadline_s=math.inf if ready_s is None else ready_s, min_replies=0)
        here = set(self.hub.grid.get_node_ids()) if asked else set()    # some may have left meanwhile
        contents = {answer.node: answer.content for answer in replies.arrived}
        contents |= {failure.node: RecordDict() for failure in replies.missing}
        # Those that say which partition they hold come first; the others take what is left.
        for node in sorted(contents, key=lambda node: "partition-id" not in facts_of(contents[node])):
            if node.id in here:
                self._admit(node, contents[node])

    def admit_waiting(self, introduce: bool = True) -> None:
        """Admit the nodes that came while a round was going on; wait for one when none is left.

        Args:
            introduce: as for `open`.
        """
        hub = self.hub
        while True:
            waiting = [self._stranger(node_id, index) for index, node_id in enumerate(hub.pop_waiting())]
            if introduce or not hasattr(hub.grid, "partition_of"):
                replies = hub.collect([self._query(node) for node in waiting]) if waiting else Replies([], [])
                for answer in replies.arrived:
                    self._report_join(self._admit(answer.node, answer.content))
                waiting = [failure.node for failure in replies.missing if failure.code != NODE_GONE]
            for node in waiting:
                self._report_join(self._admit(node))
            if hub.nodes:
                return
            outcome = hub.next_outcome(None)
            if isinstance(outcome, Event):
                hub.note_membership(outcome)

    def _stranger(self, node_id: int, index: int = 0) -> Node:
        """Return a node that has said nothing yet: it counts as one example, in the `index`-th free partition."""
        return self.hub.find_node(node_id) or Node(node_id, self._free_partition() + index, 1, self.hub.now)

    def _query(self, node: Node) -> Task:
        return self.hub.send_to(node, MessageType.QUERY, RecordDict({CONFIG: ConfigRecord()}))

    def _admit(self, node: Node, content: RecordDict | None = None) -> Node | None:
        """Make a node of what it answered to the query; one that does not know the query is admitted all the same."""
        if node.id in self.hub.node_ids:
            return None    # it was asked twice
        if self.hub.node_of(node.partition) is not None:
            node = replace(node, partition=self._free_partition())    # somebody else was found to hold it
        facts = facts_of(content or RecordDict())
        kinds = str(facts.get("kinds", ""))
        partition, examples = facts.get("partition-id", node.partition), facts.get("num-examples", 1)
        if not isinstance(partition, int) or not isinstance(examples, int) or examples < 1:
            logger.warning("Node %d describes itself in a way that cannot be used; it counts as one example.", node.id)
            partition, examples = node.partition, 1
        if self.hub.node_of(partition) is not None:
            logger.warning("Two nodes say that they hold partition %d; the later one is turned away.", partition)
            return None
        node = Node(node.id, partition, examples, self.hub.now)
        self.hub.add_nodes([(node, kinds)])
        self.hub.errors_in_a_row.pop(partition, None)    # whoever comes back may have mended what was wrong
        self.clients[partition] = {"node": partition, "num_examples": examples, "labels": facts.get("labels")}
        return node

    def outcomes(self, until: Callable[[], float | None]) -> Iterator[Answer | Failure | Event]:
        """Yield what happens, with nodes that come and go already taken note of.

        A join is reported once the node has said who it is, as an `Event` of kind `join`.
        """
        hub = self.hub
        for node_id in hub.pop_waiting():    # they came before the first event
            self._query(self._stranger(node_id))
        while True:
            outcome = hub.next_outcome(until())
            if isinstance(outcome, Event) and outcome.kind == "join":
                if outcome.node_id is not None and outcome.node_id not in hub.node_ids:
                    self._query(self._stranger(outcome.node_id))
            elif not isinstance(outcome, Event) and outcome.action.startswith(MessageType.QUERY):
                if isinstance(outcome, Failure) and outcome.code == NODE_GONE:
                    continue
                content = outcome.content if isinstance(outcome, Answer) else None
                if (node := self._admit(outcome.node, content)) is not None:
                    self._report_join(node)
                    yield Event("join", hub.now, node.id)
            else:
                yield outcome
            del outcome    # its memory is not held while the next one is waited for

    def _report_join(self, node: Node | None) -> None:
        if node is not None:
            self.hub.recorder.metric(self.hub.now, "join", version=self.hub.version, node=node.partition)

    def _free_partition(self) -> int:
        return next(partition for partition in count() if self.hub.node_of(partition) is None)

    # ---- limits and checkpoints ---------------------------------------------------------------------------------

    def check_limits(self, rounds_done: float) -> None:
        """Stop the run once one of its limits is reached."""
        rule, hub = self.hub.options.stop, self.hub
        if hub.scores.reached(rule.target):
            hub.stop("target")
        if rule.client_updates is not None and hub.totals["client_updates"] >= rule.client_updates:
            hub.stop("client_updates")
        if rule.rounds is not None and rounds_done >= rule.rounds:
            hub.stop("rounds")
        if rule.seconds is not None and hub.now >= rule.seconds:
            hub.stop("seconds")

    def safe_point(self) -> None:
        """Save when it is time to, or when the user wants to stop: nothing is half done here."""
        interrupted = self.interrupted()
        due = time.monotonic() - self._saved_at >= self.save_every_s
        if self.checkpoints and (interrupted or (due and not (self._saver and self._saver.busy))):
            self.save()
        if interrupted:
            self.hub.stop("interrupted")

    def save(self) -> None:
        """Write a checkpoint: of this moment, or of the one remembered.

        Raises:
            UnusableCheckpoint: it, or the one before, cannot be written.
        """
        assert self.checkpoints is not None
        snapshot = self._snapshot() if self._remembered is None else self._remembered
        snapshot.note("saving")
        if self._saver is not None:
            self._saver.save(snapshot.tree, lambda saved: snapshot.note("saved" if saved else "unsaved"))
        else:
            self.checkpoints.save(snapshot.tree)
            snapshot.note("saved")
        self._saved_at = time.monotonic()

    def _snapshot(self) -> "Snapshot":
        return Snapshot(freeze(self._tree()), self.hub.grid, getattr(self.hub.grid, "mark", None))

    def remember(self) -> None:
        """Keep the present state for `save`, where what follows may be broken off and cannot be saved half done."""
        limited = self.hub.options.stop.seconds is not None or self._saver is not None
        if self.checkpoints is not None and limited:
            self._remembered = self._snapshot()

    def forget(self) -> None:
        """Let `save` save the present state again."""
        self._remembered = None

    def _tree(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"hub": self.hub, "strategy": self.strategy}
        if hasattr(self.hub.grid, "state_dict"):
            parts["grid"] = self.hub.grid
        states = {name: part.state_dict() for name, part in parts.items()}
        return {"engine": self.engine, "clients": self.clients, **states}

    def restore(self) -> list[str]:
        """Continue from the newest checkpoint that can be read; returns what was wrong with newer ones.

        Raises:
            UnusableCheckpoint: there is none, or it is another engine's.
        """
        assert self.checkpoints is not None
        tree, problems = self.checkpoints.load_newest()
        if tree["engine"] != self.engine:
            command = {"virtual": "fedcore simulate", "grpc": "fedcore server"}.get(tree["engine"], "another engine")
            raise UnusableCheckpoint(f"{self.checkpoints.folder} was written by {command}; continue the run with that.")
        if "grid" in tree:
            self.hub.grid.load_state_dict(tree["grid"])  # type: ignore[attr-defined]
        self.hub.load_state_dict(tree["hub"])
        self.strategy.load_state_dict(tree["strategy"])
        self.clients = tree["clients"]
        self.resumed = True
        return problems

    def close(self, on_stop: Callable[[], None]) -> None:
        """End the run: save it as it is, let the strategy flush, evaluate what came out."""
        hub = self.hub
        if self.checkpoints:
            self.save()
        if self._saver is not None:
            self._saver.close()
        hub.closing = True
        hub.drop_polls()
        hub.cancel_all()
        on_stop()
        stopped_at = hub.now
        hub.evaluate()
        try:
            hub.finish_polls(LAST_EVALUATION_S)
        except (NothingCanHappen, AllNodesFailed):
            logger.warning("The last evaluation at the clients could not be completed.")
        hub.cancel_all()
        # The run's time is what training took; looking at the result afterwards does not count.
        hub.end_clock(stopped_at)
        hub.recorder.metric(hub.now, "stop", version=hub.version, reason=hub.stop_reason, **hub.totals)
        hub.recorder.flush()
