"""The hub: all that a server strategy can see and touch."""
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from torch import Tensor

from fedcore.clock import Event
from fedcore.errors import AllNodesFailed, EmptyRound, FedcoreError, MalformedReply, NothingCanHappen, RunEnded
from fedcore.evaluation import Poll, Scores, read_evaluation
from fedcore.flower import adopt_identity
from fedcore.options import RunOptions
from fedcore.payload import (
    ARRAYS,
    CONFIG,
    VectorRecord,
    read_train_reply,
    wire_bytes,
)
from fedcore.recorder import Recorder
from fedcore.tasks import ERROR_WORDS, NODE_GONE, REFUSED, Answer, Failure, Node, Replies, Reply, ShowOnce, Task, as_plain, printable
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

EVALUATE_TIMER = "$evaluate"
# A node that fails so often in a row is left aside: giving it work again would never end.
MAX_FAILURES_IN_A_ROW = 3


class HubGrid(Protocol):
    """What the hub needs of a grid: fedcore's own grids have it, `PolledGrid` adds it to any other."""

    @property
    def now(self) -> float: ...

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]: ...

    def next_event(self, until: float | None) -> Event | None: ...


class Hub:
    """A strategy's view of the federation.

    Attributes:
        model: the current global model.
        version: how many times a strategy has published.
        expected: how many nodes belong to the run.
        seed: of the run.
        round_index: rounds finished, for strategies that have rounds.
    """

    def __init__(self, grid: HubGrid, model: Model, options: RunOptions, recorder: Recorder | None = None):
        adopt_identity()
        self.grid, self.model, self.options = grid, model, options
        self.recorder = recorder or Recorder()
        self.seed, self.expected, self.version, self.round_index = options.seed, options.expected or 0, 0, 0
        self.stop_reason: str | None = None
        self.totals = {"client_updates": 0, "client_steps": 0, "bytes_up": 0, "bytes_down": 0}
        self.counts = {"failures": 0, "refused": 0, "lost": 0, "evaluations": 0}
        self.failures_in_a_row: dict[int, int] = {}    # by partition; a good reply clears it
        self.closing = False                           # beyond the run's limits, for the last evaluation
        self.show_failure = ShowOnce()
        self._last_failure = ""
        self._now, self._epoch = 0.0, 0.0
        self._nodes: dict[int, Node] = {}         # by Flower's id, ascending partition
        self._kinds: dict[int, str] = {}          # what each partition says it can answer with
        self._tasks: dict[str, Task] = {}         # by message id
        self._by_id: dict[int, Task] = {}
        self._unsent: deque[Failure] = deque()
        self._timers: dict[str, float] = {}
        self._draws: dict[int, int] = {}
        self._next_task = 0
        self.scores = Scores()
        self._waiting_room: dict[int, None] = {}
        self._polls: dict[int, Poll] = {}         # evaluations under way at the clients, by version
        self._record: tuple[Model, VectorRecord, int] | None = None

    # ---- what strategies use ------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since the first work could be handed out; time during which the server was down is not counted."""
        return self._now

    @property
    def nodes(self) -> list[Node]:
        """The nodes that are here, ascending partition."""
        return list(self._nodes.values())

    def train(
        self,
        node: Node,
        local_steps: int | None = None,
        config: Mapping[str, Any] | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> int:
        """Send a node the current model to train on, and return the task's id.

        Args:
            node: one of `nodes`.
            local_steps: optimizer steps; None leaves it to the client's settings.
            config: more entries for the request, e.g. `{"lr-scale": 0.5}`, or `{"reply": "model"}`.
            note: figures for the task's row in the timeline.
        """
        task_id = self._next_task
        draw = self._draws.get(node.partition, 0)
        self._draws[node.partition] = draw + 1
        settings: dict[str, Any] = {
            "task-id": task_id, "version": self.version, "draw": draw, "seed": self.seed, "reply": "update",
            **self.options.train_config, **(config or {}),
        }
        if local_steps is not None:
            settings["local-steps"] = local_steps
        content = RecordDict({ARRAYS: self.model_record(), CONFIG: ConfigRecord(settings)})
        wanted = settings["reply"]
        # Only where an update is wanted of a client that may answer with a model must its base be kept.
        knows_updates = "update" in self._kinds.get(node.partition, "")
        base = self.model if wanted == "update" and not knows_updates else None
        self.send_to(
            node, MessageType.TRAIN, content, local_steps=local_steps, base=base, wanted=wanted, note=dict(note or {})
        )
        return task_id

    def cancel(self, task_id: int) -> None:
        """Stop waiting for a task: whatever comes back is dropped."""
        if task := self._by_id.get(task_id):
            task.abandoned = True

    def publish(
        self,
        params: Tensor | Model,
        used: Sequence[Reply] = (),
        buffers: Mapping[str, Tensor] | None = None,
        weights: Sequence[float] | None = None,
        **figures: Any,
    ) -> None:
        """Make a new version of the model; evaluation and metrics follow from it.

        Args:
            params: trainable parameters, shape (d,), or a whole model. Not written to afterwards.
            used: the replies that went into it; their staleness is recorded.
            buffers: new values of non-trainable entries.
            weights: what each used reply was multiplied by.
            figures: further numbers for the metrics row.
        """
        staleness = [reply.staleness for reply in used]
        self.model = params if isinstance(params, Model) else self.model.replace(params, buffers)
        self.version += 1
        row: dict[str, Any] = {"version": self.version, **self.totals}
        row |= {"nodes": [reply.node.partition for reply in used], "staleness": staleness}
        if weights is not None:
            row["weights"] = list(weights)
        self.recorder.metric(self._now, "update", **row, **figures)
        if self.options.evaluation.unit == "versions" and self.version % self.options.evaluation.every == 0:
            self.evaluate()

    def set_timer(self, name: str, at: float) -> None:
        """Call `on_timer(name)` at the time `at`; a timer of the same name is replaced."""
        self._timers[name] = at

    def cancel_timer(self, name: str) -> None:
        """Forget a timer, if there is one."""
        self._timers.pop(name, None)

    def log(self, **figures: Any) -> None:
        """Write figures to the metrics."""
        self.recorder.metric(self._now, "log", version=self.version, **figures)

    def stop(self, reason: str) -> None:
        """End the run after the present event."""
        if self.stop_reason is None:
            self.stop_reason = reason

    def evaluate(self, nodes: Sequence[Node] | None = None) -> None:
        """Evaluate the current version where the run's options say; a poll of clients is written when all answered."""
        rule = self.options.evaluation
        if rule.where == "none" or self.scores.evaluated_version == self.version:
            return
        self.scores.evaluated_version = self.version
        if rule.where == "server":
            assert rule.fn is not None
            self.record_evaluation(rule.fn(self.model), self.version, "server")
            return
        nodes = self.nodes if nodes is None else nodes
        self._polls[self.version] = Poll(self.version, pending=len(nodes))
        for node in nodes:
            config = ConfigRecord({"version": self.version, "seed": self.seed})
            self.send_to(node, MessageType.EVALUATE, RecordDict({ARRAYS: self.model_record(), CONFIG: config}))

    def ask(
        self,
        nodes: Sequence[Node],
        action: str,
        content: RecordDict | Callable[[Node], RecordDict],
        deadline_s: float | None = None,
        min_replies: int | None = None,
    ) -> Replies:
        """Send every node a message, and wait for the answers.

        Args:
            action: Flower's message type, e.g. `train.econtrol`.
            content: one for all, or a function of the node.
            deadline_s: how long to wait, seconds; None: the run's `round_deadline_s`, or for all.
            min_replies: answers waited for even beyond the deadline; None: the run's least share.

        Raises:
            NothingCanHappen: answers are missing and none can come any more.
        """
        sent = []
        for node in nodes:
            body = content(node) if callable(content) else content
            steps = body[CONFIG].get("local-steps") if isinstance(body.get(CONFIG), ConfigRecord) else None
            sent.append(self.send_to(node, action, body, local_steps=steps if isinstance(steps, int) else None))
        return self.collect(sent, deadline_s, min_replies)

    # ---- the loop's side ----------------------------------------------------------------------------------------

    def collect(self, sent: Sequence[Task], deadline_s: float | None = None, min_replies: int | None = None) -> Replies:
        """Wait for the answers to tasks that were sent (see `ask`)."""
        deadline_s = self.options.round_deadline_s if deadline_s is None else deadline_s
        least = math.ceil(self.options.min_replies_share * len(sent)) if min_replies is None else min_replies
        limit = math.inf if deadline_s is None else self._now + deadline_s
        waiting = {task.id for task in sent}
        arrived: dict[int, Answer] = {}
        missing: dict[int, Failure] = {}
        while waiting and not (self._now >= limit and len(arrived) >= least):
            outcome = self.next_outcome(None if math.isinf(limit) or self._now >= limit else limit)
            if isinstance(outcome, Event):
                self.note_membership(outcome)
            elif outcome.task_id in waiting:
                waiting.discard(outcome.task_id)
                box: dict[int, Any] = arrived if isinstance(outcome, Answer) else missing
                box[outcome.task_id] = outcome
        for task in sent:
            if task.id in waiting:
                task.abandoned = True
                missing[task.id] = Failure(task.node, task.id, f"no answer within {deadline_s} s", 3)
        by_partition = sorted(sent, key=lambda task: task.node.partition)
        return Replies([arrived[task.id] for task in by_partition if task.id in arrived],
                       [missing[task.id] for task in by_partition if task.id in missing])

    def next_outcome(self, until: float | None) -> Answer | Failure | Event:
        """Wait for the next thing that concerns a strategy; returns the event itself for joins, leaves and time.

        Raises:
            NothingCanHappen: nobody works, no timer is set, and no node will come.
            RunEnded: the run's time is over.
        """
        while True:
            if self._unsent:
                return self._unsent.popleft()
            limit = None if self.closing else self.options.stop.seconds
            target = min((at for at in (until, limit) if at is not None), default=None)
            event = self.grid.next_event(None if target is None else target + self._epoch)
            if event is None:
                raise self.dead_end()
            if event.kind == "time":
                assert target is not None
                self._now = max(self._now, float(target))
                if limit is not None and self._now >= limit:
                    self.stop("seconds")
                    raise RunEnded("seconds")
                return event
            self._now = max(self._now, event.at - self._epoch)
            if event.kind != "reply":
                return event
            assert event.message is not None
            outcome = self._receive(event.message)
            if outcome is not None:
                return outcome

    def dead_end(self) -> FedcoreError:
        """Return the error that says why the run cannot go on."""
        if self._nodes and all(self.failures_in_a_row.get(node.partition) for node in self._nodes.values()):
            return AllNodesFailed(
                f"Every node failed, and none is left to give work to at {self._now:.6g} s. "
                f"The last failure: {printable(self._last_failure)}"
            )
        return NothingCanHappen(
            f"Nothing can happen any more at {self._now:.6g} s: no work is under way, no timer is set and no node will "
            f"come ({len(self._nodes)} of {self.expected} nodes are here)."
        )

    def next_timer(self) -> float | None:
        """Return when the next timer is due, None when none is set."""
        return min(self._timers.values(), default=None)

    def pop_due_timers(self) -> Iterator[str]:
        """Yield the timers that are due, earliest first; handling one may set or cancel others."""
        while due := [(at, index, name) for index, (name, at) in enumerate(self._timers.items()) if at <= self._now]:
            name = min(due)[2]
            del self._timers[name]
            yield name

    def give_up_if_hopeless(self) -> None:
        """Raise `AllNodesFailed` when no node has ever answered and each has failed three times."""
        tried = [self.failures_in_a_row.get(node.partition, 0) for node in self._nodes.values()]
        if not self.totals["client_updates"] and tried and min(tried) >= MAX_FAILURES_IN_A_ROW:
            raise self.dead_end()

    @property
    def node_ids(self) -> KeysView[int]:
        """Flower's ids of the nodes that are here."""
        return self._nodes.keys()

    def add_nodes(self, nodes: Sequence[tuple[Node, str]]) -> None:
        """Admit nodes, each with what it says it can answer with (`update,model`)."""
        for node, kinds in nodes:
            self._kinds[node.partition] = kinds
            self._nodes[node.id] = node
        self._nodes = dict(sorted(self._nodes.items(), key=lambda item: item[1].partition))

    def find_node(self, node_id: int) -> Node | None:
        """Return the node of Flower's number; one that only just came is known by its partition alone."""
        if node_id not in self._nodes and hasattr(self.grid, "partition_of"):
            return Node(node_id, self.grid.partition_of(node_id), 1, self._now)
        return self._nodes.get(node_id)

    def note_membership(self, event: Event) -> None:
        """Take note, during a round, of a node that left or of one that came (it is admitted after the round)."""
        if event.kind == "join" and event.node_id is not None:
            self._waiting_room[event.node_id] = None
        elif event.kind == "leave" and event.node_id is not None:
            self._waiting_room.pop(event.node_id, None)
            if (node := self.remove_node(event.node_id)) is not None:
                self.recorder.metric(self._now, "leave", version=self.version, node=node.partition)

    def pop_waiting(self) -> list[int]:
        """Return the nodes that came during a round, and forget them."""
        waiting, self._waiting_room = list(self._waiting_room), {}
        return waiting

    def task(self, task_id: int) -> Task | None:
        """Return a task that has not ended."""
        return self._by_id.get(task_id)

    def cancel_all(self) -> None:
        """Drop all work under way, and say so in the timeline."""
        for task in list(self._by_id.values()):
            self._end(task, "cancelled", 0)
            if task.message_id is not None:
                self._tasks.pop(task.message_id, None)

    def remove_node(self, node_id: int) -> Node | None:
        """Forget a node that left; None when it was never admitted."""
        return self._nodes.pop(node_id, None)

    def start_clock(self) -> None:
        """Let time begin: what came before (nodes coming in, saying who they are) does not count."""
        if (restart := getattr(self.grid, "start_clock", None)) is not None:
            restart()
        self._epoch, self._now = self.grid.now, 0.0

    def finish_polls(self) -> None:
        """Wait until the evaluations under way at the clients are complete."""
        while self._polls:
            self.next_outcome(None)

    def read_reply(self, answer: Answer) -> Reply | Failure:
        """Validate a training answer; a malformed one becomes a failure, is counted, and touches nothing."""
        task = self._by_id.pop(answer.task_id)
        try:
            found = read_train_reply(answer.content, self.model.layout)
            if found.task_id is not None and found.task_id != task.id:
                raise MalformedReply(f"it answers task {found.task_id}, but task {task.id} was asked")
            if task.wanted and task.base is None and found.kind != task.wanted:
                raise MalformedReply(f"it is of kind {found.kind!r}, but {task.wanted!r} was asked for")
            if found.kind == "update" and task.base is not None:
                self._kinds[task.node.partition] = "update,model"
        except MalformedReply as error:
            return self.refuse(task, error.reason, wire_bytes(answer.content))
        asked, done = task.local_steps, found.work_steps
        steps = asked if done is None else int(done) if asked is None else min(int(done), asked)
        elapsed = answer.elapsed_s
        reply = Reply(
            node=task.node, task_id=task.id, base_version=task.base_version, local_steps=steps or 0,
            num_examples=found.num_examples, elapsed_s=elapsed, metrics=found.metrics, buffers=found.buffers,
            train_seconds=None if found.train_seconds is None else min(found.train_seconds, elapsed),
            values=found.values, kind=found.kind, base=task.base, _version_now=self._version_now,
        )
        self.failures_in_a_row.pop(task.node.partition, None)
        self.totals["client_updates"] += 1
        self.totals["client_steps"] += reply.local_steps
        self._end(task, "ok", wire_bytes(answer.content), reply.local_steps)
        return reply

    def read_figures(self, answer: Answer) -> dict[str, float] | None:
        """Validate an evaluation; a malformed one is refused, and None is returned."""
        task, size = self._by_id[answer.task_id], wire_bytes(answer.content)
        try:
            _, figures = read_evaluation(answer.content)
        except MalformedReply as error:
            self.refuse(task, error.reason, size)
            return None
        self._end(task, "ok", size)
        return figures

    def refuse(self, task: Task, reason: str, bytes_up: int) -> Failure:
        """Count and log a reply that must not be used."""
        self.counts["refused"] += 1
        self.recorder.metric(self._now, "refused", version=self.version, node=task.node.partition, reason=reason)
        logger.warning("Refused a reply of node %d: %s", task.node.partition, printable(reason))
        self._end(task, "refused", bytes_up)
        self._note_failure(task.node, reason)
        return Failure(task.node, task.id, reason, REFUSED)

    def _note_failure(self, node: Node, reason: str) -> None:
        self.failures_in_a_row[node.partition] = self.failures_in_a_row.get(node.partition, 0) + 1
        self._last_failure = reason

    def restore_reply(self, state: Mapping[str, Any]) -> Reply:
        """Make a reply again from `Reply.state()`, after a restart."""
        known = {node.partition: node for node in self._nodes.values()}
        fields = dict(state)
        node = known.get(fields["partition"], Node(-1, fields["partition"], fields["num_examples"]))
        del fields["partition"]
        return Reply(node=node, _version_now=self._version_now, **fields)

    def model_record(self) -> VectorRecord:
        """Return the current model as a record; all messages of one version share it."""
        if self._record is None or self._record[0] is not self.model:
            record = VectorRecord(self.model)
            self._record = (self.model, record, wire_bytes(RecordDict({ARRAYS: record})))
        return self._record[1]

    def _version_now(self) -> int:
        return self.version

    def send_to(self, node: Node, action: str, content: RecordDict, **details: Any) -> Task:
        """Push a message; a grid that refuses it makes the task fail at the next turn of the loop, not here."""
        message = Message(content, node.id, action, ttl=self.options.task_timeout_s, group_id=str(self.version))
        return self.send(node, message, **details)

    def send(self, node: Node, message: Message, **details: Any) -> Task:
        """Push a message of the caller's making (see `send_to`)."""
        bytes_down = wire_bytes(message.content)
        message_id = next(iter(self.grid.push_messages([message])))
        task = Task(self._next_task, node, message.metadata.message_type, message_id, self._now, self.version,
                    bytes_down=bytes_down, **details)
        self._next_task += 1
        self._by_id[task.id] = task
        if message_id is None:
            self.counts["lost"] += 1
            self._end(task, "lost", 0)
            self._note_failure(node, "the node could not be reached")
            self._unsent.append(Failure(node, task.id, "the node could not be reached", NODE_GONE))
        else:
            self.totals["bytes_down"] += bytes_down
            self._tasks[message_id] = task
        return task

    def _receive(self, message: Message) -> Answer | Failure | None:
        task = self._tasks.pop(message.metadata.reply_to_message_id, None)
        if task is None:
            self.counts["refused"] += 1
            known = self._nodes.get(message.metadata.src_node_id)
            self.recorder.metric(self._now, "refused", version=self.version,
                                 node=known.partition if known else None, reason="a reply to an unknown task, or a second one")
            return None
        failed = message.has_error()
        size = 0 if failed else wire_bytes(message.content)
        self.totals["bytes_up"] += size
        if task.abandoned:
            self._end(task, "cancelled", size)
            return None
        if failed:
            return self._fail(task, message)
        if (poll := self._poll_of(task)) is not None:
            try:
                poll.add(task.node.partition, message.content)
            except MalformedReply as error:
                self.refuse(task, error.reason, size)
            else:
                self._end(task, "ok", size)
            self._close_if_complete(poll)
            return None
        return Answer(task.node, task.id, message.content, message, self._now - task.sent_at)

    def _fail(self, task: Task, message: Message) -> Failure | None:
        code = message.error.code
        reason = f"node {task.node.partition} {ERROR_WORDS.get(code, ERROR_WORDS[0])}"
        if message.error.reason:
            reason += f": {message.error.reason.strip()}"
        failure = Failure(task.node, task.id, reason, code)
        outcome = "lost" if code in (3, 4, 5) else "failed"
        self.counts["lost" if outcome == "lost" else "failures"] += 1
        self._end(task, outcome, 0)
        self.recorder.metric(self._now, "failure", version=self.version, node=task.node.partition, code=code, reason=reason)
        self.show_failure(failure)
        self._note_failure(task.node, reason)
        if (poll := self._poll_of(task)) is not None:
            poll.pending -= 1
            self._close_if_complete(poll)
            return None
        return failure

    def _poll_of(self, task: Task) -> Poll | None:
        return self._polls.get(task.base_version) if task.action == MessageType.EVALUATE else None

    def _close_if_complete(self, poll: Poll) -> None:
        if poll.pending == 0:
            del self._polls[poll.version]
            if poll.figures:
                self.record_evaluation(poll.means(), poll.version, "clients")

    def record_evaluation(self, figures: Mapping[str, float], version: int, where: str) -> None:
        """Write an evaluation, and stop the run when it reaches the target."""
        self.counts["evaluations"] += 1
        self.recorder.metric(self._now, "evaluate", version=version, where=where, **figures, **self.totals)
        if self.scores.add(figures, self._now, self.options.stop.target):
            self.stop("target")

    def _end(self, task: Task, outcome: str, bytes_up: int, local_steps: int | None = None) -> None:
        """Write the task's row in the timeline."""
        self._by_id.pop(task.id, None)
        if task.action.startswith(MessageType.QUERY):
            return
        parts = getattr(self.grid, "task_times", lambda _: {})(task.message_id) or {}
        self.recorder.task({
            "task": task.id, "node": task.node.partition, "kind": task.action, "start_s": task.sent_at,
            "end_s": self._now, "download_s": parts.get("download_s"), "queue_s": parts.get("queue_s"),
            "compute_s": parts.get("compute_s"), "upload_s": parts.get("upload_s"),
            "local_steps": task.local_steps if local_steps is None else local_steps,
            "base_version": task.base_version, "staleness": self.version - task.base_version, "outcome": outcome,
            "bytes_down": task.bytes_down, "bytes_up": bytes_up, **task.note,
        })

    # ---- what survives a restart --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart, tasks under way included."""
        own = {name: getattr(self, name) for name in ("model", "version", "round_index", "expected", "failures_in_a_row")}
        inner = {name: getattr(self, name) for name in ("_now", "_kinds", "_timers", "_draws", "_next_task", "_waiting_room")}
        return {
            **own, **inner, "totals": self.totals, "counts": self.counts, "scores": vars(self.scores),
            "nodes": [as_plain(node) for node in self._nodes.values()],
            "tasks": [{**as_plain(task), "node": as_plain(task.node)} for task in self._tasks.values()],
            "unsent": [{**as_plain(failure), "node": as_plain(failure.node)} for failure in self._unsent],
            "polls": [vars(poll) for poll in self._polls.values()], "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the grid must have been restored before."""
        for name in ("model", "version", "round_index", "expected", "_now", "_kinds", "_timers", "_draws",
                     "_next_task", "_waiting_room", "totals", "counts", "failures_in_a_row"):
            setattr(self, name, state[name])
        self.scores = Scores(**state["scores"])
        self._nodes = {fields["id"]: Node(**fields) for fields in state["nodes"]}
        tasks = [Task(**{**fields, "node": Node(**fields["node"])}) for fields in state["tasks"]]
        self._tasks = {task.message_id: task for task in tasks if task.message_id}
        self._by_id = {task.id: task for task in tasks}
        self._unsent = deque(Failure(**{**fields, "node": Node(**fields["node"])}) for fields in state["unsent"])
        self._polls = {fields["version"]: Poll(**fields) for fields in state["polls"]}
        # Time during which nobody ran does not count: the epoch moves with the grid's clock.
        self._epoch = self.grid.now - self._now
        self.recorder.load_state_dict(state["recorder"])

    @staticmethod
    def require_weight(total: float, clients: int) -> None:
        """Raise `EmptyRound` when nobody carries weight."""
        if total <= 0:
            raise EmptyRound(f"{clients} replies carry a total weight of {total}; it must be positive.")
