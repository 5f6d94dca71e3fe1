"""Means over all members that survivors agree on, whoever dies meanwhile.

A ring is not atomic: when a member dies, some may have the result and others never will. Whoever cannot finish then
asks all who live (`accord.py`). If anybody has the result, the others copy it; if nobody has, those who live begin
again among themselves. Results are kept for as long as somebody may ask, contributions until the result is there: so
the mean and the list of contributors are the same at all survivors.
"""
import asyncio
import functools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedcore.errors import PeerLost
from fedcore.peers.accord import Words
from fedcore.peers.all_reduce import copy_of, give_copy, ring_all_gather, ring_all_reduce
from fedcore.peers.packing import Packed
from fedcore.peers.seams import Reduced

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer

AGAIN = "reduce"
# Of each tag so many results are kept: a member that is a reduction behind, with another one begun, may still ask.
KEPT_RESULTS = 2


@dataclass(slots=True, eq=False)
class Begun:
    """A reduction in which this peer takes part.

    Attributes:
        epoch, members: of when it began.
        attempt: counts the rings and copies.
        disturbed: done when the present attempt cannot succeed, or others have given it up.
        result: None as long as there is none.
    """

    epoch: int
    members: Sequence[int]
    attempt: int = 0
    disturbed: "asyncio.Future[None] | None" = None
    result: Reduced | None = None


class AtomicMeans:
    """One peer's part in all reductions over messages."""

    def __init__(self, peer: "Peer"):
        self._peer = peer
        self._begun: dict[tuple[str, int], Begun] = {}
        peer.accords.heard[AGAIN] = self._on_word
        peer.accords.on_loss.append(self._on_loss)

    def start(self, vector: Tensor | Packed, tag: str, round: int, weight: float) -> "asyncio.Task[Reduced]":
        """Contribute to the weighted mean over the present members; the task returns it, and whose vectors are in it.

        The result has the same bits at all who live.

        Args:
            vector: shape (d,), or what travels for it.

        Raises:
            LeftBehind: from the task: the others went on without this peer.
        """
        return asyncio.get_running_loop().create_task(
            self._reduce(self._begin(tag, round), vector, tag, round, weight))

    async def _reduce(
        self, begun: Begun, vector: Tensor | Packed, tag: str, round: int, weight: float
    ) -> Reduced:
        peer, group = self._peer, tuple(begun.members)
        result = await self._try(begun, tag, round, group, self._ring(vector, tag, round, weight, group))
        while result is None:
            begun.attempt += 1
            name, word = self._name(begun, tag), {"has": False}
            words = await peer.accords.say(name, round, word, begun.epoch, tuple(begun.members))
            source = next((rank for rank, word in words.items() if word["has"]), None)
            name = f"{tag}#{begun.attempt}"
            if source is not None:
                result = await self._try(begun, tag, round, (source,), copy_of(peer, source, name, round))
            elif tuple(words) == group and begun.attempt > 1:    # nobody was lost: it is the sum that is not finite
                size = vector.codec.num_values if isinstance(vector, Packed) else len(vector)
                result = Reduced(torch.zeros(size), ())
            else:
                group = tuple(words)
                result = await self._try(begun, tag, round, group, self._ring(vector, name, round, weight, group))
        begun.result = result
        return result

    def _ring(
        self, vector: Tensor | Packed, tag: str, round: int, weight: float, group: tuple[int, ...]
    ) -> Coroutine[Any, Any, Reduced]:
        if isinstance(vector, Packed):
            return ring_all_gather(self._peer, vector, tag, round, weight, group)
        return ring_all_reduce(self._peer, vector, tag, round, weight, group)

    def _begin(self, tag: str, round: int) -> Begun:
        begun = self._begun[tag, round] = Begun(self._peer.epoch, self._peer.members)
        for old in [key for key in self._begun if key[0] == tag and key[1] <= round - KEPT_RESULTS]:
            del self._begun[old]
        return begun

    @staticmethod
    def _name(begun: Begun, tag: str) -> str:
        return f"{AGAIN}/{begun.attempt}/{tag}"

    async def _try(
        self, begun: Begun, tag: str, round: int, group: tuple[int, ...], attempt: "Coroutine[Any, Any, Reduced]"
    ) -> Reduced | None:
        """Return what an attempt gives; None when it cannot succeed any more. Either way it is over then.

        Args:
            group: without whom it cannot succeed.
        """
        accords, loop = self._peer.accords, asyncio.get_running_loop()
        if accords.lost_in(begun.epoch) & set(group) or accords.is_begun(
                self._name(replace(begun, attempt=begun.attempt + 1), tag), round):
            attempt.close()
            return None
        running, begun.disturbed = loop.create_task(attempt), loop.create_future()
        try:
            either: list[asyncio.Future[Any]] = [running, begun.disturbed]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return running.result() if running.done() else None
        except PeerLost:
            return None
        finally:
            running.cancel()
            begun.disturbed.cancel()
            begun.disturbed = None

    def _on_loss(self, rank: int) -> None:
        """Give up what cannot succeed without a peer that is lost."""
        for begun in self._begun.values():
            if rank in begun.members:
                _disturb(begun)

    def _on_word(self, name: str, round: int) -> None:
        """Answer those who ask again, or join them."""
        _, number, tag = name.split("/", 2)
        begun = self._begun.get((tag, round))
        if begun is None:
            return    # this peer has not come so far; what was said waits for it
        if begun.result is None:
            _disturb(begun)
            return
        ended = self._peer.accords.say(name, round, {"has": True}, begun.epoch, tuple(begun.members))
        ended.add_done_callback(functools.partial(self._give, begun.result, f"{tag}#{number}", round))

    def _give(self, result: Reduced, tag: str, round: int, ended: "asyncio.Future[Words]") -> None:
        """Send the result to those who have none, where that is up to this peer."""
        if ended.cancelled() or ended.exception() is not None:
            return
        words = ended.result()
        if next(rank for rank, word in words.items() if word["has"]) == self._peer.rank:
            for rank in [rank for rank, word in words.items() if not word["has"]]:
                give_copy(self._peer, rank, result, tag, round)


def _disturb(begun: Begun) -> None:
    if begun.disturbed is not None and not begun.disturbed.done():
        begun.disturbed.set_result(None)
