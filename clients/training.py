"""Local training: exactly so many minibatch steps on one client's data."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.clients.data import Dataset, shuffled_batches
from fedcore.clients.optim import OptimizerFactory
from fedcore.clients.task import Task
from fedcore.vectors import FlatModule


@dataclass(frozen=True)
class Work:
    """What one task asks of a client.

    Attributes:
        steps: optimizer steps.
        batch_size: examples per step; a pass over the data may end in a shorter batch.
        lr_at: learning rate of a step, counted from 0 within this task.
        proximal_mu: FedProx's pull towards the received model, at least 0.
        clip_norm: largest l2 norm of a minibatch gradient (without the pull); None: no limit.
    """

    steps: int
    batch_size: int
    lr_at: Callable[[int], float]
    proximal_mu: float = 0.0
    clip_norm: float | None = None


class Placed:
    """A dataset whose batches come on the model's device, floating-point values in the model's dtype."""

    def __init__(self, data: Dataset, dtype: torch.dtype, device: torch.device):
        self._data, self._dtype, self._device = data, dtype, device

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets at `indices`."""
        inputs, targets = self._data.batch(indices)
        return self._place(inputs), self._place(targets)

    def _place(self, values: Tensor) -> Tensor:
        if values.is_floating_point() and values.dtype is not self._dtype:
            values = values.to(self._dtype)
        return values if values.device == self._device else values.to(self._device)


def train_steps(
    task: Task, flat: FlatModule, data: Dataset, work: Work, optimizer: OptimizerFactory, generator: torch.Generator
) -> float:
    """Train a model in place and return the mean loss of its minibatches, each measured before its step.

    Every step: x <- x - lr (grad + proximal_mu (x - received)), by the optimizer's rule. Optimizer state starts afresh;
    every pass visits each example once in a new order; as many passes are begun as the steps need.

    Args:
        flat: holds the received model, and afterwards the trained one.
        data: at least one example.
        generator: of the batch order.

    Source: McMahan et al., 2017, arXiv:1602.05629, ClientUpdate; Li et al., 2020, arXiv:1812.06127, equation 2.
    """
    parameters = trainable(flat)
    received = [parameter.detach().clone() for parameter in parameters] if work.proximal_mu else []
    values = [parameter.detach() for parameter in parameters]
    local = optimizer(parameters)
    batches = shuffled_batches(len(data), work.batch_size, generator)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for step in range(work.steps):
        inputs, targets = data.batch(next(batches))
        loss = task.loss(flat.module, inputs, targets)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        if work.clip_norm is not None:
            clip(gradients, work.clip_norm)
        if work.proximal_mu:
            drift = torch._foreach_sub(values, received)
            gradients = torch._foreach_add(gradients, drift, alpha=work.proximal_mu)
        local.step(gradients, work.lr_at(step))
        total += loss.detach()
    return total.item() / work.steps


def trainable(flat: FlatModule) -> list[nn.Parameter]:
    """Return a module's trainable parameters in the order of its flat vector."""
    named = dict(flat.module.named_parameters())
    return [named[spec.name] for spec in flat.layout.params]


def clip(gradients: tuple[Tensor, ...], clip_norm: float) -> None:
    """Scale gradients down in place so that all together are no longer than `clip_norm`; or leave them alone."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if norm > clip_norm:
        torch._foreach_mul_(gradients, clip_norm / norm)
