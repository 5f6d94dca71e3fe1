"""FedFix beside synchronous and asynchronous federated averaging, all at server rate 1, and the control that is not.

Multinomial logistic regression (20 features, 10 classes, L2 0.01), 10 clients of equal size with 3 of the 10 classes
each; the fastest client's task takes 0.2 of the slowest's 1 s, the others lie evenly between (the paper's F-80);
10 local steps of batch 32. The measure is the objective above its minimum after 10 s of virtual time.

    python tests/paper/fedfix_study.py              # the tables of docs/algorithms/fedfix.md

Source: Fraboni, Vidal, Kameni, Lorenzi, 2023, JMLR 24(110), arXiv:2206.10189.
"""
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvgM
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.data import Dataset, Samples
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.recorder import Recorder
from fedcore.rounds import FlowerRounds
from fedcore.seeds import numpy_generator
from fedcore.session import Session
from fedcore.simulations.devices import Devices
from fedcore.simulations.distributions import Trace
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategies.fedasync import FedAsync
from fedcore.strategies.fedbuff import FedBuff
from fedcore.strategies.fedfix import FedFix, ticks_of
from fedcore.strategy import HubStrategy
from fedcore.vectors import Model

CLIENTS, CLASSES, CLASSES_EACH, FEATURES, EXAMPLES_EACH = 10, 10, 3, 20, 200
L2, BATCH, LOCAL_STEPS, LOCAL_LR = 0.01, 32, 10, 0.1
HORIZON_S, TAIL_FROM_S = 10.0, 8.0
SLACK_S = 0.01    # FedFix's ticks come a billionth late; the one at the horizon counts
SEEDS = (0, 1, 2)
LOCAL_RATES = (0.02, 0.05, 0.1, 0.2, 0.5)


def spread_times(percent: float) -> list[float]:
    """Return the paper's F-X: task times from 1 down to 1 - X/100, evenly."""
    return [1.0 - percent / 100 * client / (CLIENTS - 1) for client in range(CLIENTS)]


F80 = spread_times(80)


class SkewedBlobs:
    """Ten Gaussian classes; client i has equally many examples of classes i, i + 1 and i + 2."""

    metric_names = ("loss",)

    def __init__(self, seed: int):
        generator = numpy_generator(seed, "blobs")
        centers = 0.6 * generator.normal(size=(CLASSES, FEATURES))
        held = (np.arange(CLIENTS)[:, None] + np.arange(CLASSES_EACH)) % CLASSES
        self.classes = np.repeat(held, -(-EXAMPLES_EACH // CLASSES_EACH), axis=1)[:, :EXAMPLES_EACH]
        inputs = centers[self.classes] + generator.normal(size=(*self.classes.shape, FEATURES))
        self.inputs, self.targets = torch.from_numpy(inputs), torch.from_numpy(self.classes)

    def model(self) -> nn.Module:
        module = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        return module

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return cross entropy with L2/2 times the squared norm of all parameters."""
        squared_norm = sum(parameter.square().sum() for parameter in model.parameters())
        return functional.cross_entropy(model(inputs), targets) + 0.5 * L2 * squared_norm

    def data(self, site: int) -> Samples:
        return Samples(self.inputs[site], self.targets[site])

    def validation_data(self, site: int) -> None:
        return None

    def metrics(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        return {"loss": self.loss(model, *data.batch(torch.arange(len(data)))).item()}

    def objective(self, params: Tensor, weights: Sequence[float]) -> Tensor:
        """Return sum_i weights_i f_i at `params`, shape (d,), the weights divided by their sum."""
        matrix, bias = params[:-CLASSES].view(CLASSES, FEATURES), params[-CLASSES:]
        losses = functional.cross_entropy(
            (self.inputs @ matrix.T + bias).flatten(0, 1), self.targets.flatten(), reduction="none"
        ).view(CLIENTS, -1).mean(1)
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return share @ losses + 0.5 * L2 * params.square().sum()

    def optimum(self, weights: Sequence[float]) -> Tensor:
        """Return the minimiser of `objective`, shape (d,)."""

        def value_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
            params = torch.tensor(point, requires_grad=True)
            value = self.objective(params, weights)
            value.backward()
            return value.item(), params.grad.numpy()

        start = np.zeros(CLASSES * (FEATURES + 1))
        found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B",
                         options={"gtol": 1e-10, "ftol": 1e-15, "maxiter": 5000})
        return torch.from_numpy(found.x)


UNIFORM = [1.0] * CLIENTS


@lru_cache(maxsize=8)
def blobs(seed: int) -> tuple[SkewedBlobs, float]:
    """Return the data of a seed and the least value of the federated objective."""
    task = SkewedBlobs(seed)
    return task, task.objective(task.optimum(UNIFORM), UNIFORM).item()


@dataclass(frozen=True)
class Trial:
    """One run: the objective above its minimum after each version, and the last model."""

    times_s: list[float]
    gaps: list[float]
    params: Tensor
    updates: int

    def gap_at(self, time_s: float) -> float:
        """Return the gap of the version that is current at a time."""
        return [gap for at, gap in zip(self.times_s, self.gaps, strict=True) if at <= time_s + SLACK_S][-1]

    def time_to(self, gap: float) -> float:
        """Return when the gap was first that small; infinity when never."""
        return next((at for at, found in zip(self.times_s, self.gaps, strict=True) if found <= gap), float("inf"))

    def worst_since(self, from_s: float) -> float:
        """Return the largest gap of the versions since a time: an unstable method still leaps up."""
        return max(gap for at, gap in zip(self.times_s, self.gaps, strict=True) if at >= from_s)


def trial(
    strategy: HubStrategy,
    seed: int = 0,
    lr: float = LOCAL_LR,
    *,
    times_s: Sequence[float] = F80,
    local_steps: int = LOCAL_STEPS,
    batch_size: int = BATCH,
    horizon_s: float = HORIZON_S,
    every_version: bool = True,
) -> Trial:
    """Run a strategy to a horizon; a task of client i takes `times_s[i]`."""
    task, least = blobs(seed)
    settings = TrainSettings(lr=lr, local_steps=local_steps, batch_size=batch_size, dtype="float64", device="cpu")
    devices = Devices(Trace([time_s / local_steps for time_s in times_s]), seed=seed)
    grid = VirtualGrid(torch_client(task, settings), CLIENTS, seed=seed, devices=devices)
    rows: list[dict] = []
    evaluation = Evaluation("server", every=1 if every_version else 10**9, fn=lambda model: {
        "gap": task.objective(model.params, UNIFORM).item() - least})
    options = RunOptions(seed=seed, expected=CLIENTS, evaluation=evaluation, stop=StopRule(seconds=horizon_s + SLACK_S))
    hub = Hub(grid, Model.of(task.model()), options, Recorder(listeners=(rows.append,)))
    strategy.drive(Session(hub, strategy))
    scores = [(row["time_s"], row["gap"]) for row in rows if row["event"] == "evaluate"]
    return Trial([at for at, _ in scores], [gap for _, gap in scores], hub.model.params, hub.totals["client_updates"])


def fedavg(server_lr: float = 1.0) -> HubStrategy:
    """Flower's FedAvg with a server rate: its FedAvgM without momentum."""
    return FlowerRounds(FedAvgM(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS,
                                server_learning_rate=server_lr))


METHODS: dict[str, Callable[[], HubStrategy]] = {
    "FedAvg": fedavg,
    "FedFix, dt 0.8": lambda: FedFix(0.8),
    "FedFix, dt 0.5": lambda: FedFix(0.5),
    "FedFix, dt 0.2": lambda: FedFix(0.2),
    "FedFix, auto (dt 0.5 after a first round)": FedFix,
    "FedFix, dt 0.2, identical weights": lambda: FedFix(0.2, weights="identical"),
    "async FedAvg, corrected": lambda: FedAsync(1.0, "constant", "delta", "corrected"),
    "async FedAvg, identical": lambda: FedAsync(1.0, "constant", "delta"),
    "FedBuff, K 5 (polynomial)": lambda: FedBuff(5),
    "FedBuff, K 5, clients wait": lambda: FedBuff(5, staleness="constant", wait=True),
}
CONTROLS: dict[str, Callable[[], HubStrategy]] = {
    "FedAvg, server rate 2": lambda: fedavg(2.0),
    "FedAvg, server rate 5": lambda: fedavg(5.0),
}


def trials(build: Callable[[], HubStrategy], seeds: Sequence[int] = SEEDS, lr: float = LOCAL_LR) -> list[Trial]:
    """Run a method once per seed."""
    return [trial(build(), seed, lr) for seed in seeds]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def one_rate_table() -> None:
    """Print all methods at one local rate."""
    start = median([trial(fedavg(), seed).gaps[0] for seed in SEEDS])
    target = 0.1 * start
    print(f"\nLocal rate {LOCAL_LR:g}, median of {len(SEEDS)} seeds; the gap is {start:.2f} at the start\n")
    print(f"| method | gap at 10 s | largest gap in the last 2 s | s to a gap of {target:.2f} | client updates |")
    print("|---|---|---|---|---|")
    for name, build in {**METHODS, **CONTROLS}.items():
        found = trials(build)
        cells = [f"{median([one.gap_at(HORIZON_S) for one in found]):.3f}",
                 f"{median([one.worst_since(TAIL_FROM_S) for one in found]):.3f}",
                 f"{median([one.time_to(target) for one in found]):.1f}", f"{median([one.updates for one in found]):g}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def rates_table() -> None:
    """Print all methods over a grid of local rates."""
    print(f"\nGap at 10 s by local rate, median of {len(SEEDS)} seeds\n")
    print("| method | " + " | ".join(f"{lr:g}" for lr in LOCAL_RATES) + " |\n|---" + "|---" * len(LOCAL_RATES) + "|")
    for name, build in {**METHODS, **CONTROLS}.items():
        cells = [f"{median([one.gap_at(HORIZON_S) for one in trials(build, lr=lr)]):.3f}" for lr in LOCAL_RATES]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def equal_table() -> None:
    """Print FedFix and FedAvg for clients that are equally fast."""
    print(f"\nEqual clients (F-0), local rate {LOCAL_LR:g}, gap at 10 s, seed 0\n\n| method | gap |\n|---|---|")
    strategies = {"FedAvg": fedavg(), "FedAvg, server rate 2": fedavg(2.0), "FedAvg, server rate 5": fedavg(5.0),
                  "FedFix, dt 0.5": FedFix(0.5), "FedFix, dt 0.2": FedFix(0.2)}
    for name, strategy in strategies.items():
        print(f"| {name} | {trial(strategy, times_s=[1.0] * CLIENTS).gap_at(HORIZON_S):.4f} |", flush=True)


LIMIT_INTERVAL_S, LIMIT_LR, LIMIT_HORIZON_S = 0.2, 0.2, 600.0


def limit_distances(weights: str, seed: int = 0) -> tuple[float, float, float]:
    """Train with one full-gradient step per task until nothing changes any more.

    Returns:
        Relative distance of the limit from the federated optimum, from the biased one (p_i / c_i), and of the biased
        optimum from the federated one.
    """
    task, _ = blobs(seed)
    true = task.optimum(UNIFORM)
    biased = task.optimum([1.0 / ticks_of(time_s, LIMIT_INTERVAL_S) for time_s in F80])
    strategy = FedFix(LIMIT_INTERVAL_S, weights="corrected" if weights == "corrected" else "identical")
    found = trial(strategy, seed, LIMIT_LR, local_steps=1, batch_size=EXAMPLES_EACH, horizon_s=LIMIT_HORIZON_S,
                  every_version=False).params
    scale = true.norm()
    return ((found - true).norm() / scale).item(), ((found - biased).norm() / biased.norm()).item(), (
        (biased - true).norm() / scale).item()


def limit_table() -> None:
    """Print where FedFix ends with each kind of weights."""
    print(f"\nLimit with one full-gradient step per task, dt {LIMIT_INTERVAL_S:g}, local rate {LIMIT_LR:g}, "
          f"{LIMIT_HORIZON_S:g} s\n")
    print("| weights | from the federated optimum | from the biased one | between the two |\n|---|---|---|---|")
    for weights in ("corrected", "identical"):
        print(f"| {weights} | " + " | ".join(f"{distance:.2%}" for distance in limit_distances(weights)) + " |")


def main() -> None:
    """Print the tables."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    one_rate_table()
    rates_table()
    equal_table()
    limit_table()


if __name__ == "__main__":
    main()
