"""The mean of all peers' models, and how far they are from it."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.peers.peer import Peer
from fedcore.peers.ring import chunk_bounds

PARTS, SUMS, MEAN, SQUARES, EQUAL, BUFFER = "mean.parts", "mean.sums", "mean", "squares", "equal", "mean.buffer."


class Consensus(NamedTuple):
    """The mean of all peers' models.

    Attributes:
        params: shape (d,).
        buffers: means of those with a fractional part; of the others, the lowest rank's.
        distance: the peers' root mean square distance from the mean.
    """

    params: Tensor
    buffers: dict[str, Tensor]
    distance: float


def mean_and_distance(vectors: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the mean of vectors, shape (d,), and their root mean square distance from it.

    Sums run in the given order, in float64; equal vectors have themselves as their mean, to the bit.
    """
    first = vectors[0]
    if _all_equal(vectors):
        return first, 0.0
    mean, squares = _mean_and_squares(vectors)
    return mean.to(first.dtype), math.sqrt(squares / len(vectors))


def _all_equal(vectors: Sequence[Tensor]) -> bool:
    first = vectors[0]
    return all(vector is first or torch.equal(vector, first) for vector in vectors[1:])


def _mean_and_squares(vectors: Sequence[Tensor]) -> tuple[Tensor, float]:
    total = torch.zeros_like(vectors[0], dtype=torch.float64)
    for vector in vectors:
        total += vector
    mean = total / len(vectors)
    squares = 0.0
    for vector in vectors:
        squares += float((vector - mean).square().sum())
    return mean, squares


async def mean_of_peers(peer: Peer, members: Sequence[int], round: int) -> Consensus | None:
    """Take part in averaging all members' models; the member of the lowest rank gets the result, the others None.

    Every member averages one chunk of all models, in ascending order of rank, so that the result has the bits of
    `mean_and_distance`: no member sends or receives more than its own model, and the lowest rank one more.

    Args:
        members: ranks, ascending, the same at all of them.
        round: tells this one from others.

    Raises:
        PeerLost: a member is gone.
    """
    bounds = chunk_bounds(len(peer.params), len(members))
    for rank, (start, end) in zip(members, bounds, strict=True):
        if rank != peer.rank:
            peer.send(rank, peer.params[start:end], PARTS, round)
    own = slice(*bounds[members.index(peer.rank)])
    parts = []
    for rank in members:
        part = peer.params[own] if rank == peer.rank else await peer.receive(rank, PARTS, round)
        assert isinstance(part, Tensor)
        parts.append(part)
    mean, squares = _mean_and_squares(parts)
    figures = {SQUARES: torch.tensor([squares], dtype=torch.float64),
               EQUAL: torch.tensor([_all_equal(parts)], dtype=torch.uint8)}
    summed = {MEAN: mean.to(peer.params.dtype), **figures}
    if peer.rank != members[0]:
        peer.send(members[0], summed, SUMS, round)
        for name, values in peer.buffers.items():
            peer.send(members[0], values, BUFFER + name, round)
        return None
    found = [summed if rank == peer.rank else await peer.receive(rank, SUMS, round) for rank in members]
    rows = [row for row in found if not isinstance(row, Tensor)]
    agreed = all(bool(row[EQUAL]) for row in rows)
    params = peer.params if agreed else torch.cat([row[MEAN] for row in rows])
    buffers = {}
    for name, values in peer.buffers.items():
        each = [values if rank == peer.rank else await peer.receive(rank, BUFFER + name, round) for rank in members]
        tensors = [found for found in each if isinstance(found, Tensor)]
        buffers[name] = mean_and_distance(tensors)[0] if values.is_floating_point() else values
    distance = 0.0 if agreed else math.sqrt(sum(float(row[SQUARES]) for row in rows) / len(members))
    return Consensus(params, buffers, distance)
