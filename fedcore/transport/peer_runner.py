"""What real peers have in common: a strategy on the link's event loop, training in a thread, checkpoints."""
import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedcore.checkpoint import Checkpoints
from fedcore.errors import PeerLost
from fedcore.peers.envelope import Envelope
from fedcore.peers.packing import Packing
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Membership, PeerWork
from fedcore.peers.segments import describe
from fedcore.peers.strategy import PeerStrategy
from fedcore.tls import Credentials
from fedcore.transport.peer_labour import ThreadLabour
from fedcore.transport.peer_roster import Roster
from fedcore.transport.peer_wire import PeerWire
from fedcore.transport.wire import host_of
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# What peers say to each other besides what their strategy does.
READY, ENDED, GOODBYE, ASK, STATE = "ready", "ended", "goodbye", "ask", "state"
POLL_S = 0.01
SAY_AGAIN_S = 2.0
MOST_REASONS = 1000    # that are counted apart


@dataclass(frozen=True)
class PeerOptions:
    """How a real peer runs.

    Attributes:
        num_steps: steps of the run, the same at all peers; for strategies that stop by time, spans of equal length.
        stop_s: when those stop, seconds; None for the others.
        save_every_s: seconds between checkpoints.
        lost_after_s: a peer that could not be reached for so long counts as gone, until it is back.
        farewell_s: how long a peer that is done waits for the others, who may still be asking.
    """

    num_steps: int
    stop_s: float | None = None
    save_every_s: float = 30.0
    lost_after_s: float = 60.0
    farewell_s: float = 60.0


class RosterBoard:
    """Steps in which all take part, and which all know beforehand.

    Args:
        on_row: told what happens: (event, figures).
        gather: waits until all peers have said a word, for strategies that stop by time.
    """

    def __init__(
        self, count: int, options: PeerOptions, checkpoints: Checkpoints | None,
        on_row: Callable[[str, dict[str, Any]], None], gather: Callable[[str], Any],
    ):
        self._membership = Membership(0, tuple(range(count)))
        self._options, self._checkpoints, self._on_row, self._gather = options, checkpoints, on_row, gather
        self._started = self._saved_at = time.monotonic()
        self.ends_at = math.inf if options.stop_s is None else options.stop_s
        self.latest: tuple[int, Any, Tensor, Mapping[str, Tensor]] | None = None    # at the last safe point

    @property
    def now(self) -> float:
        """Seconds since all peers were ready."""
        return time.monotonic() - self._started

    def attach(self, peer: Peer) -> None:
        """Learn whose board this is."""

    def start_clock(self) -> None:
        """Call the present moment zero."""
        self._started = time.monotonic()

    async def sleep_until(self, rank: int, at: float) -> None:
        """Wait for a moment of this peer's clock."""
        await asyncio.sleep(at - self.now)

    async def begin(self, peer: Peer, step: int) -> Membership | None:
        """Return who takes part in a step; None after the last."""
        return self._membership if step < self._options.num_steps else None

    async def report(self, peer: Peer, state: Callable[[], Any]) -> None:
        """Write a checkpoint when it is time to."""
        if self._options.stop_s is not None:
            await self._gather(ENDED)    # from here on nobody proposes a meeting any more
            await peer.settle_meetings()
        plain = state()
        self.latest = (peer.step, plain, peer.params, peer.buffers)
        last = peer.step == self._options.num_steps - 1
        if self._checkpoints is not None and (last or time.monotonic() - self._saved_at >= self._options.save_every_s):
            saved = {"kind": "peer", "rank": peer.rank, "peer": peer.state_dict(plain)}
            await asyncio.get_running_loop().run_in_executor(None, self._checkpoints.save, saved)
            self._saved_at = time.monotonic()
        self._on_row("step", {"step": peer.step, "loss": peer.loss, **peer.counters.as_dict()})

    def log(self, peer: Peer, figures: Mapping[str, Any]) -> None:
        """Hand on figures."""
        self._on_row("refused" if "refused_from" in figures else "log", dict(figures))


class RealPeer(ABC):
    """What every real peer is made of, and how it hears of others and gives them what they need to start.

    Args:
        model: from which all peers start.
        seed: of the run, the same at all peers.
        on_row: told what happens: (event, figures).
        packing: compresses what this peer sends; None: nothing does.
    """

    def __init__(
        self, strategy: PeerStrategy, roster: Roster, rank: int, credentials: Credentials | None, model: Model,
        work: PeerWork, options: PeerOptions, seed: int, checkpoints: Checkpoints | None = None,
        on_row: Callable[[str, dict[str, Any]], None] = lambda event, figures: None, packing: Packing | None = None,
    ):
        self._strategy, self._roster, self._labour, self._options = strategy, roster, ThreadLabour(work), options
        self._checkpoints, self._on_row = checkpoints, on_row
        self._others = {other for other in roster.ranks if other != rank}
        self._incidents: Counter[tuple[str, str]] = Counter()
        self._heard: dict[str, set[int]] = {READY: set(), ENDED: set(), GOODBYE: set()}
        self._donated: asyncio.Future[Envelope] | None = None
        self.wire = PeerWire(
            roster, rank, credentials, self._take, self._incident, model.layout.num_bytes,
            alike={**describe(strategy), "seed": seed, "steps": options.num_steps, "stop_s": options.stop_s,
                   "parameters": model.layout.num_params, "dtype": str(model.layout.dtype),
                   "compressed": packing is not None})
        self.board = self._make_board()
        self.peer = Peer(rank, seed, model.params, model.buffers, run=roster.run, labour=self._labour, wire=self.wire,
                         board=self.board, num_examples=work.num_examples, packing=packing)
        self.peer.accords.on_loss.append(self._on_loss)
        self.peer.accords.left_behind = self._on_left_behind
        self.board.attach(self.peer)

    @abstractmethod
    def _make_board(self) -> RosterBoard:
        """Return where this peer learns who takes part; `self.peer` is made after it."""

    @abstractmethod
    def _on_loss(self, rank: int) -> None:
        """All who live have agreed that a peer is gone."""

    @abstractmethod
    def _on_left_behind(self) -> None:
        """The others have agreed to go on without this peer."""

    # ---- what comes -------------------------------------------------------------------------------------------------

    def _take(self, envelope: Envelope) -> str | None:
        if envelope.kind in self._heard:
            self._heard[envelope.kind].add(envelope.source)
        elif envelope.kind == ASK:
            self._donate(envelope.source)
        elif envelope.kind == STATE:
            if self._donated is not None and not self._donated.done():
                self._donated.set_result(envelope)
        else:
            return self.peer.take(envelope)
        return None

    def _incident(self, who: str, reason: str) -> None:
        """Write down who was refused and why, at the 1st, 2nd, 4th, ... time: some try again for hours."""
        if who not in {entry.name for entry in self._roster.peers}:
            who = host_of(who) or who    # every attempt comes from another port
        if len(self._incidents) >= MOST_REASONS:
            self._incidents.clear()
        self._incidents[who, reason] += 1
        times = self._incidents[who, reason]
        if times & (times - 1) == 0:
            logger.warning("%s was refused: %s%s", who, reason, f" ({times} times)" if times > 1 else "")
            self._on_row("incident", {"who": who, "reason": reason, "times": times})

    async def _watch(self) -> None:
        """Take note of peers that cannot be reached any more."""
        while True:
            for rank in sorted(self._others - self.peer.mailbox.lost):
                if self._is_gone(rank):
                    self._lose(rank)
            await asyncio.sleep(min(1.0, self._options.lost_after_s / 4))

    def _is_gone(self, rank: int) -> bool:
        return self.wire.silent_for(rank) > self._options.lost_after_s

    def _lose(self, rank: int) -> None:
        self._on_row("lost", {"peer": self._roster.peers[rank].name})
        self.peer.lose(rank)

    async def _gather(self, word: str, within_s: float = math.inf, tag: str = "") -> None:
        """Say a word to all, and wait until all who live have said it."""
        said = {rank: self.peer.post(rank, word, tag, 0, {}) for rank in sorted(self._others)}
        began = said_at = time.monotonic()
        while (awaited := self._others - self.peer.mailbox.lost - self._heard[word]) and (
                time.monotonic() < began + within_s):
            await asyncio.sleep(POLL_S)
            if time.monotonic() > said_at + SAY_AGAIN_S:
                # Whoever heard it may have been another process, which is gone by now.
                said |= {rank: self.peer.post(rank, word, tag, 0, {}) for rank in sorted(awaited) if said[rank].done()}
                said_at = time.monotonic()

    # ---- newcomers --------------------------------------------------------------------------------------------------

    def _donate(self, to: int) -> None:
        """Give a newcomer what it needs to start: the state of the last safe point."""
        if self.board.latest is not None:
            data, meta = self._present()
            self.peer.post(to, STATE, "", meta["step"], data, {**meta, **self._beside()})

    def _present(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of the last safe point, made one to start from: tensors, and what else there is."""
        assert self.board.latest is not None
        step, state, params, buffers = self.board.latest
        state = self._strategy.newcomer(state)
        tensors = {} if state is None else {name: value for name, value in state.items() if isinstance(value, Tensor)}
        plain = None if state is None else {name: value for name, value in state.items() if name not in tensors}
        data = {"params": params, **{f"state.{name}": value for name, value in tensors.items()},
                **{f"buffer.{name}": value for name, value in buffers.items()}}
        return data, {"step": step, "plain": plain}

    def _beside(self) -> dict[str, Any]:
        """Return what a newcomer is told besides the state."""
        return {}

    async def _rejoin(self) -> Envelope:
        """Start from what the first living peer that answers has; returns its answer.

        Raises:
            PeerLost: nobody answers.
        """
        self._donated = asyncio.get_running_loop().create_future()
        for rank in sorted(self._others):
            self.peer.post(rank, ASK, "", 0, {})
        try:
            given = await asyncio.wait_for(self._donated, self._options.lost_after_s)
        except TimeoutError:
            raise PeerLost(min(self._others)) from None
        self._start_from(given)
        return given

    def _start_from(self, given: Envelope) -> None:
        """Start from what a living peer has given."""
        parts = {kind: {name.removeprefix(kind): value for name, value in given.data.items() if name.startswith(kind)}
                 for kind in ("state.", "buffer.")}
        plain = given.meta["plain"]
        state = None if plain is None else {**plain, **parts["state."]}
        self.peer.start_from(state, given.data["params"], parts["buffer."], given.meta["step"])
        self._on_row("rejoined", {"from": self._roster.peers[given.source].name, "step": given.meta["step"]})
