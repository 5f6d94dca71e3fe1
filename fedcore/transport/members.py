"""The clients of a server, as it sees them, and the work that each of them has."""
import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict

from fedcore.tls import Identity
from fedcore.transport.frames import Assembler, Framed
from fedcore.transport.history import TaskId
from fedcore.transport.wire import pack

# Messages that a client has not taken from its stream; one that lets more pile up is not reading.
MAX_UNREAD = 10_000
# Rates are averages over about so many seconds.
RATE_S = 10.0


@dataclass(eq=False)
class Partial:
    """What has come of a reply so far.

    Attributes:
        head: the reply's head; another one means another reply.
    """

    head: bytes
    assembler: Assembler


@dataclass(eq=False)
class Job:
    """A message to a node that has no answer yet, or whose answer nobody has taken.

    Attributes:
        message: as the node gets it; without content once the node has it.
        framed: the content ready to be sent; None once the node has it.
        pushed_at: when the strategy pushed it, by its own clock.
        stage: `waiting` for the node to have it, `working`, `uploading`, `arrived` (taken by nobody so far).
        error: what it ended with, where there was no proper answer.
    """

    id: TaskId
    node_id: int
    message: Message
    framed: Framed | None
    pushed_at: float
    since: float
    stage: str = "waiting"
    error: Error | None = None
    partial: Partial | None = None
    times: dict[str, float] = field(default_factory=dict)
    expiry: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """The id as text: Flower's message id."""
        return str(self.id)

    @property
    def is_open(self) -> bool:
        """Whether an answer is still waited for."""
        return self.stage != "arrived"

    def enter(self, stage: str, now: float) -> None:
        """Note what the node does with it now."""
        if stage != self.stage:
            self.stage, self.since = stage, now


class Meter:
    """Counts bytes, and how many come per second of late."""

    def __init__(self) -> None:
        self.total, self._rate, self._at = 0, 0.0, 0.0

    def add(self, num_bytes: int, now: float) -> None:
        """Count bytes."""
        self._rate = self.rate(now) + num_bytes / RATE_S
        self._at = now
        self.total += num_bytes

    def rate(self, now: float) -> float:
        """Return bytes per second, fading where nothing comes."""
        return self._rate * math.exp(-max(0.0, now - self._at) / RATE_S)


@dataclass(eq=False)
class Member:
    """A client that belongs to the run.

    Attributes:
        session: what its further calls must show; None while it is not connected.
        instance: names the client's process.
        since: when this connection came, or was lost.
        outbox: what it is to be told.
        jobs: its work by id, in the order in which it was given.
    """

    name: str
    node_id: int
    partition: int
    config: dict[str, Any]
    introduction: RecordDict | None
    identity: Identity | None = None
    session: str | None = None
    instance: str = ""
    version: str = ""
    address: str = ""
    since: float = 0.0
    heard_at: float = 0.0
    outbox: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(MAX_UNREAD))
    jobs: dict[str, Job] = field(default_factory=dict)
    leaving: asyncio.TimerHandle | None = None
    up: Meter = field(default_factory=Meter)
    down: Meter = field(default_factory=Meter)
    busy: set[str] = field(default_factory=set)    # calls under way: at most one of each kind

    @property
    def connected(self) -> bool:
        """Whether it can be told anything now."""
        return self.session is not None

    def tell(self, facts: Mapping[str, Any], framed: Framed | None = None) -> None:
        """Say something to it, unless it is away (then it is told when it comes back)."""
        if self.connected:
            try:
                self.outbox.put_nowait(pack(facts, framed))
            except asyncio.QueueFull:
                self.hang_up()

    def hang_up(self, last_words: Mapping[str, Any] | None = None) -> None:
        """End its connection, from this side."""
        if self.connected:
            while not self.outbox.empty():
                self.outbox.get_nowait()
            if last_words is not None:
                self.outbox.put_nowait(pack(last_words))
            self.outbox.put_nowait(None)

    def doing(self) -> tuple[str, float, str]:
        """Return what it does, since when, and on which message type."""
        for job in list(self.jobs.values()):
            if job.is_open:
                return job.stage, job.since, job.message.metadata.message_type
        return "idle", self.since, ""


def new_partial(head: bytes, body: np.ndarray, checked: bool) -> Partial:
    """Return a reply of which nothing has come."""
    return Partial(head, Assembler(body, checked=checked))
