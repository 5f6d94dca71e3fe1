"""Copies that two peers keep of each other's vector, so that only what changed has to travel, compressed.

For each neighbour j a peer i holds x^_ij, what j knows of its vector, and x^_ji, what it knows of j's. It sends
q = C(x_i - x^_ij), and both ends add q to x^_ij. What one payload leaves out is in the next one's difference, so that
the copies come ever closer. Peers then move by the differences of copies, w_ij (x^_ji - x^_ij): each end the opposite
of the other, so that their sum stays.

Every payload says which message it builds on. Who does not hold the copy that this message left says so with its own
next message, and is then sent the whole vector.

Source: Koloskova, Stich and Jaggi, 2019, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
Communication", arXiv:1902.00340, algorithm 2, with a copy for each neighbour, because messages may be lost.
"""
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedcore.compression.base import Codec
from fedcore.compression.dense import Identity
from fedcore.errors import MalformedPayload

# In place of a message's number: none was seen; the model from which all peers start.
NOTHING, START = -2, -1
# A payload begins with three numbers: its own, that of the message it builds on, and that of the one heard last.
HEAD_BYTES = 24


class Copies:
    """What one peer and its neighbours hold of each other's vector.

    Args:
        codec: of the differences.
        generator: returns that of a message's random choices.
    """

    def __init__(self, codec: Codec, generator: Callable[[int], torch.Generator]):
        self._codec, self._generator = codec, generator
        self._whole = Identity().codec([(codec.num_values,)], codec.dtype)
        self._mine: dict[int, tuple[int, Tensor]] = {}      # by neighbour: the last message to it, and x^_ij after it
        self._theirs: dict[int, tuple[int, Tensor]] = {}    # by neighbour: its last message heard, and x^_ji after it
        self._built_on: dict[int, int] = {}                 # by neighbour: what the last message to it builds on

    def begin(self, params: Tensor, neighbours: "tuple[int, ...]") -> None:
        """Take the vector from which all peers start for known to everybody."""
        for rank in neighbours:
            self._mine[rank] = self._theirs[rank] = (START, params)

    def offers(self, vector: Tensor, neighbours: "tuple[int, ...]", number: int) -> dict[int, Tensor]:
        """Return what to send to each neighbour: bytes. `mine` is what they know of it from then on.

        Args:
            vector: finite, shape (d,).
            number: of the message; each is larger than the one before.
        """
        made: dict[int | None, tuple[Tensor, Tensor]] = {}    # neighbours that hold the same copy get the same payload
        offers = {}
        for held in (self._mine, self._theirs, self._built_on):
            for rank in held.keys() - set(neighbours):
                del held[rank]
        for rank in neighbours:
            after, copy = self._mine.get(rank, (NOTHING, None))
            key = None if copy is None else id(copy)
            if key not in made:
                made[key] = self._encoded(vector, copy, number)
            payload, known = made[key]
            heard = self._theirs[rank][0] if rank in self._theirs else NOTHING
            self._mine[rank], self._built_on[rank] = (number, known), after
            offers[rank] = torch.cat([torch.tensor([number, after, heard]).view(torch.uint8), payload])
        return offers

    def _encoded(self, vector: Tensor, copy: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        if copy is None:
            return self._whole.encode(vector, self._generator(number)), vector
        payload = self._codec.encode(vector - copy, self._generator(number))
        return payload, copy + self._codec.decode(payload)

    def hear(self, rank: int, offer: Tensor) -> bool:
        """Take in a neighbour's answer to an offer; returns whether both ends hold the same copies now.

        Args:
            offer: bytes.

        Raises:
            MalformedPayload: these bytes are no message of a neighbour.
        """
        if offer.dtype != torch.uint8 or offer.ndim != 1 or len(offer) < HEAD_BYTES:
            raise MalformedPayload(f"a message of {offer.numel()} values of {offer.dtype} holds no numbers")
        number, after, heard = offer[:HEAD_BYTES].clone().view(torch.int64).tolist()
        if self._built_on.get(rank, NOTHING) not in (NOTHING, heard):
            self._mine.pop(rank, None)    # it cannot use what was sent: the next message to it is the whole vector
        payload, known = offer[HEAD_BYTES:], self._theirs.get(rank)
        if after == NOTHING:
            self._theirs[rank] = number, self._whole.decode(payload)
        elif known is None or known[0] != after:
            self._theirs.pop(rank, None)
            return False
        else:
            self._theirs[rank] = number, known[1] + self._codec.decode(payload)
        return rank in self._mine

    def mine(self, rank: int) -> Tensor:
        """Return x^_ij, what a neighbour knows of this peer's vector."""
        return self._mine[rank][1]

    def theirs(self, rank: int) -> Tensor:
        """Return x^_ji, what this peer knows of a neighbour's vector."""
        return self._theirs[rank][1]

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart; copies that several neighbours share are in it once."""
        shared: list[Tensor] = []
        mine = {}
        for rank, (number, copy) in self._mine.items():
            place = next((index for index, other in enumerate(shared) if other is copy), len(shared))
            if place == len(shared):
                shared.append(copy)
            mine[rank] = [number, place]
        theirs = {rank: [number, copy] for rank, (number, copy) in self._theirs.items()}
        return {"mine": mine, "shared": shared, "theirs": theirs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        shared = list(state["shared"])
        self._mine = {rank: (number, shared[place]) for rank, (number, place) in state["mine"].items()}
        self._theirs = {rank: (number, copy) for rank, (number, copy) in state["theirs"].items()}
