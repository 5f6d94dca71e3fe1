"""Nodes, the work they are given, and what comes back, as strategies see them."""
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from torch import Tensor

from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# Flower's error codes, by what they mean to a person (flwr.common.constant.ErrorCode).
ERROR_WORDS = {
    0: "failed for an unknown reason",
    1: "could not load its app",
    2: "raised an exception",
    3: "did not answer in time",
    4: "has no answer any more",
    5: "went offline",
    6: "refused the work in a mod",
    7: "got an invalid app bundle",
    8: "crashed",
}
REFUSED = -1    # our own code: the reply came, but must not touch the model
LONGEST_SHOWN = 8000    # characters of what a node wrote
NODE_GONE = 5   # also when a grid refuses a message: the node is not there


@dataclass(frozen=True, slots=True)
class Node:
    """A client of the run.

    Attributes:
        id: Flower's number for it, which may change from run to run.
        partition: which share of the data it holds; strategies keep their state by this.
        num_examples: training examples it holds.
        since: when it joined, seconds.
    """

    id: int
    partition: int
    num_examples: int = 1
    since: float = 0.0


@dataclass(slots=True)
class Task:
    """Work that was sent and has not ended."""

    id: int
    node: Node
    action: str
    message_id: str | None
    sent_at: float
    base_version: int
    local_steps: int | None = None
    bytes_down: int = 0
    wanted: str = ""             # `update` or `model`, where the hub asked for it
    base: Model | None = None    # kept only where the client may answer with a model instead of an update
    packed: str = ""             # `update` or `model`, where a compressed answer was asked for: what it is opened to
    origin: Model | None = None    # the model that was sent; kept where such an answer is to become a model
    for_poll: bool = False       # an evaluation that the hub itself asked for
    note: dict[str, Any] = field(default_factory=dict)
    abandoned: bool = False      # nobody waits for it any more
    ended: bool = False          # its row is in the timeline
    answered_at: float | None = None
    bytes_up: int = 0


@dataclass(eq=False)
class Reply:
    """A training reply that passed validation.

    Attributes:
        update: trained minus received, over trainable parameters, shape (d,); not when a model was asked for.
        buffers: non-trainable values after training, by name.
        base_version: the version it was trained from.
        local_steps: optimizer steps done.
        elapsed_s: from sending the request to the reply, on the server's clock.
        train_seconds: what the client says it spent training, at most `elapsed_s`; None when it does not say.
    """

    node: Node
    task_id: int
    base_version: int
    local_steps: int
    num_examples: int
    elapsed_s: float
    train_seconds: float | None
    metrics: dict[str, Any]
    buffers: dict[str, Tensor]
    values: Tensor = field(repr=False)
    kind: str
    base: Model | None = field(repr=False)
    _version_now: Callable[[], int] = field(repr=False)

    @property
    def staleness(self) -> int:
        """Server versions published since the one that this reply was trained from."""
        return self._version_now() - self.base_version

    @property
    def update(self) -> Tensor:
        """Trained minus received, shape (d,)."""
        if self.kind == "update":
            return self.values
        assert self.base is not None
        return self.values - self.base.params

    @property
    def model(self) -> Tensor:
        """The trained parameters, shape (d,)."""
        if self.kind == "model":
            return self.values
        assert self.base is not None
        return self.base.params + self.values

    def state(self) -> dict[str, Any]:
        """Return plain data from which `Hub.restore_reply` makes the same reply."""
        return {
            "partition": self.node.partition,
            "task_id": self.task_id,
            "base_version": self.base_version,
            "local_steps": self.local_steps,
            "num_examples": self.num_examples,
            "elapsed_s": self.elapsed_s,
            "train_seconds": self.train_seconds,
            "metrics": self.metrics,
            "buffers": self.buffers,
            "values": self.values,
            "kind": self.kind,
            "base": self.base,
        }


@dataclass(frozen=True)
class Failure:
    """A task that ended without a usable reply.

    Attributes:
        code: Flower's error code, or `REFUSED` for a reply that failed validation.
        reason: for people; may hold a client's traceback.
        action: what the node had been asked for (Flower's message type).
    """

    node: Node
    task_id: int
    reason: str
    code: int
    action: str = MessageType.TRAIN


@dataclass(frozen=True)
class Answer:
    """What a node answered to `Hub.ask`."""

    node: Node
    task_id: int
    content: RecordDict = field(repr=False)
    message: Message = field(repr=False)
    elapsed_s: float = 0.0
    bytes_up: int = 0
    action: str = MessageType.TRAIN
    task: Task | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Replies:
    """The outcome of `Hub.ask`: answers in ascending partition order, and who is missing, and why."""

    arrived: list[Answer]
    missing: list[Failure]


def as_plain(item: Any) -> dict[str, Any]:
    """Return a dataclass's fields by name, without descending into them."""
    return {name: getattr(item, name) for name in type(item).__dataclass_fields__}


def printable(text: str) -> str:
    """Escape what a node wrote before it reaches a terminal or a log; of a long text, its beginning and its end."""
    if len(text) > LONGEST_SHOWN:
        text = f"{text[:LONGEST_SHOWN // 4]}\n...\n{text[-3 * LONGEST_SHOWN // 4:]}"
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


# Errors that a person has to look into; a node that dies or goes offline is part of life, and counted.
USERS_CODE = (1, 2, 6)


MOST_NAMED = 4    # nodes that are named one by one when they fail in the same way


class ShowOnce:
    """Logs an exception of clients' code once with its traceback; other nodes with the same one get a line each."""

    def __init__(self) -> None:
        self._nodes: dict[str, set[int]] = {}    # by the traceback's last line: who had it

    def __call__(self, failure: Failure) -> None:
        if failure.code not in USERS_CODE:
            return
        last_line = failure.reason.rstrip().rsplit("\n", 1)[-1]
        nodes = self._nodes.setdefault(last_line, set())
        if failure.node.partition in nodes:
            return
        nodes.add(failure.node.partition)
        if len(nodes) == 1:
            logger.error("%s", printable(failure.reason))
        elif len(nodes) <= MOST_NAMED:
            logger.error("Node %d failed in the same way: %s", failure.node.partition, printable(last_line))
        elif len(nodes) == MOST_NAMED + 1:
            logger.error("More nodes fail in the same way; metrics.jsonl names each of them.")
