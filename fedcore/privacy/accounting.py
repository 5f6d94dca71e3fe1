"""What releases cost: exact for Gaussian releases about all records, by privacy loss distributions for sampled ones.

A release is a vector plus normal noise whose deviation is `noise_multiplier` times the vector's sensitivity: the most
that one record can move it. The factor 2 between the two neighbouring relations is part of the sensitivity
(`fedcore.privacy.mechanism`), so the accounting here needs nothing but the bare multiplier.

Releases about all records compose to one Gaussian mechanism with mu^2 = sum 1/z^2, without slack, also when later ones
depend on earlier ones:

    delta(epsilon) = Phi(-epsilon/mu + mu/2) - exp(epsilon) Phi(-epsilon/mu - mu/2)

Source: Balle and Wang, 2018, arXiv:1805.06530, theorem 8; Dong, Roth and Su, 2022, "Gaussian Differential Privacy",
arXiv:1905.02383, corollary 2.13 and corollary 3.3. Sampled releases: dp-accounting's privacy loss distributions.
"""
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedcore.errors import InvalidSetting

# A planned schedule adds up to its budget, but not to the last bit.
SLACK = 1e-9
# Relative accuracy of the noise found for sampled releases.
SAMPLED_ACCURACY = 1e-3
BISECTIONS = 200
# Of the logarithm of a noise multiplier, searched from its central limit.
BRACKET = 0.05
LEAST_SAMPLED_NOISE = 0.4
FINE_GRID, COARSE_GRID = 1e-4, 1e-3


def delta_of(mu: float, epsilon: float) -> float:
    """Return the smallest delta for which a Gaussian mechanism of ratio `mu` is (epsilon, delta) private."""
    if mu <= 0:
        return 0.0
    above, below = log_ndtr(-epsilon / mu + mu / 2), epsilon + log_ndtr(-epsilon / mu - mu / 2)
    return max(0.0, math.exp(above) - math.exp(min(below, above)))


def epsilon_of(mu: float, delta: float) -> float:
    """Return the smallest epsilon for which a Gaussian mechanism of ratio `mu` is (epsilon, delta) private.

    Args:
        mu: at least 0; 0 means nothing was released.
        delta: in (0, 1).
    """
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high    # the side that keeps the promise


def mu_of(epsilon: float, delta: float) -> float:
    """Return the largest ratio `mu` of a Gaussian mechanism that is (epsilon, delta) private."""
    low, high = 0.0, 1.0
    while delta_of(high, epsilon) <= delta:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if delta_of(middle, epsilon) > delta else (middle, high)
    return low


@dataclass(frozen=True)
class Release:
    """Releases of one kind about one client's records.

    Attributes:
        noise_multiplier: z, deviation of the noise over the sensitivity; above 0.
        sample_rate: q, with which each record takes part, independently of the others; 1: all do.
        times: how many.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    times: int = 1


@dataclass(frozen=True)
class Spending:
    """What was released about one client's records so far.

    Attributes:
        mu_squared: sum of 1/z^2 over the releases about all records.
        sampled: how many releases about a sample, by (noise multiplier, sample rate).
    """

    mu_squared: float = 0.0
    sampled: Mapping[tuple[float, float], int] = field(default_factory=dict)

    def plus(self, release: Release) -> "Spending":
        """Return the spending after more releases."""
        if release.sample_rate >= 1:
            return Spending(self.mu_squared + release.times / release.noise_multiplier**2, self.sampled)
        key = release.noise_multiplier, release.sample_rate
        return Spending(self.mu_squared, {**self.sampled, key: self.sampled.get(key, 0) + release.times})

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of everything together."""
        if not self.sampled:
            return epsilon_of(math.sqrt(self.mu_squared), delta)
        return sampled_epsilon(self.mu_squared, tuple(sorted(self.sampled.items())), delta)

    def within(self, epsilon: float, delta: float) -> bool:
        """Say whether everything together is (epsilon, delta) private."""
        if not self.sampled:
            return self.mu_squared <= mu_of(epsilon, delta) ** 2 * (1 + SLACK)
        if not self.mu_squared and len(self.sampled) == 1:
            ((noise_multiplier, rate), times), = self.sampled.items()
            return times <= most_sampled(noise_multiplier, rate, epsilon, delta, times)
        return self.epsilon(delta) <= epsilon * (1 + SLACK)

    def state(self) -> dict[str, Any]:
        """Return plain values from which `of` makes the same."""
        return {"mu_squared": self.mu_squared,
                "sampled": [[*key, count] for key, count in sorted(self.sampled.items())]}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Read what `state` returned."""
        return cls(float(state["mu_squared"]), {(float(z), float(q)): int(n) for z, q, n in state["sampled"]})


def plan(releases: tuple[Release, ...]) -> Spending:
    """Return what releases cost together."""
    total = Spending()
    for release in releases:
        total = total.plus(release)
    return total


def most_sampled(noise_multiplier: float, sample_rate: float, epsilon: float, delta: float, wanted: int) -> int:
    """Return how many sampled releases are (epsilon, delta) private, or a number of at least `wanted`.

    Whoever asks after every release is answered from memory most of the time.
    """
    ceiling = 1
    while ceiling < wanted:
        ceiling *= 2
    return _most_sampled(noise_multiplier, sample_rate, epsilon, delta, ceiling)


@lru_cache(maxsize=64)
def _most_sampled(noise_multiplier: float, sample_rate: float, epsilon: float, delta: float, ceiling: int) -> int:
    def fits(times: int) -> bool:
        return plan((Release(noise_multiplier, sample_rate, times),)).epsilon(delta) <= epsilon * (1 + SLACK)

    if fits(ceiling):
        return ceiling
    low, high = 0, ceiling
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=256)
def sampled_epsilon(
    mu_squared: float, sampled: tuple[tuple[tuple[float, float], int], ...], delta: float, grid: float = FINE_GRID
) -> float:
    """Return the epsilon of sampled releases together with others of `mu_squared`, by privacy loss distributions.

    The neighbouring relation handed over is the library's default, and the multipliers are bare: asked for
    replace-one, it would double the sensitivity of one kind of event and leave another's as it is.

    Args:
        grid: of privacy losses, which are rounded up to it: a coarse one is fast, and errs on the safe side.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=grid)
    if mu_squared > 0:
        accountant.compose(GaussianDpEvent(1 / math.sqrt(mu_squared)))
    for (noise_multiplier, rate), times in sampled:
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), times)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def noise_for_sampled(epsilon: float, delta: float, sample_rate: float, times: int) -> float:
    """Return the noise multiplier with which so many sampled releases are (epsilon, delta) private.

    Raises:
        InvalidSetting: it would be so small that there is nothing to compute with.
    """
    def excess(log_noise: float, grid: float = COARSE_GRID) -> float:
        found = sampled_epsilon(0.0, (((math.exp(log_noise), sample_rate), times),), delta, grid)
        return math.log(max(found, sys.float_info.min) / epsilon)

    # The central limit of many sampled releases has mu^2 = q^2 n (exp(1/z^2) - 1): good enough to begin with.
    start = -0.5 * math.log(math.log1p((mu_of(epsilon, delta) / sample_rate) ** 2 / times))
    if start < math.log(LEAST_SAMPLED_NOISE):
        raise InvalidSetting("epsilon", epsilon, "smaller", f"With {times} samples at sample_rate={sample_rate:g} it "
                             "asks for hardly any noise, and the accounting of samples then takes for ever.")
    low, high = start - BRACKET, start + BRACKET
    while excess(low) < 0:
        low -= BRACKET
    while excess(high) > 0:
        high += BRACKET
    found = brentq(excess, low, high, xtol=SAMPLED_ACCURACY)
    while excess(found, FINE_GRID) > 0:
        found += SAMPLED_ACCURACY
    return math.exp(found)
