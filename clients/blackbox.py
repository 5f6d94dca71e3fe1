"""Functions that can only be evaluated, as tasks; and the oracle that asks them on a client's behalf.

A black box of a user's own is a plain class with `dimension`, `box` and `evaluate(point, site)`, or
`evaluate(point)` where all sites have the same one; see `OwnBlackBox` for what it may have beside.
"""
import inspect
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.clients.data import Dataset, Samples
from fedcore.clients.task import Site
from fedcore.errors import BlackBoxFailed, InvalidSetting, MalformedRequest

logger = logging.getLogger("fedcore")

# So many queries in a row without a usable answer end the search.
MOST_FAILURES_IN_A_ROW = 10
LONGEST_SHOWN = 300     # characters of what a black box raised

Bounds = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Box:
    """Where a black box is defined: each coordinate between two bounds. Methods see it as the unit cube.

    Attributes:
        low, high: shape (d,).
    """

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, bounds: Bounds, dimension: int) -> "Box":
        """Return the box of one pair of bounds for all coordinates, or of one for each.

        Raises:
            InvalidSetting: the bounds make no box.
        """
        advice = "Give [low, high], or a list of such pairs, one for each coordinate."
        try:
            pairs = np.asarray(bounds, dtype=float)
        except (TypeError, ValueError) as error:
            raise InvalidSetting("box", bounds, "pairs of numbers", advice) from error
        if pairs.shape == (2,):
            pairs = np.tile(pairs, (dimension, 1))
        if pairs.shape != (dimension, 2) or not np.isfinite(pairs).all() or not (pairs[:, 0] < pairs[:, 1]).all():
            raise InvalidSetting("box", bounds, f"lower bounds below upper ones, for {dimension} coordinates", advice)
        return cls(pairs[:, 0].copy(), pairs[:, 1].copy())

    def to_unit(self, points: np.ndarray) -> np.ndarray:
        """Return points of shape (..., d) in units of the box."""
        return (points - self.low) / (self.high - self.low)

    def from_unit(self, points: np.ndarray) -> np.ndarray:
        """Return points given in units of the box."""
        return self.low + points * (self.high - self.low)

    def clip(self, points: np.ndarray) -> np.ndarray:
        """Return the nearest points inside."""
        return np.clip(points, self.low, self.high)


class Point(nn.Module):
    """A model that is a point; returns its displacement from each input."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.params = nn.Parameter(start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.params - inputs


class BlackBoxTask(ABC):
    """Minimise the mean over the sites of functions that can only be evaluated.

    Args:
        dimension: of a point, at least 1.
        box: where the functions are defined; what lies outside is clipped to it before it is evaluated.
        budget: queries that each client may make; None: as many as it likes.
        retries: further attempts at an evaluation that raises an exception or takes too long; each counts as a query.
        timeout_s: longest time for an attempt, wall-clock seconds; None: no limit.

    Attributes:
        batched: whether `evaluate_many` takes many points in one call; otherwise it gets them one by one.
        stops_itself: whether an attempt ends by itself after `timeout_s`.
    """

    metric_names: tuple[str, ...] = ("loss",)
    batched = False
    stops_itself = False

    def __init__(
        self, dimension: int, box: Bounds = (0.0, 1.0), budget: int | None = None, retries: int = 0,
        timeout_s: float | None = None,
    ):
        if dimension < 1:
            raise InvalidSetting("dimension", dimension, "at least 1")
        if budget is not None and budget < 1:
            raise InvalidSetting("budget", budget, "at least 1, or left out")
        if retries < 0:
            raise InvalidSetting("retries", retries, "at least 0")
        if timeout_s is not None and not timeout_s > 0:
            raise InvalidSetting("timeout_s", timeout_s, "above 0, or left out")
        self.dimension, self.box = dimension, Box.of(box, dimension)
        self.budget, self.retries, self.timeout_s = budget, retries, timeout_s

    # ---- what a black box is --------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate_many(self, points: np.ndarray, site: Site) -> np.ndarray:
        """Return a site's function at points of shape (n, dimension), inside the box; shape (n,)."""

    def start(self) -> np.ndarray:
        """Return the point that a run starts from, shape (dimension,)."""
        return (self.box.low + self.box.high) / 2

    def figures(self, point: np.ndarray) -> Mapping[str, float]:
        """Return what is known of a point beside its loss."""
        return {}

    # A task whose derivatives are known defines these two, and reports then show how good estimates were.
    gradient: Callable[[np.ndarray, Site], np.ndarray] | None = None            # of a site's function
    mean_gradient: Callable[[np.ndarray], np.ndarray] | None = None             # of the mean over the sites

    # ---- what every task has ----------------------------------------------------------------------------------------

    num_clients = 1

    def model(self) -> nn.Module:
        """Return the starting point as a model."""
        return Point(torch.from_numpy(np.asarray(self.start(), dtype=float)).to(torch.get_default_dtype()))

    def data(self, site: Site) -> Samples:
        """Return one empty example: all sites weigh the same."""
        return Samples(torch.empty(1, 0), torch.empty(1, 0))

    def validation_data(self, site: Site) -> None:
        """There are no data."""
        return

    def test_data(self) -> Samples:
        """Return an empty example: a server that evaluates asks every site's function."""
        return self.data(0)

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return the mean of all sites' functions at a point, and what else is known of it."""
        point = next(model.parameters()).detach().double().cpu().numpy()
        inside = self.box.clip(point)[None]
        values = [float(self.evaluate_many(inside, site)[0]) for site in range(self.num_clients)]
        return {"loss": sum(values) / len(values), **self.figures(inside[0])}

    def client_app(self, settings: Any) -> Any:
        """Return the clients of methods that only evaluate."""
        from fedcore.clients.blackbox_client import BlackBoxApp, BlackBoxClient

        return BlackBoxApp(BlackBoxClient(self, settings))


class OwnBlackBox(BlackBoxTask):
    """A user's class with `dimension`, `box` and `evaluate`.

    It may also have `start()`, `figures(point)`, `gradient(point, site)`, `mean_gradient(point)`, and attributes
    `budget`, `retries`, `timeout_s`, `metric_names`.

    Args:
        inner: the user's object.
        num_clients: sites.
    """

    def __init__(self, inner: Any, num_clients: int):
        super().__init__(inner.dimension, getattr(inner, "box", (0.0, 1.0)), getattr(inner, "budget", None),
                         getattr(inner, "retries", 0), getattr(inner, "timeout_s", None))
        self.num_clients, self._evaluate = num_clients, with_site(inner.evaluate)
        for name in ("start", "figures", "gradient", "mean_gradient", "metric_names"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def evaluate_many(self, points: np.ndarray, site: Site) -> np.ndarray:
        return np.array([as_number(self._evaluate(point, site)) for point in points])


def is_black_box(task: Any) -> bool:
    """Say whether an object is a black box of a user's own."""
    return not isinstance(task, BlackBoxTask) and hasattr(task, "dimension") and callable(
        getattr(task, "evaluate", None))


def with_site(function: Callable[..., Any]) -> Callable[[np.ndarray, Site], Any]:
    """Return a function of a point and a site, whether or not the given one wants to know the site."""
    try:
        takes = [parameter for parameter in inspect.signature(function).parameters.values()
                 if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    except ValueError:      # one written in C does not say
        takes = []
    if len(takes) > 1 and (takes[1].default is takes[1].empty or takes[1].name == "site"):
        return function
    return lambda point, site: function(point)


def as_number(value: Any) -> float:
    """Return what a black box returned as a number.

    Raises:
        ValueError, TypeError: it is none.
    """
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.item()
    return float(value)


@dataclass
class Counts:
    """What a client has asked so far.

    Attributes:
        queries: evaluations for a method, failed ones and repeated attempts among them.
        failed: queries without a usable answer.
        failures_in_a_row: of them, since the last usable answer.
        evaluations: for the record, not for a method.
    """

    queries: int = 0
    failed: int = 0
    failures_in_a_row: int = 0
    evaluations: int = 0


class SiteOracle:
    """Asks one site's function, and counts; points are in the unit cube.

    Args:
        counts: of this client; changed.
    """

    def __init__(self, task: BlackBoxTask, site: Site, counts: Counts):
        self.task, self.site, self.counts = task, site, counts
        self.before = counts.queries

    @property
    def queries(self) -> int:
        """Queries that this oracle was asked."""
        return self.counts.queries - self.before

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.left == 0

    @property
    def left(self) -> float:
        """How many queries the budget still allows."""
        return math.inf if self.task.budget is None else max(0, self.task.budget - self.counts.queries)

    def ask(self, points: np.ndarray) -> np.ndarray:
        """Return f at points of shape (n, d), shape (n,); NaN where there is no usable answer, or no budget.

        Raises:
            BlackBoxFailed: ten queries in a row had no usable answer.
        """
        values = np.full(len(points), np.nan)
        real = self.task.box.clip(self.task.box.from_unit(points))
        size = len(points) if self.task.batched else 1
        for first in range(0, len(points), max(1, size)):
            part = real[first:first + size][:int(min(size, self.left))]
            if len(part):
                values[first:first + len(part)] = self._answers(part)
        return values

    def _answers(self, points: np.ndarray) -> np.ndarray:
        problem = "it is not finite"
        values = np.full(len(points), np.nan)
        for _ in range(1 + self.task.retries):
            if len(points) > self.left:
                break
            self.counts.queries += len(points)
            try:
                values = np.asarray(self._attempt(points), dtype=float).reshape(len(points))
                break
            except MalformedRequest:
                raise
            except Exception as error:      # a user's function may raise anything
                problem = f"{type(error).__name__}: {error}"[:LONGEST_SHOWN]
                logger.info("The black box of client %s failed: %s", self.site, problem)
        for value in values:
            self.counts.failures_in_a_row = 0 if math.isfinite(value) else self.counts.failures_in_a_row + 1
            self.counts.failed += not math.isfinite(value)
            if self.counts.failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
                raise BlackBoxFailed(f"The black box of client {self.site!r} gave no usable value "
                                     f"{MOST_FAILURES_IN_A_ROW} times in a row; the last time {problem}.")
        return values

    def _attempt(self, points: np.ndarray) -> np.ndarray:
        if self.task.timeout_s is None or self.task.stops_itself:
            return self.task.evaluate_many(points, self.site)
        return within(self.task.timeout_s, lambda: self.task.evaluate_many(points, self.site))


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return what a function returns, or raise TimeoutError after so many seconds.

    The thread that still runs it is left behind: Python cannot end it.
    """
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["value"] = work()
        except Exception as error:      # whatever it is, it is raised where somebody waits for it
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if "error" in box:
        raise box["error"]
    return box["value"]
