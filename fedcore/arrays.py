"""Flower's arrays over memory that exists already, and the careful reading of those that strangers sent."""
import math
import tokenize
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Self

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy

from fedcore.errors import MalformedReply
from fedcore.vectors import TensorSpec

NUMPY_ARRAY = "numpy.ndarray"


class LazyArray(Array):
    """A Flower Array over memory that exists already; serialised only when somebody asks for its bytes.

    The memory is shared and read only: `numpy()` hands out a copy, as Flower's own arrays do. Whoever assigns to one of
    its attributes turns it into an ordinary array, and tells the record that it came from.
    """

    def __init__(self, values: np.ndarray):
        view = values.view()
        view.flags.writeable = False
        self.__dict__.update(dtype=str(view.dtype), shape=tuple(view.shape), stype=NUMPY_ARRAY, view=view, source=[])

    @classmethod
    def over(cls, view: np.ndarray, spec: TensorSpec, source: list[Any]) -> Self:
        """Return an array over a view that is read only already, whose description is at hand.

        Args:
            source: emptied when the array is changed.
        """
        array = object.__new__(cls)
        array.__dict__.update(dtype=spec.dtype, shape=spec.shape, stype=NUMPY_ARRAY, view=view, source=source)
        return array

    @property
    def view(self) -> np.ndarray | None:
        """The shared memory, read only; None once the array was changed."""
        return self.__dict__.get("view")

    @property
    def data(self) -> bytes:
        """The array in NumPy's `.npy` format."""
        if "data" not in self.__dict__:
            self.__dict__["data"] = Array.from_numpy_ndarray(self.__dict__["view"]).data
        return self.__dict__["data"]

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["data"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("dtype", "shape", "stype", "data") and self.view is not None:
            self.__dict__["data"] = self.data
            del self.__dict__["view"]
            self.__dict__["source"].clear()
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        """Compare as Flower's arrays do, and with them."""
        if not isinstance(other, Array):
            return NotImplemented
        mine, theirs = (self.dtype, self.shape, self.stype), (other.dtype, other.shape, other.stype)
        return mine == theirs and self.data == other.data

    def numpy(self) -> np.ndarray:
        """Return a copy that the caller may change."""
        view = self.view
        return super().numpy() if view is None else view.copy()

    def deflate(self) -> bytes:
        """Return what goes over Flower's wire, where nobody knows this class: its first word is the class's name."""
        return b"Array" + super().deflate().removeprefix(b"LazyArray")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.view is None:
            return Array, (self.dtype, self.shape, self.stype, self.data)
        return LazyArray, (self.view,)


def twins(arrays: Mapping[str, Array], source: list[Any]) -> dict[str, Array]:
    """Return arrays that can be changed without touching the originals; what they hold is shared."""
    twins = {}
    for name, array in arrays.items():
        twins[name] = twin = object.__new__(type(array))
        twin.__dict__.update(array.__dict__)
        if isinstance(twin, LazyArray):
            twin.__dict__["source"] = source
    return twins


def array_view(array: Array) -> np.ndarray:
    """Return an array's values without copying where that is possible; not to be written to.

    Raises:
        MalformedReply: the bytes are no array in NumPy's `.npy` format.
    """
    if isinstance(array, LazyArray) and array.view is not None:
        return array.view
    if array.stype != NUMPY_ARRAY:
        raise MalformedReply(f"an array is serialised as {str(array.stype)[:40]!r}; only {NUMPY_ARRAY!r} is known")
    try:
        return _decode(array.data)
    except NOT_DECODABLE as error:
        raise MalformedReply(f"an array cannot be decoded: {str(error)[:200]}") from error


# What NumPy's reader of headers and Python's parser raise about bytes that a stranger wrote.
NOT_DECODABLE = (ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, SyntaxError,
                 RecursionError, MemoryError, tokenize.TokenError)


def _decode(data: bytes) -> np.ndarray:
    """Return the values in `.npy` bytes, as a view of them: nothing is allocated because a header says so."""
    stream = BytesIO(data)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject or any(size < 0 for size in shape):
        raise ValueError(f"values of type {dtype} and shape {shape}")
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype, count, stream.tell()).reshape(shape, order="F" if fortran_order else "C")
