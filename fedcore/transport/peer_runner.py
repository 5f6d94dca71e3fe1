"""One real peer: its strategy on the link's event loop, its training in a thread, its checkpoints in a folder."""
import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fedcore.checkpoint import Checkpoints
from fedcore.peers.envelope import Envelope
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Membership, Trained
from fedcore.peers.strategy import PeerStrategy
from fedcore.tls import Credentials
from fedcore.transport.peer_roster import Roster
from fedcore.transport.peer_wire import PeerWire
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

T = TypeVar("T")
# How long a peer that is done waits for its last messages to be acknowledged, and for the others to be done.
FAREWELL_S = 30.0
GOODBYE = "goodbye"


class Work(Protocol):
    """What one peer computes, in any thread."""

    num_examples: int

    def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained: ...

    def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]: ...

    def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]: ...

    def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor: ...

    def forget_optimizer(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ThreadLabour:
    """Computes in a thread of its own, so that the peer answers others meanwhile."""

    def __init__(self, work: Work):
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedcore-peer")

    @property
    def curvature(self) -> tuple[float, float] | None:
        """Strong convexity and smoothness of the peer's objective, where the task knows them."""
        found: tuple[float, float] | None = getattr(self._work, "curvature", None)
        return found

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained:
        """Make optimizer steps."""
        return await self._run(self._work.train, params, buffers, steps)

    async def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the gradient of the next batch."""
        return await self._run(self._work.gradient, params, buffers)

    async def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]:
        """Return what the optimizer's next step would subtract."""
        return await self._run(self._work.displacement, params, buffers, gradient)

    async def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Return what the optimizer's next step makes of a model."""
        return await self._run(self._work.descend, params, buffers, gradient)

    def forget_optimizer(self) -> None:
        """Let the optimizer start afresh."""
        self._work.forget_optimizer()

    def state_dict(self) -> dict[str, Any]:
        """Return what the training remembers."""
        return self._work.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._work.load_state_dict(state)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class RosterBoard:
    """All peers of a roster take part from the first step to the last, whose number all of them know beforehand.

    Args:
        num_steps: steps of the run.
        save_every_s: seconds between checkpoints.
        on_step: told of every step that this peer has finished, and of rows that it logs: (event, figures).
    """

    def __init__(
        self, count: int, num_steps: int, checkpoints: Checkpoints | None, save_every_s: float,
        on_row: Callable[[str, dict[str, Any]], None],
    ):
        self._membership = Membership(0, tuple(range(count)))
        self._num_steps, self._checkpoints, self._save_every_s = num_steps, checkpoints, save_every_s
        self._on_row = on_row
        self._started = self._saved_at = time.monotonic()
        self.ends_at = math.inf

    @property
    def now(self) -> float:
        """Seconds since this peer began."""
        return time.monotonic() - self._started

    async def sleep_until(self, rank: int, at: float) -> None:
        """Wait for a moment of this peer's clock."""
        await asyncio.sleep(at - self.now)

    async def begin(self, peer: Peer, step: int) -> Membership | None:
        """Return who takes part in a step; None after the last."""
        return self._membership if step < self._num_steps else None

    async def report(self, peer: Peer, state: Callable[[], Any]) -> None:
        """Write a checkpoint when it is time to."""
        plain = state()
        last = peer.step == self._num_steps - 1
        due = time.monotonic() - self._saved_at >= self._save_every_s
        if self._checkpoints is not None and (last or due):
            saved = {"kind": "peer", "rank": peer.rank, "peer": peer.state_dict(plain)}
            await asyncio.get_running_loop().run_in_executor(None, self._checkpoints.save, saved)
            self._saved_at = time.monotonic()
        self._on_row("step", {"step": peer.step, "loss": peer.loss, **peer.counters.as_dict()})

    def log(self, peer: Peer, figures: Mapping[str, Any]) -> None:
        """Hand on figures."""
        self._on_row("refused" if "refused_from" in figures else "log", dict(figures))


class RealPeer:
    """A peer of a roster, ready to run.

    Args:
        model: from which all peers start.
        num_steps: steps of the run, the same at all peers.
        seed: of the run, the same at all peers.
        on_row: told what happens: (event, figures).
    """

    def __init__(
        self, strategy: PeerStrategy, roster: Roster, rank: int, credentials: Credentials | None, model: Model,
        work: Work, num_steps: int, seed: int, checkpoints: Checkpoints | None = None, save_every_s: float = 30.0,
        on_row: Callable[[str, dict[str, Any]], None] = lambda event, figures: None,
    ):
        self._strategy, self._roster, self._labour = strategy, roster, ThreadLabour(work)
        self._checkpoints, self._on_row = checkpoints, on_row
        count = len(roster.peers)
        self.wire = PeerWire(roster, rank, credentials, self._take, self._incident, model.layout.num_bytes)
        board = RosterBoard(count, num_steps, checkpoints, save_every_s, on_row)
        self.peer = Peer(rank, seed, model.params, model.buffers, run=roster.run, labour=self._labour, wire=self.wire,
                         board=board, num_examples=work.num_examples)
        self._absent: set[int] = set()

    def _take(self, envelope: Envelope) -> str | None:
        if envelope.kind == GOODBYE:
            self._absent.add(envelope.source)
            return None
        return self.peer.take(envelope)

    def _incident(self, who: str, reason: str) -> None:
        logger.warning("%s was refused: %s", who, reason)
        self._on_row("incident", {"who": who, "reason": reason})

    async def run(self, listen: str | None = None, resume: bool = False) -> Tensor:
        """Take part to the end; returns this peer's parameters.

        Raises:
            CannotListen: the port is in use.
            PeerLost: a peer without which nobody can go on is gone.
            UnusableCheckpoint: there is none to resume from.
        """
        if resume and self._checkpoints is not None:
            saved, _ = self._checkpoints.load_newest()
            self.peer.load_state_dict(saved["peer"])
        await self.wire.start(listen)
        try:
            self.peer.resume()
            await self._strategy.run(self.peer)
            await self._say_goodbye()
        finally:
            self.peer.close()
            self._labour.close()
            await self.wire.close()
        return self.peer.params

    async def _say_goodbye(self) -> None:
        """Leave once the others have all they need of this peer: they may still be asking."""
        others = {rank for rank in range(len(self._roster.peers)) if rank != self.peer.rank}
        for rank in others:
            self.peer.post(rank, GOODBYE, "", self.peer.step, {})
        until = time.monotonic() + FAREWELL_S
        while not others <= self._absent and time.monotonic() < until:
            await asyncio.sleep(0.01)
        await self.wire.drain(max(0.0, until - time.monotonic()))
