"""What a peer compresses with, and what it remembers of what its payloads left out.

With error feedback a peer that has v to give sends C(e + v) and keeps e <- e + v - C(e + v), so that nothing is lost,
only late. Everybody, the sender too, goes on with what the payload holds.

Source: Seide et al., 2014, in the form of Stich et al., 2018, arXiv:1809.07599.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.compressed import Compression
from fedcore.compression.base import Codec
from fedcore.config import Experiment
from fedcore.peers.copies import Copies
from fedcore.peers.envelope import ALONE, payload_bytes
from fedcore.peers.ring import chunk_bounds
from fedcore.seeds import torch_generator
from fedcore.vectors import Layout


class Packing:
    """A peer's compressor and its memory.

    Attributes:
        codec: fitted to the model.
        error_feedback: whether what payloads leave out is added to later ones.
    """

    def __init__(self, compression: Compression, layout: Layout, seed: int, rank: int):
        self.codec, self.error_feedback = compression.codec(layout), compression.error_feedback
        self._seed, self._rank = seed, rank
        self._errors: dict[str, Tensor] = {}      # e, by tag
        self._copies: dict[str, Copies] = {}      # by tag

    def pack(self, vector: Tensor, tag: str, number: int) -> Tensor:
        """Return the payload of a vector, with what earlier ones of the same tag left out: bytes, shape (num_bytes,).

        Args:
            vector: finite, shape (d,).
            number: counts the payloads of a tag.
        """
        left_out = self._errors.get(tag)
        whole = vector if left_out is None else left_out + vector
        payload = self.codec.encode(whole, self.generator(tag, number))
        if self.error_feedback and not self.codec.is_exact:
            self._errors[tag] = whole - self.codec.decode(payload)
        return payload

    def generator(self, tag: str, number: int) -> torch.Generator:
        """Return the generator of one payload's random choices."""
        return torch_generator(self._seed, self._rank, "compress", tag, number)

    def copies(self, tag: str) -> Copies:
        """Return what this peer and others hold of each other's vector; see `Copies`."""
        if tag not in self._copies:
            self._copies[tag] = Copies(self.codec, lambda number: self.generator(tag, number))
        return self._copies[tag]

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {"errors": dict(self._errors), "copies": {tag: held.state_dict() for tag, held in self._copies.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._errors = dict(state["errors"])
        for tag, held in state["copies"].items():
            self.copies(tag).load_state_dict(held)


def packing_for(settings: Experiment, layout: Layout, rank: int) -> Packing | None:
    """Return what a peer of an experiment compresses with; None where nothing is."""
    if settings.compression is None:
        return None
    return Packing(Compression.of(settings.compression), layout, settings.seed, rank)


@dataclass(frozen=True, eq=False)
class Packed:
    """What a member brings to a mean: a payload, which travels to all others as it is.

    Attributes:
        payload: bytes, shape (num_bytes,).
        base: (d,) what the payloads are differences to, the same at all members; None: to nothing.
    """

    payload: Tensor
    codec: Codec
    base: Tensor | None = None

    def bytes_sent(self, count: int) -> int:
        """Return how many bytes a member of so many sends, and receives: all payloads but one pass by it."""
        return (count - 1) * payload_bytes({ALONE: self.payload})

    def mean(self, payloads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the base plus the weighted mean of all members' payloads, shape (d,).

        Terms are added as a ring all-reduce adds them (`ring.py`), so that a compressor that changes nothing changes no
        bit. Each payload is opened twice, which spares the memory of all vectors at once.

        Args:
            payloads: in ascending order of rank.
            weights: of the members; all zero: nobody has anything to give.
        """
        total = torch.empty(self.codec.num_values, dtype=self.codec.dtype)
        bounds = chunk_bounds(len(total), len(payloads))
        for first in (True, False):
            # Chunk c begins with member c: the members from c on come first, then those before it.
            for (start, end), payload, weight in zip(bounds, payloads, weights, strict=True):
                vector = self.codec.decode(payload)
                vector = vector if weight in (0.0, 1.0) else weight * vector
                if first:
                    total[:start] += vector[:start]
                    total[start:end] = vector[start:end]
                else:
                    total[end:] += vector[end:]
        share = sum(weights)
        mean = total / share if share else total
        return mean if self.base is None else self.base + mean
