"""The hub: all that a server strategy can see and touch."""
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from flwr.app import ConfigRecord, MessageType, RecordDict
from torch import Tensor

from fedcore.compressing import CompressingExchange
from fedcore.errors import EmptyRound, InvalidSetting, MalformedReply
from fedcore.evaluation import Poll, Scores
from fedcore.exchange import HubGrid
from fedcore.flower import record_of
from fedcore.options import RunOptions
from fedcore.payload import ARRAYS, COMPRESSION_ERROR, CONFIG, read_train_reply
from fedcore.recorder import Recorder
from fedcore.tasks import Answer, Failure, Node, Replies, Reply, Task, as_plain
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# Plain attributes that a checkpoint holds as they are.
SAVED = ("model", "version", "round_index", "expected", "failures_in_a_row", "errors_in_a_row", "_now", "_kinds",
         "_timers", "_draws", "_next_task", "_used", "_given", "_waiting_room", "barren", "_arrivals")
# A node that errs so often in a row is left aside: giving it work again would never end.
MAX_FAILURES_IN_A_ROW = 3
# Failures per node of the run, with no good reply among them, after which nothing good will come.
HOPELESS_FAILURES = 10
NODE_FIELDS = tuple(entry.name for entry in fields(Node))


class Hub(CompressingExchange):
    """A strategy's view of the federation.

    Attributes:
        model: the current global model.
        version: how many times a strategy has published.
        expected: how many nodes belong to the run.
        seed: of the run.
        round_index: rounds finished, for strategies that have rounds.
    """

    def __init__(self, grid: HubGrid, model: Model, options: RunOptions, recorder: Recorder | None = None):
        super().__init__(grid, model, options, recorder)
        self.round_index = 0
        self._train_config = dict(ConfigRecord(dict(options.train_config)).items())    # checked once, for all requests
        self._timers: dict[str, float] = {}
        self._draws: dict[int, int] = {}          # training tasks given to each partition so far

    # ---- what strategies use ----------------------------------------------------------------------------------------

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
        settings = record_of(ConfigRecord, {
            "task-id": task_id, "version": self.version, "draw": draw, "seed": self.seed, "reply": "update",
            **self._train_config,
        })
        for name, value in (config or {}).items():
            settings[name] = value
        if local_steps is None:
            told = settings.get("local-steps")    # what the run tells every client, if it does
            local_steps = told if isinstance(told, int) else None
        else:
            settings["local-steps"] = local_steps
        wanted = str(settings["reply"])
        content = record_of(RecordDict, {ARRAYS: self.model_record(), CONFIG: settings})
        # Only where an update is wanted of a client that may answer with a model must its base be kept.
        knows_updates = "update" in self._kinds.get(node.partition, "")
        base = self.model if wanted == "update" and not knows_updates else None
        self.send_to(
            node, MessageType.TRAIN, content, local_steps=local_steps, base=base, wanted=wanted, note=dict(note or {})
        )
        return task_id

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
        left_out = [error for reply in used if isinstance(error := reply.metrics.get(COMPRESSION_ERROR), float)]
        if left_out:
            row["compression_error"] = sum(left_out) / len(left_out)
        if weights is not None:
            row["weights"] = list(weights)
        self.recorder.metric(self._now, "update", **row, **figures)
        if self.evaluation_is_due(self.version - 1):
            self.evaluate()

    def set_timer(self, name: str, at: float) -> None:
        """Call `on_timer(name)` at the time `at`; a timer of the same name is replaced. Infinity: never.

        Raises:
            InvalidSetting: the time is not a number.
        """
        if math.isnan(at):
            raise InvalidSetting("at", at, "a time in seconds", f"It was given for the timer {name!r}.")
        self._timers.pop(name, None)
        if at < math.inf:
            self._timers[name] = at

    def cancel_timer(self, name: str) -> None:
        """Forget a timer, if there is one."""
        self._timers.pop(name, None)

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

    # ---- the loop's side --------------------------------------------------------------------------------------------

    def next_timer(self) -> float | None:
        """Return when the next timer is due, None when none is set."""
        return min(self._timers.values(), default=None)

    def pop_due_timers(self) -> Iterator[str]:
        """Yield the timers that are due, earliest first; handling one may set or cancel others."""
        while due := [(at, index, name) for index, (name, at) in enumerate(self._timers.items()) if at <= self._now]:
            name = min(due)[2]
            del self._timers[name]
            yield name

    def is_left_aside(self, node: Node) -> bool:
        """Say whether a node has erred so often in a row that giving it work again would never end."""
        return self.errors_in_a_row.get(node.partition, 0) >= MAX_FAILURES_IN_A_ROW

    def give_up_if_hopeless(self) -> None:
        """Raise `AllNodesFailed` when nothing but failures has come for so long that nothing else will.

        That is: no node has ever answered, and each has failed three times; or there were ten failures for each node
        of the run since the last good reply.
        """
        if not self.barren:
            return
        tried = [self.failures_in_a_row.get(node.partition, 0) for node in self._nodes.values()]
        never = not self.totals["client_updates"] and tried and min(tried) >= MAX_FAILURES_IN_A_ROW
        if never or self.barren >= HOPELESS_FAILURES * max(1, self.expected):
            raise self.all_failed()

    def end_clock(self, at: float) -> None:
        """Call the time at which training ended the run's last."""
        self._now = at

    def read_reply(self, answer: Answer) -> Reply | Failure:
        """Validate a training answer; a malformed one becomes a failure, is counted, and touches nothing."""
        task = answer.task
        assert task is not None
        try:
            found = read_train_reply(answer.content, self.model.layout)
            if found.task_id is not None and found.task_id != task.id:
                raise MalformedReply(f"it answers task {found.task_id}, but task {task.id} was asked")
            if task.wanted and task.base is None and found.kind != task.wanted:
                raise MalformedReply(f"it is of kind {found.kind!r}, but {task.wanted!r} was asked for")
            if found.kind == "update" and task.base is not None:
                self._kinds[task.node.partition] = "update,model"
        except MalformedReply as error:
            return self.refuse(task, error.reason, answer.bytes_up)
        asked, done = task.local_steps, found.work_steps
        steps = asked if done is None else int(done) if asked is None else min(int(done), asked)
        elapsed = answer.elapsed_s
        reply = Reply(
            node=task.node, task_id=task.id, base_version=task.base_version, local_steps=steps or 0,
            num_examples=found.num_examples, elapsed_s=elapsed, metrics=found.metrics, buffers=found.buffers,
            train_seconds=None if found.train_seconds is None else min(found.train_seconds, elapsed),
            values=found.values, kind=found.kind, base=task.base, _version_now=self._version_now,
        )
        self.accept(answer, reply)
        return reply

    def accept(self, answer: Answer, reply: Reply) -> None:
        """Count an answer that is used as `reply`."""
        self.count_work(answer, 1, reply.local_steps)

    def count_work(self, answer: Answer, updates: int, local_steps: int) -> None:
        """Count an answer that is used, and what its client did for it."""
        assert answer.task is not None
        self.failures_in_a_row.pop(answer.node.partition, None)
        self.errors_in_a_row.pop(answer.node.partition, None)
        self.barren = 0
        self.totals["client_updates"] += updates
        self.totals["client_steps"] += local_steps
        self._end(answer.task, "ok", answer.bytes_up, local_steps)

    def restore_reply(self, state: Mapping[str, Any]) -> Reply:
        """Make a reply again from `Reply.state()`, after a restart."""
        fields = dict(state)
        partition = fields.pop("partition")
        node = self.node_of(partition) or Node(-1, partition, fields["num_examples"])
        return Reply(node=node, _version_now=self._version_now, **fields)

    def _version_now(self) -> int:
        return self.version

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart, tasks under way included."""
        return {
            **{name: getattr(self, name) for name in SAVED},
            "totals": self.totals, "counts": self.counts, "scores": vars(self.scores),
            "clock": [self.grid.now, self._epoch],
            # By column: there may be a hundred thousand of them.
            "nodes": [[getattr(node, name) for node in self.nodes] for name in NODE_FIELDS],
            "tasks": [{**as_plain(task), "node": as_plain(task.node)} for task in self._tasks.values()],
            "unsent": [{**as_plain(task), "node": as_plain(task.node)} for task in self._unsent],
            "polls": [vars(poll) for poll in self._polls.values()], "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the grid must have been restored before."""
        for name in (*SAVED, "totals", "counts"):
            setattr(self, name, state[name])
        self.scores = Scores(**state["scores"])
        nodes = [Node(*row) for row in zip(*state["nodes"], strict=True)]
        self.add_nodes([(node, self._kinds.get(node.partition, "")) for node in nodes])
        tasks, unsent = ([Task(**{**fields, "node": Node(**fields["node"])}) for fields in state[name]]
                         for name in ("tasks", "unsent"))
        self._tasks = {task.message_id: task for task in tasks if task.message_id}
        self._by_id = {task.id: task for task in tasks if not task.ended}
        self._unsent = deque(unsent)
        self._polls = {fields["version"]: Poll(**fields) for fields in state["polls"]}
        grid_now, epoch = state["clock"]
        # Time during which nobody ran does not count: the epoch moves with the grid's clock. A virtual one has not
        # moved, and a difference of two rounded numbers would not be the epoch to the last bit.
        self._epoch = epoch if self.grid.now == grid_now else self.grid.now - self._now
        self.recorder.load_state_dict(state["recorder"])

    @staticmethod
    def require_weight(total: float, clients: int) -> None:
        """Raise `EmptyRound` when nobody carries weight."""
        if total <= 0:
            raise EmptyRound(f"{clients} replies carry a total weight of {total}; it must be positive.")
