"""The equations of A2CiD2: pairwise averaging with a second copy of the parameters that runs ahead.

Each peer keeps x and a copy x~, which drift towards each other between events:

    x' = eta (x~ - x),    x~' = eta (x - x~).

A gradient moves both by the optimizer's step. An exchange with a partner of parameters x_j, m = x - x_j, takes

    x -= alpha m,    x~ -= alpha~ m.

The drift keeps x + x~, an exchange keeps the sums over both peers. With eta = 0 and alpha = 1/2 this is pairwise
averaging, which needs no copy.

Source: Nabli, Belilovsky and Oyallon, 2023 (NeurIPS), "A2CiD2: Accelerating Asynchronous Communication in
Decentralized Deep Learning", arXiv:2306.08289. Departure: the parameters that a peer sends have drifted up to the
exchange, so that both ends take x_i - x_j at one time, and sums are kept exactly.
"""
import math
from dataclasses import dataclass, replace

from torch import Tensor

from fedcore.graphs import EdgeRates


@dataclass(frozen=True)
class Mixing:
    """How strongly a peer moves at an exchange and between.

    Attributes:
        eta: of the drift, per unit of time.
        alpha: at an exchange, of x.
        alpha_copy: at an exchange, of x~.
    """

    eta: float
    alpha: float
    alpha_copy: float

    @classmethod
    def of(cls, rates: EdgeRates) -> "Mixing":
        """Return eta = 1 / (2 sqrt(chi1 chi2)), alpha = 1/2, alpha~ = sqrt(chi1 / chi2) / 2 for the actual rates."""
        if not rates.graph.edges:
            return PLAIN    # one peer alone
        return cls(1 / (2 * math.sqrt(rates.chi1 * rates.chi2)), 0.5, 0.5 * math.sqrt(rates.chi1 / rates.chi2))

    def gains(self, elapsed: float) -> tuple[float, float]:
        """Return what x and x~ gain per unit of -m when the exchange was so long ago."""
        near = math.exp(-2 * self.eta * elapsed)
        mean, half = (self.alpha + self.alpha_copy) / 2, (self.alpha - self.alpha_copy) / 2
        return mean + near * half, mean - near * half


PLAIN = Mixing(0.0, 0.5, 0.5)


@dataclass(frozen=True)
class PeerState:
    """One peer.

    Attributes:
        params: x, shape (d,).
        copy: x~, shape (d,); None for pairwise averaging.
        at: time up to which both have drifted, in gradient units.
    """

    params: Tensor
    copy: Tensor | None
    at: float = 0.0


def advance(state: PeerState, mixing: Mixing, now: float) -> PeerState:
    """Let x and x~ drift until `now`; a state that is further on already stays as it is."""
    if now <= state.at:
        return state
    if state.copy is None:
        return replace(state, at=now)
    near = math.exp(-2 * mixing.eta * (now - state.at))
    # Both move by the same vector, so their sum is kept.
    moved = (state.copy - state.params) * ((1 - near) / 2)
    return PeerState(state.params + moved, state.copy - moved, now)


def gradient_step(state: PeerState, step: Tensor) -> PeerState:
    """Return the state after both copies moved by -step, the optimizer's displacement, shape (d,)."""
    return replace(state, params=state.params - step, copy=None if state.copy is None else state.copy - step)


def exchange_step(state: PeerState, mixing: Mixing, mine: Tensor, theirs: Tensor, at: float) -> PeerState:
    """Return the state after an exchange at the time `at`; one that comes late counts as if it had been in time.

    Args:
        mine, theirs: parameters of both ends as they were sent, shape (d,).
        at: of the exchange; both ends take the same.
    """
    state = advance(state, mixing, at)
    gain, gain_copy = mixing.gains(state.at - at)
    apart = mine - theirs
    copy = None if state.copy is None else state.copy - gain_copy * apart
    return replace(state, params=state.params - gain * apart, copy=copy)
