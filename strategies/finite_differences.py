"""Gradients from finite differences, and a client's descent along them.

    g(x) = (d / Q) sum_q ((f(x + h u_q) - f(x)) / h) u_q

for Q orthonormal directions u_q, or directions on the sphere; without the factor d for Gaussian ones. Points are in the
unit cube [0, 1]^d.

Source: Fang, Yu, Jiang, Shi, Jones and Zhou, 2022, "Communication-Efficient Stochastic Zeroth-Order Optimization for
Federated Learning", arXiv:2201.09531 (the estimator and FedZO).
"""
import logging
from dataclasses import dataclass, field

import numpy as np

from fedcore.strategies.local_steps import OPTIMIZERS, local_optimizer
from fedcore.strategies.settings import check_choice, check_count, check_number, check_switch
from fedcore.strategies.surrogates import Oracle

logger = logging.getLogger("fedcore")

KINDS = ("orthonormal", "gaussian", "sphere")
CONTROLS = ("none", "probe", "previous")


@dataclass(frozen=True)
class Differences:
    """How a client estimates gradients and descends; see `fedcore.strategies.zeroth_order`."""

    local_iterations: int = 10
    local_lr: float = 0.01
    local_optimizer: str = "adam"
    directions: int = 20
    difference: float = 0.01
    kind: str = "orthonormal"
    proximal: float = 0.0
    control: str = "none"
    project: bool = False

    def __post_init__(self) -> None:
        check_count("local_iterations", self.local_iterations, 1)
        check_count("directions", self.directions, 1)
        check_number("local_lr", self.local_lr, above=0)
        check_number("difference", self.difference, above=0)
        check_number("proximal", self.proximal, at_least=0)
        check_choice("local_optimizer", self.local_optimizer, OPTIMIZERS)
        check_choice("kind", self.kind, KINDS)
        check_choice("control", self.control, CONTROLS)
        check_switch("project", self.project)

    def check_dimension(self, dimension: int) -> None:
        """Raise `InvalidSetting` where there are not as many orthonormal directions."""
        if self.kind == "orthonormal":
            check_count("directions", self.directions, 1, dimension,
                        f"There are no more orthonormal directions in {dimension} dimensions; or use kind: gaussian.")
        if self.difference < np.sqrt(np.finfo(float).eps):
            logger.warning("difference=%g is so small that rounding will drown the differences.", self.difference)

    def queries_per_round(self) -> int:
        """Return how many queries a client makes in a round."""
        probe = self.directions + 1 if self.control == "probe" else 0
        return 1 + self.local_iterations * (self.directions + 1) + probe


def draw_directions(kind: str, count: int, dimension: int, generator: np.random.Generator) -> np.ndarray:
    """Return u, shape (count, dimension)."""
    rows = generator.standard_normal((count, dimension))
    if kind == "orthonormal":
        return np.ascontiguousarray(np.linalg.qr(rows.T)[0].T)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if kind == "sphere" else rows


def estimate(
    oracle: Oracle, point: np.ndarray, settings: Differences, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Return the estimate of the gradient at a point, both of shape (d,), and f there.

    Directions in which there is no answer are left out; without f at the point itself the estimate is zero.
    """
    directions = draw_directions(settings.kind, settings.directions, len(point), generator)
    value = float(oracle.ask(point[None])[0])
    slopes = (oracle.ask(point + settings.difference * directions) - value) / settings.difference
    known = np.isfinite(slopes)
    if not known.any():
        return np.zeros_like(point), value
    factor = (1 if settings.kind == "gaussian" else len(point)) / known.sum()
    return factor * (slopes[known] @ directions[known]), value


@dataclass
class DifferenceDescent:
    """A client's round so far.

    Attributes:
        point: x_i,t, shape (d,).
        start_value: f at x_r.
        local: the uncorrected estimate at each x_i,t.
        used: what was stepped along there.
        visited: those x_i,t.
    """

    point: np.ndarray
    start_value: float = float("nan")
    local: list[np.ndarray] = field(default_factory=list)
    used: list[np.ndarray] = field(default_factory=list)
    visited: list[np.ndarray] = field(default_factory=list)
    flat_steps: int = 0

    @property
    def mean_estimate(self) -> np.ndarray:
        """The mean of the uncorrected estimates, shape (d,)."""
        return np.mean(self.local, axis=0) if self.local else np.zeros_like(self.point)


def descend_by_differences(
    oracle: Oracle, state: DifferenceDescent, settings: Differences, generator: np.random.Generator,
    control: np.ndarray | None,
) -> None:
    """Run the T local iterations, from `state.point`, and query where they end; ends early when the budget is spent.

    Args:
        state: what the round begins with; changed.
        control: c - c_i, shape (d,); None where there is none.
    """
    start, optimizer = state.point, local_optimizer(settings.local_optimizer, settings.local_lr)
    for t in range(settings.local_iterations):
        if oracle.spent:
            return
        local, value = estimate(oracle, state.point, settings, generator)
        if t == 0:
            state.start_value = value
        gradient = local if control is None else local + control
        if settings.proximal:
            gradient = gradient + settings.proximal * (state.point - start)
        state.local.append(local)
        state.used.append(gradient)
        state.visited.append(state.point)
        state.flat_steps += not local.any()
        state.point = state.point - optimizer.step(gradient)
        if settings.project:
            state.point = np.clip(state.point, 0, 1)
    oracle.ask(state.point[None])
