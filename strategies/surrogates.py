"""What a client of FZooS does: it descends along its Gaussian process's gradient, and asks where it is least sure.

Points are in the unit cube [0, 1]^d throughout; whoever evaluates maps them to the task's box.

Source: Shu, Lin, Dai and Low, 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate
Gradients", arXiv:2308.04077, algorithm 2 (client).
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedcore.errors import BlackBoxFailed
from fedcore.strategies.gaussian_process import GaussianProcess
from fedcore.strategies.local_steps import OPTIMIZERS, local_optimizer
from fedcore.strategies.random_features import Features
from fedcore.strategies.settings import check_choice, check_count, check_number, check_switch

# gamma_t (h(w, x) - h(w_i, x)) at a local iteration t and a point x.
Correction = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Search:
    """How a client searches; see `fedcore.strategies.fzoos.FZooS`."""

    local_iterations: int = 10
    local_lr: float = 0.01
    local_optimizer: str = "adam"
    features: int = 10_000
    noise: float = 1e-6
    nearest: int = 150
    feature_queries: int = 500
    initial_queries: int = 10
    initial_radius: float = 0.01
    active_queries: int = 5
    active_candidates: int = 100
    active_radius: float = 0.01
    end_queries: int = 50
    end_candidates: int = 200
    memory: int = 2000
    project: bool = False

    def __post_init__(self) -> None:
        for name in ("local_iterations", "features"):
            check_count(name, getattr(self, name), 1)
        for name in ("nearest", "feature_queries", "initial_queries"):
            check_count(name, getattr(self, name), 2)
        for name in ("local_lr", "initial_radius", "active_radius"):
            check_number(name, getattr(self, name), above=0)
        check_number("noise", self.noise, at_least=0)
        check_choice("local_optimizer", self.local_optimizer, OPTIMIZERS)
        check_switch("project", self.project)
        for queries, candidates in (("active_queries", "active_candidates"), ("end_queries", "end_candidates")):
            check_count(candidates, getattr(self, candidates), 0)
            check_count(queries, getattr(self, queries), 0, getattr(self, candidates),
                        f"The queries are chosen among strategy.{candidates}.")
        check_count("memory", self.memory, max(self.nearest, self.feature_queries))

    def queries_per_round(self) -> int:
        """Return how many queries a client makes in a round, beyond `initial_queries` + 1 once."""
        return self.local_iterations + self.active_queries * (self.local_iterations - 1) + self.end_queries + 1


class Oracle(Protocol):
    """Answers queries, and counts them.

    Attributes:
        spent: whether the budget of queries is used up; what is asked then is not answered.
    """

    @property
    def spent(self) -> bool: ...

    def ask(self, points: np.ndarray) -> np.ndarray:
        """Return f at points of shape (n, d), shape (n,); NaN where there is no answer."""
        ...


@dataclass(frozen=True)
class History:
    """A client's queries, oldest first, no point twice.

    Attributes:
        points: shape (n, d).
        values: shape (n,), all finite.
    """

    points: np.ndarray
    values: np.ndarray

    @classmethod
    def empty(cls, dimension: int) -> "History":
        """Return a history without queries."""
        return cls(np.empty((0, dimension)), np.empty(0))

    def __len__(self) -> int:
        return len(self.values)

    def add(self, points: np.ndarray, values: np.ndarray) -> "History":
        """Return the history with more queries: only finite values, and only points that are new."""
        known = {point.tobytes() for point in self.points}
        fresh = []
        for row, point in enumerate(points):
            if np.isfinite(values[row]) and (name := point.tobytes()) not in known:
                known.add(name)
                fresh.append(row)
        return History(np.concatenate((self.points, points[fresh])), np.concatenate((self.values, values[fresh])))

    def newest(self, count: int) -> "History":
        """Return the last queries only."""
        return self if len(self) <= count else History(self.points[-count:], self.values[-count:])

    def nearest(self, point: np.ndarray, count: int) -> np.ndarray:
        """Return the indices of the queries nearest to a point, ascending; of equally near ones the oldest."""
        if len(self) <= count:
            return np.arange(len(self))
        distances = ((self.points - point) ** 2).sum(1)
        return np.sort(np.argsort(distances, kind="stable")[:count])


@dataclass
class Descent:
    """A client's round so far.

    Attributes:
        history: all queries.
        point: x_i,t, shape (d,).
        local: g_i at each x_i,t that a step was made from, without correction; only where `record` is set.
        used: the same with the correction.
        visited: those x_i,t.
        flat_steps: steps at which all values nearby were equal.
    """

    history: History
    point: np.ndarray
    record: bool = False
    local: list[np.ndarray] = field(default_factory=list)
    used: list[np.ndarray] = field(default_factory=list)
    visited: list[np.ndarray] = field(default_factory=list)
    flat_steps: int = 0


def ask_around(
    oracle: Oracle, history: History, centre: np.ndarray, search: Search, generator: np.random.Generator,
    with_centre: bool = True,
) -> tuple[History, float]:
    """Make a client's first queries: uniform around a point, then the point itself; returns f there, or NaN."""
    shape = (search.initial_queries, len(centre))
    points = placed(centre + search.initial_radius * generator.uniform(-1, 1, shape), search)
    history = history.add(points, oracle.ask(points))
    if not with_centre:
        return history, float("nan")
    value = oracle.ask(centre[None])
    return history.add(centre[None], value), float(value[0])


def placed(points: np.ndarray, search: Search) -> np.ndarray:
    """Return points where the search may ask: in the unit cube when it projects."""
    return np.clip(points, 0, 1) if search.project else points


def descend(
    oracle: Oracle, state: Descent, search: Search, lengthscale: float, generator: np.random.Generator,
    correction: Correction | None,
) -> None:
    """Run the T local iterations, from `state.point`; ends early when the budget is spent.

    Args:
        state: what the round begins with; changed.
        correction: None where there is none.
    """
    process, optimizer = GaussianProcess(lengthscale, search.noise), local_optimizer(search.local_optimizer,
                                                                                    search.local_lr)
    for t in range(search.local_iterations):
        if oracle.spent:
            return
        condition(process, state.history, state.point, search.nearest)
        local = process.gradient(state.point)                                              # g_i(x_i,t)
        gradient = local if correction is None else local + correction(t, state.point)
        state.flat_steps += process.flat
        if state.record:
            state.local.append(local)
            state.used.append(gradient)
            state.visited.append(state.point)
        state.point = placed(state.point - optimizer.step(gradient), search)               # x_i,t+1
        state.history = state.history.add(state.point[None], oracle.ask(state.point[None]))
        if t < search.local_iterations - 1:
            state.history = ask_actively(
                oracle, process, state.history, state.point, search.active_queries, search.active_candidates,
                search.active_radius, search, generator)


def condition(process: GaussianProcess, history: History, point: np.ndarray, count: int) -> None:
    """Give a Gaussian process the queries nearest to a point."""
    names = history.nearest(point, count)
    if not len(names):
        raise BlackBoxFailed("The black box gave no usable value yet, so there is nothing to begin with.")
    process.condition(names.tolist(), history.points[names], history.values[names])


def ask_actively(
    oracle: Oracle, process: GaussianProcess, history: History, centre: np.ndarray, count: int, candidates: int,
    radius: float, search: Search, generator: np.random.Generator,
) -> History:
    """Query those of some random points around a centre at which the process is least sure."""
    if not count or oracle.spent:
        return history
    offers = placed(centre + radius * generator.uniform(-1, 1, (candidates, len(centre))), search)
    condition(process, history, centre, search.nearest)
    chosen = np.argsort(-process.uncertainty(offers), kind="stable")[:count]
    return history.add(offers[chosen], oracle.ask(offers[chosen]))


def finish(
    oracle: Oracle, history: History, point: np.ndarray, left: np.ndarray | None, search: Search, lengthscale: float,
    generator: np.random.Generator,
) -> tuple[History, float]:
    """Query the server's new point, and around it where the process is least sure; returns f at the point too.

    Args:
        point: x_{r+1}, shape (d,).
        left: x_i,T, from which the radius follows: mean_j |x_{r+1,j} - x_i,T,j| / 2; None, or the same point: the
            radius of the active queries.
    """
    value = oracle.ask(point[None])
    history = history.add(point[None], value)
    radius = 0.0 if left is None else float(np.abs(point - left).mean()) / 2
    process = GaussianProcess(lengthscale, search.noise)
    if search.end_queries and not oracle.spent:
        history = ask_actively(oracle, process, history, point, search.end_queries, search.end_candidates,
                               radius or search.active_radius, search, generator)
    return history, float(value[0])


def surrogate(history: History, point: np.ndarray, features: Features, search: Search) -> np.ndarray:
    """Return w_i, shape (M,), from the queries nearest to a point."""
    names = history.nearest(point, search.feature_queries)
    return features.weights(history.points[names], history.values[names], search.noise)
