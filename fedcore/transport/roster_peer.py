"""One real peer of a roster: takes part from the beginning to the end, among others who come and go."""
import asyncio
import functools
import math
import time
from typing import Any

from torch import Tensor

from fedcore.errors import LeftBehind, PeerLost
from fedcore.peers.all_reduce import give_copy
from fedcore.peers.envelope import Envelope
from fedcore.peers.seams import Membership, Reduced
from fedcore.transport.agreed_board import AgreedBoard
from fedcore.transport.peer_runner import ASK, GOODBYE, READY, STATE, RealPeer

# How long a peer that cannot go on waits for the others to hear what it has said.
LAST_WORDS_S = 1.0


class RosterPeer(RealPeer):
    """A peer of a roster, ready to run.

    Args:
        model: from which all peers start.
        seed: of the run, the same at all peers.
        on_row: told what happens: (event, figures).
        packing: compresses what this peer sends; None: nothing does.
    """

    board: AgreedBoard
    _left: asyncio.Future[None] | None = None
    _gift: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    _change: tuple[int, Membership, tuple[int, ...]] | None = None    # the latest, where somebody joins

    def _make_board(self) -> AgreedBoard:
        return AgreedBoard(len(self._roster.peers), self._options, self._checkpoints, self._on_row, self._on_change,
                           self._on_safe_point)

    # ---- who comes and goes -----------------------------------------------------------------------------------------

    def _take(self, envelope: Envelope) -> str | None:
        if envelope.kind == ASK:
            self._on_ask(envelope)
            return None
        return super()._take(envelope)

    def _lose(self, rank: int) -> None:
        self.peer.lose(rank)

    def _on_loss(self, rank: int) -> None:
        self._on_row("lost", {"peer": self._roster.peers[rank].name})
        self.wire.forget(rank)
        self._give()

    def _on_left_behind(self) -> None:
        if self._left is not None and not self._left.done():
            self._left.set_exception(LeftBehind(self.peer.rank))

    # ---- newcomers --------------------------------------------------------------------------------------------------

    def _on_ask(self, envelope: Envelope) -> None:
        """Let a newcomer in from a step on that all agree on; when this peer is done, that is after the last."""
        self.wire.call_again(envelope.source)
        if not self.board.is_over:
            self.board.ask(envelope.source, int(envelope.meta["incarnation"]))
        elif self._gift is None:
            self._change = (self.board.num_steps, self.board.changes[-1][1], (envelope.source,))
            self._on_safe_point(self.peer.step)

    def _on_change(self, first: int, members: Membership, joins: tuple[int, ...]) -> None:
        if joins:
            for rank in joins:    # whose own words to this peer may still be on their way
                self.wire.call_again(rank)
            self._change, self._gift = (first, members, joins), None
            if self.board.latest is not None:
                self._on_safe_point(self.board.latest[0])

    def _on_safe_point(self, step: int) -> None:
        """Put together what newcomers start from, once this peer has ended the last step without them."""
        if self._change is None or self._gift is not None or self.board.latest is None:
            return
        first, members, _ = self._change
        if step < min(first, self.board.num_steps) - 1:
            return
        data, meta = self._present()
        self._gift = (data, {
            **meta, "first": first, "epoch": members.epoch, "members": list(members.members),
            "labour": self._labour.newcomer(), "pending": sorted(self.peer.reductions.underway)})
        self._give()

    def _give(self) -> None:
        """Give newcomers their state, where that is up to this peer: to the lowest rank of those who live."""
        if self._gift is None or self._change is None:
            return
        (data, meta), (_, members, joins) = self._gift, self._change
        able = sorted(set(members.members) - set(joins) - self.peer.accords.lost_in(members.epoch))
        if able and able[0] == self.peer.rank:
            for rank in joins:
                self.peer.post(rank, STATE, "", meta["step"], data, {**meta, "at": self.board.now})
                for tag, round in meta["pending"]:
                    underway = self.peer.reduction(tag, round)
                    if underway is not None:
                        underway.then(functools.partial(self._pass_on, rank, tag, round))

    def _pass_on(self, rank: int, tag: str, round: int, result: Reduced) -> None:
        give_copy(self.peer, rank, result, tag, round)

    async def _rejoin(self) -> Envelope:
        """Start from what a living peer has, at the step from which on the others take this one in; returns that.

        Raises:
            PeerLost: nobody can be reached.
        """
        self.peer.incarnation, self.peer.accords.since_epoch = int(time.time()), math.inf
        self._donated = asyncio.get_running_loop().create_future()
        for rank in sorted(self._others):
            self.peer.post(rank, ASK, "", 0, {}, {"incarnation": self.peer.incarnation})
        while not self._donated.done():
            if all(self.wire.silent_for(rank) > self._options.lost_after_s for rank in self._others):
                raise PeerLost(min(self._others))
            await asyncio.wait([self._donated], timeout=min(1.0, self._options.lost_after_s / 4))
        given = self._donated.result()
        meta, self.wire.donor = given.meta, given.source
        self._labour.load_state_dict(meta["labour"])
        self._start_from(given)
        self.peer.take_up([{"tag": tag, "round": round, "vector": None, "weight": 0.0, "began": 0.0, "charged": True}
                           for tag, round in meta["pending"]])
        self.board.join(meta["first"], Membership(meta["epoch"], tuple(meta["members"])), meta["at"])
        return given

    # ---- the run ----------------------------------------------------------------------------------------------------

    async def run(
        self, listen: str | None = None, resume: bool = False, rejoin: bool = False, side_port: int = 0
    ) -> Tensor:
        """Take part to the end; returns this peer's parameters.

        Args:
            listen: HOST:PORT, where that is not the roster's address.
            resume: continue from this peer's own checkpoint; all peers must.
            rejoin: start from what a living peer has: this one was away.
            side_port: on which large vectors come; 0: any free one.

        Raises:
            CannotListen: the port is in use.
            PeerLost: a newcomer can reach nobody.
            LeftBehind: the others went on without this peer.
            UnusableCheckpoint: there is none to resume from.
        """
        at = 0.0
        if resume and self._checkpoints is not None:
            saved, _ = self._checkpoints.load_newest()
            self.peer.load_state_dict(saved["peer"])
            at = saved["peer"]["at"]
        await self.wire.start(listen, side_port)
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        watching = None
        try:
            if rejoin:
                await self._rejoin()
            else:
                await self._gather(READY)
                self.board.resume(self.peer, at) if resume else self.board.set_clock(0.0)
            watching = loop.create_task(self._watch())
            self.peer.resume()
            await self._until_left_behind(loop.create_task(self._strategy.run(self.peer)))
            self.board.is_over = True
            await self._gather(GOODBYE, self._options.farewell_s)
            await self.wire.drain(self._options.farewell_s, self.peer.mailbox.lost)
        finally:
            if watching is not None:
                watching.cancel()
            self.peer.close()
            self._labour.close()
            await self.wire.drain(LAST_WORDS_S, self.peer.mailbox.lost)
            await self.wire.close()
        return self.peer.params

    async def _until_left_behind(self, running: "asyncio.Task[None]") -> None:
        """Run to the end, or until the others say that they took this peer for lost."""
        assert self._left is not None
        try:
            await asyncio.wait([running, self._left], return_when=asyncio.FIRST_COMPLETED)
            if self._left.done():
                self._left.result()
            await running
        finally:
            running.cancel()
