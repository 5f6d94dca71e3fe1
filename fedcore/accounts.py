"""What a run has counted: tasks and how they ended, bytes, failures; and their rows in metrics and timeline."""
import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import MessageType

from fedcore.errors import AllNodesFailed
from fedcore.recorder import Recorder
from fedcore.roster import Roster
from fedcore.tasks import NODE_GONE, REFUSED, USERS_CODE, Task, printable

logger = logging.getLogger("fedcore")


class Accounts(Roster):
    """Nodes, their tasks, and everything that is counted about them.

    Attributes:
        version: of the model, for the record; `Hub` advances it.
        expected: how many nodes belong to the run.
        totals: counted since the start: accepted updates and their local steps, bytes up and down.
        failures_in_a_row: by partition; a good reply clears it.
        errors_in_a_row: those of them that another try will not cure: exceptions of the client's code, refused replies,
            messages that nobody took. A node that crashes, or a message that is lost, is part of life.
        barren: failures of training, of whichever nodes, since the last good reply.
    """

    def __init__(self, recorder: Recorder | None, expected: int):
        super().__init__()
        self.recorder = recorder or Recorder()
        self.version, self.expected = 0, expected
        self.stop_reason: str | None = None
        self.totals = {"client_updates": 0, "client_steps": 0, "bytes_up": 0, "bytes_down": 0}
        self.counts = {"failures": 0, "refused": 0, "lost": 0, "late": 0, "evaluations": 0}
        self.failures_in_a_row: dict[int, int] = {}
        self.errors_in_a_row: dict[int, int] = {}
        self.barren = 0
        self._now = 0.0
        self._last_failure = ""
        self._tasks: dict[str, Task] = {}         # by message id
        self._by_id: dict[int, Task] = {}         # that have not ended: no row in the timeline yet
        self._unread: dict[int, Task] = {}        # answered, and whoever asked may still find the answer malformed

    @property
    def now(self) -> float:
        """Seconds since the first work could be handed out; time during which the server was down is not counted."""
        return self._now

    def stop(self, reason: str) -> None:
        """End the run after the present event."""
        if self.stop_reason is None:
            self.stop_reason = reason

    def log(self, **figures: Any) -> None:
        """Write figures to the metrics."""
        self.recorder.metric(self._now, "log", version=self.version, **figures)

    def warn(self, text: str) -> None:
        """Tell the user something about the run: now, and in the metrics and the report."""
        logger.warning("%s", text)
        self.log(warning=text)

    def all_failed(self) -> AllNodesFailed:
        """Return the error that shows the last of many failures."""
        return AllNodesFailed(
            f"Every node failed, and none is left to give work to at {self._now:.6g} s. "
            f"The last failure: {printable(self._last_failure)}"
        )

    def _log_refusal(self, partition: int | None, reason: str) -> None:
        self.counts["refused"] += 1
        self.recorder.metric(self._now, "refused", version=self.version, node=partition, reason=reason)
        who = "a stranger" if partition is None else f"node {partition}"
        logger.warning("Refused a reply of %s: %s", who, printable(reason))

    def _note_failure(self, task: Task, reason: str, code: int) -> None:
        if task.action.startswith(MessageType.TRAIN):    # a node that cannot evaluate may still train
            partition = task.node.partition
            self.failures_in_a_row[partition] = self.failures_in_a_row.get(partition, 0) + 1
            if code in (REFUSED, NODE_GONE, *USERS_CODE):
                self.errors_in_a_row[partition] = self.errors_in_a_row.get(partition, 0) + 1
            self.barren += 1
            self._last_failure = reason

    def _end(self, task: Task, outcome: str, bytes_up: int, local_steps: int | None = None) -> None:
        """Write the task's row in the timeline, once."""
        self._unread.pop(task.id, None)
        parts = self._times_of(task)
        self._by_id.pop(task.id, None)
        if task.ended or task.action.startswith(MessageType.QUERY):
            return
        task.ended = True
        self.recorder.task({
            "task": task.id, "node": task.node.partition, "kind": task.action, "start_s": task.sent_at,
            "end_s": self._now if task.answered_at is None else task.answered_at,
            "download_s": parts.get("download_s"), "queue_s": parts.get("queue_s"),
            "compute_s": parts.get("compute_s"), "upload_s": parts.get("upload_s"),
            "local_steps": task.local_steps if local_steps is None else local_steps,
            "base_version": task.base_version, "staleness": self.version - task.base_version, "outcome": outcome,
            "bytes_down": task.bytes_down, "bytes_up": bytes_up, **task.note,
        })

    def _times_of(self, task: Task) -> Mapping[str, float]:
        """Return where a task's time went (`download_s`, ...), as far as anybody knows."""
        return {}
