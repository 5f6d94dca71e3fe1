"""NoLoCo's offers in two parts: the slow weights before training, while the links are idle, and Delta after it.

The slow weights of an outer step are known when the step before has ended, and so is the group: it is drawn without a
message. An outer step uses them as they were before training, so nothing changes but when they travel.
"""
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedcore.peers.peer import Peer

SLOW, MOVED = "slow", "moved"


class EarlyOffers:
    """The exchange of one outer step, begun with what is known before training.

    Args:
        group: ranks, this peer's own among them.
        slow: phi, or the part of it that travels.
    """

    def __init__(self, peer: Peer, group: Sequence[int], slow: Tensor):
        self._peer, self._group, self._step = peer, group, peer.step
        self._sent = {rank: peer.send(rank, {SLOW: slow}, SLOW) for rank in group if rank != peer.rank}

    async def exchange(
        self, offer: Mapping[str, Tensor], timeout_s: float | None
    ) -> dict[int, Mapping[str, Tensor]]:
        """Send the other part of this peer's offer; returns whose both parts came and who took both of ours.

        Args:
            offer: both parts; the slow weights are those that were sent.
            timeout_s: who has not answered, and acknowledged, within so many seconds is left out; None waits for all
                that live.

        Returns:
            Offers by rank, ascending, this peer's own included.
        """
        peer, others = self._peer, list(self._sent)
        slow = {rank: peer.expect("message", SLOW, self._step, rank) for rank in others}
        timer = None
        if timeout_s is not None and others:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._time_out, others)
        moved: Any = await peer.exchange(self._group, {MOVED: offer[MOVED]}, timeout_s=timeout_s)
        found, began = {}, peer.now
        for rank, payload in moved.items():
            if rank == peer.rank:
                found[rank] = offer
                continue
            envelope, delivered = await slow[rank], await self._sent[rank]
            if envelope is None or SLOW not in envelope.data:
                peer.counters.silent += 1
                continue
            peer.counters.bytes_received += envelope.num_bytes
            if delivered:
                found[rank] = {SLOW: envelope.data[SLOW], MOVED: payload[MOVED]}
            else:
                peer.counters.asymmetric_exchanges += 1
        peer.counters.waiting_s += peer.now - began
        if timer is not None:
            timer.cancel()
        return found

    def _time_out(self, others: list[int]) -> None:
        self._peer.mailbox.give_up("message", SLOW, self._step, others)
        for delivered in self._sent.values():
            if not delivered.done():
                delivered.set_result(False)
