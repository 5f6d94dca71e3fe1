"""One peer's part in a segment of a run that a server hosts: a rendezvous, some steps, the mean of all models."""
import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedcore.errors import LeftBehind, PeerLost, StateMissing
from fedcore.peers.accord import ACCORD
from fedcore.peers.consensus import Consensus, mean_of_peers
from fedcore.peers.counters import Counters
from fedcore.peers.envelope import Envelope
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Membership, PeerWork
from fedcore.peers.segments import NO_STEP, Segment
from fedcore.peers.strategy import PeerStrategy
from fedcore.tls import Credentials
from fedcore.transport.peer_roster import Entry, Roster
from fedcore.transport.peer_runner import GOODBYE, READY, PeerOptions, RealPeer, RosterBoard
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# Said besides what all real peers say: "the segment has begun without you", and "I cannot go on in it".
BEGUN, BROKEN = "begun", "broken"
# What those who live agree on at the end of a segment: who they are.
LIVING = "living"
# How long a peer that cannot go on waits for the others to hear it.
LAST_WORDS_S = 1.0
BEGUN_WITHOUT = "the others had begun without this peer"


@dataclass(frozen=True)
class Outcome:
    """What became of a peer in a segment.

    Attributes:
        state: what it needs to go on in the next one; None: it never came to the end of a step.
        step: the step after which that is; -1: none.
        counters: what it has done since the run began.
        lost: peers that it could not reach any more.
        problem: why it stopped early; empty: it did not.
        consensus: the mean of all models, for the member of the lowest rank.
        beside: what the mean took.
    """

    state: dict[str, Any] | None
    step: int
    at: float
    model: Model
    loss: float
    counters: Counters
    lost: tuple[int, ...]
    problem: str
    consensus: Consensus | None
    beside: Counters


class SegmentBoard(RosterBoard):
    """Lets a peer take the steps of a segment, and keeps what it was at the end of the last of them."""

    def __init__(
        self, segment: Segment, options: PeerOptions, on_row: Callable[[str, dict[str, Any]], None],
        gather: Callable[[str], Any],
    ):
        super().__init__(len(segment.members), options, None, on_row, gather)
        self._membership = Membership(segment.epoch, segment.members)
        self._segment = segment
        self.over = asyncio.Event()
        self.kept: dict[str, Any] | None = None

    def start_clock(self) -> None:
        """Let the clock go on where it stood when the segment before was over."""
        self._started = time.monotonic() - self._segment.began_s

    async def begin(self, peer: Peer, step: int) -> Membership | None:
        """Return who takes part in a step; None when the run is over.

        After a segment that is not the last the strategy is left where it stands: what it does at the end of a run, it
        does in the last one.
        """
        if step < self._segment.end:
            return self._membership
        if not self._segment.final:
            self.over.set()
            await asyncio.get_running_loop().create_future()
        return None

    async def report(self, peer: Peer, state: Callable[[], Any]) -> None:
        """Keep what the peer is at the end of its step."""
        await super().report(peer, state)
        self.keep(peer)

    def keep(self, peer: Peer) -> None:
        """Keep what the peer is now; its strategy's state is that of the latest safe point."""
        assert self.latest is not None
        self.kept = peer.state_dict(self.latest[1])


class SegmentPeer(RealPeer):
    """A peer for one segment.

    Args:
        model: to start from, where no peer has been trained yet; else any of the same layout.
        given: whether that model came with the segment.
        saved: the state in which this peer ended an earlier segment of the run, if it did.
    """

    board: SegmentBoard

    def __init__(
        self, strategy: PeerStrategy, segment: Segment, rank: int, credentials: Credentials | None, model: Model,
        given: bool, work: PeerWork, saved: Mapping[str, Any] | None,
        on_row: Callable[[str, dict[str, Any]], None] = lambda event, figures: None,
    ):
        places = zip(segment.names, segment.addresses, segment.fingerprints, strict=True)
        entries = {member: Entry(*place) for member, place in zip(segment.members, places, strict=True)}
        stop_s = None if segment.seconds is None else segment.began_s + segment.seconds
        options = PeerOptions(segment.end, stop_s, lost_after_s=segment.lost_after_s, farewell_s=segment.lost_after_s)
        self._segment, self._model, self._given, self._saved = segment, model, given, saved
        super().__init__(strategy, Roster.of_members(segment.conversation, entries), rank, credentials, model, work,
                         options, segment.seed, on_row=on_row)
        self._token = secrets.token_hex(8)    # tells this process from one of the same name that was killed
        self._tokens: dict[int, str] = {}
        self._silent: set[int] = set()
        self._broken: set[int] = set()
        self._left = asyncio.Event()

    def _make_board(self) -> SegmentBoard:
        return SegmentBoard(self._segment, self._options, self._on_row, self._gather)

    def _on_left_behind(self) -> None:
        self._left.set()

    # ---- what comes -------------------------------------------------------------------------------------------------

    def _take(self, envelope: Envelope) -> str | None:
        source = envelope.source
        if source in self.peer.mailbox.lost and envelope.kind != ACCORD:
            if envelope.kind == READY:
                self.peer.post(source, BEGUN, "", 0, {})
            return None    # it takes no further part in this segment
        if envelope.kind == READY and self._tokens.setdefault(source, envelope.tag) != envelope.tag:
            # It was killed and came back: what it had promised in this segment is gone.
            self._lose(source)
            self.peer.post(source, BEGUN, "", 0, {})
        elif envelope.kind == BEGUN:
            self._left.set()
        elif envelope.kind == BROKEN:
            self._broken.add(source)
            self._silent |= {int(rank) for rank in envelope.meta["lost"]} & self._others
            self.peer.lose(source)
        else:
            return super()._take(envelope)
        return None

    def _is_gone(self, rank: int) -> bool:
        return super()._is_gone(rank) or self.wire.refusal(rank) is not None

    def _on_loss(self, rank: int) -> None:
        self.wire.forget(rank)
        if rank not in self._broken:
            self._silent.add(rank)

    # ---- the beginning ----------------------------------------------------------------------------------------------

    async def _find_state(self) -> None:
        """Go on from this peer's own state, or from a living peer's, or begin from the model that the server sent.

        Raises:
            PeerLost: others know the state, and none of them answers.
        """
        saved, segment, peer = self._saved, self._segment, self.peer
        if saved is not None:
            peer.load_state_dict(saved)
        if saved is None or saved["step"] != segment.first - 1:
            # Clocks that stood still while this peer was away must not tick for all that time at once.
            peer.clocks = {name: (count, None) for name, (count, _) in peer.clocks.items()}
            if segment.donors and segment.donors != (peer.rank,):
                meta = (await self._rejoin()).meta
                pending = meta["pending"]
                self._labour.load_state_dict(meta["labour"])
            else:
                if not self._given:
                    raise StateMissing(peer.rank)
                pending = []
                peer.start_from(None, self._model.params, self._model.buffers, segment.first - 1)
            self._observe(pending)
        peer.epoch, peer.members = segment.epoch, segment.members

    def _observe(self, pending: list[list[Any]]) -> None:
        """Take part in the reductions that are under way without a vector of one's own: zeros weigh nothing."""
        self.peer.take_up([
            {"tag": tag, "round": round, "vector": torch.zeros(size, dtype=self.peer.params.dtype), "weight": 0.0,
             "began": self._segment.began_s, "charged": False} for tag, round, size in pending])

    def _beside(self) -> dict[str, Any]:
        saved = self._saved or {}
        pending = [[entry["tag"], entry["round"], len(entry["vector"])] for entry in saved.get("pending", ())]
        return {"pending": pending, "labour": self._labour.newcomer()}

    def _can_donate(self) -> bool:
        return self._saved is not None and self._saved["step"] == self._segment.first - 1

    # ---- the segment ------------------------------------------------------------------------------------------------

    async def play(
        self, listen: str | None = None, on_listening: Callable[[int], None] = lambda port: None, side_port: int = 0,
    ) -> Outcome:
        """Take part in the segment; returns what came of it.

        Args:
            listen: HOST:PORT, where that is not the segment's address.
            on_listening: told the port.
            side_port: on which large vectors come; 0: any free one.

        Raises:
            CannotListen: the port is in use.
            FedcoreError: the strategy cannot go on.
        """
        if self._can_donate():
            saved = self._saved or {}
            self.board.latest = (saved["step"], saved["state"], saved["params"], saved["buffers"])
        await self.wire.start(listen, side_port)
        on_listening(self.wire.port)
        watching = asyncio.get_running_loop().create_task(self._watch())
        consensus, beside, problem = None, Counters(), ""
        try:
            try:
                await self._until_left(self._meet())
                await self._until_left(self._work())
            except PeerLost as error:
                problem = BEGUN_WITHOUT if self._left.is_set() else str(error)
                for rank in sorted(self._others - self.peer.mailbox.lost):
                    self.peer.post(rank, BROKEN, "", 0, {}, {"lost": sorted(self._silent)})
            counters = self.peer.counters
            self.peer.counters = beside    # what the mean takes is no part of the method
            if not problem:
                consensus = await self._mean()
                await self._gather(GOODBYE, self._options.farewell_s)
            await self.wire.drain(LAST_WORDS_S if problem else self._options.farewell_s, self.peer.mailbox.lost)
        finally:
            watching.cancel()
            self.peer.close()
            self._labour.close()
            await self.wire.close()
        return self._outcome(counters, problem, consensus, beside)

    async def _until_left(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something to its end, or until the others say that they go on without this peer.

        Raises:
            LeftBehind: they do.
        """
        loop = asyncio.get_running_loop()
        working, left = loop.create_task(work), loop.create_task(self._left.wait())
        try:
            await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise LeftBehind(self.peer.rank)
            working.result()
        finally:
            for task in (working, left):
                task.cancel()
            await asyncio.gather(working, left, return_exceptions=True)

    async def _meet(self) -> None:
        """Wait until all members are here, each with a state to start from.

        Raises:
            PeerLost: one of them is not.
        """
        await self._find_state()
        await self._gather(READY, tag=self._token)
        if self.peer.mailbox.lost:
            raise PeerLost(min(self.peer.mailbox.lost))
        self.board.start_clock()
        self.peer.resume()
        self.board.latest = (self.peer.step, self.peer.restored, self.peer.params, self.peer.buffers)
        if self.peer.step > NO_STEP:
            self.board.keep(self.peer)

    async def _work(self) -> None:
        segment, board = self._segment, self.board
        if not segment.steps and not segment.final:
            return
        loop = asyncio.get_running_loop()
        running, over = loop.create_task(self._strategy.run(self.peer)), loop.create_task(board.over.wait())
        try:
            await asyncio.wait({running, over}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            for task in (running, over):
                task.cancel()
            await asyncio.gather(running, over, return_exceptions=True)

    async def _mean(self) -> Consensus | None:
        peer, number = self.peer, self._segment.number
        try:
            living = await peer.accords.say(LIVING, number, {}, peer.epoch, peer.members)
            return await mean_of_peers(peer, tuple(living), number)
        except PeerLost as error:
            logger.warning("The mean of the peers' models is missing: %s", error)
            return None

    def _outcome(
        self, counters: Counters, problem: str, consensus: Consensus | None, beside: Counters
    ) -> Outcome:
        peer, segment, kept = self.peer, self._segment, self.board.kept
        latest = self._saved if kept is None else kept
        if latest is not None and (problem or not segment.final):
            # What came after the latest safe point will be done again.
            counters = Counters(**latest["counters"])
        step, at = (NO_STEP, segment.began_s) if latest is None else (latest["step"], latest["at"])
        return Outcome(kept, step, max(at, segment.began_s), self._model.replace(peer.params, peer.buffers), peer.loss,
                       counters, tuple(sorted(self._silent)), problem, consensus, beside)
