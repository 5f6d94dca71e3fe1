"""Means over all members as messages around a ring: of vectors, added on their way, or of payloads, which all pass by.

`ring.py` says in which order is added.
"""
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedcore.errors import PeerLost
from fedcore.peers.envelope import ALONE, Envelope, is_finite
from fedcore.peers.packing import Packed
from fedcore.peers.ring import chunk_bounds
from fedcore.peers.seams import Reduced

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer

RING = "ring"


async def ring_all_reduce(
    peer: "Peer", vector: Tensor, tag: str, round: int, weight: float, members: Sequence[int] | None = None
) -> Reduced:
    """Return the weighted mean over all members, and whose vectors are in it; the same bits at all of them.

    A vector that is not finite is left out by its owner, and named in the run's metrics.

    Args:
        vector: shape (d,).
        members: who takes part, in ascending order; None: those of the present step.

    Raises:
        PeerLost: a neighbour in the ring is gone; nobody can finish.
    """
    members = peer.members if members is None else members
    count = len(members)
    if not is_finite({ALONE: vector}):
        peer.log(refused_from=peer.rank, reason="not finite", tag=tag)
        vector, weight = torch.zeros_like(vector), 0.0
    own = vector if weight in (0.0, 1.0) else weight * vector
    weights = {peer.rank: weight}
    place = members.index(peer.rank)
    before, after = members[place - 1], members[(place + 1) % count]
    bounds, total = chunk_bounds(len(vector), count), torch.empty_like(vector)
    chunk = own[slice(*bounds[place])]
    for hop in range(2 * (count - 1)):
        gathers = hop < count - 1
        peer.post(after, RING, f"{tag}:{hop}", round, chunk, {"weights": dict(weights)} if gathers else {})
        envelope = await _next(peer, before, f"{tag}:{hop}", round)
        start, end = bounds[(place - hop - 1) % count]
        chunk = envelope.data[ALONE]
        if gathers:
            chunk = chunk + own[start:end]
            weights |= {int(rank): float(value) for rank, value in envelope.meta["weights"].items()}
        if hop >= count - 2:    # from here on chunks are complete
            total[start:end] = chunk
    if count == 1:
        total = own
    share = sum(weights[rank] for rank in members)
    return Reduced(total / share if share else total, tuple(rank for rank in members if weights[rank]))


async def ring_all_gather(
    peer: "Peer", packed: Packed, tag: str, round: int, weight: float, members: Sequence[int] | None = None
) -> Reduced:
    """Return the weighted mean of all members' payloads, and whose are in it; the same bits at all of them.

    Sums of sparse vectors are less sparse than these, so each payload goes around the ring as it is.

    Args:
        members: who takes part, in ascending order; None: those of the present step.

    Raises:
        PeerLost: a neighbour in the ring is gone; nobody can finish.
        MalformedPayload: a member's payload cannot be opened; nobody can finish either.
    """
    members = peer.members if members is None else members
    count = len(members)
    place = members.index(peer.rank)
    before, after = members[place - 1], members[(place + 1) % count]
    found = {peer.rank: (packed.payload, weight)}
    payload = packed.payload
    for hop in range(count - 1):
        peer.post(after, RING, f"{tag}:{hop}", round, payload, {"weight": weight})
        envelope = await _next(peer, before, f"{tag}:{hop}", round)
        payload, weight = envelope.data[ALONE], float(envelope.meta["weight"])
        found[members[(place - hop - 1) % count]] = payload, weight
    weights = [found[rank][1] for rank in members]
    mean = packed.mean([found[rank][0] for rank in members], weights)
    return Reduced(mean, tuple(rank for rank in members if found[rank][1]))


async def copy_of(peer: "Peer", source: int, tag: str, round: int) -> Reduced:
    """Return a result that another peer has, and gives (`give_copy`).

    Raises:
        PeerLost: it is gone.
    """
    envelope = await _next(peer, source, f"{tag}:copy", round)
    return Reduced(envelope.data[ALONE], tuple(envelope.meta["contributors"]))


def give_copy(peer: "Peer", to: int, result: Reduced, tag: str, round: int) -> None:
    """Send a result to a peer that has none."""
    peer.post(to, RING, f"{tag}:copy", round, {ALONE: result.mean}, {"contributors": list(result.contributors)})


async def _next(peer: "Peer", source: int, tag: str, round: int) -> Envelope:
    envelope = await peer.expect(RING, tag, round, source)
    if envelope is None:
        raise PeerLost(source)
    peer.counters.bytes_received += envelope.num_bytes
    return envelope
