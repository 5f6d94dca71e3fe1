"""The compressor that changes nothing, and the one that sends matrices of low rank."""
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fedcore.compression.base import VALUE_FORMATS, Compressor, Part, Shape, ValueFormat, check_one_of
from fedcore.errors import InvalidSetting

Values = Literal["same", "float32", "float16", "bfloat16"]


class DensePart(Part):
    """All values."""

    contraction = 1.0
    variance = 0.0

    def __init__(self, size: int, values: ValueFormat):
        self.num_values, self.values = size, values
        self.num_bytes = size * values.num_bytes

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        return self.values.pack(values)

    def decode(self, payload: Tensor) -> Tensor:
        return self.values.unpack(payload)


class Identity(Compressor):
    """Sends all values, at their own precision or at a lower one; contraction = 1, variance = 0.

    Args:
        values: format of the values on the wire.
    """

    def __init__(self, values: Values = "same"):
        check_one_of("values", values, VALUE_FORMATS)
        self.values = values

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        return DensePart(prod(shape), ValueFormat(self.values, dtype))


class _LowRankPart(Part):
    def __init__(self, rows: int, columns: int, rank: int, values: ValueFormat):
        self.rows, self.columns, self.rank, self.values = rows, columns, rank, values
        self.num_values = rows * columns
        self.num_bytes = rank * (rows + columns) * values.num_bytes
        self.contraction = rank / min(rows, columns)

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        matrix = values.view(self.rows, self.columns)
        if self.columns > self.rows:
            matrix = matrix.T    # the random matrix has the shorter side: that gives the better constant
        start = torch.randn(matrix.shape[1], self.rank, generator=generator, dtype=values.dtype)
        peak = matrix.abs().max()
        scaled = matrix / peak if peak > 0 else matrix      # so that products of large values stay finite
        left = torch.linalg.qr(scaled @ start).Q            # P, orthonormal
        right = _bounded(matrix.T @ left)                   # Q' = M^T P
        return torch.cat([self.values.pack(left.reshape(-1)), self.values.pack(right.reshape(-1))])

    def decode(self, payload: Tensor) -> Tensor:
        longer = max(self.rows, self.columns)
        factors = self.values.unpack(payload)
        left, right = factors[:longer * self.rank].view(-1, self.rank), factors[longer * self.rank:].view(-1, self.rank)
        # One rank at a time: the bits of a matrix product depend on the machine.
        matrix = torch.zeros(left.shape[0], right.shape[0], dtype=factors.dtype)
        for column in range(self.rank):
            matrix = _bounded(matrix + _bounded(left[:, column, None] * right[:, column]))
        return (matrix.T if self.columns > self.rows else matrix).reshape(-1)


def _bounded(values: Tensor) -> Tensor:
    """Return the values with the largest number in place of an infinite one."""
    largest = torch.finfo(values.dtype).max
    return values.clamp(-largest, largest)


class PowerSgd(Compressor):
    """Sends each matrix M as P (M^T P)^T, where P spans M times a random matrix; vectors are sent whole.

    Contractive with contraction = rank / min(rows, columns) in expectation: the span of M Q holds M Pi_Q, the part of M
    on the span of a random Q, whose expected squared norm is that share of |M|^2. With few large singular values the
    error is far smaller. Payload: rank (rows + columns) values. A tensor of more dimensions is a matrix of its first
    one by all others.

    Source: Vogels et al., 2019, "PowerSGD", arXiv:1905.13727, algorithm 1; Q is drawn anew each time instead of kept,
    so that the compressor has no memory.

    Args:
        rank: at least 1; where that would be no shorter than the matrix, the matrix is sent.
        values: format of the values on the wire.
    """

    per_tensor = True

    def __init__(self, rank: int = 2, values: Values = "same"):
        if rank < 1:
            raise InvalidSetting("rank", rank, "at least 1", "2 suits most models.")
        check_one_of("values", values, VALUE_FORMATS)
        self.rank, self.values = rank, values

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        values, size = ValueFormat(self.values, dtype), prod(shape)
        rows = shape[0] if len(shape) > 1 else 1
        columns = size // rows
        if self.rank * (rows + columns) >= size:
            return DensePart(size, values)
        return _LowRankPart(rows, columns, self.rank, values)
