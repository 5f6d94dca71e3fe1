"""DADAO's equations: what a peer's six vectors do between events, at a gradient, and at an exchange.

The sum over peers of f_i is minimised, each of them L-smooth and mu-strongly convex. A peer keeps six vectors:

    x, x~   primal iterate and its momentum copy (parameters)
    y, y~   dual variable of the gradient part and its copy (gradients); y~ tends to grad f_i(x*) - nu x*
    z, z~   dual variable of consensus and its copy (gradients); over all peers each adds up to zero

Between events they drift along a linear differential equation; gradients and exchanges come at the ticks of independent
Poisson clocks. Time counts in units in which a peer computes one gradient on average.

Source: Nabli and Oyallon, 2023, "DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization" (ICML),
arXiv:2208.00779; constants as in the authors' code, AdelNabli/DADAO. The closed form of the drift is derived here.
"""
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedcore.edge_rates import LARGEST_PRODUCT
from fedcore.errors import InvalidSetting
from fedcore.graphs import EdgeRates

# Rows of a peer's matrix.
X, X_COPY, Y, Y_COPY, Z, Z_COPY = range(6)
# Rates that are exactly the least ones meet the condition to rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Constants:
    """What all peers must agree on; `Constants.of` chooses them. `_copy` stands for the tilde of the paper."""

    nu: float           # mu / 2
    eta: float          # drift of x and x~ towards each other
    alpha: float        # drift of y towards y~ and of z towards z~
    alpha_copy: float   # drift of z~ towards z
    theta: float        # drift of y~
    gamma: float        # steps along a gradient, of x and of x~
    gamma_copy: float
    delta: float        # step along a gradient, of y~: the sum of both
    delta_copy: float
    beta: float         # steps along an exchange, of z and of z~
    beta_copy: float

    @classmethod
    def of(cls, strong_convexity: float, smoothness: float, chi1: float) -> "Constants":
        """Return the constants for a problem and a graph.

        Args:
            strong_convexity: mu > 0, the smallest of all peers'.
            smoothness: L >= mu, the largest of all peers'. One too small diverges, one too large only slows down.
            chi1: inverse algebraic connectivity of the graph at the actual rates; 0 for one peer alone.
        """
        if not 0 < strong_convexity < math.inf:
            raise InvalidSetting("strong_convexity", strong_convexity, "a finite number above 0",
                                 "DADAO needs strong convexity: mu must be > 0. For neural networks take a2cid2.")
        if not strong_convexity <= smoothness < math.inf:
            raise InvalidSetting("smoothness", smoothness, "a finite number of at least strong_convexity, "
                                 f"{strong_convexity:g}")
        if not 0 <= chi1 < math.inf:
            raise InvalidSetting("chi1", chi1, "a finite number of at least 0")
        nu = strong_convexity / 2
        ratio = math.sqrt(nu / smoothness)      # r
        return cls(
            nu=nu, eta=ratio / 8, alpha=ratio / 4, alpha_copy=ratio / 8, theta=1 / (2 * ratio),
            gamma=1 / (4 * smoothness), gamma_copy=1 / (4 * math.sqrt(smoothness * nu)),
            delta=ratio / 4, delta_copy=1.0, beta=0.5, beta_copy=2 * chi1 / ratio,
        )

    @cached_property
    def on_gradient(self) -> Tensor:
        """What each vector gains per unit of D = grad f_i(x) - nu x - y~, shape (6, 1), float64."""
        gains = [-self.gamma, -self.gamma_copy, 0.0, self.delta + self.delta_copy, 0.0, 0.0]
        return torch.tensor(gains, dtype=torch.float64)[:, None]

    @cached_property
    def on_exchange(self) -> Tensor:
        """What each vector gains per unit of P = (y + z) - (y + z of the partner), shape (6, 1), float64."""
        return torch.tensor([0.0, 0.0, 0.0, 0.0, -self.beta, -self.beta_copy], dtype=torch.float64)[:, None]

    @cached_property
    def generator(self) -> Tensor:
        """A of the drift d/dt rows = A rows, shape (6, 6), float64.

        x' = eta (x~ - x)       x~' = eta (x - x~)
        y' = alpha (y~ - y)     y~' = -theta (y + z + nu x~)
        z' = alpha (z~ - z)     z~' = alpha~ (z - z~)
        """
        a, matrix = self.alpha, torch.zeros(6, 6, dtype=torch.float64)
        matrix[X, X], matrix[X, X_COPY], matrix[X_COPY, X], matrix[X_COPY, X_COPY] = (
            -self.eta, self.eta, self.eta, -self.eta)
        matrix[Y, Y], matrix[Y, Y_COPY] = -a, a
        matrix[Y_COPY, Y] = matrix[Y_COPY, Z] = -self.theta
        matrix[Y_COPY, X_COPY] = -self.theta * self.nu
        matrix[Z, Z], matrix[Z, Z_COPY] = -a, a
        matrix[Z_COPY, Z], matrix[Z_COPY, Z_COPY] = self.alpha_copy, -self.alpha_copy
        return matrix

    @cached_property
    def _forced(self) -> tuple[tuple[float, float], ...]:
        """V(r) of the response of (y, y~) to a force e^(-r t) on y~ / -theta, for r = 0, 2 eta, alpha + alpha~."""
        responses = []
        for rate in (0.0, 2 * self.eta, self.alpha + self.alpha_copy):
            size = rate * rate - self.alpha * rate + self.alpha * self.theta     # positive: its roots are complex
            responses.append((-self.alpha * self.theta / size, -self.theta * (self.alpha - rate) / size))
        return tuple(responses)

    @cached_property
    def _pitch(self) -> float:
        """Angular frequency of (y, y~); real, because alpha theta = 1/8 exceeds alpha^2 / 4."""
        return math.sqrt(self.alpha * self.theta - self.alpha**2 / 4)


def drift_matrix(constants: Constants, elapsed: float) -> Tensor:
    """Return exp(elapsed A), the drift over a while in closed form, shape (6, 6), float64.

    Args:
        elapsed: units of time; at least 0.
    """
    eta, a, b, theta, nu = constants.eta, constants.alpha, constants.alpha_copy, constants.theta, constants.nu
    total = a + b
    near, settled = math.exp(-2 * eta * elapsed), math.exp(-total * elapsed)     # q, p
    damping = math.exp(-a * elapsed / 2)
    cosine = damping * math.cos(constants._pitch * elapsed)
    sine = damping * math.sin(constants._pitch * elapsed) / constants._pitch
    # (y, y~) on their own, then what x, x~, z and z~ force on them: their constant part, and their decaying parts.
    yy, yc, cy, cc = cosine - a * sine / 2, a * sine, -theta * sine, cosine + a * sine / 2
    forced = [(fade * v - yy * v - yc * w, fade * w - cy * v - cc * w)
              for fade, (v, w) in zip((1.0, near, settled), constants._forced, strict=True)]
    x_rows, z_rows = [], []
    for lasting, nearing, settling in zip(*forced, strict=True):
        x_rows.append((nu * (lasting - nearing) / 2, nu * (lasting + nearing) / 2))
        z_rows.append(((b * lasting + a * settling) / total, a * (lasting - settling) / total))
    return torch.tensor([
        [(1 + near) / 2, (1 - near) / 2, 0, 0, 0, 0],
        [(1 - near) / 2, (1 + near) / 2, 0, 0, 0, 0],
        [*x_rows[0], yy, yc, *z_rows[0]],
        [*x_rows[1], cy, cc, *z_rows[1]],
        [0, 0, 0, 0, (b + a * settled) / total, a * (1 - settled) / total],
        [0, 0, 0, 0, b * (1 - settled) / total, (a + b * settled) / total],
    ], dtype=torch.float64)


@dataclass(frozen=True)
class PeerState:
    """One peer.

    Attributes:
        rows: x, x~, y, y~, z, z~, shape (6, d).
        at: time up to which they have drifted, in gradient units.
    """

    rows: Tensor
    at: float = 0.0

    @classmethod
    def start(cls, params: Tensor, at: float = 0.0) -> "PeerState":
        """Return x = x~ = params of shape (d,), and zero dual variables."""
        rows = torch.zeros(6, params.numel(), dtype=params.dtype)
        rows[X] = rows[X_COPY] = params
        return cls(rows, at)

    @property
    def params(self) -> Tensor:
        """x, shape (d,)."""
        return self.rows[X]


def advance(state: PeerState, constants: Constants, now: float) -> PeerState:
    """Let a peer's vectors drift until `now`; a state that is further on already stays as it is."""
    if now <= state.at:
        return state
    drift = drift_matrix(constants, now - state.at).to(state.rows.dtype)
    return PeerState(drift @ state.rows, now)


def gradient_step(state: PeerState, constants: Constants, gradient: Tensor) -> PeerState:
    """Return the state after x -= gamma D, x~ -= gamma~ D, y~ += (delta + delta~) D, D = gradient - nu x - y~.

    Args:
        gradient: of f_i, shape (d,); D takes x and y~ as they are now.
    """
    step = gradient - constants.nu * state.rows[X] - state.rows[Y_COPY]
    gains = constants.on_gradient.to(state.rows.dtype)
    return replace(state, rows=torch.addcmul(state.rows, gains, step))


def offer(state: PeerState) -> Tensor:
    """Return y + z, shape (d,): all that a partner is told."""
    return state.rows[Y] + state.rows[Z]


def exchange_step(state: PeerState, constants: Constants, mine: Tensor, theirs: Tensor, at: float) -> PeerState:
    """Return the state after z -= beta P, z~ -= beta~ P at the time `at`, P = mine - theirs.

    Both peers gain the same with opposite signs, bit for bit. A state that has drifted beyond `at` gains what the step
    would have become since then: the drift is linear, so a late step is exact.

    Args:
        mine, theirs: what both offered, shape (d,).
        at: of the exchange; both ends take the same.
    """
    state = advance(state, constants, at)
    gains = constants.on_exchange
    if state.at > at:
        gains = drift_matrix(constants, state.at - at) @ gains
    return replace(state, rows=torch.addcmul(state.rows, gains.to(state.rows.dtype), mine - theirs))


def check_rates(rates: EdgeRates, advice: str = "") -> None:
    """Raise `InvalidSetting` unless chi1 chi2 <= 1/2, without which the iteration may diverge."""
    product = rates.chi1 * rates.chi2
    if product > LARGEST_PRODUCT * (1 + ROUNDING):
        raise InvalidSetting("chi1 * chi2", product, f"at most {LARGEST_PRODUCT:g}",
                             advice or "Exchange more often: fedcore.edge_rates.required_rates says how often.")
