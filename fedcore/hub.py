"""The hub: all that a server strategy can see and touch."""
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from flwr.app import ConfigRecord, MessageType, RecordDict
from torch import Tensor

from fedcore.clock import Event
from fedcore.errors import EmptyRound, InvalidSetting, MalformedReply
from fedcore.evaluation import Poll, Scores, read_evaluation
from fedcore.exchange import Exchange, HubGrid
from fedcore.flower import record_of
from fedcore.options import RunOptions
from fedcore.payload import ARRAYS, CONFIG, VectorRecord, read_train_reply
from fedcore.recorder import Recorder
from fedcore.tasks import Answer, Failure, Node, Replies, Reply, Task, as_plain
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# Plain attributes that a checkpoint holds as they are.
SAVED = ("model", "version", "round_index", "expected", "failures_in_a_row", "_now", "_kinds", "_timers", "_draws",
         "_next_task", "_waiting_room", "barren")
# A node that fails so often in a row is left aside: giving it work again would never end.
MAX_FAILURES_IN_A_ROW = 3
# Failures per node of the run, with no good reply among them, after which nothing good will come.
HOPELESS_FAILURES = 10
NODE_FIELDS = tuple(entry.name for entry in fields(Node))


class Hub(Exchange):
    """A strategy's view of the federation.

    Attributes:
        model: the current global model.
        version: how many times a strategy has published.
        expected: how many nodes belong to the run.
        seed: of the run.
        round_index: rounds finished, for strategies that have rounds.
    """

    def __init__(self, grid: HubGrid, model: Model, options: RunOptions, recorder: Recorder | None = None):
        super().__init__(grid, options, recorder)
        self.model, self.seed, self.round_index = model, options.seed, 0
        self._train_config = dict(ConfigRecord(dict(options.train_config)).items())    # checked once, for all requests
        self.scores = Scores(due_s=options.evaluation.every)
        self._polls: dict[int, Poll] = {}         # evaluations under way at the clients, by version
        self._timers: dict[str, float] = {}
        self._draws: dict[int, int] = {}          # training tasks given to each partition so far
        self._record: tuple[Model, VectorRecord] | None = None

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
        if weights is not None:
            row["weights"] = list(weights)
        self.recorder.metric(self._now, "update", **row, **figures)
        if self._evaluation_is_due():
            self.evaluate()

    def _evaluation_is_due(self) -> bool:
        """Say whether this version is to be evaluated: every so many versions, or the first after so many seconds."""
        rule = self.options.evaluation
        if rule.unit == "versions":
            return self.version % rule.every == 0
        if self._now < self.scores.due_s:
            return False
        # Counted from the start, not from now, so that the period does not drift.
        self.scores.due_s = (math.floor(self._now / rule.every) + 1) * rule.every
        return True

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

    def log(self, **figures: Any) -> None:
        """Write figures to the metrics."""
        self.recorder.metric(self._now, "log", version=self.version, **figures)

    def warn(self, text: str) -> None:
        """Tell the user something about the run: now, and in the metrics and the report."""
        logger.warning("%s", text)
        self.log(warning=text)

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
        if not nodes:
            return    # nobody is here to ask
        self._polls[self.version] = Poll(self.version, asked=len(nodes), pending=len(nodes))
        for node in nodes:
            config = ConfigRecord({"version": self.version, "seed": self.seed})
            content = RecordDict({ARRAYS: self.model_record(), CONFIG: config})
            self.send_to(node, MessageType.EVALUATE, content, for_poll=True)

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

    def finish_polls(self, within_s: float = math.inf) -> None:
        """Wait until the evaluations under way at the clients are complete, or for so many seconds.

        Whoever has not answered by then is left out.
        """
        limit = None if math.isinf(within_s) else self._now + within_s
        while self._polls and (limit is None or self._now < limit):
            outcome = self.next_outcome(limit, enough=lambda: not self._polls)
            if isinstance(outcome, Event):
                self.note_membership(outcome)
        for poll in list(self._polls.values()):
            self._close_poll(poll)

    def drop_polls(self) -> None:
        """Forget the evaluations under way at the clients; the current version can then be evaluated anew."""
        if self.version in self._polls:
            self.scores.evaluated_version = -1
        self._polls = {}

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
        assert answer.task is not None
        self.failures_in_a_row.pop(answer.node.partition, None)
        self.barren = 0
        self.totals["client_updates"] += 1
        self.totals["client_steps"] += reply.local_steps
        self._end(answer.task, "ok", answer.bytes_up, reply.local_steps)

    def read_figures(self, answer: Answer) -> dict[str, float] | None:
        """Validate an evaluation; a malformed one is refused, and None is returned."""
        task = answer.task
        assert task is not None
        try:
            _, figures = read_evaluation(answer.content)
        except MalformedReply as error:
            self.refuse(task, error.reason, answer.bytes_up)
            return None
        self._end(task, "ok", answer.bytes_up)
        return figures

    def restore_reply(self, state: Mapping[str, Any]) -> Reply:
        """Make a reply again from `Reply.state()`, after a restart."""
        fields = dict(state)
        partition = fields.pop("partition")
        node = self.node_of(partition) or Node(-1, partition, fields["num_examples"])
        return Reply(node=node, _version_now=self._version_now, **fields)

    def model_record(self) -> VectorRecord:
        """Return the current model as a record; all messages of one version share it."""
        if self._record is None or self._record[0] is not self.model:
            self._record = (self.model, VectorRecord(self.model))
        return self._record[1]

    def _version_now(self) -> int:
        return self.version

    def _intercept(self, task: Task, outcome: Answer | Failure) -> Answer | Failure | None:
        """Count what belongs to an evaluation at the clients; pass on everything else."""
        if not task.for_poll:
            return outcome
        poll = self._polls.get(task.base_version)
        if poll is None:    # it was dropped meanwhile
            self._end(task, "cancelled", task.bytes_up)
            return None
        if isinstance(outcome, Failure):
            poll.pending -= 1
        else:
            try:
                poll.add(task.node.partition, outcome.content)
            except MalformedReply as error:
                self.refuse(task, error.reason, outcome.bytes_up)
            else:
                self._end(task, "ok", outcome.bytes_up)
        if poll.pending == 0:
            self._close_poll(poll)
        return None

    def _close_poll(self, poll: Poll) -> None:
        del self._polls[poll.version]
        if 2 * poll.answers > poll.asked:
            self.record_evaluation(poll.means(), poll.version, "clients", evaluated_by=poll.answers)
        else:
            # The mean of a few clients would be taken for the model's quality.
            self.log(unfinished_evaluation=poll.version, answers=poll.answers, asked=poll.asked)

    def record_evaluation(self, figures: Mapping[str, float], version: int, where: str, **details: Any) -> None:
        """Write an evaluation, and stop the run when it reaches the target."""
        self.counts["evaluations"] += 1
        ours = {"version": version, "where": where, **self.totals, **details}
        # A client may call its figures what it likes, but not what we call ours.
        theirs = {name: value for name, value in figures.items() if name not in (*ours, "time_s", "event")}
        self.recorder.metric(self._now, "evaluate", **{"version": version, "where": where, **theirs, **ours})
        if self.scores.add(figures, self._now, self.options.stop.target):
            self.stop("target")

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
