"""What a client answers to a request for a compressed gradient, and the validation of it.

The payloads travel as arrays of bytes: `payload` is D, `start` the gradient estimate that a client begins with.
"""
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedcore.arrays import LazyArray
from fedcore.compression.base import Codec
from fedcore.errors import MalformedReply, shown
from fedcore.payload import (
    ARRAYS,
    REPLY,
    check_finite,
    read_array,
    read_num_examples,
    single_record,
)
from fedcore.vectors import Layout, TensorSpec, check_names

# The message type, and the action that a ClientApp registers for it.
GRADIENT, ACTION = "train.gradient", "gradient"
PAYLOAD, START, BUFFERS, BEGINS, ESTIMATE = "payload", "start", "buffers", "begins", "estimate"


@dataclass(frozen=True)
class Contribution:
    """A client's answer that passed validation.

    Attributes:
        begins: the client starts from nothing, because it is new or has forgotten.
        start: its estimate h_0, shape (d,); None where it has none, or zero.
        sent: D, shape (d,); None in a round in which h_0 says it all.
        estimate: fingerprint of the h that the client has now; None where the method has none.
        buffers: non-trainable values, by name.
    """

    begins: bool
    start: Tensor | None
    sent: Tensor | None
    estimate: int | None
    metrics: dict[str, Any]
    buffers: dict[str, Tensor]

    @property
    def values(self) -> Tensor:
        """Whatever vector it brought."""
        vector = self.start if self.sent is None else self.sent
        assert vector is not None
        return vector


def fingerprint(vector: Tensor) -> int:
    """Return a short number that two vectors of different bits hardly ever share (CRC-32)."""
    return zlib.crc32(vector.contiguous().numpy().data)


def contribution_arrays(payload: Tensor | None, start: Tensor | None) -> ArrayRecord:
    """Return payloads as a record, without copying them."""
    named = {PAYLOAD: payload, START: start}
    record = ArrayRecord()
    for name, vector in named.items():
        if vector is not None:
            record[name] = LazyArray(vector.numpy())
    return record


def read_contribution(
    content: RecordDict, codec: Codec, start_codec: Codec | None, start_suffices: bool, layout: Layout
) -> Contribution:
    """Validate an answer.

    Args:
        codec: of D.
        start_codec: of the h_0 of a client that begins; None where it sends none.
        start_suffices: whether a client that begins sends its h_0 alone.

    Raises:
        MalformedReply: a record is missing, a payload cannot be decoded, a value is not finite.
    """
    metrics: dict[str, Any] = dict(single_record(content, MetricRecord, "metrics").items())
    read_num_examples(metrics)
    loss = metrics.get("loss")
    if not isinstance(loss, (int, float)) or not math.isfinite(loss):
        raise MalformedReply("the metrics have no finite number under 'loss'")
    arrays, said = content.get(ARRAYS), content.get(REPLY)
    if not isinstance(arrays, ArrayRecord) or not isinstance(said, ConfigRecord):
        raise MalformedReply("the reply has no arrays, or no record of what they are")
    begins = said.get(BEGINS)
    if not isinstance(begins, bool):
        raise MalformedReply(f"the reply does not say under {BEGINS!r} whether the client begins")
    estimate = said.get(ESTIMATE)
    if estimate is not None and not isinstance(estimate, int):
        raise MalformedReply(f"the fingerprint under {ESTIMATE!r} is {shown(estimate)}, but must be a whole number")
    codecs = {}
    if begins and start_codec is not None:
        codecs[START] = start_codec
    if START not in codecs or not start_suffices:
        codecs[PAYLOAD] = codec
    check_names(arrays, tuple(codecs))
    vectors = {name: _decoded(arrays, name, one) for name, one in codecs.items()}
    buffers = _read_buffers(content, layout)
    return Contribution(begins, vectors.get(START), vectors.get(PAYLOAD), estimate, metrics, buffers)


def read_payload(arrays: ArrayRecord, codec: Codec, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the bytes and the buffers in the arrays of a compressed model.

    Raises:
        MalformedReply: names, shapes or dtypes are wrong.
    """
    check_names(arrays, (PAYLOAD, *(spec.name for spec in layout.buffers)))
    payload = read_array(arrays[PAYLOAD], TensorSpec(PAYLOAD, (codec.num_bytes,), "uint8"))
    buffers = {spec.name: torch.from_numpy(read_array(arrays[spec.name], spec).copy()) for spec in layout.buffers}
    return torch.from_numpy(payload.copy()), buffers


def _decoded(arrays: ArrayRecord, name: str, codec: Codec) -> Tensor:
    view = read_array(arrays[name], TensorSpec(name, (codec.num_bytes,), "uint8"))
    return codec.decode(torch.from_numpy(view.copy()))


def _read_buffers(content: RecordDict, layout: Layout) -> dict[str, Tensor]:
    if not layout.buffers:
        return {}
    record = content.get(BUFFERS)
    if not isinstance(record, ArrayRecord):
        raise MalformedReply("the reply lacks the model's non-trainable values")
    check_names(record, tuple(spec.name for spec in layout.buffers))
    buffers = {spec.name: torch.from_numpy(read_array(record[spec.name], spec).copy()) for spec in layout.buffers}
    check_finite(torch.zeros(1), buffers)
    return buffers
