"""Words that all who live say to each other, and of which all survivors keep the same ones, whoever dies meanwhile.

With its word a peer says whom it knows to be lost. Who hears of a loss believes it, and says its word again. A round is
over for a peer once all who live have said their words and know of the same losses; from then on it answers whoever
still asks with what it ended with. So whoever ends a round later ends it with the same words, or everybody who knew
others is gone.

It rests on one thing: a peer that is lost stays lost, until a new membership takes it in again. One that was taken for
lost by mistake is told so, and has to join anew.

Source: the flooding of views in Chandra and Toueg, 1996, J. ACM 43(2), "Unreliable failure detectors for reliable
distributed systems", for failure detectors that the members' common belief makes accurate.
"""
import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedcore.errors import LeftBehind
from fedcore.peers.envelope import Envelope

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer

ACCORD = "accord"
# So many rounds of each name are remembered after they ended.
KEPT_ROUNDS = 4

Words = dict[int, dict[str, Any]]


@dataclass(slots=True, eq=False)
class Round:
    """What was said in a round so far.

    Attributes:
        words: by rank: whom the speaker knew to be lost, and what it said.
        epoch, members: of whom the round consists, once this peer has said its word.
        word: this peer's own; None: it has said nothing yet.
        ended: with which words it ended here.
    """

    words: dict[int, tuple[frozenset[int], dict[str, Any]]] = field(default_factory=dict)
    epoch: int = 0
    members: tuple[int, ...] = ()
    word: dict[str, Any] | None = None
    ended: "asyncio.Future[Words] | None" = None


class Accords:
    """One peer's part in all rounds.

    Attributes:
        heard: called with (name, round) when somebody speaks in a round in which this peer has said nothing yet, by
            the first part of the name, up to a slash.
        on_loss: called with the rank of whoever is lost.
        since_epoch: what was said of this peer in earlier epochs is not about it, but about who had its rank before.
        left_behind: called when others say that they took this peer for lost.
    """

    def __init__(self, peer: "Peer"):
        self._peer = peer
        self._lost_until: dict[int, float] = {}    # by rank: the last epoch in which it is lost
        self._rounds: dict[str, dict[int, Round]] = {}
        self.heard: dict[str, Callable[[str, int], None]] = {}
        self.since_epoch = 0.0
        self.on_loss: list[Callable[[int], None]] = []
        self.left_behind: Callable[[], None] = _nothing

    def lost_in(self, epoch: int) -> set[int]:
        """Return whom this peer knows to be lost in an epoch."""
        return {rank for rank, until in self._lost_until.items() if until >= epoch}

    def is_begun(self, name: str, round: int) -> bool:
        """Say whether anybody has said anything in a round."""
        return bool(self._round(name, round).words)

    def say(
        self, name: str, round: int, word: dict[str, Any], epoch: int, members: tuple[int, ...]
    ) -> "asyncio.Future[Words]":
        """Say a word; the future becomes what all who live have said, by rank, ascending, the same at all of them.

        Args:
            word: plain values.
            epoch, members: the same at all who take part.

        Raises:
            LeftBehind: from the future: the others took this peer for lost.
        """
        found = self._round(name, round)
        if found.ended is None:
            found.word, found.epoch, found.members = word, epoch, members
            found.ended = asyncio.get_running_loop().create_future()
            self._forget_before(name, round)
            self._speak(name, round, found)
            self._try_to_end(found)
        return found.ended

    def take(self, envelope: Envelope) -> str | None:
        """Act on what another peer said; returns why it was refused, if it was."""
        name, round, meta = envelope.tag, envelope.round, envelope.meta
        found = self._round(name, round)
        if "ended" in meta:
            self._end(found, {int(rank): word for rank, word in meta["ended"].items()})
            return None
        lost, known = frozenset(meta["lost"]), self.lost_in(meta["epoch"])
        if self._peer.rank in lost:
            if meta["epoch"] >= self.since_epoch:
                self._fail(found)
            return None
        if envelope.source in known:
            self._peer.post(envelope.source, ACCORD, name, round, {}, {**meta, "lost": sorted(known)})
            return None
        found.words[envelope.source] = (lost, meta["word"])
        for rank in sorted(lost - known):
            self._peer.lose(rank)
        if found.ended is None:
            answer = self.heard.get(name.partition("/")[0])
            if answer is not None:
                answer(name, round)
        elif found.ended.done() and not found.ended.cancelled() and found.ended.exception() is None:
            self._peer.post(envelope.source, ACCORD, name, round, {}, {"ended": found.ended.result()})
        else:
            self._try_to_end(found)
        return None

    def lose(self, rank: int) -> None:
        """Take note that a peer is lost, until it is admitted."""
        if self._lost_until.get(rank) == math.inf:
            return
        self._lost_until[rank] = math.inf
        for act in self.on_loss:
            act(rank)
        for name, rounds in list(self._rounds.items()):
            for round, found in sorted(rounds.items()):
                if found.ended is not None and not found.ended.done() and rank in found.members:
                    self._speak(name, round, found)
                    self._try_to_end(found)

    def admit(self, rank: int, epoch: int) -> None:
        """Take note that a peer takes part again from an epoch on."""
        if rank in self._lost_until:
            self._lost_until[rank] = epoch - 1

    # ---- one round --------------------------------------------------------------------------------------------------

    def _round(self, name: str, round: int) -> Round:
        return self._rounds.setdefault(name, {}).setdefault(round, Round())

    def _speak(self, name: str, round: int, found: Round) -> None:
        lost = self.lost_in(found.epoch) & set(found.members)
        assert found.word is not None
        found.words[self._peer.rank] = (frozenset(lost), found.word)
        for rank in found.members:
            if rank != self._peer.rank:    # who is lost by mistake learns it
                self._peer.post(rank, ACCORD, name, round, {},
                                {"lost": sorted(lost), "word": found.word, "epoch": found.epoch})

    def _try_to_end(self, found: Round) -> None:
        lost = frozenset(self.lost_in(found.epoch) & set(found.members))
        living = [rank for rank in found.members if rank not in lost]
        if all(rank in found.words and found.words[rank][0] == lost for rank in living):
            self._end(found, {rank: found.words[rank][1] for rank in living})

    @staticmethod
    def _end(found: Round, words: Words) -> None:
        if found.ended is not None and not found.ended.done():
            found.ended.set_result(words)

    def _fail(self, found: Round) -> None:
        if found.ended is not None and not found.ended.done():
            found.ended.set_exception(LeftBehind(self._peer.rank))
        self.left_behind()

    def _forget_before(self, name: str, round: int) -> None:
        rounds = self._rounds[name]
        for old in [old for old in rounds if old <= round - KEPT_ROUNDS]:
            del rounds[old]


def _nothing() -> None:
    """Nobody wants to know."""
