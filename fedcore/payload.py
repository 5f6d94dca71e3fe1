"""What travels between server and clients, on top of Flower's records, and the validation of what arrives.

A request carries the model (`arrays`) and a `config`; a reply carries `arrays` and `metrics`. That is what Flower's
FedAvg sends and expects, so its strategies and ours understand the same clients. A request that asks for it
(`reply: update`) is answered with *trained minus received* in the entries of trainable parameters.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedcore.errors import MalformedReply, UnsupportedModel
from fedcore.vectors import FLAT_DTYPES, Layout, Model, TensorSpec, check_names, mismatch

ARRAYS, CONFIG, METRICS, REPLY, INFO = "arrays", "config", "metrics", "reply", "info"
NUMPY_ARRAY = "numpy.ndarray"

# An `.npy` header is 128 bytes for every array of fewer than about 10 dimensions.
ARRAY_HEADER_BYTES = 128
SCALAR_BYTES = 8
FIXED_SIZE = (int, float, bool)
MAX_NUM_EXAMPLES = 10**12

R = TypeVar("R", ArrayRecord, MetricRecord)


class LazyArray(Array):
    """A Flower Array over memory that exists already; serialised only when somebody asks for its bytes.

    The memory is shared and read only: `numpy()` hands out a copy, as Flower's own arrays do.
    """

    def __init__(self, values: np.ndarray):
        view = values.view()
        view.flags.writeable = False
        self.__dict__.update(dtype=str(view.dtype), shape=tuple(view.shape), stype=NUMPY_ARRAY, view=view)

    @classmethod
    def over(cls, view: np.ndarray, spec: TensorSpec) -> Self:
        """Return an array over a view that is read only already, whose description is at hand."""
        array = object.__new__(cls)
        array.__dict__.update(dtype=spec.dtype, shape=spec.shape, stype=NUMPY_ARRAY, view=view)
        return array

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in NumPy's `.npy` format."""
        if "data" not in self.__dict__:
            self.__dict__["data"] = Array.from_numpy_ndarray(self.view).data
        return self.__dict__["data"]  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: bytes) -> None:
        # Flower's base class announces the assignment; whoever assigns bytes no longer wants the shared memory.
        self.__dict__["data"] = value
        self.__dict__["view"] = Array(self.dtype, self.shape, self.stype, value).numpy()

    def numpy(self) -> np.ndarray:
        """Return a copy that the caller may change."""
        return self.__dict__["view"].copy()  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyArray, (self.__dict__["view"],)


class VectorRecord(ArrayRecord):
    """A model's arrays as views of its flat vector: built and read without copying.

    Reads and writes like any ArrayRecord. Once somebody changes an entry it stops being a view of the vector.
    """

    def __init__(self, model: Model):
        super().__init__()
        layout, flat = model.layout, model.params.numpy()
        flat.flags.writeable = False    # of this view, and so of the views taken of it
        arrays: dict[str, Array] = {
            spec.name: LazyArray.over(flat[start:end].reshape(spec.shape), spec) for spec, start, end in layout.slices
        }
        if layout.buffers:
            arrays |= {name: LazyArray(tensor.numpy()) for name, tensor in model.buffers.items()}
            arrays = {name: arrays[name] for name in layout.order}
        self.__dict__.update(model=model, _data=arrays)

    @classmethod
    def of(cls, params: Tensor, buffers: Mapping[str, Tensor], layout: Layout) -> Self:
        """Wrap a vector of trainable values, shape (d,), and buffers by name."""
        return cls(Model(params, buffers, layout))

    @property
    def model(self) -> Model | None:
        """The values behind the arrays; None once an entry was changed."""
        return self.__dict__["model"]  # type: ignore[no-any-return]

    def __setitem__(self, key: str, value: Array) -> None:
        self.__dict__["model"] = None
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.__dict__["model"] = None
        super().__delitem__(key)

    def copy(self) -> Self:
        """Return a record with the same arrays."""
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__, _data=dict(self.__dict__["_data"]))
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        if self.model is None:
            return _plain_record, (dict(self.items()),)
        model = self.model
        buffers = {name: tensor.numpy() for name, tensor in model.buffers.items()}
        return _vector_record, (model.params.numpy(), buffers, model.layout)


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


def clone_content(content: RecordDict) -> RecordDict:
    """Return records that can be changed without touching the original; the arrays' memory is shared, read only."""
    clone = content.copy()
    # Past the type checks of RecordDict's own assignment: these are copies of records that passed them.
    clone.__dict__["_data"] = {name: record.copy() for name, record in content.items()}
    return clone


def array_view(array: Array) -> np.ndarray:
    """Return an array's values without copying where that is possible; not to be written to.

    Raises:
        MalformedReply: the bytes are not what dtype and shape announce.
    """
    if isinstance(array, LazyArray):
        return array.__dict__["view"]  # type: ignore[no-any-return]
    try:
        values = array.numpy()
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise MalformedReply(f"an array cannot be decoded: {str(error)[:200]}") from error
    return values


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
        params[start:end] = _checked(record[spec.name], spec).reshape(-1)
    buffers = {spec.name: torch.from_numpy(_checked(record[spec.name], spec).copy()) for spec in layout.buffers}
    return torch.from_numpy(params), buffers


def _checked(array: Array, spec: TensorSpec) -> np.ndarray:
    if tuple(array.shape) != spec.shape or array.dtype != spec.dtype:
        raise MalformedReply(mismatch(spec, tuple(array.shape), str(array.dtype)[:40]))
    values = array_view(array)
    if values.shape != spec.shape or str(values.dtype) != spec.dtype:
        raise MalformedReply(mismatch(spec, values.shape, str(values.dtype)))
    return values


def model_from_arrays(record: ArrayRecord) -> Model:
    """Return a model whose layout is guessed from its arrays, for a user's app that has no module at hand.

    Floating-point entries of the first one's dtype are trained, except BatchNorm's statistics, known by their names.
    """
    values = {name: torch.from_numpy(array_view(array).copy()) for name, array in record.items()}
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
    total = 0
    for record in content.values():
        if isinstance(record, VectorRecord) and record.model is not None:
            total += record.model.layout.num_bytes + ARRAY_HEADER_BYTES * len(record)
        elif isinstance(record, ArrayRecord):
            total += sum(_array_bytes(array) + ARRAY_HEADER_BYTES for array in record.values())
        else:
            total += SCALAR_BYTES * len(record)
            total += sum(_extra_bytes(value) for value in record.values() if type(value) not in FIXED_SIZE)
    return total


def _array_bytes(array: Array) -> int:
    if array.stype != NUMPY_ARRAY:
        return len(array.data)
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _extra_bytes(value: object) -> int:
    """Return what a value takes beyond the bytes of one number: its characters, or its items."""
    if isinstance(value, list):
        return sum(SCALAR_BYTES + _extra_bytes(item) for item in value)
    return len(value) if isinstance(value, (str, bytes)) else 0


@dataclass(frozen=True)
class Estimate:
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


@dataclass(frozen=True)
class TrainReply:
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
    metrics = single_record(content, MetricRecord, "metrics")
    num_examples = read_num_examples(metrics)
    values, buffers = read_arrays(arrays, layout)
    check_finite(values, buffers)
    echo: Mapping[str, Any] = content[REPLY] if isinstance(content.get(REPLY), ConfigRecord) else {}  # type: ignore[assignment]
    kind = echo.get("kind", "model")
    if kind not in ("update", "model"):
        raise MalformedReply(f"the reply's kind is {str(kind)[:40]!r}; only 'update' and 'model' are known")
    return TrainReply(
        kind=kind,
        values=values,
        buffers=buffers,
        num_examples=num_examples,
        work_steps=_number(metrics, "work-steps"),
        train_seconds=_number(metrics, "train-seconds"),
        metrics=dict(metrics),
        task_id=_integer(echo, "task-id"),
        version=_integer(echo, "version"),
    )


def single_record(content: RecordDict, kind: type[R], noun: str) -> R:
    """Return the only record of a kind, or raise `MalformedReply`."""
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise MalformedReply(f"expected one record of {noun}, found {len(found)}")
    return found[0]


def read_num_examples(metrics: MetricRecord) -> int:
    """Return the weight of a reply, or raise `MalformedReply`."""
    value = metrics.get("num-examples")
    if isinstance(value, list) or value is None:
        raise MalformedReply("the metrics have no number under 'num-examples'")
    if not 0 < value <= MAX_NUM_EXAMPLES or value != int(value):
        raise MalformedReply(f"num-examples is {value}, but must be a whole number from 1 to {MAX_NUM_EXAMPLES:.0e}")
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
    if isinstance(value, list) or not math.isfinite(value) or value < 0:
        raise MalformedReply(f"{name} is {str(value)[:40]}, but must be a finite number of at least 0")
    return value  # type: ignore[no-any-return]


def _integer(record: Mapping[str, Any], name: str) -> int | None:
    value = record.get(name)
    if value is not None and not isinstance(value, int):
        raise MalformedReply(f"{name} is {str(value)[:40]!r}, but must be a whole number")
    return value
