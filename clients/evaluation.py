"""How good a model is on given data."""
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.data import Dataset, as_dataset, in_order
from fedcore.clients.modules import flat_module
from fedcore.clients.task import Task
from fedcore.clients.training import Placed
from fedcore.errors import BadInput
from fedcore.vectors import FlatModule, Model


def measure(task: Task, flat: FlatModule, data: Dataset) -> dict[str, float]:
    """Return a task's metrics for the values that a module holds, as plain numbers."""
    flat.module.eval()
    with torch.no_grad():
        figures = task.metrics(flat.module, Placed(data, flat.layout.dtype, flat.device))
    return {name: float(value) for name, value in figures.items()}


def server_evaluation(task: Task, device: torch.device | None = None) -> Callable[[Model], dict[str, float]]:
    """Return the function that measures models on the task's `test_data()`.

    Raises:
        BadInput: the task has no test data.
    """
    found = task.test_data() if hasattr(task, "test_data") else None
    if found is None:
        raise BadInput(
            f"The task {type(task).__name__} has no test data for the server. Give it a method test_data(), or let the "
            "clients evaluate: evaluate: {where: clients}."
        )
    data, modules = as_dataset(found), dict[torch.dtype, FlatModule]()

    def evaluate(model: Model) -> dict[str, float]:
        if model.layout.dtype not in modules:
            modules[model.layout.dtype] = flat_module(task, model.layout.dtype, device)
        flat = modules[model.layout.dtype]
        flat.load(model.params, model.buffers)
        return measure(task, flat, data)

    return evaluate


def evaluate_model(task: Task, model: Model) -> dict[str, float]:
    """Return a model's metrics on the task's `test_data()`; `server_evaluation` is faster for many models."""
    return server_evaluation(task)(model)


def classification_metrics(model: nn.Module, data: Dataset) -> Mapping[str, float]:
    """Return mean cross entropy and accuracy over all targets; outputs have shape (batch, ..., classes)."""
    loss, correct, count = 0.0, 0, 0
    for inputs, targets in in_order(data):
        scores, truth = flat_scores(model(inputs), targets)
        loss += functional.cross_entropy(scores, truth, reduction="sum").item()
        correct += int((scores.argmax(1) == truth).sum())
        count += len(truth)
    return {"loss": loss / count, "accuracy": correct / count}


def regression_metrics(model: nn.Module, data: Dataset) -> Mapping[str, float]:
    """Return mean squared error (`loss`) and mean absolute error (`mae`) over all targets."""
    squares, sizes, count = 0.0, 0.0, 0
    for inputs, targets in in_order(data):
        errors = model(inputs).reshape(targets.shape).double() - targets
        squares += errors.square().sum().item()
        sizes += errors.abs().sum().item()
        count += targets.numel()
    return {"loss": squares / count, "mae": sizes / count}


def flat_scores(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores of shape (rows, classes) and targets of shape (rows,), one row per predicted token or example."""
    if scores.dim() == 2:
        return scores, targets
    return scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
