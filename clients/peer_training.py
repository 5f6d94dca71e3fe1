"""A peer's local training: like a client's, with an optimizer that lives as long as the run."""
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fedcore.clients.data import Dataset, as_dataset, shuffled_batches
from fedcore.clients.modules import flat_module, seeded_torch
from fedcore.clients.optim import LocalOptimizer, OptimizerFactory
from fedcore.clients.schedules import make_schedule
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import Site, Task
from fedcore.clients.training import Placed, clip, trainable
from fedcore.errors import BadInput, EmptyClient
from fedcore.peers.seams import Trained
from fedcore.seeds import derive_seed, torch_generator
from fedcore.vectors import FlatModule


class PeerTraining:
    """Local training of all peers of a process: they share one model's memory, and each has its own optimizer.

    Args:
        task: anything with the methods of `Task`.
        settings: the section `train`; its `local_steps` are the strategy's to choose.
        seed: of the run.

    Raises:
        BadInput: the task trains in a way of its own.
    """

    def __init__(self, task: Task, settings: TrainSettings, seed: int):
        if hasattr(task, "client_app"):
            raise BadInput(
                f"The task {type(task).__name__} supplies clients of its own, which peers cannot use. Give it a method "
                "peer_training(settings, seed), or choose another task."
            )
        self.task, self.settings, self.seed = task, settings, seed
        self.optimizer = OptimizerFactory(settings.optimizer)
        self.schedule, self.schedule_unit = make_schedule(settings.schedule, settings.lr)
        self.flat = flat_module(task, settings.torch_dtype, settings.torch_device)

    def peer(self, rank: int, site: Site | None = None) -> "LocalTraining":
        """Return the training of one peer, on the data of `site` (by default, of its rank)."""
        return LocalTraining(self, rank, rank if site is None else site)


def peer_training(task: Any, settings: TrainSettings, seed: int) -> Any:
    """Return what makes each peer's training: the task's own, or ours."""
    own = getattr(task, "peer_training", None)
    return PeerTraining(task, settings, seed) if own is None else own(settings, seed)


class LocalTraining:
    """One peer's training. The n-th piece of work draws the batches of a client's n-th task."""

    def __init__(self, shared: PeerTraining, rank: int, site: Site):
        self._shared, self._rank = shared, rank
        data = as_dataset(shared.task.data(site))
        if not len(data):
            raise EmptyClient(site, "train on")
        self._data: Dataset = Placed(data, shared.settings.torch_dtype, shared.flat.device)
        self.num_examples = len(data)
        self._site = site
        self._draws = self._steps = 0
        self._made: LocalOptimizer | None = None
        self._restored: Mapping[str, Any] | None = None

    @property
    def curvature(self) -> tuple[float, float] | None:
        """Strong convexity and smoothness of this peer's objective, where the task knows them."""
        known = getattr(self._shared.task, "curvature", None)
        return None if known is None else known(self._site)

    @property
    def _optimizer(self) -> LocalOptimizer:
        if self._made is None:
            self._made = self._shared.optimizer(trainable(self._shared.flat))
            if self._restored is not None:
                self._made.load_state_dict(self._restored)
                self._restored = None
        return self._made

    def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained:
        """Make optimizer steps; returns the new values and the mean loss of the batches, each before its step."""
        shared, flat = self._shared, self._load(params, buffers)
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        with self._seeded():
            batches = self._batches()
            for _ in range(steps):
                gradients, loss = self._gradients(next(batches))
                self._optimizer.step(gradients, self._lr())
                self._steps += 1
                total += loss
        self._draws += 1
        return Trained(_detached(flat), flat.buffers() if shared.flat.layout.buffers else {}, total.item() / steps)

    def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the gradient of the next batch, shape (d,), and its mean loss."""
        self._load(params, buffers)
        with self._seeded():
            gradients, loss = self._gradients(next(self._batches()))
        self._draws += 1
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu(), loss.item()

    def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]:
        """Return what the optimizer's next step subtracts, shape (d,), and the loss (NaN with a given gradient)."""
        loss = math.nan
        if gradient is None:
            gradient, loss = self.gradient(params, buffers)
        return params - self.descend(params, buffers, gradient), loss

    def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Return what the optimizer's next step with a given gradient makes of a model, shape (d,)."""
        flat = self._load(params, buffers)
        views = flat.layout.views(gradient.to(flat.device))
        self._optimizer.step(tuple(views[spec.name] for spec in flat.layout.params), self._lr())
        self._steps += 1
        return _detached(flat)

    def forget_optimizer(self) -> None:
        """Let the optimizer start afresh; the schedule goes on."""
        self._made = self._restored = None

    def _load(self, params: Tensor, buffers: Mapping[str, Tensor]) -> FlatModule:
        flat = self._shared.flat
        flat.load(params, buffers)
        if not flat.module.training:
            flat.module.train()
        return flat

    def _seeded(self) -> AbstractContextManager[None]:
        shared = self._shared
        return seeded_torch(derive_seed(shared.seed, self._rank, "torch", self._draws), shared.flat.device)

    def _batches(self) -> Iterator[Tensor]:
        shared = self._shared
        order = torch_generator(shared.seed, self._rank, "train", self._draws)
        return shuffled_batches(len(self._data), shared.settings.batch_size, order)

    def _gradients(self, indices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        shared = self._shared
        inputs, targets = self._data.batch(indices)
        loss = shared.task.loss(shared.flat.module, inputs, targets)
        gradients = torch.autograd.grad(loss, trainable(shared.flat), materialize_grads=True)
        if shared.settings.clip_norm is not None:
            clip(gradients, shared.settings.clip_norm)
        return gradients, loss.detach()

    def _lr(self) -> float:
        shared = self._shared
        position = self._steps if shared.schedule_unit == "steps" else self._draws
        return shared.schedule.lr(shared.settings.lr, position)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the optimizer's memory."""
        memory = self._restored if self._made is None else self._made.state_dict()
        return {"draws": self._draws, "steps": self._steps, "optimizer": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._draws, self._steps = state["draws"], state["steps"]
        self._made, self._restored = None, state["optimizer"]


def _detached(flat: FlatModule) -> Tensor:
    """Return a module's parameters, on the CPU and apart from its own memory."""
    values = flat.params.cpu()
    return values.clone() if values is flat.params or values.data_ptr() == flat.params.data_ptr() else values


class IdlePeers:
    """Peers that compute nothing: what they are given comes back as it is.

    Args:
        num_examples: that each peer is said to have.
    """

    def __init__(self, num_examples: int):
        self.num_examples = num_examples

    def peer(self, rank: int, site: Site | None = None) -> "IdlePeers":
        """Return the work of one peer; it is the same for all."""
        return self

    def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained:
        """Return the model as it came."""
        return Trained(params, buffers, 0.0)

    def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return zero."""
        return torch.zeros_like(params), 0.0

    def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]:
        """Return zero."""
        return torch.zeros_like(params), 0.0

    def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Return the model as it came."""
        return params

    def forget_optimizer(self) -> None:
        """There is none."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to remember."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing was remembered."""
