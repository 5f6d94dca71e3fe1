"""Compressed model updates on the wire: what a request asks for, what a reply holds, and the reading of both.

A request for training may have one more record, `fedcore.compression`. The reply then carries, in place of the model's
trainable entries, one array of bytes: the payload of *trained minus received*, plus what earlier payloads of this
client left out where the request asks for error feedback. Buffers travel as they are.
"""
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedcore.arrays import LazyArray
from fedcore.compression.base import Codec, Compressor
from fedcore.compression.named import codec_asked_for, registered_compressor
from fedcore.errors import InvalidSetting, MalformedReply, MalformedRequest, shown
from fedcore.flower import record_of
from fedcore.payload import (
    ARRAY_HEADER_BYTES,
    COMPRESSION_ERROR,
    REPLY,
    SCALAR_BYTES,
    VectorRecord,
    read_array,
    read_arrays,
    single_record,
)
from fedcore.vectors import Layout, Model, TensorSpec, check_names

ASKED = "fedcore.compression"    # of a request, what is asked; of a reply, which request it answers
PAYLOAD = "fedcore.payload"      # the entry of a reply's arrays that stands for all trainable ones
# No task of this client's was used yet.
NEVER = -1
# Of a model on which a compressor is tried out before the real one is known.
TRIAL_SHAPE = (100, 100)


@dataclass(frozen=True)
class Compression:
    """How clients compress what they have learnt, whatever the strategy.

    Attributes:
        compressor: built from `spec`, its name and settings.
        error_feedback: whether a client adds to each update what was left out of those before.
    """

    spec: Mapping[str, Any]
    error_feedback: bool = True
    compressor: Compressor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        compressor = registered_compressor(self.spec, "compression")
        object.__setattr__(self, "compressor", compressor)
        trial = compressor.codec([TRIAL_SHAPE], torch.float32)
        if self.error_feedback and trial.contraction is None:
            raise InvalidSetting("compression", dict(self.spec), "contractive, or error_feedback: false",
                                 "Error feedback diverges with a compressor that is not contractive.")

    @classmethod
    def of(cls, settings: str | Mapping[str, Any]) -> Self:
        """Read an experiment's `compression`: a compressor's name, alone or among its settings and `error_feedback`.

        Raises:
            InvalidSetting: no such compressor, or a setting that it does not have.
        """
        spec = {"name": settings} if isinstance(settings, str) else dict(settings)
        feedback = spec.pop("error_feedback", True)
        if not isinstance(feedback, bool):
            raise InvalidSetting("compression.error_feedback", feedback, "true or false")
        return cls(spec, feedback)

    @cached_property
    def wire_spec(self) -> str:
        """The compressor as clients are told it."""
        return json.dumps(dict(self.spec))

    def codec(self, layout: Layout) -> Codec:
        """Return the compressor as it suits a model."""
        return codec_asked_for(self.wire_spec, layout)

    def ask(self, content: RecordDict, number: int, after: int, seed: int, layout: Layout) -> RecordDict:
        """Return a training request that asks for a compressed update; the one given is not changed.

        Args:
            number: of the task.
            after: the last task of this client's whose answer was, or may still be used; `NEVER`: none.
            seed: of the compressor's random choices.
            layout: of the model.
        """
        asked: dict[str, Any] = {"compressor": self.wire_spec, "error-feedback": self.error_feedback, "number": number,
                                 "after": after, "seed": seed}
        if layout.buffers:
            asked["buffers"] = [spec.name for spec in layout.buffers]
        return RecordDict({**content, ASKED: ConfigRecord(asked)})

    def open(self, content: RecordDict, number: int, kind: str, layout: Layout, base: Model | None) -> RecordDict:
        """Return a reply as if it had never been compressed.

        Args:
            number: of the task that it must answer.
            kind: `update` (trained minus received) or `model` (trained values).
            base: the model that was sent; needed for `model`.

        Raises:
            MalformedReply: it is not compressed, answers another task, or cannot be decoded.
        """
        said = content.get(ASKED)
        if not isinstance(said, ConfigRecord):
            raise MalformedReply("it is not compressed, although that was asked: the client needs fedcore's "
                                 "compression_mod")
        if said.get("number") != number:
            raise MalformedReply(f"it is the compressed answer to task {shown(said.get('number'))}, not {number}")
        arrays = single_record(content, ArrayRecord, "arrays")
        values, buffers = read_compressed(arrays, self.codec(layout), layout)
        opened = dict(content.items())
        del opened[ASKED]
        if kind == "model":
            assert base is not None
            values = base.params + values
        echo = opened.get(REPLY)
        if kind == "update" or isinstance(echo, ConfigRecord):
            opened[REPLY] = ConfigRecord({**(echo if isinstance(echo, ConfigRecord) else {}), "kind": kind})
        # Flower's wire knows plain records only, but nothing of this goes over one any more.
        opened[next(name for name, record in opened.items() if record is arrays)] = VectorRecord.of(
            values, buffers, layout)
        return record_of(RecordDict, opened)


@dataclass(frozen=True)
class Asked:
    """What a request says about compression.

    Attributes:
        number, after, seed: see `Compression.ask`.
        buffers: names of the entries that are not compressed.
    """

    compressor: str
    error_feedback: bool
    number: int
    after: int
    seed: int
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, content: RecordDict) -> "Asked | None":
        """Read a request; None when it does not ask for compression.

        Raises:
            MalformedRequest: an entry is missing or has no meaning.
        """
        record = content.get(ASKED)
        if record is None:
            return None
        entries: dict[str, Any] = dict(record.items()) if isinstance(record, ConfigRecord) else {}
        kinds = {"compressor": str, "error-feedback": bool, "number": int, "after": int, "seed": int}
        for name, kind in kinds.items():
            if type(entries.get(name)) is not kind:
                raise MalformedRequest(f"The request's {ASKED} has {name}={entries.get(name)!r}, which is not usable.")
        buffers = entries.get("buffers", [])
        if not isinstance(buffers, list):
            raise MalformedRequest(f"The request's {ASKED} has buffers={buffers!r}, which are no names.")
        return cls(entries["compressor"], entries["error-feedback"], entries["number"], entries["after"],
                   entries["seed"], tuple(buffers))

    def layout(self, received: ArrayRecord) -> Layout:
        """Return the layout of the model that came with the request.

        Raises:
            MalformedRequest: the arrays are no model whose trainable entries make up one vector.
        """
        if isinstance(received, VectorRecord) and received.model is not None:
            return received.model.layout
        specs = [TensorSpec(name, tuple(array.shape), array.dtype) for name, array in received.items()]
        params = tuple(spec for spec in specs if spec.name not in self.buffers)
        dtypes = {spec.dtype for spec in params}
        if dtypes not in ({"float32"}, {"float64"}):
            found = ", ".join(sorted(dtypes)) or "nothing"
            raise MalformedRequest(f"The entries to be compressed are {found}; all must be float32, or all float64.")
        return Layout(params, tuple(spec for spec in specs if spec.name in self.buffers),
                      tuple(spec.name for spec in specs))

    def codec(self, layout: Layout) -> Codec:
        """Return the compressor, fitted to the model.

        Raises:
            MalformedRequest: it is none that this client knows.
        """
        return codec_asked_for(self.compressor, layout)

    def saved_bytes(self, layout: Layout) -> int:
        """Return by how much compression makes a reply shorter on the wire."""
        trainable = sum(spec.num_bytes + ARRAY_HEADER_BYTES for spec in layout.params)
        # The payload, the number of the task, and the metric.
        return trainable - (self.codec(layout).num_bytes + ARRAY_HEADER_BYTES + 2 * SCALAR_BYTES)


def seal(content: RecordDict, asked: Asked, payload: Tensor, unsent: float, layout: Layout) -> RecordDict:
    """Return a reply with a payload in place of its trainable entries.

    Args:
        content: the reply of a client that knows nothing of compression.
        unsent: share of the squared norm that the payload leaves out, for the metrics.
    """
    arrays = single_record(content, ArrayRecord, "arrays")
    metrics = single_record(content, MetricRecord, "metrics")
    packed = ArrayRecord()
    packed[PAYLOAD] = LazyArray(payload.numpy())
    for spec in layout.buffers:
        packed[spec.name] = arrays[spec.name]
    sealed: dict[str, Any] = {ASKED: ConfigRecord({"number": asked.number})}
    for name, record in content.items():
        sealed[name] = packed if record is arrays else record
        if record is metrics:
            sealed[name] = MetricRecord({**record, COMPRESSION_ERROR: unsent})
    return RecordDict(sealed)


def learnt(content: RecordDict, received: Tensor, layout: Layout) -> Tensor:
    """Return trained minus received, shape (d,), of a reply that holds either that or the trained values.

    Args:
        received: the trainable values that were sent, shape (d,).

    Raises:
        MalformedReply: the reply's arrays are not those of the model that it was sent.
    """
    values, _ = read_arrays(single_record(content, ArrayRecord, "arrays"), layout)
    echo = content.get(REPLY)
    if isinstance(echo, ConfigRecord) and echo.get("kind") == "update":
        return values
    return values - received


def read_compressed(arrays: ArrayRecord, codec: Codec, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the vector in a compressed reply, shape (d,), and its buffers.

    Raises:
        MalformedReply: names, shapes or dtypes are wrong, or the payload is none of this codec's.
    """
    check_names(arrays, (PAYLOAD, *(spec.name for spec in layout.buffers)))
    payload = read_array(arrays[PAYLOAD], TensorSpec(PAYLOAD, (codec.num_bytes,), "uint8"))
    buffers = {spec.name: torch.from_numpy(read_array(arrays[spec.name], spec).copy()) for spec in layout.buffers}
    return codec.decode(torch.from_numpy(payload.copy())), buffers
