"""Local optimizers: those of torch.optim, by name, started afresh for every task.

Every rule works on the tensors of the model, not on one flat vector: on 6 million parameters copying the gradients
into one place costs as much as half a training step.
"""
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd as torch_sgd

from fedcore.errors import InvalidSetting
from fedcore.registry import check, resolve

PATH = "train.optimizer"

# Registered in torch, but no use here: each would fail at its first step.
UNSUITABLE = {
    "LBFGS": "It evaluates the loss several times per step; a local step here is one minibatch gradient.",
    "SparseAdam": "It takes sparse gradients only.",
    "Muon": "It takes matrices only, and every model here has biases.",
}
# Chosen here, by what is fastest, unless the file says otherwise.
IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")


class LocalOptimizer(Protocol):
    """Updates parameters in place; its state lives as long as one task, or as a peer's run."""

    def step(self, gradients: tuple[Tensor, ...], lr: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Sgd:
    """torch.optim.SGD, bit for bit, through torch's functional form.

    Building the class itself imports torch's compiler, 1 to 2 seconds in every new process that nobody needs here.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False,
    ):
        # Detached tensors share the memory; updating them needs no `no_grad` block around every step.
        self._tensors = [parameter.detach() for parameter in parameters]
        self._plain = not (momentum or weight_decay or maximize)
        self._momenta: list[Tensor | None] = [None] * len(self._tensors)
        self._settings: dict[str, Any] = {
            "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize,
        }

    def step(self, gradients: tuple[Tensor, ...], lr: float) -> None:
        """x <- x - lr v, where v is the gradient, or its running sum with momentum."""
        if self._plain:
            torch._foreach_add_(self._tensors, gradients, alpha=-lr)
        else:
            torch_sgd(self._tensors, list(gradients), self._momenta, foreach=True, lr=lr, **self._settings)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the momenta."""
        return {"momenta": [None if momentum is None else momentum.clone() for momentum in self._momenta]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._momenta = [None if momentum is None else momentum.clone() for momentum in state["momenta"]]


class TorchOptimizer:
    """Any other optimizer with the interface of torch.optim."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]):
        self._optimizer, self._parameters = optimizer, parameters

    def step(self, gradients: tuple[Tensor, ...], lr: float) -> None:
        """Give the optimizer its gradients and its learning rate, and let it update."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the optimizer's memory, by the parameters' positions."""
        memory = self._optimizer.state_dict()["state"]
        return {"state": {position: {name: value.clone() if isinstance(value, Tensor) else value
                                     for name, value in entries.items()} for position, entries in memory.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


class OptimizerFactory:
    """Makes a fresh optimizer for every task, from settings that were checked once.

    Args:
        spec: registered name or `module:Class`, alone or under `name` among its settings.

    Raises:
        InvalidSetting: no such optimizer, no such setting, or a value out of its range.
    """

    def __init__(self, spec: str | Mapping[str, Any] = "sgd"):
        settings, problems = check("optimizers", spec, PATH)
        if problems:
            raise problems[0]
        self.name = str(settings.pop("name"))
        self._class: Any = resolve("optimizers", self.name)
        if self._class.__name__ in UNSUITABLE:
            raise InvalidSetting(PATH, self.name, "an optimizer for minibatches", UNSUITABLE[self._class.__name__])
        self._is_sgd = self._class is torch.optim.SGD
        # A file has lists where torch expects tuples.
        self._settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        if self._is_sgd:
            _check_sgd(self._settings)
            for name in IMPLEMENTATIONS:
                self._settings.pop(name, None)
        else:
            self._use_fastest()
            self._try_out()

    def __call__(self, parameters: Sequence[nn.Parameter]) -> LocalOptimizer:
        """Return an optimizer of these parameters without any past."""
        if self._is_sgd:
            return Sgd(parameters, **self._settings)
        return TorchOptimizer(self._class(parameters, lr=1.0, **self._settings), parameters)

    def _use_fastest(self) -> None:
        chosen = any(self._settings.get(name) is not None for name in IMPLEMENTATIONS)
        if "fused" in inspect.signature(self._class).parameters and not chosen:
            self._settings["fused"] = True

    def _try_out(self) -> None:
        parameters = [nn.Parameter(torch.zeros(2, 2))]
        try:
            self._class(parameters, lr=1.0, **self._settings)
        except (TypeError, ValueError, RuntimeError) as error:
            settings = {name: value for name, value in self._settings.items() if name != "fused"}
            raise InvalidSetting(PATH, {"name": self.name, **settings}, "accepted by torch", f"{error}.") from error


def _check_sgd(settings: Mapping[str, Any]) -> None:
    for name in ("momentum", "weight_decay", "dampening"):
        value = settings.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise InvalidSetting(f"{PATH}.{name}", value, "a finite number of at least 0")
    if settings.get("nesterov") and (not settings.get("momentum") or settings.get("dampening")):
        raise InvalidSetting(f"{PATH}.nesterov", True, "used with momentum and without dampening")
