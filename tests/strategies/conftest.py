"""A small federation in virtual time: quadratic clients with a known optimum, each with its own time per task."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore.checkpoint import Checkpoints
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.hub import Hub
from fedcore.options import RunOptions, StopRule
from fedcore.recorder import Recorder
from fedcore.session import Session
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategy import HubStrategy
from fedcore.vectors import Model

# As in a simulation: with more threads small tests wait for each other, and bits depend on the machine.
torch.set_num_threads(1)


class Point(nn.Module):
    """A model that is one vector."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.params = nn.Parameter(start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.params - inputs


class Quadratic:
    """Client i has f_i(w) = a_i/2 |w - m_i|^2, as one example whose gradient is exact."""

    metric_names = ("loss",)

    def __init__(self, centers: Tensor, curvatures: Sequence[float] | None = None):
        self.centers = centers                                        # (clients, d), m_i
        self.curvatures = torch.tensor(curvatures or [1.0] * len(centers), dtype=centers.dtype)

    def model(self) -> nn.Module:
        return Point(torch.zeros(self.centers.shape[1], dtype=self.centers.dtype))

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (targets * model(inputs).square().sum(1)).mean()

    def data(self, site: int) -> tuple[Tensor, Tensor]:
        return self.centers[site:site + 1], self.curvatures[site:site + 1]

    def validation_data(self, site: int) -> None:
        return None

    def metrics(self, model: nn.Module, data: Any) -> dict[str, float]:
        inputs, targets = data.batch(torch.arange(len(data)))
        return {"loss": self.loss(model, inputs, targets).item()}


class Noisy(Quadratic):
    """Quadratic clients of twelve examples each, scattered about the center, so that batches are drawn."""

    def data(self, site: int) -> tuple[Tensor, Tensor]:
        center, curvature = super().data(site)
        noise = torch.randn(12, center.shape[1], dtype=center.dtype, generator=torch.Generator().manual_seed(site))
        return center + noise, curvature.repeat(12)


class TaskTimes:
    """A task of client i takes so many seconds, whatever it consists of."""

    seconds_per_task = 0.0

    def __init__(self, times_s: Sequence[float | Sequence[float]]):
        self.times_s = times_s

    def compute_seconds(self, partition: int, task_index: int, work_steps: float) -> float:
        time_s = self.times_s[partition] if work_steps else 0.0
        # Task 0 is the query. A client given several times takes them in turn.
        return time_s if isinstance(time_s, (int, float)) else time_s[(task_index - 1) % len(time_s)]


@dataclass
class Outcome:
    """What a run left behind."""

    params: Tensor
    rows: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    hub: Hub
    strategy: HubStrategy
    trajectory: list[Tensor] = field(default_factory=list)    # parameters after each version

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == event]

    def logged(self, name: str) -> list[Any]:
        return [row[name] for row in self.of("log") if name in row]


class Listener(Recorder):
    """Keeps rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        super().__init__(listeners=(self.rows.append,))

    def task(self, row: dict[str, Any]) -> None:
        self.tasks.append(row)


def federate(
    strategy: HubStrategy,
    times_s: Sequence[float | Sequence[float]],
    *,
    centers: Tensor | None = None,
    curvatures: Sequence[float] | None = None,
    local_steps: int = 2,
    lr: float = 0.1,
    seed: int = 0,
    task: Any = None,
    app: Any = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    interrupted: Any = None,
    grid_class: type[VirtualGrid] = VirtualGrid,
    **stop: Any,
) -> Outcome:
    """Run a strategy over clients whose tasks take `times_s` seconds (one each, or several taken in turn)."""
    grid_settings = {name: stop.pop(name) for name in ("availability", "failures", "network") if name in stop}
    waiting = {name: stop.pop(name) for name in (
        "round_deadline_s", "deadline_factor", "min_replies_share", "compression") if name in stop}
    if centers is None:
        centers = torch.randn(len(times_s), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    task = task or Quadratic(centers, curvatures)
    dtype = str(next(task.model().parameters()).dtype).removeprefix("torch.")
    settings = TrainSettings(lr=lr, batch_size=4, local_steps=local_steps, dtype=dtype, device="cpu")
    app = app or torch_client(task, settings)
    recorder = Listener()
    options = RunOptions(seed=seed, expected=len(times_s), stop=StopRule(**stop), **waiting)
    grid = grid_class(app, len(times_s), seed=seed, devices=TaskTimes(times_s), **grid_settings)
    hub = Hub(grid, Model.of(task.model()), options, recorder)
    outcome = Outcome(hub.model.params, recorder.rows, recorder.tasks, hub, strategy)
    publish = hub.publish

    def remember(*args: Any, **kwargs: Any) -> None:
        publish(*args, **kwargs)
        outcome.trajectory.append(hub.model.params)

    hub.publish = remember  # type: ignore[method-assign]
    session = Session(hub, strategy, checkpoints, save_every_s=0.0, interrupted=interrupted or (lambda: False))
    if resume:
        session.restore()
    strategy.drive(session)
    outcome.params = hub.model.params
    return outcome


@pytest.fixture(name="federate", scope="session")
def federate_fixture() -> Any:
    """Run a strategy over quadratic clients: `federate(strategy, times_s, rounds=3)`."""
    return federate


@pytest.fixture(name="quadratic", scope="session")
def quadratic_fixture() -> Any:
    """Make a task of quadratic clients: `quadratic(centers, curvatures)`."""
    return Quadratic


@pytest.fixture(name="noisy", scope="session")
def noisy_fixture() -> Any:
    """Make a task of quadratic clients whose batches are drawn: `noisy(centers)`."""
    return Noisy
