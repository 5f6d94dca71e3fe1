"""How a private run's budget is divided among its rounds, and how much noise that means."""
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedcore.privacy.accounting import Release, Spending, mu_of, noise_for_sampled, plan
from fedcore.privacy.wire import Terms

FULL, BETWEEN, LOCAL_STEPS = "full", "between", "local steps"


@dataclass(frozen=True)
class Schedule:
    """When full gradients are asked for, and what between them.

    Attributes:
        interval: T, rounds from one full gradient to the next; None: only the first is one.
        gradient_weight: a, of the gradient between; 0: differences alone.
        sample_rate: q, with which each record takes part.
        split: beta, share of mu^2 for the full ones; None: every round costs the same.
        local_share: share of the whole mu^2 for local steps, where there are any.
    """

    interval: int | None = 1
    gradient_weight: float = 0.0
    sample_rate: float = 1.0
    split: float | None = None
    local_share: float = 0.5

    def counts(self, rounds: int) -> tuple[int, int]:
        """Return K1 and K2: rounds with a full gradient, and others."""
        full = 1 if self.interval is None else math.ceil(rounds / self.interval)
        return full, rounds - full


@dataclass(frozen=True)
class Budget:
    """The plan of a run: what it may spend, and how much noise that means.

    Attributes:
        rounds: R.
        noise: noise multiplier of each kind of release: `full`, `between`, `local steps`.
        total: what all of it costs one client.
    """

    terms: Terms
    rounds: int
    noise: Mapping[str, float]
    total: Spending


def make_budget(
    schedule: Schedule, rounds: int, local_releases: int, epsilon: float | None, noise_multiplier: float | None,
    delta: float, noise_mode: str, neighbouring: str,
) -> Budget:
    """Return how much noise each release needs, or what releases with a given noise cost.

    Args:
        local_releases: noised local steps of the run that one record takes part in at most.
        epsilon, noise_multiplier: one of the two.

    Source: z1 = sqrt(K1/beta)/mu and z2 = sqrt(K2/(1 - beta))/mu compose to mu exactly (Dong, Roth and Su, 2022,
    arXiv:1905.02383, corollary 3.3); Murata and Suzuki, 2023, arXiv:2302.03884, compose in Renyi privacy.
    """
    full, between = schedule.counts(rounds)
    if noise_multiplier is not None:
        noise = dict.fromkeys((FULL, BETWEEN, LOCAL_STEPS), noise_multiplier)
    else:
        assert epsilon is not None
        if schedule.sample_rate < 1:
            noise = {FULL: noise_for_sampled(epsilon, delta, schedule.sample_rate, rounds)}
        else:
            noise = divide(schedule, mu_of(epsilon, delta), full, between, local_releases)
    releases = [Release(noise[FULL], schedule.sample_rate, full)]
    releases += [Release(noise[BETWEEN], 1.0, between)] if between else []
    releases += [Release(noise[LOCAL_STEPS], 1.0, local_releases)] if local_releases else []
    total = plan(tuple(releases))
    terms = Terms(total.epsilon(delta) if epsilon is None else epsilon, delta, noise_mode, neighbouring)
    return Budget(terms, rounds, noise, total)


def divide(schedule: Schedule, mu: float, full: int, between: int, local_releases: int) -> dict[str, float]:
    """Return noise multipliers with which all releases together have the ratio `mu`."""
    share = schedule.local_share if local_releases else 0.0
    exchanged = mu * math.sqrt(1 - share)
    if schedule.split is None or not between:
        noise = dict.fromkeys((FULL, BETWEEN), math.sqrt(full + between) / exchanged)
    else:
        noise = {FULL: math.sqrt(full / schedule.split) / exchanged,
                 BETWEEN: math.sqrt(between / (1 - schedule.split)) / exchanged}
    return {**noise, LOCAL_STEPS: math.sqrt(local_releases / share) / mu} if local_releases else noise
