"""The means over all members that a peer takes part in, from their beginning to the handing over of their results."""
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedcore.peers.envelope import ALONE, is_finite
from fedcore.peers.packing import Packed
from fedcore.peers.underway import Underway

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer


class Reductions:
    """Those of one peer.

    Attributes:
        underway: those that were begun and not awaited yet, by tag and round.
    """

    def __init__(self, peer: "Peer"):
        self._peer = peer
        self.underway: dict[tuple[str, int], Underway] = {}
        self._unfinished: list[dict[str, Any]] = []    # to take up again

    def begin(self, vector: Tensor, tag: str, round: int, weight: float, base: Tensor | None) -> Underway:
        """Contribute to a mean; see `Peer.all_reduce`."""
        peer, packing = self._peer, self._peer.packing
        inputs: dict[str, Any] = {"tag": tag, "round": round, "weight": weight, "began": peer.now, "charged": False}
        if packing is None or len(vector) != packing.codec.num_values:
            return self._start({**inputs, "vector": vector})
        # What arrives as it was sent needs no difference, which would round.
        base = None if packing.codec.is_exact else base
        if not is_finite({ALONE: vector}):
            peer.log(refused_from=peer.rank, reason="not finite", tag=tag)
            nothing = torch.zeros_like(vector)
            payload, inputs["weight"] = packing.codec.encode(nothing, packing.generator(tag, round)), 0.0
        else:
            payload = packing.pack(vector if base is None else vector - base, tag, round)
        return self._start({**inputs, "vector": payload, "packed": True, "base": base})

    def _start(self, inputs: dict[str, Any]) -> Underway:
        peer, tag, round = self._peer, inputs["tag"], inputs["round"]
        vector, counters = inputs["vector"], peer.counters
        before = counters.bytes_sent, counters.bytes_received
        if vector is None:
            future = peer.wire.observe(peer, tag, round)
        else:
            if inputs.get("packed"):
                assert peer.packing is not None
                vector = Packed(vector, peer.packing.codec, inputs["base"])
            future = peer.wire.all_reduce(peer, vector, tag, round, inputs["weight"], inputs["began"])
        if inputs["charged"]:    # before the restart
            counters.bytes_sent, counters.bytes_received = before
        else:
            counters.exchanges += 1
        underway = Underway(peer, {**inputs, "charged": True}, future)
        self.underway[tag, round] = underway
        return underway

    def find(self, tag: str, round: int) -> Underway | None:
        """Return a reduction that was begun and not awaited yet."""
        return self.underway.get((tag, round))

    def forget(self, tag: str, round: int) -> None:
        """Take note that a result was handed over."""
        self.underway.pop((tag, round), None)

    def cancel(self) -> None:
        """Cancel all that are under way."""
        for underway in self.underway.values():
            underway.cancel()

    def pending(self) -> list[dict[str, Any]]:
        """Return the inputs of all that are under way, for a checkpoint."""
        return [dict(underway.inputs) for underway in self.underway.values()]

    def remember(self, inputs: Iterable[Mapping[str, Any]]) -> None:
        """Take note of what was under way at a checkpoint; `resume` takes it up."""
        self._unfinished = [dict(one) for one in inputs]

    def resume(self) -> None:
        """Take up what was under way."""
        for inputs in self._unfinished:
            self._start(inputs)
        self._unfinished = []
