"""What a user brings: a model, a loss, data. And how a pool of data becomes a task with many sites."""
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.clients.data import Dataset, Samples
from fedcore.clients.partitions import Partition, Partitioner, Traits
from fedcore.errors import BadInput, InvalidSetting
from fedcore.seeds import torch_generator

Site = int | str


@runtime_checkable
class Task(Protocol):
    """A learning problem. Any class with these methods will do; there is nothing to inherit from.

    A *site* is a partition number in simulation, a path or a name where the task is deployed. Optional methods:
    `test_data()` for a server that has data of its own; `labels(site)`, examples of each class, for the report;
    `client_app(settings)` for a task that trains in a way of its own. An attribute `metric_names`, a tuple of what
    `metrics` returns, lets a simulator know the size of an evaluation's reply before it has run.
    """

    def model(self) -> nn.Module:
        """Return a freshly initialised model. Random numbers come from torch's global generator, seeded by fedcore."""
        ...

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar, calling nothing of the model but `model(inputs)`."""
        ...

    def data(self, site: Site) -> Any:
        """Return a site's training examples: a `Dataset`, a map-style torch dataset, or (inputs, targets)."""
        ...

    def validation_data(self, site: Site) -> Any:
        """Return a site's examples that are not trained on, or None when it has none."""
        ...

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return figures about a model in evaluation mode, `loss` among them, without computing gradients."""
        ...


class Pool(Protocol):
    """A task whose examples lie in one place and are split among simulated clients.

    Without a site the methods speak of the whole pool; with one, of the data that a deployed client has there.
    """

    metric_names: tuple[str, ...]

    def model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor: ...

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]: ...

    def training_data(self, site: str | None = None) -> Samples: ...

    def test_data(self, site: str | None = None) -> Samples: ...

    def traits(self) -> Traits:
        """Return labels and owners of the training examples."""
        ...


class PartitionedTask:
    """A pool of data as a task: site `i` holds the i-th part of a partition that follows from the seed.

    The pool is loaded at first use and shared; a site's data are indices into it. A site given as a string is a path:
    the client's own file, read in the same way, all of it its own.

    Args:
        pool: where the data come from.
        partitioner: who gets what.
        num_clients: number of sites.
        seed: of the run.
        validation_share: share of a site's examples held back from training, in [0, 1); at least one of two or more.
    """

    def __init__(
        self, pool: Pool, partitioner: Partitioner, num_clients: int, seed: int = 0, validation_share: float = 0.0
    ):
        if not 0 <= validation_share < 1:
            raise InvalidSetting("clients.validation_share", validation_share, "in [0, 1)")
        self.pool, self.partitioner, self.num_clients = pool, partitioner, num_clients
        self.seed, self.validation_share = seed, validation_share

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` returns."""
        return self.pool.metric_names

    @cached_property
    def partition(self) -> Partition:
        """The training examples of each site, before any are held back."""
        return self.partitioner.split(self.pool.traits(), self.num_clients, self.seed)

    def model(self) -> nn.Module:
        """Return a fresh model."""
        return self.pool.model()

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self.pool.loss(model, inputs, targets)

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return figures about a model."""
        return self.pool.metrics(model, data)

    def test_data(self) -> Samples:
        """Return the examples that no site has."""
        return self.pool.test_data()

    def data(self, site: Site) -> Samples:
        """Return a site's training examples."""
        if isinstance(site, str):
            return self.pool.training_data(site)
        return self.pool.training_data().subset(self._split(site)[0])

    def validation_data(self, site: Site) -> Samples | None:
        """Return what a site holds back from training, or None when it holds back nothing."""
        if isinstance(site, str):
            found = self.pool.test_data(site)
            return found if len(found) else None
        held_back = self._split(site)[1]
        return self.pool.training_data().subset(held_back) if len(held_back) else None

    def labels(self, site: Site) -> list[int] | None:
        """Return how many training examples of each class a site has, or None where there are no classes."""
        if isinstance(site, str):
            targets = self.pool.training_data(site).all_targets().numpy()
            return np.bincount(targets).tolist() if targets.ndim == 1 and targets.dtype.kind in "iu" else None
        labels = self.pool.traits().labels
        if labels is None:
            return None
        return np.bincount(labels[self._split(site)[0].numpy()], minlength=labels.max() + 1).tolist()

    def _split(self, site: int) -> tuple[Tensor, Tensor]:
        """Return the indices that a site trains on, and those that it holds back."""
        if not 0 <= site < self.num_clients:
            raise BadInput(f"There is no client {site}: clients.count={self.num_clients}, counted from 0.")
        mine = torch.from_numpy(self.partition[site])
        if not self.validation_share or len(mine) < 2:
            return mine, mine[:0]
        held_back = min(len(mine) - 1, max(1, round(self.validation_share * len(mine))))
        order = torch.randperm(len(mine), generator=torch_generator(self.seed, site, "validation"))
        return mine[order[held_back:].sort().values], mine[order[:held_back].sort().values]
