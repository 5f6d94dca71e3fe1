"""Examples as tensors: shared by all clients of a process, viewed through indices, fetched one batch at a time."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fedcore.errors import BadInput

EVALUATION_BATCH = 1024


class Dataset(Protocol):
    """What training needs of a client's data."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets at `indices`, shape (batch,), each in 0 .. len - 1."""
        ...


@dataclass(frozen=True, eq=False)
class Samples:
    """Examples in memory, or a view of some of them: a view costs its indices and nothing else.

    Attributes:
        inputs: shape (n, ...), in whatever dtype is compact; `transform` makes it what the model takes.
        targets: shape (n, ...).
        indices: which examples belong to this view, shape (len,); None: all.
        transform: applied to the inputs of a batch.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise BadInput(f"There are {len(self.inputs)} inputs but {len(self.targets)} targets, not one for each.")

    def __len__(self) -> int:
        return len(self.inputs if self.indices is None else self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets at `indices`, shape (batch,), each in 0 .. len - 1."""
        # `index_select` takes half the time of brackets, which matters for small models.
        rows = indices if self.indices is None else self.indices.index_select(0, indices)
        inputs = self.inputs.index_select(0, rows)
        return inputs if self.transform is None else self.transform(inputs), self.targets.index_select(0, rows)

    def subset(self, indices: Tensor) -> "Samples":
        """Return a view of the examples at `indices` of this one."""
        return replace(self, indices=indices if self.indices is None else self.indices[indices])

    def all_targets(self) -> Tensor:
        """Return the targets of every example, shape (len, ...)."""
        return self.targets if self.indices is None else self.targets[self.indices]


class Collated:
    """A map-style dataset (`len`, and an `(input, target)` pair for each index) read one batch at a time."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stacked inputs and targets at `indices`."""
        inputs, targets = default_collate([self.pairs[index] for index in indices.tolist()])
        return inputs, targets


def as_dataset(data: Any) -> Dataset:
    """Return what a task calls its data as a `Dataset`.

    Args:
        data: a `Dataset`, a map-style `torch.utils.data.Dataset`, or a pair of tensors (inputs, targets).

    Raises:
        BadInput: it is none of these.
    """
    if isinstance(data, Samples) or callable(getattr(data, "batch", None)):
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return Samples(*data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Collated(data)
    raise BadInput(
        f"A task's data is a {type(data).__name__}, which is no dataset. Return fedcore.clients.data.Samples, a "
        "torch.utils.data.Dataset with a length, or a pair of tensors (inputs, targets)."
    )


def shuffled_batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches without end: every pass visits each example once, in a new order.

    The last batch of a pass is short when `batch_size` does not divide `num_examples`. A dataset of one batch is not
    shuffled: its gradient does not depend on the order, and so neither do its bits.
    """
    if num_examples <= batch_size:
        everything = torch.arange(num_examples)
        while True:
            yield everything
    while True:
        order = torch.randperm(num_examples, generator=generator)
        for start in range(0, num_examples, batch_size):
            yield order[start:start + batch_size]


def in_order(data: Dataset, batch_size: int = EVALUATION_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a dataset's batches from the first example to the last, once."""
    for start in range(0, len(data), batch_size):
        yield data.batch(torch.arange(start, min(start + batch_size, len(data))))


def batches_per_pass(num_examples: int, batch_size: int) -> int:
    """Return how many batches visit each example once."""
    return -(-num_examples // batch_size)
