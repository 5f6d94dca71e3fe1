"""The work that all contenders do: the same models, the same data, the same local steps."""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLIENTS, PER_ROUND = 100, 10
LOCAL_STEPS, BATCH, LR = 10, 32, 0.05
EXAMPLES, FEATURES, CLASSES = 64, 64, 10

# Widths of the hidden layers, by the size they are named after.
HIDDEN = {"8k": (107,), "80k": (1067,), "6M": (2412, 2412)}


def build_net(size: str) -> nn.Module:
    """Return a fully connected network of 8,035, 80,035 or 6,001,066 parameters."""
    layers: list[nn.Module] = []
    widths = (FEATURES, *HIDDEN[size], CLASSES)
    for width, following in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@lru_cache(maxsize=1)
def pool() -> tuple[Tensor, Tensor]:
    """Return the examples of all clients: inputs of shape (clients, examples, features) and their classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(CLIENTS, EXAMPLES, FEATURES, generator=generator)
    return inputs, torch.randint(CLASSES, (CLIENTS, EXAMPLES), generator=generator)


@dataclass(frozen=True)
class Shard:
    """A client's examples."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples at `indices`."""
        return self.inputs[indices], self.targets[indices]


def shard(client: int) -> Shard:
    """Return a client's examples; beyond the hundredth client they repeat."""
    inputs, targets = pool()
    return Shard(inputs[client % CLIENTS], targets[client % CLIENTS])


def batches(num_examples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches without end, shuffled anew for every pass."""
    while True:
        order = torch.randperm(num_examples, generator=generator)
        yield from order.split(BATCH)


class BenchTask:
    """The same work as a task of fedcore's."""

    metric_names = ("loss",)

    def __init__(self, size: str = "8k"):
        self.size = size

    def model(self) -> nn.Module:
        """Return a fresh model."""
        return build_net(self.size)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        return functional.cross_entropy(model(inputs), targets)

    def data(self, site: int | str) -> Shard:
        """Return a client's examples."""
        return shard(int(site))

    def validation_data(self, site: int | str) -> None:
        """Nothing is held back."""

    def metrics(self, model: nn.Module, data: Any) -> Mapping[str, float]:
        """Return the mean loss."""
        return {"loss": self.loss(model, *data.batch(torch.arange(len(data)))).item()}
