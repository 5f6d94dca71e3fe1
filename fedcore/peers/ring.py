"""The ring all-reduce: in which order it adds, and how long it takes.

The vector is cut into as many chunks as there are members. Each chunk travels around the ring, and every member adds
its own part; then the sums travel around once more. Member c begins with chunk c, so the terms of a chunk are added in
ring order, beginning with member c. Nothing else may change the order, or the bits would differ between engines.

Source: Patarasuk and Yuan, 2009, J. Parallel Distrib. Comput. 69(2), section 3.
"""
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedcore.peers.envelope import ALONE, payload_bytes

# Up to so many bytes the contributions are stacked, which is faster for many members and short chunks.
MOST_STACKED_BYTES = 1 << 28
LONG_CHUNK = 4096


def chunk_bounds(num_elements: int, count: int) -> list[tuple[int, int]]:
    """Return start and end of each chunk; the first ones are longer by one where the division leaves a rest."""
    short, longer = divmod(num_elements, count)
    ends = [(index + 1) * short + min(index + 1, longer) for index in range(count)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def ring_sum(vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum of vectors, each of shape (d,), with the bits of a ring all-reduce over them in this order."""
    count, size = len(vectors), len(vectors[0])
    if count == 1:
        return vectors[0].clone()
    if size >= LONG_CHUNK * count or vectors[0].nbytes * count > MOST_STACKED_BYTES:
        return _sum_by_chunks(vectors)
    length = -(-size // count)
    # Of more members than elements the first chunks hold one element each, and the others none.
    used = min(count, size)
    # Row i of the table is member i's vector, cut into chunks and filled up to equal length.
    table = torch.zeros(count, used, length, dtype=vectors[0].dtype)
    longer = size % count
    stacked = torch.stack(list(vectors))
    split = longer * length
    table[:, :longer, :] = stacked[:, :split].view(count, longer, length)
    if size > split:
        table[:, longer:, :size // count] = stacked[:, split:].view(count, count - longer, -1)
    chunks = torch.arange(used)
    total = table[chunks, chunks]
    for hop in range(1, count):
        total += table[(chunks + hop) % count, chunks]
    parts = [total[:longer].reshape(-1), total[longer:, :size // count].reshape(-1)]
    return torch.cat(parts)


def _sum_by_chunks(vectors: Sequence[Tensor]) -> Tensor:
    count = len(vectors)
    total = torch.empty_like(vectors[0])
    for chunk, (start, end) in enumerate(chunk_bounds(len(total), count)):
        part = total[start:end]
        part.copy_(vectors[chunk][start:end])
        for hop in range(1, count):
            part += vectors[(chunk + hop) % count][start:end]
    return total


def ring_bytes(vector: Tensor, count: int, place: int) -> int:
    """Return how many bytes a member sends in one all-reduce; the member after it receives as many.

    Args:
        place: the member's, from 0.
    """
    if count == 1:
        return 0
    short, longer = divmod(len(vector), count)
    # It passes on every chunk but the next one in the first half, and every one but the one after that in the second.
    left_out = 2 * short + ((place + 1) % count < longer) + ((place + 2) % count < longer)
    elements = 2 * len(vector) - left_out
    return 2 * (count - 1) * payload_bytes({ALONE: vector[:0]}) + elements * vector.element_size()


def ring_times(
    began: Sequence[float], sending: Callable[[int], np.ndarray], latency: np.ndarray, rounds: int = 2
) -> np.ndarray:
    """Return when each member has the result, shape (members,).

    A member sends its next chunk once it has received the one before and its uplink is free; the links work at the same
    time.

    Args:
        began: when each member contributed, with a free uplink, seconds, in ring order.
        sending: given the number of the hop, how long each member's chunk takes to send, shape (members,).
        latency: how long each member's chunks then travel to the next member, shape (members,).
        rounds: how often chunks go around: 2 to be added, and sums told; 1 where all see everything.
    """
    ready = np.array(began, dtype=np.float64)
    free = ready
    arriving = np.empty_like(ready)
    for hop in range(rounds * (len(ready) - 1)):
        free = np.maximum(ready, free) + sending(hop)
        arrives = free + latency
        arriving[1:], arriving[0] = arrives[:-1], arrives[-1]
        ready = np.maximum(ready, arriving)
    return ready
