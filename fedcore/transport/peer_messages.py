"""Envelopes of peers as framed messages: a head that says what they are, and their vectors' memory behind it."""
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import MalformedFrame, shown
from fedcore.peers.envelope import Envelope, payload_bytes
from fedcore.transport.frames import Framed, padded
from fedcore.transport.records import parse

DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "uint8": torch.uint8}
MOST_VECTORS, LONGEST_NAME = 64, 100
TEXTS, COUNTS = ("run", "kind", "tag"), ("epoch", "round", "source")


def frame(envelope: Envelope) -> Framed:
    """Return an envelope ready to be sent; its vectors' memory is not copied."""
    arrays, buffers = [], []
    for name, tensor in envelope.data.items():
        values = tensor.detach().contiguous().numpy()
        arrays.append([name, str(values.dtype), list(values.shape)])
        buffers.append(values.reshape(-1).view(np.uint8).data)
    head = {name: getattr(envelope, name) for name in (*TEXTS, *COUNTS)}
    text = json.dumps({**head, "meta": dict(envelope.meta), "arrays": arrays}, separators=(",", ":"))
    return Framed.of(text.encode(), buffers)


class Arriving:
    """An envelope whose head has come.

    Attributes:
        size: bytes that its body takes.

    Raises:
        MalformedFrame: nobody of ours wrote the head.
    """

    def __init__(self, head: bytes):
        facts = parse(head)
        self._fields: dict[str, Any] = {}
        for names, kind in ((TEXTS, str), (COUNTS, int)):
            for name in names:
                if type(facts.get(name)) is not kind:
                    raise MalformedFrame(f"an envelope's {name} is {shown(facts.get(name))}")
                self._fields[name] = facts[name]
        if not isinstance(facts.get("meta"), dict) or not isinstance(facts.get("arrays"), list):
            raise MalformedFrame("an envelope has no meta or no arrays")
        self._meta, self.size = facts["meta"], 0
        self._arrays: list[tuple[str, str, list[int], int, int]] = []
        if len(facts["arrays"]) > MOST_VECTORS:
            raise MalformedFrame(f"an envelope with {len(facts['arrays'])} vectors came")
        for entry in facts["arrays"]:
            self._reserve(entry)

    def _reserve(self, entry: Any) -> None:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
                and len(entry[0]) <= LONGEST_NAME and entry[1] in DTYPES and isinstance(entry[2], list)
                and all(type(size) is int and size >= 0 for size in entry[2])):
            raise MalformedFrame(f"an envelope holds a vector described as {shown(entry)}")
        num_bytes = math.prod(entry[2]) * DTYPES[entry[1]].itemsize
        self._arrays.append((entry[0], entry[1], entry[2], self.size, num_bytes))
        self.size += padded(num_bytes)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where in the body each vector that is not empty begins, and how many bytes it takes."""
        return [(start, num_bytes) for _, _, _, start, num_bytes in self._arrays if num_bytes]

    def build(self, body: np.ndarray) -> Envelope:
        """Return the envelope; its vectors are views of the body, shape (size,), uint8."""
        data: dict[str, Tensor] = {}
        for name, dtype, shape, start, num_bytes in self._arrays:
            data[name] = torch.from_numpy(body[start:start + num_bytes].view(dtype).reshape(shape))
        return Envelope(**self._fields, data=data, meta=self._meta, num_bytes=payload_bytes(data))
