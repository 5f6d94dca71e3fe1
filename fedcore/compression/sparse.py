"""Compressors that send a few of the values: the largest ones, or random ones."""
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedcore.compression.base import (
    SCALINGS,
    VALUE_FORMATS,
    Compressor,
    Part,
    Shape,
    ValueFormat,
    check_fraction,
    check_one_of,
    kept,
)
from fedcore.compression.bits import IndexSet

Values = Literal["same", "float32", "float16", "bfloat16"]
SEED_BYTES = 8
LARGEST_SEED = 2**63 - 1
# So many values are looked at before all of them, to know roughly how large the largest ones are.
SAMPLE = 1 << 16
# Vectors of fewer values are searched without that.
WORTH_SAMPLING = 1 << 20


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the ascending indices of the `count` values of largest magnitude; of equal ones the first are taken.

    Args:
        values: finite, shape (d,).
        count: from 1 to d.
    """
    if count == len(values):
        return np.arange(count)
    magnitudes = np.abs(values)
    candidates = _likely(magnitudes, count)
    pool = magnitudes if candidates is None else magnitudes[candidates]
    threshold = np.partition(pool, len(pool) - count)[len(pool) - count]
    chosen = np.flatnonzero(pool >= threshold)
    if (surplus := len(chosen) - count) > 0:
        ties = np.flatnonzero(pool[chosen] == threshold)
        chosen = np.delete(chosen, ties[len(ties) - surplus:])
    return chosen if candidates is None else candidates[chosen]


def _likely(magnitudes: np.ndarray, count: int) -> np.ndarray | None:
    """Return the indices of all values above a bound that more than `count` exceed; None where none was found."""
    size = len(magnitudes)
    share = 1.25 * count / size + 16 / SAMPLE
    if size < WORTH_SAMPLING or share > 0.5:
        return None
    sample = magnitudes[:: size // SAMPLE]
    rank = round((1 - share) * len(sample))
    found = np.flatnonzero(magnitudes >= np.partition(sample, rank)[rank])
    return found if len(found) >= count else None


class _TopKPart(Part):
    def __init__(self, size: int, count: int, values: ValueFormat):
        self.num_values, self.count, self.values = size, count, values
        self.indices = IndexSet(count, size)
        self.num_bytes = self.indices.num_bytes + count * values.num_bytes
        self.contraction = count / size

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        chosen = largest(values.numpy(), self.count)
        code = torch.from_numpy(self.indices.encode(chosen))
        return torch.cat([code, self.values.pack(values[torch.from_numpy(chosen)])])

    def decode(self, payload: Tensor) -> Tensor:
        chosen = self.indices.decode(payload[:self.indices.num_bytes].numpy())
        sent = self.values.unpack(payload[self.indices.num_bytes:])
        values = torch.zeros(self.num_values, dtype=self.values.dtype)
        values[torch.from_numpy(chosen)] = sent
        return values


class TopK(Compressor):
    """Sends the values of largest magnitude, and where they are; of equal ones the first.

    Contractive with contraction = K/d, K = max(1, round(fraction d)). Payload: the indices' differences (about
    2 + log2(d/K) bits each), then K values.

    Source: Stich et al., 2018, "Sparsified SGD with Memory", arXiv:1809.07599, definition 2.1.

    Args:
        fraction: share K/d of the values, in (0, 1].
        per_tensor: a share of each tensor, instead of the whole model's largest values.
        values: format of the values on the wire.
    """

    def __init__(self, fraction: float = 0.1, per_tensor: bool = False, values: Values = "same"):
        check_fraction(fraction)
        check_one_of("values", values, VALUE_FORMATS)
        self.fraction, self.per_tensor, self.values = fraction, per_tensor, values

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        size = int(np.prod(shape))
        return _TopKPart(size, kept(self.fraction, size), ValueFormat(self.values, dtype))


class _RandKPart(Part):
    def __init__(self, size: int, count: int, values: ValueFormat, unbiased: bool):
        self.num_values, self.count, self.values = size, count, values
        self.num_bytes = SEED_BYTES + count * values.num_bytes
        self.scale = size / count if unbiased else 1.0
        if unbiased:
            self.variance = size / count - 1
        self.contraction = None if unbiased and count < size else count / size

    def chosen(self, seed: int) -> Tensor:
        """Return the ascending indices that a seed stands for."""
        order = torch.randperm(self.num_values, generator=torch.Generator().manual_seed(seed))
        return order[:self.count].sort().values

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        seed = torch.randint(LARGEST_SEED, (1,), generator=generator)
        largest_number = torch.finfo(values.dtype).max
        sent = (values[self.chosen(int(seed))] * self.scale).clamp(-largest_number, largest_number)
        return torch.cat([seed.view(torch.uint8), self.values.pack(sent)])

    def decode(self, payload: Tensor) -> Tensor:
        seed = int(payload[:SEED_BYTES].clone().view(torch.int64)) & LARGEST_SEED
        sent = self.values.unpack(payload[SEED_BYTES:])
        values = torch.zeros(self.num_values, dtype=self.values.dtype)
        values[self.chosen(seed)] = sent
        return values


class RandK(Compressor):
    """Sends random values; a seed says which, so that indices cost nothing.

    Contractive with contraction = K/d in expectation; unbiased, times d/K, with variance = d/K - 1. Payload: 8 bytes of
    seed, then K values. Sender and receiver draw the indices with torch, and must have the same version of it.

    Source: Stich et al., 2018, "Sparsified SGD with Memory", arXiv:1809.07599, definition 2.1.

    Args:
        fraction: share K/d of the values, in (0, 1].
        scaling: `contractive` sends values as they are, `unbiased` times d/K.
        per_tensor: a share of each tensor, instead of the whole model.
        values: format of the values on the wire.
    """

    def __init__(
        self, fraction: float = 0.1, scaling: Literal["contractive", "unbiased"] = "contractive",
        per_tensor: bool = False, values: Values = "same",
    ):
        check_fraction(fraction)
        check_one_of("scaling", scaling, SCALINGS)
        check_one_of("values", values, VALUE_FORMATS)
        self.fraction, self.scaling, self.per_tensor, self.values = fraction, scaling, per_tensor, values

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        size = int(np.prod(shape))
        values = ValueFormat(self.values, dtype)
        return _RandKPart(size, kept(self.fraction, size), values, self.scaling == "unbiased")
