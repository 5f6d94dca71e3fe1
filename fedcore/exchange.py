"""Messages out and in: who is here, what they were asked, and what became of it."""
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from flwr.app import Message, MessageType, RecordDict

from fedcore.accounts import Accounts
from fedcore.clock import Event
from fedcore.errors import FedcoreError, MalformedReply, NothingCanHappen, RunEnded
from fedcore.flower import adopt_identity
from fedcore.options import RunOptions
from fedcore.payload import wire_bytes
from fedcore.recorder import Recorder
from fedcore.tasks import ERROR_WORDS, NODE_GONE, REFUSED, Answer, Failure, Node, Replies, ShowOnce, Task

logger = logging.getLogger("fedcore")

# Answers from whose times an adaptive deadline follows.
REMEMBERED_ARRIVALS = 100


class HubGrid(Protocol):
    """What the hub needs of a grid: fedcore's own grids have it, `PolledGrid` adds it to any other."""

    @property
    def now(self) -> float: ...

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]: ...

    def next_event(self, until: float | None) -> Event | None: ...


class Exchange(Accounts):
    """The nodes of a run and the tasks they were given; `Hub` adds the model and what strategies do with it.

    Attributes:
        closing: beyond the run's limits, for the last evaluation.
        must_stop: asked when the grid wakes up: the user wants to stop, and waited for a safe moment in vain.
    """

    def __init__(self, grid: HubGrid, options: RunOptions, recorder: Recorder | None = None):
        super().__init__(recorder, options.expected or 0)
        adopt_identity()
        self.grid, self.options = grid, options
        self.closing = False
        self.must_stop: Callable[[], bool] = lambda: False
        self.show_failure = ShowOnce()
        self._epoch = 0.0
        self._unsent: deque[Task] = deque()
        self._waiting_room: dict[int, None] = {}
        self._next_task = 0
        self._arrivals: dict[str, list[float]] = {}    # how long the latest answers took, by action, seconds

    # ---- nodes and time ---------------------------------------------------------------------------------------------

    @property
    def slow_messages(self) -> bool:
        """Whether a message takes seconds however little it holds, as between Flower's SuperLink and SuperNodes."""
        return bool(getattr(self.grid, "slow_messages", False))

    @property
    def moment(self) -> tuple[float, int]:
        """What changes whenever anything happens: the time, and how many tasks were ever given out."""
        return self._now, self._next_task

    def find_node(self, node_id: int) -> Node | None:
        """Return the node of Flower's number; one that only just came is known by its partition alone."""
        if node_id not in self._nodes and hasattr(self.grid, "partition_of"):
            return Node(node_id, self.grid.partition_of(node_id), 1, self._now)
        return self._nodes.get(node_id)

    def note_membership(self, event: Event) -> list[Failure]:
        """Take note, during a round, of a node that left or of one that came (it is admitted after the round).

        Returns:
            The tasks that a node took with it.
        """
        if event.kind == "join" and event.node_id is not None and event.node_id not in self._nodes:
            self._waiting_room[event.node_id] = None
        elif event.kind == "leave" and event.node_id is not None:
            self._waiting_room.pop(event.node_id, None)
            if (node := self.remove_node(event.node_id)) is not None:
                return self.lose_tasks(node)
        return []

    def lose_tasks(self, node: Node) -> list[Failure]:
        """End the tasks of a node that left, whether or not the grid will say so of each; write that it left."""
        failures = []
        for task in [task for task in self._tasks.values() if task.node.id == node.id and not task.abandoned]:
            task.abandoned = True
            reason = f"node {node.partition} {ERROR_WORDS[NODE_GONE]}"
            failure = Failure(task.node, task.id, reason, NODE_GONE, task.action)
            if not task.action.startswith(MessageType.QUERY):
                self.counts["lost"] += 1
                self.recorder.metric(self._now, "failure", version=self.version, node=node.partition, code=NODE_GONE,
                                     reason=reason)
            self._end(task, "lost", 0)
            if (outcome := self._intercept(task, failure)) is not None:
                failures.append(failure)
                assert outcome is failure
        self.recorder.metric(self._now, "leave", version=self.version, node=node.partition)
        return failures

    def note_news(self) -> None:
        """Take note of whoever has come or gone by now, without waiting."""
        while True:
            outcome = self.next_outcome(self._now)
            if isinstance(outcome, Event):
                if outcome.kind == "time":
                    return
                self.note_membership(outcome)

    def pop_waiting(self) -> list[int]:
        """Return the nodes that came during a round, and forget them."""
        waiting, self._waiting_room = list(self._waiting_room), {}
        return waiting

    def start_clock(self) -> None:
        """Let time begin: what came before (nodes coming in, saying who they are) does not count."""
        if (restart := getattr(self.grid, "start_clock", None)) is not None:
            restart()
        self._epoch, self._now = self.grid.now, 0.0

    # ---- sending and waiting ----------------------------------------------------------------------------------------

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
            self._note_failure(task, "the node could not be reached", NODE_GONE)
            self._unsent.append(task)
        else:
            self.totals["bytes_down"] += bytes_down
            self._tasks[message_id] = task
        return task

    def task(self, task_id: int) -> Task | None:
        """Return a task that has not ended."""
        return self._by_id.get(task_id)

    def cancel(self, task_id: int) -> None:
        """Stop waiting for a task: whatever comes back is dropped."""
        if task := self._by_id.get(task_id):
            task.abandoned = True

    def cancel_all(self) -> None:
        """Drop all work under way, and say so in the timeline."""
        for task in list(self._by_id.values()):
            self._end(task, "cancelled", 0)
            task.abandoned = True

    def is_busy(self, node: Node) -> bool:
        """Say whether a node still owes an answer that nobody waits for any longer."""
        return any(task.node.id == node.id and task.abandoned and not task.ended for task in self._tasks.values())

    def collect(
        self, sent: Sequence[Task], deadline_s: float | None = None, min_replies: int | None = None,
        enough: Callable[[Sequence[Answer], Sequence[Node]], bool] = lambda arrived, awaited: False,
    ) -> Replies:
        """Wait for the answers to tasks that were sent (see `ask`).

        Args:
            enough: given the answers and whom is still waited for, says whether to wait no longer.
        """
        self.end_unread()
        deadline_s = self._round_deadline_s(sent) if deadline_s is None else deadline_s
        # 0.07 x 100 is a little more than 7.
        share = self.options.min_replies_share
        least = math.ceil(share * len(sent) - 1e-9) if min_replies is None else min_replies
        limit = math.inf if deadline_s is None else self._now + deadline_s
        waiting = {task.id for task in sent}
        arrived: dict[int, Answer] = {}
        missing: dict[int, Failure] = {}
        nodes = {task.id: task.node for task in sent}
        while waiting and not (self._now >= limit and len(arrived) >= least) and not enough(
                list(arrived.values()), [nodes[task_id] for task_id in sorted(waiting)]):
            outcome = self.next_outcome(None if math.isinf(limit) or self._now >= limit else limit)
            for found in self.note_membership(outcome) if isinstance(outcome, Event) else [outcome]:
                if found.task_id in waiting:
                    waiting.discard(found.task_id)
                    box: dict[int, Any] = arrived if isinstance(found, Answer) else missing
                    box[found.task_id] = found
        for task in sent:
            if task.id in waiting:
                task.abandoned = True
                reason = "it was not waited for" if deadline_s is None else f"no answer within {deadline_s} s"
                missing[task.id] = Failure(task.node, task.id, reason, 3, task.action)
        by_partition = sorted(sent, key=lambda task: task.node.partition)
        return Replies([arrived[task.id] for task in by_partition if task.id in arrived],
                       [missing[task.id] for task in by_partition if task.id in missing])

    def _round_deadline_s(self, sent: Sequence[Task]) -> float | None:
        """Return how long to wait for the answers to these tasks: for ever where the run sets no deadline."""
        deadline_s = self.options.round_deadline_s
        if deadline_s != "adaptive":
            return deadline_s
        # Of nobody's time is anything known before the first answer.
        usual = [statistics.median(took) for action in {task.action for task in sent}
                 if (took := self._arrivals.get(action))]
        return self.options.deadline_factor * max(usual) if usual else None

    def awaited(self) -> list[Task]:
        """Return the tasks that somebody waits for, oldest first."""
        return sorted((task for task in self._by_id.values() if not task.abandoned), key=lambda task: task.sent_at)

    def next_outcome(
        self, until: float | None, enough: Callable[[], bool] = lambda: False
    ) -> Answer | Failure | Event:
        """Wait for the next thing that concerns a strategy; returns the event itself for joins, leaves and time.

        What concerns no strategy (an evaluation at a client) is taken note of on the way. When it ends the run, or is
        `enough` for the caller, an `Event` of kind `time` is returned.

        Raises:
            NothingCanHappen: nobody works, no timer is set, and no node will come.
            RunEnded: the run's time is over.
        """
        while True:
            if self._unsent:
                task = self._unsent.popleft()
                gone = Failure(task.node, task.id, "the node could not be reached", NODE_GONE, task.action)
                if (unsent := self._intercept(task, gone)) is not None:
                    return unsent
                if self.stop_reason is not None or enough():
                    return Event("time", self._now)
                continue
            limit = None if self.closing else self.options.stop.seconds
            # What is due already is due now: replies of this moment come before it.
            target = min((max(at, self._now) for at in (until, limit) if at is not None), default=None)
            event = self.grid.next_event(None if target is None else target + self._epoch)
            if event is None:
                raise self.dead_end()
            if event.kind == "wake":
                if self.must_stop():
                    self.stop("interrupted")
                    raise RunEnded("interrupted")
                return Event("time", self._now)
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
            if self.stop_reason is not None or enough():
                return Event("time", self._now)

    def dead_end(self) -> FedcoreError:
        """Return the error that says why the run cannot go on."""
        if self._nodes and all(self.failures_in_a_row.get(node.partition) for node in self._nodes.values()):
            return self.all_failed()
        return NothingCanHappen(
            f"Nothing can happen any more at {self._now:.6g} s: no work is under way, no timer is set and no node will "
            f"come ({len(self._nodes)} of {self.expected} nodes are here)."
        )

    # ---- what comes back --------------------------------------------------------------------------------------------

    def _receive(self, message: Message) -> Answer | Failure | None:
        source = message.metadata.src_node_id
        task = self._tasks.get(message.metadata.reply_to_message_id)
        if task is None or task.node.id != source:
            known = self._nodes.get(source)
            what = "a reply to an unknown task, or a second one" if task is None else "another node's task was answered"
            self._log_refusal(known.partition if known else None, what)
            return None
        del self._tasks[message.metadata.reply_to_message_id]
        task.answered_at = self._now
        failed = message.has_error()
        task.bytes_up = 0 if failed else wire_bytes(message.content)
        self.totals["bytes_up"] += task.bytes_up
        if not failed and self.options.round_deadline_s == "adaptive":
            took = self._arrivals.setdefault(task.action, [])
            took.append(self._now - task.sent_at)    # late ones too, or the deadline would only ever shrink
            del took[:-REMEMBERED_ARRIVALS]
        if task.abandoned:
            if not failed and not self.closing:
                self.counts["late"] += 1
                reason = f"it came after {self._now - task.sent_at:.6g} s, when nobody waited for it any longer"
                self.recorder.metric(self._now, "late", version=self.version, node=task.node.partition, reason=reason)
            self._end(task, "cancelled", task.bytes_up)
            return None
        if failed:
            return self._intercept(task, self._fail(task, message))
        self._unread[task.id] = task
        try:
            message = self._opened(task, message)
        except MalformedReply as error:
            return self._intercept(task, self.refuse(task, error.reason, task.bytes_up))
        return self._intercept(task, Answer(
            task.node, task.id, message.content, message, self._now - task.sent_at, task.bytes_up, task.action, task
        ))

    def _times_of(self, task: Task) -> Mapping[str, float]:
        times_of = getattr(self.grid, "task_times", None)
        return (times_of(task.message_id) if times_of is not None else None) or {}

    def end_unread(self) -> None:
        """End the tasks whose answers somebody has received and found nothing wrong with."""
        for task in list(self._unread.values()):
            self._end(task, "ok", task.bytes_up)

    def _opened(self, task: Task, message: Message) -> Message:
        """Return an answer as strategies read it; a subclass may have asked for another form.

        Raises:
            MalformedReply: it is not in that form.
        """
        return message

    def _intercept(self, task: Task, outcome: Answer | Failure) -> Answer | Failure | None:
        """Let a subclass keep what no strategy waits for."""
        return outcome

    def _fail(self, task: Task, message: Message) -> Failure:
        code = message.error.code
        reason = f"node {task.node.partition} {ERROR_WORDS.get(code, ERROR_WORDS[0])}"
        if message.error.reason:
            reason += f": {message.error.reason.strip()}"
        failure = Failure(task.node, task.id, reason, code, task.action)
        if task.action.startswith(MessageType.QUERY):
            self._end(task, "failed", 0)
            return failure    # clients of plain Flower apps answer no queries; that is no failure of theirs
        outcome = "lost" if code in (3, 4, 5) else "failed"
        self.counts["lost" if outcome == "lost" else "failures"] += 1
        self._end(task, outcome, 0)
        self.recorder.metric(self._now, "failure", version=self.version, node=task.node.partition, code=code,
                             reason=reason)
        self.show_failure(failure)
        self._note_failure(task, reason, code)
        return failure

    def refuse(self, task: Task, reason: str, bytes_up: int) -> Failure:
        """Count and log a reply that must not be used."""
        self._log_refusal(task.node.partition, reason)
        self._end(task, "refused", bytes_up)
        self._note_failure(task, reason, REFUSED)
        return Failure(task.node, task.id, reason, REFUSED, task.action)
