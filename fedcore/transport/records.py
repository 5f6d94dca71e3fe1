"""Flower's records as a head and buffers, and back, without pickle and without copying tensors.

What arrives was written by a stranger: `Plan.of` checks a head completely, and says how much memory its body needs,
before any is taken.
"""
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from fedcore.arrays import LazyArray, array_view
from fedcore.errors import MalformedFrame, MalformedReply, shown
from fedcore.payload import VectorRecord
from fedcore.transport.frames import MAX_HEAD_BYTES, Framed, padded
from fedcore.vectors import FLAT_DTYPES, Layout, Model, TensorSpec

DTYPES = frozenset((
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128",
))
MAX_DIMENSIONS = 32
LONGEST_REASON = 16_000    # characters of a failure that travel
# Lists of numbers longer than this travel in the body.
LONGEST_LIST = 64
INT64 = 2**63
SCALARS = (bool, int, float, str)

Content = RecordDict | Error


def encode(content: Content, **facts: Any) -> Framed:
    """Return content, and further facts about the message, ready to be sent; arrays' memory is shared.

    Raises:
        MalformedFrame: the head would be too long.
    """
    buffers: list[memoryview] = []
    if isinstance(content, Error):
        head = {**facts, "error": [content.code, (content.reason or "")[:LONGEST_REASON]]}
    else:
        head = {**facts, "records": [[name, *_record(record, buffers)] for name, record in content.items()]}
    return Framed.of(json.dumps(head, separators=(",", ":")).encode(), buffers)


def _bytes_of(values: np.ndarray) -> memoryview:
    if not values.nbytes:
        return memoryview(b"")
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _record(record: Any, buffers: list[memoryview]) -> tuple[str, Any]:
    if isinstance(record, VectorRecord) and (model := record.model) is not None:
        buffers.append(_bytes_of(model.params.numpy()))
        buffers.extend(_bytes_of(model.buffers[spec.name].numpy()) for spec in model.layout.buffers)
        return "vector", _layout_body(model.layout)
    if isinstance(record, ArrayRecord):
        return "arrays", [[name, *_array(array, buffers)] for name, array in record.items()]
    kind = "metrics" if isinstance(record, MetricRecord) else "config"
    return kind, [[name, _value(value, buffers)] for name, value in record.items()]


def _array(array: Array, buffers: list[memoryview]) -> tuple[Any, ...]:
    try:
        values = array_view(array)
    except MalformedReply:
        values = None
    if values is None or str(values.dtype) not in DTYPES or (str(values.dtype), values.shape) != (
            array.dtype, tuple(array.shape)):
        buffers.append(memoryview(array.data))    # something of the user's own: as it is
        return array.dtype, list(array.shape), array.stype, len(array.data)
    buffers.append(_bytes_of(values))
    return array.dtype, list(array.shape)


def _value(value: Any, buffers: list[memoryview]) -> Any:
    if isinstance(value, bytes):
        buffers.append(memoryview(value))
        return {"bytes": len(value)}
    if not isinstance(value, list):
        return value
    kinds = set(map(type, value))
    if kinds == {bytes}:
        buffers.append(memoryview(b"".join(value)))
        return {"cut": list(map(len, value))}
    if len(value) > LONGEST_LIST and (kinds == {float} or (
            kinds == {int} and -INT64 <= min(value) and max(value) < INT64)):
        values = np.array(value, np.float64 if kinds == {float} else np.int64)
        buffers.append(_bytes_of(values))
        return {"list": str(values.dtype), "length": len(value)}
    return value


@lru_cache(maxsize=8)
def _layout_body(layout: Layout) -> dict[str, Any]:
    def specs(entries: tuple[TensorSpec, ...]) -> list[Any]:
        return [[spec.name, spec.dtype, list(spec.shape)] for spec in entries]

    return {"params": specs(layout.params), "buffers": specs(layout.buffers), "order": list(layout.order)}


# ---- reading ------------------------------------------------------------------------------------------------------


def parse(data: bytes | memoryview) -> dict[str, Any]:
    """Return a JSON object that a stranger wrote.

    Raises:
        MalformedFrame: it is none, or longer than allowed.
    """
    if len(data) > MAX_HEAD_BYTES:
        raise MalformedFrame(f"a head of {len(data)} bytes came, but {MAX_HEAD_BYTES} are allowed")
    try:
        found = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise MalformedFrame("a head came that is not JSON") from error
    if not isinstance(found, dict):
        raise MalformedFrame(f"a head came that is a {type(found).__name__}, not an object")
    return found


class Plan:
    """What a message will hold, known from its head.

    Attributes:
        facts: what the head says beside its records.
        size: bytes that the body takes.
    """

    def __init__(self, head: Mapping[str, Any]):
        self.facts = {name: value for name, value in head.items() if name not in ("records", "error")}
        self.size = 0
        self._error: Error | None = None
        self._makers: dict[str, Callable[[np.ndarray], Any]] = {}
        if "error" in head:
            self._error = _read_error(head["error"])
            return
        for entry in _list(head.get("records"), "records"):
            if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)):
                raise MalformedFrame("a record is not described by its name, its kind and its entries")
            name, kind, body = entry
            read = _READERS.get(kind) if isinstance(kind, str) else None
            if read is None or name in self._makers:
                raise MalformedFrame(f"a record {shown(name)} of kind {shown(kind)} came twice, or is unknown")
            self._makers[name] = read(self, body)

    @classmethod
    def of(cls, head: bytes | memoryview | Mapping[str, Any]) -> "Plan":
        """Check a head.

        Raises:
            MalformedFrame: nobody of ours wrote it.
        """
        return cls(head if isinstance(head, Mapping) else parse(head))

    def build(self, body: np.ndarray) -> Content:
        """Return the content; arrays are views of the body, shape (size,), uint8.

        Raises:
            MalformedFrame: a value is none that Flower's records hold.
        """
        assert body.shape == (self.size,)
        if self._error is not None:
            return self._error
        try:
            return RecordDict({name: make(body) for name, make in self._makers.items()})
        except (TypeError, ValueError, OverflowError) as error:
            raise MalformedFrame(f"a record holds what no record may hold: {str(error)[:200]}") from error

    def reserve(self, num_bytes: int) -> int:
        """Return where the next buffer starts, and go on behind it."""
        start = self.size
        self.size += padded(num_bytes)
        return start

    def values(self, dtype: Any, shape: Any) -> Callable[[np.ndarray], np.ndarray]:
        """Reserve an array's memory; returns what takes the array out of the body."""
        if not _is_dtype(dtype):
            raise MalformedFrame(f"values of type {shown(dtype)} came")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
            raise MalformedFrame(f"an array of shape {shown(shape)} came")
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        start = self.reserve(num_bytes)
        return lambda body: body[start:start + num_bytes].view(dtype).reshape(shape)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPES


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise MalformedFrame(f"{what} are not a list")
    return value


def _read_error(body: Any) -> Error:
    if not (isinstance(body, list) and len(body) == 2 and type(body[0]) is int and isinstance(body[1], str)):
        raise MalformedFrame("an error is not described by its code and its reason")
    return Error(body[0], body[1][:LONGEST_REASON])


def _read_vector(plan: Plan, body: Any) -> Callable[[np.ndarray], VectorRecord]:
    if not isinstance(body, dict):
        raise MalformedFrame("a vector has no layout")
    layout = _read_layout(json.dumps(body, sort_keys=True))
    params = plan.values(layout.params[0].dtype, [layout.num_params])
    buffers = [(spec, plan.values(spec.dtype, list(spec.shape))) for spec in layout.buffers]

    def make(memory: np.ndarray) -> VectorRecord:
        tensors = {spec.name: torch.from_numpy(values(memory)) for spec, values in buffers}
        return VectorRecord(Model(torch.from_numpy(params(memory)), tensors, layout))

    return make


@lru_cache(maxsize=8)
def _read_layout(text: str) -> Layout:
    body = json.loads(text)
    found = {"params": _specs(body.get("params")), "buffers": _specs(body.get("buffers"))}
    names = [spec.name for specs in found.values() for spec in specs]
    order = _list(body.get("order"), "names")
    known = all(isinstance(name, str) for name in order) and len(set(names)) == len(names)
    if not known or sorted(order) != sorted(names):
        raise MalformedFrame("a layout's names are not one for each tensor")
    dtypes = {spec.torch_dtype for spec in found["params"]}
    if len(dtypes) != 1 or not dtypes <= set(FLAT_DTYPES):
        raise MalformedFrame("a vector's entries are not all float32, or all float64")
    return Layout(found["params"], found["buffers"], tuple(order))


def _specs(body: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for entry in _list(body, "a layout's tensors"):
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and _is_dtype(entry[1])
                and isinstance(entry[2], list) and len(entry[2]) <= MAX_DIMENSIONS and all(map(_is_count, entry[2]))):
            raise MalformedFrame("a tensor is not described by its name, dtype and shape")
        specs.append(TensorSpec(entry[0], tuple(entry[2]), entry[1]))
    return tuple(specs)


def _read_arrays(plan: Plan, body: Any) -> Callable[[np.ndarray], ArrayRecord]:
    makers = {}
    for entry in _list(body, "arrays"):
        if not isinstance(entry, list) or len(entry) not in (3, 5) or not isinstance(entry[0], str):
            raise MalformedFrame("an array is not described by its name, dtype and shape")
        makers[entry[0]] = _read_array(plan, entry)

    def make(memory: np.ndarray) -> ArrayRecord:
        record = ArrayRecord()
        for name, maker in makers.items():
            record[name] = maker(memory)
        return record

    return make


def _read_array(plan: Plan, entry: list[Any]) -> Callable[[np.ndarray], Array]:
    if len(entry) == 3:
        values = plan.values(entry[1], entry[2])
        return lambda memory: LazyArray(values(memory))
    _, dtype, shape, stype, num_bytes = entry
    described = isinstance(dtype, str) and isinstance(stype, str) and isinstance(shape, list)
    if not described or not _is_count(num_bytes) or not all(map(_is_count, shape)):
        raise MalformedFrame("an array of a foreign kind is not described")
    start = plan.reserve(num_bytes)
    return lambda memory: Array(dtype, tuple(shape), stype, memory[start:start + num_bytes].tobytes())


def _read_scalars(
    kind: type[ConfigRecord] | type[MetricRecord]
) -> Callable[[Plan, Any], Callable[[np.ndarray], ConfigRecord | MetricRecord]]:
    def read(plan: Plan, body: Any) -> Callable[[np.ndarray], ConfigRecord | MetricRecord]:
        makers: dict[str, Callable[[np.ndarray], Any]] = {}
        for entry in _list(body, "entries"):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise MalformedFrame("an entry is not a name with a value")
            makers[entry[0]] = _read_value(plan, entry[1])
        return lambda memory: kind({name: make(memory) for name, make in makers.items()})

    return read


def _read_value(plan: Plan, value: Any) -> Callable[[np.ndarray], Any]:
    if not isinstance(value, dict):
        if not isinstance(value, (*SCALARS, list)):
            raise MalformedFrame(f"a value is {shown(value)}")
        return lambda memory: value
    length, cuts, dtype = value.get("bytes"), value.get("cut"), value.get("list")
    if _is_count(length):
        assert length is not None
        start = plan.reserve(length)
        return lambda memory: memory[start:start + length].tobytes()
    if isinstance(cuts, list) and all(map(_is_count, cuts)):
        return _read_cuts(plan, cuts)
    if dtype in ("int64", "float64"):
        values = plan.values(dtype, [value.get("length")])
        return lambda memory: values(memory).tolist()
    raise MalformedFrame("a value is described in an unknown way")


def _read_cuts(plan: Plan, cuts: list[int]) -> Callable[[np.ndarray], list[bytes]]:
    start = plan.reserve(sum(cuts))

    def make(memory: np.ndarray) -> list[bytes]:
        ends = (start + np.cumsum([0, *cuts])).tolist()
        return [memory[begin:end].tobytes() for begin, end in zip(ends[:-1], ends[1:], strict=True)]

    return make


_READERS: dict[str, Callable[[Plan, Any], Callable[[np.ndarray], Any]]] = {
    "vector": _read_vector, "arrays": _read_arrays, "metrics": _read_scalars(MetricRecord),
    "config": _read_scalars(ConfigRecord),
}
