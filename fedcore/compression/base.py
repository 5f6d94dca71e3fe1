"""What all compressors have in common: a setting that, fitted to a model's shapes, becomes a codec.

A compressor C is *contractive* when E|C(v) - v|^2 <= (1 - contraction) |v|^2. It is *unbiased* when E C(v) = v; then
E|C(v) - v|^2 <= variance |v|^2, and C(v) / (1 + variance) is contractive with contraction = 1 / (1 + variance).
"""
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedcore.errors import InvalidSetting, MalformedPayload, NotFinite

Shape = tuple[int, ...]
VALUE_FORMATS = ("same", "float32", "float16", "bfloat16")
SCALINGS = ("contractive", "unbiased")


class Part(ABC):
    """How the values of one tensor, or of the whole model, travel.

    Attributes:
        num_values: elements, at least 1.
        num_bytes: length of every payload.
        contraction: in (0, 1]; None when the part is not contractive.
        variance: at least 0; None when the part is biased.
    """

    num_values: int
    num_bytes: int
    contraction: float | None = None
    variance: float | None = None

    @abstractmethod
    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return the payload of finite values, shape (num_values,): bytes, shape (num_bytes,)."""

    @abstractmethod
    def decode(self, payload: Tensor) -> Tensor:
        """Return the values in a payload of the right length, shape (num_values,).

        Raises:
            MalformedPayload: these bytes are no payload of this part.
        """


@dataclass(frozen=True)
class Codec:
    """A compressor fitted to a model: one part for each tensor, or one for all.

    Attributes:
        parts: in the order of the vector.
        dtype: of the vector, float32 or float64.
    """

    parts: tuple[Part, ...]
    dtype: torch.dtype

    @cached_property
    def num_values(self) -> int:
        """Length d of the vector."""
        return sum(part.num_values for part in self.parts)

    @cached_property
    def num_bytes(self) -> int:
        """Length of every payload."""
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def contraction(self) -> float | None:
        """The smallest of the parts' constants, in (0, 1]; None when one of them is not contractive.

        Rounding of values to a shorter format is not counted: it adds a relative 2^-22 (float16, in its normal range)
        or 2^-16 (bfloat16) to the squared error of what is sent.
        """
        known = [part.contraction for part in self.parts if part.contraction is not None]
        return min(known) if len(known) == len(self.parts) else None

    @cached_property
    def variance(self) -> float | None:
        """The largest of the parts' constants; None when one of them is biased."""
        known = [part.variance for part in self.parts if part.variance is not None]
        return max(known) if len(known) == len(self.parts) else None

    @property
    def is_exact(self) -> bool:
        """Whether every vector arrives as it was, bit for bit."""
        return self.contraction == 1.0 and self.num_bytes >= self.num_values * self.dtype.itemsize

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        """Return the payload of a vector.

        Args:
            vector: shape (num_values,), of the codec's dtype, on the CPU.
            generator: of the random choices; the same one gives the same payload.

        Returns:
            Bytes, shape (num_bytes,), uint8.

        Raises:
            NotFinite: a value is NaN or infinite.
        """
        assert vector.shape == (self.num_values,) and vector.dtype == self.dtype
        if not all_finite(vector):
            raise NotFinite(f"{int((~torch.isfinite(vector)).sum())} of {vector.numel()} values to be compressed are "
                            "NaN or infinite. Lower the learning rate, or set train.clip_norm.")
        pieces, start = [], 0
        for part in self.parts:
            pieces.append(part.encode(vector[start:start + part.num_values], generator))
            start += part.num_values
        payload = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        assert payload.numel() == self.num_bytes
        return payload

    def decode(self, payload: Tensor) -> Tensor:
        """Return the vector in a payload, shape (num_values,): for sender and receiver the same bits.

        Raises:
            MalformedPayload: it is too short, too long, or holds what no sender writes.
        """
        if payload.dtype != torch.uint8 or payload.ndim != 1:
            kind = str(payload.dtype).removeprefix("torch.")
            raise MalformedPayload(f"a payload is {kind}{list(payload.shape)}, but must be a row of bytes")
        if payload.numel() != self.num_bytes:
            raise MalformedPayload(f"a payload has {payload.numel()} bytes, but must have {self.num_bytes}")
        pieces, start = [], 0
        for part in self.parts:
            pieces.append(part.decode(payload[start:start + part.num_bytes]))
            start += part.num_bytes
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Compressor(ABC):
    """A compressor's settings."""

    per_tensor = False

    def codec(self, shapes: Sequence[Shape], dtype: torch.dtype) -> Codec:
        """Return the codec for a model.

        Args:
            shapes: of its tensors, in the order of the flat vector; those without elements are skipped.
            dtype: of the vector, float32 or float64.
        """
        shapes = [shape for shape in shapes if math.prod(shape)]
        if not self.per_tensor:
            shapes = [(sum(math.prod(shape) for shape in shapes),)]
        return Codec(tuple(self.part(shape, dtype) for shape in shapes), dtype)

    @abstractmethod
    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        """Return how a tensor of this shape travels."""


class ValueFormat:
    """Floating-point values as bytes: little-endian, clamped to the largest number of a shorter format.

    Args:
        name: one of `VALUE_FORMATS`; `same` is the vector's own dtype.
        dtype: of the vector; a format is never longer than that.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        wire = dtype if name == "same" else getattr(torch, name)
        self.dtype, self.wire = dtype, wire if wire.itemsize < dtype.itemsize else dtype
        self.num_bytes = self.wire.itemsize

    def pack(self, values: Tensor) -> Tensor:
        """Return the bytes of finite values."""
        if self.wire != self.dtype:
            largest = torch.finfo(self.wire).max
            values = values.clamp(-largest, largest).to(self.wire)
        return values.contiguous().view(torch.uint8)

    def unpack(self, payload: Tensor) -> Tensor:
        """Return the values in bytes, or raise `MalformedPayload` when one is NaN or infinite."""
        values = payload.clone().view(self.wire).to(self.dtype)    # a copy, because views must be aligned
        if not all_finite(values):
            raise MalformedPayload("a payload holds values that are NaN or infinite")
        return values


def all_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite."""
    # A sum is finite when all its terms are, unless it overflows: then, and only then, look at each element.
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def unsent_share(vector: Tensor, sent: Tensor) -> float:
    """Return |v - C(v)|^2 / |v|^2, the share of a vector that its receiver does not get; 0 for a vector of zeros."""
    squared_norm = float(vector.square().sum(dtype=torch.float64))
    return float((vector - sent).square().sum(dtype=torch.float64)) / squared_norm if squared_norm else 0.0


def kept(fraction: float, size: int) -> int:
    """Return how many of `size` values a fraction is, at least 1."""
    return max(1, round(fraction * size))


def check_fraction(value: float) -> None:
    """Raise `InvalidSetting` unless a share lies in (0, 1]."""
    if not 0 < value <= 1:
        raise InvalidSetting("fraction", value, "above 0 and at most 1", "0.01 sends one value in a hundred.")


def check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `InvalidSetting` unless a setting is one of `choices`."""
    if value not in choices:
        raise InvalidSetting(name, value, f"one of {', '.join(choices)}")
