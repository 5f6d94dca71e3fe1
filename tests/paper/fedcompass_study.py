"""FedCompass beside FedAvg, FedBuff and FedAsync under uneven step times: time to a target, and where it ends up.

Time: digits (a small MLP), 10 clients with 5 of the 10 classes each, Qmax 20, Qmin 4, lambda 1.2, steps of 20 ms on
average, 5 % jitter; virtual time until an accuracy of 93 % (or 90 %). Local and server rates are chosen for every
method from the same printed grid, on seeds of their own, over free links.
Limit: multinomial logistic regression on ten overlapping classes, whose optimum is known; what share of the possible
decrease of the loss over all clients' data is reached.

    python tests/paper/fedcompass_study.py          # the tables of docs/algorithms/fedcompass.md
    python tests/paper/fedcompass_study.py --tune   # first choose the rates anew, and print them
"""
import argparse
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvgM
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional

from fedcore.clients.data import Samples
from fedcore.clients.evaluation import server_evaluation
from fedcore.clients.partitions import Classes, Traits
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import PartitionedTask
from fedcore.clients.tasks.classification import Classification
from fedcore.clients.tasks.digits import Digits
from fedcore.clients.torch_client import torch_client
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.recorder import Recorder, Row
from fedcore.rounds import FlowerRounds
from fedcore.seeds import derive_seed, numpy_generator
from fedcore.session import Session
from fedcore.simulations.devices import Devices
from fedcore.simulations.distributions import Constant, Exponential, Normal
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from fedcore.strategies.fedasync import FedAsync
from fedcore.strategies.fedbuff import FedBuff
from fedcore.strategies.fedcompass import FedCompass
from fedcore.strategy import HubStrategy
from fedcore.vectors import Model

CLIENTS, CLASSES, FEATURES, EXAMPLES = 10, 10, 20, 4000
QMAX, QMIN, LATEST = 20, 4, 1.2
STEP_S, JITTER = 0.02, 0.05
TARGET, LOOSE_TARGET = 0.93, 0.90
HORIZON_S, MOST_UPDATES = 30.0, 1500
TUNING_SEEDS, REPORT_SEEDS = (100, 101), (0, 1, 2, 3, 4)

STEP_TIMES = {
    "equal": lambda: Constant(STEP_S),
    "normal": lambda: Normal(STEP_S, relative_std=0.3),
    "exponential": lambda: Exponential(STEP_S),
}
LINKS = {
    "free": lambda seed: Network(seed=seed),
    "thin": lambda seed: Network(latency_s=0.05, uplink_mbps=20, downlink_mbps=100, seed=seed),
}
LOCAL_RATES = (0.4, 0.2, 0.8, 0.1)    # likely ones first: the time to beat limits the others


@dataclass(frozen=True)
class Method:
    """A strategy with the amount of local work and the server rates that are tried for it.

    Attributes:
        rates_of: a variant takes the rates that were chosen for this method.
    """

    build: Callable[[float], HubStrategy]
    server_rates: tuple[float, ...] = ()
    local_steps: int = QMAX
    rates_of: str = ""


def compass(server_lr: float, **options: bool) -> FedCompass:
    return FedCompass(QMIN, QMAX, latest_time_factor=LATEST, server_lr=server_lr, **options)


def fedavg(server_lr: float) -> HubStrategy:
    """Flower's FedAvg with a server rate: its FedAvgM without momentum."""
    strategy = FedAvgM(
        fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS, server_learning_rate=server_lr
    )
    return FlowerRounds(strategy)


METHODS = {
    "FedCompass": Method(compass, (4.0, 2.0, 8.0, 1.0)),
    "FedCompass, normalised": Method(lambda rate: compass(rate, normalise_steps=True), rates_of="FedCompass"),
    "FedCompass, links apart": Method(lambda rate: compass(rate, link_estimate=True), rates_of="FedCompass"),
    f"FedAvg Q={QMAX}": Method(fedavg, (1.5, 1.0, 2.0)),
    f"FedAvg Q={QMIN}": Method(fedavg, (1.5, 1.0, 2.0), QMIN),
    "FedBuff K=3": Method(lambda rate: FedBuff(3, rate), (1.0, 0.5, 2.0)),
    "FedBuff K=5": Method(lambda rate: FedBuff(5, rate), (1.0, 0.5, 2.0)),
    "FedAsync": Method(FedAsync, (0.6, 0.3, 0.9)),
}

# (local rate, server rate), chosen by `--tune` on TUNING_SEEDS; see `tune`.
RATES: dict[tuple[str, str], tuple[float, float]] = {
    ("exponential", "FedCompass"): (0.4, 4.0),
    ("exponential", "FedAvg Q=20"): (0.4, 1.5),
    ("exponential", "FedAvg Q=4"): (0.4, 2.0),
    ("exponential", "FedBuff K=3"): (0.4, 2.0),
    ("exponential", "FedBuff K=5"): (0.4, 2.0),
    ("exponential", "FedAsync"): (0.8, 0.9),
    ("normal", "FedCompass"): (0.4, 2.0),
    ("normal", "FedAvg Q=20"): (0.4, 1.0),
    ("normal", "FedAvg Q=4"): (0.4, 2.0),
    ("normal", "FedBuff K=3"): (0.4, 1.0),
    ("normal", "FedBuff K=5"): (0.4, 1.0),
    ("normal", "FedAsync"): (0.4, 0.9),
    ("equal", "FedCompass"): (0.4, 1.0),
    ("equal", "FedAvg Q=20"): (0.4, 1.5),
    ("equal", "FedAvg Q=4"): (0.4, 2.0),
    ("equal", "FedBuff K=3"): (0.4, 0.5),
    ("equal", "FedBuff K=5"): (0.4, 1.0),
    ("equal", "FedAsync"): (0.4, 0.6),
}


@dataclass(frozen=True)
class Condition:
    """What the federation is like."""

    step_times: str
    links: str = "free"
    classes_per_client: int = 5


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        scores: (virtual seconds, score) of every version.
    """

    scores: list[tuple[float, float]]
    updates: int
    versions: int
    max_staleness: int

    @property
    def last(self) -> float:
        """The score at the end."""
        return self.scores[-1][1]

    def seconds_to(self, target: float) -> float:
        """Return when a score was reached, infinity when it was not."""
        return next((time_s for time_s, score in self.scores if score >= target), math.inf)


class Blobs(Classification):
    """Ten overlapping Gaussian classes; the optimum of logistic regression on them is finite and unique."""

    def __init__(self, seed: int):
        generator = numpy_generator(seed, "blobs")
        labels = np.arange(EXAMPLES) % CLASSES
        centers = generator.normal(size=(CLASSES, FEATURES)) * 0.6
        inputs = (centers[labels] + generator.normal(size=(EXAMPLES, FEATURES))).astype(np.float32)
        self.examples, self.labels = Samples(torch.from_numpy(inputs), torch.from_numpy(labels)), labels

    def model(self) -> nn.Module:
        module = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        return module

    def training_data(self, site: str | None = None) -> Samples:
        return self.examples

    def test_data(self, site: str | None = None) -> Samples:
        # The objective itself: the loss over everybody's training data.
        return self.examples

    def traits(self) -> Traits:
        return Traits(EXAMPLES, labels=self.labels)

    def least_loss(self) -> float:
        """Return the smallest loss that any parameters have."""
        inputs, targets = self.examples.inputs.double().numpy(), self.labels
        solver = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(inputs, targets)
        scores = torch.from_numpy(inputs @ solver.coef_.T + solver.intercept_)
        return functional.cross_entropy(scores, torch.from_numpy(targets)).item()


@dataclass(frozen=True)
class Problem:
    """What is trained, and the score by which a model is judged; higher is better, 1 the most."""

    pool: Any
    score: Callable[[dict[str, float]], float]


def digits(seed: int) -> Problem:
    """Return real handwritten digits, judged by accuracy on the test digits."""
    return Problem(Digits(), lambda figures: figures["accuracy"])


@lru_cache(maxsize=8)
def blobs(seed: int) -> Problem:
    """Return logistic regression, judged by the share of the possible decrease of the loss."""
    pool, highest = Blobs(seed), math.log(CLASSES)
    least = pool.least_loss()
    return Problem(pool, lambda figures: (highest - figures["loss"]) / (highest - least))


def trial(
    name: str, condition: Condition, rates: tuple[float, float], seed: int, *,
    problem: Callable[[int], Problem] = digits, target: float = TARGET, horizon_s: float = HORIZON_S,
    most_updates: int | None = MOST_UPDATES,
) -> Trial:
    """Run a method until it has reached a score, or a limit."""
    learning, method, (local_lr, server_lr) = problem(seed), METHODS[name], rates
    task = PartitionedTask(learning.pool, Classes(condition.classes_per_client), CLIENTS, seed)
    app = torch_client(task, TrainSettings(lr=local_lr, local_steps=method.local_steps, device="cpu"))
    devices = Devices(STEP_TIMES[condition.step_times](), jitter=JITTER, seed=seed)
    grid = VirtualGrid(app, CLIENTS, seed=seed, devices=devices, network=LINKS[condition.links](seed))
    evaluate, rows = server_evaluation(task), list[Row]()
    options = RunOptions(
        seed=seed, expected=CLIENTS,
        evaluation=Evaluation("server", fn=lambda model: {"score": learning.score(evaluate(model))}),
        stop=StopRule(seconds=horizon_s, client_updates=most_updates, target={"score": target}),
    )
    torch.manual_seed(derive_seed(seed, "model"))
    strategy = method.build(server_lr)
    hub = Hub(grid, Model.of(task.model()), options, Recorder(listeners=(rows.append,)))
    strategy.drive(Session(hub, strategy))
    staleness = [age for row in rows if row["event"] == "update" for age in row["staleness"]]
    scores = [(row["time_s"], row["score"]) for row in rows if row["event"] == "evaluate"]
    return Trial(scores, hub.totals["client_updates"], hub.version, max(staleness, default=0))


def tune(name: str, condition: Condition) -> tuple[float, float]:
    """Return the rates with which a method reaches the target soonest, all tuning seeds together."""
    best, best_rates = HORIZON_S * len(TUNING_SEEDS), (0.0, 0.0)
    for rates in product(LOCAL_RATES, METHODS[name].server_rates):
        total = 0.0
        for seed in TUNING_SEEDS:
            # Nobody needs to know how much longer than the best so far the others take.
            limit = min(HORIZON_S, best - total)
            total += min(limit, trial(name, condition, rates, seed, horizon_s=limit).seconds_to(TARGET))
        if total < best:
            best, best_rates = total, rates
    return best_rates


def tune_all(step_times: list[str]) -> None:
    """Choose every method's rates over free links, and print them as they are written above."""
    for kind in step_times:
        for name, method in METHODS.items():
            if not method.rates_of:
                RATES[kind, name] = tune(name, Condition(kind))
                print(f'    ("{kind}", "{name}"): {RATES[kind, name]},', flush=True)


def trials(name: str, condition: Condition, seeds: tuple[int, ...]) -> list[Trial]:
    """Run a method once per seed, with the rates chosen for it; links were not tuned for separately."""
    rates = RATES[condition.step_times, METHODS[name].rates_of or name]
    return [trial(name, condition, rates, seed) for seed in seeds]


def median_time(found: list[Trial], target: float = TARGET) -> float:
    """Return the median time to a score; a miss counts as infinitely long."""
    return statistics.median(one.seconds_to(target) for one in found)


def time_table(condition: Condition, seeds: tuple[int, ...]) -> None:
    """Print one condition's times as Markdown."""
    print(f"\n{condition.step_times} step times, {condition.links} links\n")
    print(f"| method | rates | s to {TARGET:.0%} | / FedCompass | s to {LOOSE_TARGET:.0%} | / FedCompass | missed "
          f"{TARGET:.0%} | client updates | largest staleness |\n" + "|---" * 9 + "|")
    yardstick: list[Trial] = []
    for name, method in METHODS.items():
        found = trials(name, condition, seeds)
        yardstick = yardstick or found
        cells = [f"{rate:g}" for rate in RATES[condition.step_times, method.rates_of or name]]
        times = [(median_time(found, target), median_time(yardstick, target)) for target in (TARGET, LOOSE_TARGET)]
        cells = [", ".join(cells), *(f"{time_s:.2f} | {time_s / unit:.2f}" for time_s, unit in times)]
        cells.append(f"{sum(math.isinf(one.seconds_to(TARGET)) for one in found)} of {len(seeds)}")
        cells.append(f"{statistics.median(one.updates for one in found):g}")
        cells.append(f"{max(one.max_staleness for one in found)}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


LIMIT_RATES, LIMIT_HORIZON_S = (0.2, 1.0), 30.0
LIMIT_METHODS = (f"FedAvg Q={QMAX}", "FedCompass", "FedCompass, normalised")


def limits(
    name: str, condition: Condition, seeds: tuple[int, ...], horizon_s: float = LIMIT_HORIZON_S
) -> list[float]:
    """Return the share of the possible decrease that is reached in a fixed time, all methods at the same rates."""
    return [
        trial(
            name, condition, LIMIT_RATES, seed, problem=blobs, target=1.0, horizon_s=horizon_s, most_updates=None
        ).last
        for seed in seeds
    ]


def limit_table(classes_per_client: int, seeds: tuple[int, ...]) -> None:
    """Print where the methods end up on the convex problem, as Markdown."""
    print(f"\n{classes_per_client} classes per client, local rate {LIMIT_RATES[0]:g}, server rate {LIMIT_RATES[1]:g}: "
          f"share of the possible decrease after {LIMIT_HORIZON_S:g} s, median (least to most)\n")
    print("| method | " + " | ".join(STEP_TIMES) + " |\n" + "|---" * (1 + len(STEP_TIMES)) + "|")
    for name in LIMIT_METHODS:
        cells = []
        for step_times in STEP_TIMES:
            found = limits(name, Condition(step_times, classes_per_client=classes_per_client), seeds)
            cells.append(f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="choose the rates anew first")
    parser.add_argument("--step-times", nargs="*", choices=STEP_TIMES, default=list(STEP_TIMES))
    parser.add_argument("--no-limits", action="store_true", help="leave out the convex problem")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.tune:
        tune_all(arguments.step_times)
    print(f"Medians of {len(REPORT_SEEDS)} seeds.")
    for step_times in arguments.step_times:
        for links in LINKS:
            time_table(Condition(step_times, links), REPORT_SEEDS)
    for classes_per_client in () if arguments.no_limits else (5, 2):
        limit_table(classes_per_client, REPORT_SEEDS)


if __name__ == "__main__":
    main()
