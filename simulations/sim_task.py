"""A message's life in the simulator."""
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message, MetricRecord, RecordDict

from fedcore.flower import put, with_id
from fedcore.simulations.clock import Entry

SAVED = ("id", "partition", "pushed_at", "index", "expires_at", "download_s", "started_at", "compute_s", "upload_s",
         "upload_bytes", "arrives_at", "fate", "stage")


@dataclass(slots=True, eq=False)
class SimTask:
    """A message on its way to a node, being worked on, or on its way back."""

    id: str
    partition: int
    message: Message
    pushed_at: float
    index: int                         # how many tasks this node was given before
    expires_at: float
    download_s: float = 0.0
    started_at: float = 0.0
    compute_s: float = 0.0
    upload_s: float = 0.0
    upload_bytes: int = 0
    arrives_at: float | None = None    # None until the duration is known
    fate: str = "ok"                   # ok, crash, reply_lost, gone (with its node)
    # waiting (in its node's queue), unsettled (its duration is not known yet), uploading, arriving, failing (arrived,
    # but as an error, which comes after replies), unreachable (the request was lost), done
    stage: str = "waiting"
    outcome: RecordDict | Error | None = None
    state_after: RecordDict | None = None
    future: Future[Any] | None = None
    entry: Entry | None = None
    expiry: Entry | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """The task's place among those of one moment: by node, then in the order of sending."""
        return self.partition, int(self.id)

    def times(self) -> dict[str, float] | None:
        """Return how long the task's parts took, seconds; None when it was lost with its message or its node."""
        if self.arrives_at is None or self.fate == "gone":
            return None
        queue_s = max(0.0, self.started_at - self.pushed_at - self.download_s)
        return {"download_s": self.download_s, "queue_s": queue_s, "compute_s": self.compute_s,
                "upload_s": self.upload_s}

    def put_away(self, stage: str) -> None:
        """Keep of a task only what its expiry needs: nobody will compute it any more, or look at what came out."""
        self.stage, self.entry, self.outcome, self.state_after = stage, None, None, None
        self.message = with_id(self.message, RecordDict(), self.id)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the request and the plan. What was computed already is computed again."""
        metadata = self.message.metadata
        address = [metadata.dst_node_id, metadata.message_type, metadata.ttl, metadata.group_id]
        plan = {name: getattr(self, name) for name in SAVED}
        return {**plan, "expires": self.expiry is not None, "address": address, "content": self.message.content}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SimTask":
        """Return the task that `state_dict` described, without its place in the heap."""
        node_id, message_type, ttl, group_id = state["address"]
        message = Message(state["content"], node_id, message_type, ttl=ttl, group_id=group_id)
        plan = {name: state[name] for name in SAVED}
        return cls(message=with_id(message, state["content"], state["id"]), **plan)


@dataclass(frozen=True, slots=True)
class Expiry:
    """The moment from which a task's answer is no longer valid."""

    task: SimTask


@dataclass(frozen=True, slots=True)
class Coming:
    """The moment at which a node comes online, or goes offline."""

    partition: int


@dataclass(slots=True)
class Lane:
    """A node that has work: the task it does, and those that wait. A node does one thing at a time."""

    running: SimTask | None = None
    waiting: deque[SimTask] = field(default_factory=deque)

def work_steps(content: RecordDict) -> float | None:
    """Return a reply's `work-steps` metric, None when it has none."""
    for record in content.values():
        if isinstance(record, MetricRecord) and isinstance(steps := record.get("work-steps"), (int, float)):
            return steps
    return None


def set_train_seconds(content: RecordDict, seconds: float) -> None:
    """Say in a reply how long its training took in virtual time, where it says how long it took on this machine."""
    for record in content.values():
        if isinstance(record, MetricRecord) and "train-seconds" in record:
            put(record, "train-seconds", seconds)
