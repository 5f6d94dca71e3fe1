"""Compressors that send every value at a few bits: its sign, its level, or its power of two."""
from math import prod, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedcore.compression.base import SCALINGS, Compressor, Part, Shape, ValueFormat, check_one_of
from fedcore.compression.bits import pack, packed_bytes, unpack
from fedcore.errors import InvalidSetting, MalformedPayload

Scaling = Literal["contractive", "unbiased"]
MAX_LEVELS = 2**20
# Natural compression of a value that lies between two powers of two.
NATURAL_VARIANCE = 1 / 8


class _SignPart(Part):
    def __init__(self, size: int, dtype: torch.dtype):
        self.num_values, self.scale = size, ValueFormat("same", dtype)
        self.num_bytes = self.scale.num_bytes + packed_bytes(size, 1)
        self.contraction = 1 / size

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        scale = values.abs().mean(dtype=torch.float64).to(values.dtype).reshape(1)
        signs = np.packbits((values < 0).numpy())
        return torch.cat([self.scale.pack(scale), torch.from_numpy(signs)])

    def decode(self, payload: Tensor) -> Tensor:
        scale = self.scale.unpack(payload[:self.scale.num_bytes])
        if scale < 0:
            raise MalformedPayload("a payload has a negative scale")
        negative = unpack(payload[self.scale.num_bytes:].numpy(), self.num_values, 1)
        return torch.where(torch.from_numpy(negative).bool(), -scale, scale)


class Sign(Compressor):
    """Sends one bit for each value, and their mean magnitude.

    C(v) = |v|_1 / d sign(v), with sign(0) = +1. Contractive with contraction = |v|_1^2 / (d |v|^2), which is at least
    1/d; about 0.64 for normal values. Payload: the scale, then d bits.

    Source: Karimireddy et al., 2019, "Error Feedback Fixes SignSGD", arXiv:1901.09847, section 4.

    Args:
        per_tensor: a scale for each tensor, instead of one for the model.
    """

    def __init__(self, per_tensor: bool = True):
        self.per_tensor = per_tensor

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        return _SignPart(prod(shape), dtype)


class _Unbiased(Part):
    """A part that may be divided by 1 + variance, which makes it contractive."""

    def __init__(self, size: int, dtype: torch.dtype, variance: float, scaling: Scaling):
        self.num_values, self.dtype = size, dtype
        if scaling == "contractive":
            self.contraction, self.divisor = 1 / (1 + variance), 1 + variance
        else:
            self.variance, self.divisor = variance, 1.0


class _QsgdPart(_Unbiased):
    def __init__(self, size: int, levels: int, dtype: torch.dtype, scaling: Scaling):
        super().__init__(size, dtype, min(size / levels**2, sqrt(size) / levels), scaling)
        self.levels, self.width = levels, 1 + levels.bit_length()
        self.norm = ValueFormat("same", dtype)
        self.num_bytes = self.norm.num_bytes + packed_bytes(size, self.width)

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        # Beyond the largest number the norm may be any that no magnitude exceeds.
        norm = values.double().norm().clamp(max=torch.finfo(values.dtype).max).to(values.dtype)
        uniform = torch.rand(values.shape, generator=generator, dtype=values.dtype)
        if norm == 0:
            levels = torch.zeros_like(values)
        else:
            exact = self.levels * (values.abs() / norm)
            levels = exact.floor()
            levels = (levels + (uniform < exact - levels)).clamp(max=self.levels)
        codes = levels.to(torch.int64) | ((values < 0).to(torch.int64) << (self.width - 1))
        return torch.cat([self.norm.pack(norm.reshape(1)), torch.from_numpy(pack(codes.numpy(), self.width))])

    def decode(self, payload: Tensor) -> Tensor:
        norm = self.norm.unpack(payload[:self.norm.num_bytes])
        codes = torch.from_numpy(unpack(payload[self.norm.num_bytes:].numpy(), self.num_values, self.width))
        negative, levels = codes >> (self.width - 1), codes & ((1 << (self.width - 1)) - 1)
        if norm < 0:
            raise MalformedPayload("a payload has a negative norm")
        if levels.max() > self.levels:
            raise MalformedPayload(f"a payload has a level above {self.levels}")
        magnitudes = norm * (levels.to(self.dtype) / (self.levels * self.divisor))
        return torch.where(negative.bool(), -magnitudes, magnitudes)


class Qsgd(Compressor):
    """Sends each value as one of `levels` + 1 levels of the norm, rounded at random so that the mean is right.

    Unbiased with variance = min(d / levels^2, sqrt(d) / levels). Payload: the norm, then a sign and
    ceil(log2(levels + 1)) bits for each value.

    Source: Alistarh et al., 2017, "QSGD", arXiv:1610.02132, section 3.1; fixed width instead of Elias codes, so that
    the length is known.

    Args:
        levels: at least 1.
        scaling: `contractive` divides by 1 + variance, `unbiased` does not.
        per_tensor: a norm for each tensor, instead of one for the model.
    """

    def __init__(self, levels: int = 15, scaling: Scaling = "contractive", per_tensor: bool = True):
        if not 1 <= levels <= MAX_LEVELS:
            raise InvalidSetting("levels", levels, f"a whole number from 1 to {MAX_LEVELS}", "15 takes 5 bits a value.")
        check_one_of("scaling", scaling, SCALINGS)
        self.levels, self.scaling, self.per_tensor = levels, scaling, per_tensor

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        return _QsgdPart(prod(shape), self.levels, dtype, self.scaling)


class _NaturalPart(_Unbiased):
    def __init__(self, size: int, dtype: torch.dtype, scaling: Scaling):
        super().__init__(size, dtype, NATURAL_VARIANCE, scaling)
        self.exponent_bits = 8 if dtype == torch.float32 else 11
        self.bias = (1 << (self.exponent_bits - 1)) - 1
        self.num_bytes = packed_bytes(size, 1 + self.exponent_bits)

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        magnitudes = values.abs()
        uniform = torch.rand(values.shape, generator=generator, dtype=values.dtype)
        mantissas, exponents = torch.frexp(magnitudes)    # magnitude = mantissa 2^exponent, mantissa in [1/2, 1)
        below = exponents.to(torch.int64) - 1 + self.bias
        codes = below + (uniform < 2 * mantissas - 1)
        # Below the smallest power of two there is only zero.
        tiny = torch.finfo(values.dtype).tiny
        codes = torch.where(magnitudes < tiny, (uniform < magnitudes / tiny).to(torch.int64), codes)
        codes = codes.clamp(max=2 * self.bias)
        codes = codes | ((values < 0).to(torch.int64) << self.exponent_bits)
        return torch.from_numpy(pack(codes.numpy(), 1 + self.exponent_bits))

    def decode(self, payload: Tensor) -> Tensor:
        codes = torch.from_numpy(unpack(payload.numpy(), self.num_values, 1 + self.exponent_bits))
        negative, powers = codes >> self.exponent_bits, codes & ((1 << self.exponent_bits) - 1)
        if powers.max() > 2 * self.bias:
            raise MalformedPayload("a payload has an exponent that no number has")
        ones = torch.ones(self.num_values, dtype=self.dtype)
        magnitudes = torch.ldexp(ones, powers - self.bias)
        magnitudes = torch.where(powers == 0, torch.zeros_like(ones), magnitudes) / self.divisor
        return torch.where(negative.bool(), -magnitudes, magnitudes)


class Natural(Compressor):
    """Sends each value as one of the two powers of two around it, at random so that the mean is right.

    Unbiased with variance = 1/8, for values that are not so small that they lose digits. Payload: 9 bits for each
    float32, 12 for each float64.

    Source: Horvath et al., 2022, "Natural Compression for Distributed Deep Learning", arXiv:1905.10988, theorem 1.

    Args:
        scaling: `contractive` divides by 9/8, `unbiased` does not.
    """

    def __init__(self, scaling: Scaling = "contractive"):
        check_one_of("scaling", scaling, SCALINGS)
        self.scaling = scaling

    def part(self, shape: Shape, dtype: torch.dtype) -> Part:
        return _NaturalPart(prod(shape), dtype, self.scaling)
