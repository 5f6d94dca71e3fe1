"""Clipping, sensitivity, and normal noise: who adds how much of it, under which neighbouring relation.

Two data sets are neighbours when one record of one client is another one (`replace-one`), or is there in only one of
them (`add-remove`, the number of records counting as public). A mean over n clipped records moves by at most 2 C/n in
the first case and C/n in the second.

    mode           who adds noise              deviation of each message      on the mean of P clients
    local          each client, for itself     z 2C/n_p                       z 2C/(n sqrt(P)) for equal n_p = n
    distributed    each client a share         z 2C/(n_min sqrt(P))           z 2C/(n_min P)
    central        the trusted aggregator      0                              z 2C/(n_min P)
"""
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import InvalidSetting

LOCAL, DISTRIBUTED, CENTRAL = NOISE_MODES = ("local", "distributed", "central")
REPLACE_ONE, ADD_REMOVE = NEIGHBOURING = ("replace-one", "add-remove")
# Of the uniform numbers that secure noise is made from: 53 bits fill a float64.
UNIFORM_BITS = 53
# One normal number is the sum of so many, so that no single one's rounding can be read off it.
SUMMED = 4


def sensitivity(clip_norm: float, num_records: float, neighbouring: str) -> float:
    """Return how far one record can move a mean over `num_records` vectors no longer than `clip_norm`.

    Raises:
        InvalidSetting: no such relation.
    """
    if neighbouring not in NEIGHBOURING:
        raise InvalidSetting("neighbouring", neighbouring, " or ".join(NEIGHBOURING))
    return (2 if neighbouring == REPLACE_ONE else 1) * clip_norm / num_records


def message_std(
    mode: str, noise_multiplier: float, clip_norm: float, num_records: float, sizes: Sequence[float],
    neighbouring: str, colluding: int = 0,
) -> float:
    """Return the deviation of the noise that one client adds to its message.

    Args:
        num_records: of this client; of a sample the number to be expected, like `sizes`.
        sizes: records of every client that takes part.
        colluding: clients that may subtract their own shares of distributed noise from the sum.
    """
    if mode == CENTRAL:
        return 0.0
    if mode == LOCAL:
        return noise_multiplier * sensitivity(clip_norm, num_records, neighbouring)
    return noise_multiplier * sensitivity(clip_norm, min(sizes), neighbouring) / math.sqrt(len(sizes) - colluding)


def mean_std(mode: str, noise_multiplier: float, clip_norm: float, sizes: Sequence[float], neighbouring: str) -> float:
    """Return the deviation of the noise on the equal-weight mean of all messages, wherever it was added."""
    if mode == LOCAL:
        own = [message_std(mode, noise_multiplier, clip_norm, size, sizes, neighbouring) for size in sizes]
        return math.sqrt(sum(std * std for std in own)) / len(sizes)
    return noise_multiplier * sensitivity(clip_norm, min(sizes), neighbouring) / len(sizes)


@dataclass
class Tally:
    """What became of records; private itself, so it stays where the records are.

    Attributes:
        records: looked at.
        clipped: longer than the clip norm.
        dropped: not finite, and counted as zero.
    """

    records: int = 0
    clipped: int = 0
    dropped: int = 0


def clip_records(vectors: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Return factors that make vectors no longer than a norm, and which vectors have to be left out.

    Args:
        vectors: one row per record, shape (records, d).

    Returns:
        Factors min(1, C/norm), shape (records,); 0 for rows that are not finite. And whether each row is finite.
    """
    norms = vectors.norm(dim=1)
    usable = torch.isfinite(norms)
    factors = (clip_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(usable, factors, torch.zeros_like(factors)), usable


def clipped_sum(vectors: Tensor, clip_norm: float, tally: Tally | None = None) -> Tensor:
    """Return the sum of rows, each scaled down to `clip_norm`; a row that is not finite counts as zero.

    Leaving such a row out would change the divisor with the data; as zero it keeps the sensitivity as it is.

    Args:
        vectors: shape (records, d).

    Returns:
        Shape (d,).
    """
    factors, usable = clip_records(vectors, clip_norm)
    if tally is not None:
        dropped = int((~usable).sum())
        tally.records, tally.dropped = tally.records + len(vectors), tally.dropped + dropped
        tally.clipped += int((factors < 1).sum()) - dropped
    if not bool(usable.all()):
        vectors = torch.where(usable[:, None], vectors, torch.zeros_like(vectors))
    return factors @ vectors


def noise(std: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return normal noise of a vector's shape and dtype.

    Args:
        generator: seeded, in simulations only; None draws from the operating system's secure source.
    """
    if generator is None:
        drawn = torch.from_numpy(secure_normal(like.numel())).view(like.shape)
    else:
        drawn = torch.randn(like.shape, dtype=torch.float64, generator=generator)
    return (std * drawn).to(like.dtype)


def secure_normal(count: int) -> np.ndarray:
    """Return standard normal numbers that nobody can predict, float64, shape (count,).

    Each is half the sum of four, of which an observer sees no single one: what a float leaves out of one normal number
    could tell which values are possible (Mironov, 2012; Holohan and Braghin, 2021, arXiv:2107.10138).
    """
    pairs = (SUMMED * count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs) >> np.uint64(64 - UNIFORM_BITS)
    uniform = (bits.astype(np.float64) + 0.5) / 2.0**UNIFORM_BITS    # in (0, 1): the logarithm is finite
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:SUMMED * count]
    summed: np.ndarray = normal.reshape(SUMMED, count).sum(axis=0) / math.sqrt(SUMMED)
    return summed
