"""Whole numbers at the fewest bits that fit, in lengths that do not depend on the numbers."""
from functools import cached_property

import numpy as np

from fedcore.errors import MalformedPayload

# Packed at a time, so that the bits of a large vector, a byte each, never lie in memory all at once. A multiple of 8.
CHUNK = 1 << 18


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return whole numbers below 2^width, most significant bit first, without gaps; the last byte ends in zeros."""
    shifts = np.arange(width - 1, -1, -1, dtype=numbers.dtype)
    pieces = [
        np.packbits(((numbers[start:start + CHUNK, None] >> shifts) & 1).astype(np.uint8).ravel())
        for start in range(0, len(numbers) if width else 0, CHUNK)
    ]
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)


def unpack(payload: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return the numbers that `pack` wrote, int64.

    Raises:
        MalformedPayload: bits after the last number are set.
    """
    numbers = np.zeros(count, np.int64)
    for start in range(0, count if width else 0, CHUNK):
        some = min(CHUNK, count - start)
        first = start * width // 8
        bits = np.unpackbits(payload[first:first + packed_bytes(some, width)])
        if bits[some * width:].any():
            raise MalformedPayload("a payload has bits set after its last number")
        rows = bits[:some * width].reshape(some, width)
        for column in range(width):
            numbers[start:start + some] = (numbers[start:start + some] << 1) | rows[:, column]
    return numbers


class IndexSet:
    """So many different indices below a size, ascending, in a length that depends on these two numbers alone.

    Their differences are coded as Elias and Fano do: the lower bits as they are, and the upper ones in unary, as the
    differences of successive values. That takes about 2 + log2(size / count) bits for each, against log2(size) without
    differences. Where one bit for every possible index is shorter, that is what is sent.

    Source: Elias, 1974, "Efficient storage and retrieval by content and address of static files", J. ACM 21.

    Args:
        count: indices, from 1 to `size`.
        size: exclusive bound of the indices.
    """

    def __init__(self, count: int, size: int):
        assert 1 <= count <= size
        self.count, self.size = count, size
        widths = range(max(1, (size - 1).bit_length()))
        self.low_width = min(widths, key=self._coded_bytes)
        self.as_bitmap = packed_bytes(size, 1) <= self._coded_bytes(self.low_width)

    def _coded_bytes(self, low_width: int) -> int:
        return packed_bytes(self.count, low_width) + packed_bytes(self._high_bits(low_width), 1)

    def _high_bits(self, low_width: int) -> int:
        return self.count + ((self.size - 1) >> low_width)

    @cached_property
    def num_bytes(self) -> int:
        """Length of the code; 0 when all indices are in the set."""
        if self.count == self.size:
            return 0
        return packed_bytes(self.size, 1) if self.as_bitmap else self._coded_bytes(self.low_width)

    def encode(self, indices: np.ndarray) -> np.ndarray:
        """Return the code of ascending indices, int64, shape (count,)."""
        if self.count == self.size:
            return np.empty(0, np.uint8)
        if self.as_bitmap:
            return _bitmap(indices, self.size)
        low = pack(indices & ((1 << self.low_width) - 1), self.low_width)
        steps = (indices >> self.low_width) + np.arange(self.count)
        return np.concatenate([low, _bitmap(steps, self._high_bits(self.low_width))])

    def decode(self, payload: np.ndarray) -> np.ndarray:
        """Return the indices in a code of the right length, ascending, int64, shape (count,).

        Raises:
            MalformedPayload: there are not `count` of them, they are not ascending, or one is too large.
        """
        if self.count == self.size:
            return np.arange(self.size)
        if self.as_bitmap:
            return self._set_bits(payload, self.size)
        low_bytes = packed_bytes(self.count, self.low_width)
        low = unpack(payload[:low_bytes], self.count, self.low_width)
        high = self._set_bits(payload[low_bytes:], self._high_bits(self.low_width)) - np.arange(self.count)
        indices = (high << self.low_width) | low
        if indices[-1] >= self.size:
            raise MalformedPayload(f"a payload has the index {indices[-1]}, but there are {self.size} values")
        if (np.diff(indices) <= 0).any():
            raise MalformedPayload("a payload has indices that are not ascending, or one of them twice")
        return indices

    def _set_bits(self, payload: np.ndarray, length: int) -> np.ndarray:
        bits = np.unpackbits(payload)
        found = np.flatnonzero(bits)
        if len(found) != self.count or found[-1] >= length:
            raise MalformedPayload(f"a payload does not hold {self.count} indices")
        return found


def _bitmap(positions: np.ndarray, length: int) -> np.ndarray:
    bits = np.zeros(length, np.uint8)
    bits[positions] = 1
    return np.packbits(bits)
