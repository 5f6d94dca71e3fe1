"""What travels between server and clients, on top of Flower's records, and the validation of what arrives.

A request carries the model (`arrays`) and a `config`; a reply carries `arrays` and `metrics`. That is what Flower's
FedAvg sends and expects, so its strategies and ours understand the same clients. A request that asks for it
(`reply: update`) is answered with *trained minus received* in the entries of trainable parameters.
"""
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedcore.arrays import NUMPY_ARRAY, LazyArray, Reading, array_view, twins
from fedcore.errors import MalformedReply, UnsupportedModel, shown
from fedcore.flower import record_of
from fedcore.vectors import FLAT_DTYPES, Layout, Model, TensorSpec, check_names, mismatch

ARRAYS, CONFIG, METRICS, REPLY, INFO = "arrays", "config", "metrics", "reply", "info"
# The metric by which a client says what share of the squared norm its compressed message left out.
COMPRESSION_ERROR = "compression-error"

# An `.npy` header is 128 bytes for every array of fewer than about 10 dimensions.
ARRAY_HEADER_BYTES = 128
SCALAR_BYTES = 8
FIXED_SIZE = (int, float, bool)
MAX_NUM_EXAMPLES = 10**12
MAX_WORK = 10**12    # steps or seconds: nobody has done more

R = TypeVar("R", ArrayRecord, MetricRecord)


class VectorRecord(ArrayRecord):
    """A model's arrays as views of its flat vector: built and read without copying.

    Reads and writes like any ArrayRecord. Once somebody changes an entry it stops being a view of the vector.

    Raises:
        UnsupportedModel: values whose shapes or dtypes are not those of the layout.
    """

    def __init__(self, model: Model):
        super().__init__()
        layout = model.layout
        if model.params.shape != (layout.num_params,) or model.params.dtype != layout.dtype:
            _refuse_fit(TensorSpec("params", (layout.num_params,), layout.params[0].dtype), model.params)
        flat, source = model.params.numpy(), [model]
        flat.flags.writeable = False    # of this view, and so of the views taken of it
        arrays: dict[str, Array] = {
            spec.name: LazyArray.over(flat[start:end].reshape(spec.shape), spec, source)
            for spec, start, end in layout.slices
        }
        if layout.buffers:
            for spec in layout.buffers:
                tensor = model.buffers[spec.name]
                if tensor.shape != spec.shape or tensor.dtype != spec.torch_dtype:
                    _refuse_fit(spec, tensor)
                values = tensor.numpy()
                values.flags.writeable = False
                arrays[spec.name] = LazyArray.over(values, spec, source)
            arrays = {name: arrays[name] for name in layout.order}
        self.__dict__.update(source=source, _data=arrays)

    @classmethod
    def of(cls, params: Tensor, buffers: Mapping[str, Tensor], layout: Layout) -> Self:
        """Wrap a vector of trainable values, shape (d,), and buffers by name."""
        return cls(Model(params, buffers, layout))

    @property
    def model(self) -> Model | None:
        """The values behind the arrays; None once an entry was changed."""
        source = self.__dict__["source"]
        return source[0] if source else None

    def __setitem__(self, key: str, value: Array) -> None:
        self.__dict__["source"].clear()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.__dict__["source"].clear()
        super().__delitem__(key)

    def copy(self) -> Self:
        """Return a record with arrays of its own over the same memory."""
        source = list(self.__dict__["source"])
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__, source=source, _data=twins(self, source))
        return clone

    def deflate(self) -> bytes:
        """Return what goes over Flower's wire, where nobody knows this class: its first word is the class's name."""
        return b"ArrayRecord" + super().deflate().removeprefix(b"VectorRecord")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.model is None:
            return _plain_record, (dict(self.items()),)
        model = self.model
        buffers = {name: tensor.numpy() for name, tensor in model.buffers.items()}
        return _vector_record, (model.params.numpy(), buffers, model.layout)


def _refuse_fit(spec: TensorSpec, tensor: Tensor) -> None:
    found = TensorSpec.of(spec.name, tensor)
    raise UnsupportedModel(f"These values do not fit their layout: {mismatch(spec, found.shape, found.dtype)}.")


def _plain_record(arrays: dict[str, Array]) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def _vector_record(params: np.ndarray, buffers: dict[str, np.ndarray], layout: Layout) -> VectorRecord:
    return VectorRecord(Model(as_tensor(params), {name: as_tensor(values) for name, values in buffers.items()}, layout))


def as_tensor(values: np.ndarray) -> Tensor:
    """Return a tensor over an array's memory, or over a copy of memory that may not be written to."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def clone_content(content: RecordDict, reading: Reading | None = None) -> RecordDict:
    """Return records that can be changed without touching the original; the arrays' memory is shared, read only.

    Args:
        reading: what decodes arrays for all who get them; None leaves that to each of them.
    """
    return record_of(RecordDict, {name: _clone_record(record, reading) for name, record in content.items()})


def _clone_record(record: Any, reading: Reading | None) -> Any:
    if isinstance(record, VectorRecord):
        return record.copy()
    if isinstance(record, ArrayRecord):
        clone = record.copy()
        clone.__dict__["_data"] = twins(record if reading is None else reading(record), [])
        return clone
    return record_of(type(record), {
        name: list(value) if type(value) is list else value for name, value in record.items()
    })


def read_arrays(record: ArrayRecord, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a record's trainable values as one vector, shape (num_params,), and its buffers by name.

    Costs nothing for a `VectorRecord` of the same layout. The result may share memory: read only.

    Raises:
        MalformedReply: names, shapes or dtypes are not those of the layout, or bytes cannot be decoded.
    """
    if isinstance(record, VectorRecord) and record.model is not None and record.model.layout == layout:
        return record.model.params, dict(record.model.buffers)
    check_names(record, layout.order)
    params = np.empty(layout.num_params, dtype=layout.params[0].dtype)
    for spec, start, end in layout.slices:
        params[start:end] = read_array(record[spec.name], spec).reshape(-1)
    buffers = {spec.name: torch.from_numpy(read_array(record[spec.name], spec).copy()) for spec in layout.buffers}
    return torch.from_numpy(params), buffers


def read_array(array: Array, spec: TensorSpec) -> np.ndarray:
    """Return an array's values, not to be written to, or raise `MalformedReply` when it is not as described."""
    if tuple(array.shape) != spec.shape or array.dtype != spec.dtype:
        raise MalformedReply(mismatch(spec, tuple(array.shape), str(array.dtype)[:40]))
    values = array_view(array)
    if values.shape != spec.shape or str(values.dtype) != spec.dtype:
        raise MalformedReply(mismatch(spec, values.shape, str(values.dtype)))
    return values


def model_from_arrays(record: ArrayRecord) -> Model:
    """Return a model whose layout is guessed from its arrays, for a user's app that has no module at hand.

    Floating-point entries of the first one's dtype are trained, except BatchNorm's statistics, known by their names.

    Raises:
        UnsupportedModel: nothing can be trained, or an array cannot be read.
    """
    try:
        values = {name: torch.from_numpy(array_view(array).copy()) for name, array in record.items()}
    except (MalformedReply, TypeError) as error:
        raise UnsupportedModel(f"The initial arrays cannot be read: {error}.") from error
    specs = {name: TensorSpec.of(name, tensor) for name, tensor in values.items()}
    floats = [spec for spec in specs.values() if spec.torch_dtype in FLAT_DTYPES and not _is_statistic(spec.name)]
    if not floats:
        raise UnsupportedModel("The initial arrays hold no float32 or float64 entry to train.")
    trained = tuple(spec for spec in floats if spec.dtype == floats[0].dtype)
    buffers = tuple(spec for spec in specs.values() if spec not in trained)
    return Layout(trained, buffers, tuple(specs)).split(values)


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def wire_bytes(content: RecordDict) -> int:
    """Return how many bytes a message's content takes on the wire: the arrays' elements and headers, and the scalars.

    Counted from shapes and dtypes alone, so that every engine bills the same number for the same content.
    """
    return sum(_record_bytes(record) for record in content.values())


def _record_bytes(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    if isinstance(record, ArrayRecord):
        if isinstance(record, VectorRecord) and (model := record.model) is not None:
            return model.layout.num_bytes + ARRAY_HEADER_BYTES * len(record)
        return sum(_array_bytes(array) + ARRAY_HEADER_BYTES for array in record.values())
    return sum([SCALAR_BYTES if type(value) in FIXED_SIZE else SCALAR_BYTES + _extra_bytes(value)
                for value in record.values()])


def _array_bytes(array: Array) -> int:
    """Return the size of an array's elements; of one whose description makes no sense, of what it holds."""
    if isinstance(array, LazyArray) and array.view is not None:
        return array.view.nbytes
    if array.stype != NUMPY_ARRAY or not all(type(size) is int and size >= 0 for size in array.shape):
        return len(array.data)
    try:
        described = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    except (TypeError, ValueError):
        return len(array.data)
    return min(described, len(array.data))


def _extra_bytes(value: object) -> int:
    """Return what a value takes beyond the bytes of one number: its characters, or its items."""
    if isinstance(value, list):
        return sum(SCALAR_BYTES + _extra_bytes(item) for item in value)
    return len(value) if isinstance(value, (str, bytes)) else 0


class Estimate(NamedTuple):
    """What a reply will cost, known from the request alone.

    Attributes:
        work_steps: what the reply's `work-steps` metric will say.
        reply_bytes: what `wire_bytes` of the reply will return.
    """

    work_steps: float
    reply_bytes: int


class Estimator(Protocol):
    """A client that can say beforehand what its reply will cost lets the simulator compute it later, or elsewhere."""

    def __call__(self, message: Message, context: Context) -> Estimate | None: ...


class TrainReply(NamedTuple):
    """A training reply that passed validation.

    Attributes:
        kind: `update` (trained minus received) or `model` (trained values).
        values: trainable entries, shape (d,).
        task_id: the echoed task, None when the client does not echo it.
    """

    kind: str
    values: Tensor
    buffers: dict[str, Tensor]
    num_examples: int
    work_steps: float | None
    train_seconds: float | None
    metrics: dict[str, Any]
    task_id: int | None
    version: int | None


def read_train_reply(content: RecordDict, layout: Layout) -> TrainReply:
    """Validate a training reply.

    Raises:
        MalformedReply: a record is missing; names, shapes or dtypes are wrong; a value is not finite; `num-examples`
            is absent, not a number, not positive, or absurdly large.
    """
    arrays = single_record(content, ArrayRecord, "arrays")
    # A plain dictionary is looked things up in ten times faster than a record.
    metrics: dict[str, Any] = dict(single_record(content, MetricRecord, "metrics").items())
    num_examples = read_num_examples(metrics)
    values, buffers = read_arrays(arrays, layout)
    check_finite(values, buffers)
    echo = dict(record.items()) if isinstance(record := content.get(REPLY), ConfigRecord) else {}
    kind = echo.get("kind", "model")
    if kind not in ("update", "model"):
        raise MalformedReply(f"the reply's kind is {shown(kind)}; only 'update' and 'model' are known")
    return TrainReply(
        kind=kind,
        values=values,
        buffers=buffers,
        num_examples=num_examples,
        work_steps=_number(metrics, "work-steps"),
        train_seconds=_number(metrics, "train-seconds"),
        metrics=metrics,
        task_id=_integer(echo, "task-id"),
        version=_integer(echo, "version"),
    )


def single_record(content: RecordDict, kind: type[R], noun: str) -> R:
    """Return the only record of a kind, or raise `MalformedReply`."""
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise MalformedReply(f"expected one record of {noun}, found {len(found)}")
    return found[0]


def read_num_examples(metrics: Mapping[str, Any]) -> int:
    """Return the weight of a reply, or raise `MalformedReply`."""
    value = metrics.get("num-examples")
    if isinstance(value, list) or value is None:
        raise MalformedReply("the metrics have no number under 'num-examples'")
    if not 0 < value <= MAX_NUM_EXAMPLES or value != int(value):
        limits = f"a whole number from 1 to {MAX_NUM_EXAMPLES:.0e}"
        raise MalformedReply(f"num-examples is {shown(value)}, but must be {limits}")
    return int(value)


def check_finite(values: Tensor, buffers: Mapping[str, Tensor]) -> None:
    """Raise `MalformedReply` when a value is NaN or infinite."""
    # A sum is finite when all its terms are, unless it overflows: then, and only then, look at each element.
    if not math.isfinite(values.sum().item()) and not torch.isfinite(values).all():
        count = int((~torch.isfinite(values)).sum())
        raise MalformedReply(f"{count} of {values.numel()} values are NaN or infinite")
    for name, tensor in buffers.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MalformedReply(f"buffer {name!r} holds values that are NaN or infinite")


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, list) or not 0 <= value <= MAX_WORK:
        raise MalformedReply(f"{name} is {shown(value)}, but must be a number from 0 to {MAX_WORK:.0e}")
    return value


def _integer(record: Mapping[str, Any], name: str) -> int | None:
    value = record.get(name)
    if value is not None and not isinstance(value, int):
        raise MalformedReply(f"{name} is {shown(value)}, but must be a whole number")
    return value
