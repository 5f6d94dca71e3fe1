"""What a client remembers from one task to the next, so that the server decides which tasks count.

The memory lives in `context.state`, as it was before the last task and as it is after it, each under the task's number.
A request says after which task the client is to go on: one whose answer was lost is forgotten, and a request that comes
twice is answered twice with the same bytes, because everything follows from the request and the memory before.
"""
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from fedcore.arrays import LazyArray

Vectors = Mapping[str, Tensor]


def before_key(name: str) -> str:
    """Return where a memory is kept as it was before the last task."""
    return f"{name}.before"


def after_key(name: str) -> str:
    """Return where a memory is kept as it is after the last task."""
    return f"{name}.after"


def recall(context: Context, name: str, number: int) -> dict[str, Tensor] | None:
    """Return what this client remembered after a task; None when it does not know that task."""
    record = _found(context, name, number)
    return None if record is None else {entry: torch.from_numpy(array.numpy()) for entry, array in record.items()}


def knows(context: Context, name: str, number: int) -> bool:
    """Say whether this client remembers what was after a task."""
    return _found(context, name, number) is not None


def _found(context: Context, name: str, number: int) -> ArrayRecord | None:
    numbers = context.state.get(name)
    if not isinstance(numbers, ConfigRecord):
        return None
    for key in (after_key(name), before_key(name)):
        record = context.state.get(key)
        if numbers.get(key) == number and isinstance(record, ArrayRecord):
            return record
    return None


def keep(
    context: Context, name: str, before: Vectors | None, before_number: int, after: Vectors, after_number: int
) -> None:
    """Write what this client remembers, before and after a task; None: before it there was nothing."""
    numbers = ConfigRecord({after_key(name): after_number})
    context.state[after_key(name)] = _record(after)
    if before is None:
        context.state.pop(before_key(name), None)
    else:
        numbers[before_key(name)] = before_number
        context.state[before_key(name)] = _record(before)
    context.state[name] = numbers


def _record(vectors: Vectors) -> ArrayRecord:
    record = ArrayRecord()
    for entry, values in vectors.items():
        record[entry] = LazyArray(values.numpy())
    return record
