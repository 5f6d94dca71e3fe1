"""Evaluation of the model: by the server, or by asking the clients, whose answers no strategy waits for."""
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, MessageType, RecordDict

from fedcore.clock import Event
from fedcore.errors import MalformedReply
from fedcore.evaluation import Poll, Scores, read_evaluation
from fedcore.exchange import Exchange, HubGrid
from fedcore.options import RunOptions
from fedcore.payload import ARRAYS, CONFIG, VectorRecord
from fedcore.recorder import Recorder
from fedcore.tasks import Answer, Failure, Node, Task
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")


class Polls(Exchange):
    """An exchange that has a model, and has it evaluated.

    Attributes:
        model: the current global model.
        seed: of the run.
        scores: the best and the latest evaluation.
        beside: figures that go into the row of every evaluation, besides the model's.
    """

    def __init__(self, grid: HubGrid, model: Model, options: RunOptions, recorder: Recorder | None = None):
        super().__init__(grid, options, recorder)
        self.model, self.seed = model, options.seed
        self.scores = Scores(due_s=options.evaluation.every)
        self.beside: dict[str, Any] = {}
        self._polls: dict[int, Poll] = {}         # evaluations under way at the clients, by version
        self._record: tuple[Model, VectorRecord] | None = None

    def model_record(self) -> VectorRecord:
        """Return the current model as a record; all messages of one version share it."""
        if self._record is None or self._record[0] is not self.model:
            self._record = (self.model, VectorRecord(self.model))
        return self._record[1]

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

    def evaluation_is_due(self, before: int) -> bool:
        """Say whether this version is to be evaluated: every so many versions, or the first after so many seconds.

        Args:
            before: the version before this one.
        """
        rule = self.options.evaluation
        if rule.unit == "versions":
            return self.version // rule.every > before // rule.every
        if self._now < self.scores.due_s:
            return False
        # Counted from the start, not from now, so that the period does not drift.
        self.scores.due_s = (math.floor(self._now / rule.every) + 1) * rule.every
        return True

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
        ours = {"version": version, "where": where, **self.totals, **self.beside, **details}
        # A client may call its figures what it likes, but not what we call ours.
        theirs = {name: value for name, value in figures.items() if name not in (*ours, "time_s", "event")}
        self.recorder.metric(self._now, "evaluate", **{"version": version, "where": where, **theirs, **ours})
        if self.scores.add(figures, self._now, self.options.stop.target):
            self.stop("target")
