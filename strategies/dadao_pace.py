"""What DADAO's peers agree on: the problem's constants, the unit of time, and how much faster exchanges must fire.

The analysis has exchanges that take no time. When they take long, peers use vectors that are out of date, and the
iteration diverges. A peer takes part in one exchange at a time, so what counts is its load, the share of time that its
exchanges take: at most `MOST_LOAD` is allowed, and the unit of time is chosen accordingly. Where peers cannot keep up
all the same, the unit is stretched; where exchanges fail, they fire more often.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fedcore.errors import InvalidSetting
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Reduced
from fedcore.strategies.pace import DTYPE, Pace, Probe, rows_of, spread, summed, usual_seconds

# Share of a unit of time that a peer's exchanges may take on links that carry nothing else: simulated rings and stars
# converge at 0.9, and stars diverge at 1.2.
MOST_LOAD = 0.7
# An exchange is dropped after so many times what it takes on free links, but not before a unit of time is over.
PATIENCE = 10.0
# Peers keep up when they do so much of what is due, less what chance explains.
KEPT_UP, DEVIATIONS = 0.9, 3.0
LEAST_STRETCH, MOST_STRETCH = 1.1, 2.0
MOST_BOOST = 4.0
# Telling each other may take so many times as long as reckoned.
SLACK = 2.0


@dataclass
class Tally:
    """What was due and what was done during a step: by this peer, exchanges counted where it proposes."""

    due_gradients: float = 0.0
    gradients: float = 0.0
    due: float = 0.0
    attempted: float = 0.0
    succeeded: float = 0.0

    def values(self) -> list[float]:
        """Return the five numbers in order."""
        return list(asdict(self).values())


@dataclass(frozen=True)
class Terms:
    """What all peers have agreed on.

    Attributes:
        strong_convexity: mu, the smallest of all peers'.
        smoothness: L, the largest of all peers'.
        chi1: inverse algebraic connectivity at the rates that must succeed.
        pace: the clock.
        boost: exchanges fire so many times as often as must succeed.
        timeout_s: after which an exchange is dropped.
        period: steps of the run between two times that all tell each other what they did; telling takes as long.
    """

    strong_convexity: float
    smoothness: float
    chi1: float
    pace: Pace
    boost: float
    timeout_s: float
    period: int

    def state(self) -> dict[str, float]:
        """Return the terms as plain numbers."""
        return {**asdict(self), "pace": asdict(self.pace)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Terms":
        """Return the terms that `state` came from."""
        return cls(**{**state, "pace": Pace(**state["pace"])})


async def first_terms(
    peer: Peer, probe: Probe, partners: Mapping[int, float], chi1: float, before: Terms | None,
    time_unit_s: float | None, known: tuple[float | None, float | None],
) -> Terms:
    """Measure gradients and links, and agree on all terms.

    Args:
        partners: rate of each of this peer's edges, per unit of time, by rank.
        before: terms that held until now; None at the start of the run.
        time_unit_s: the user's; None: as short as it can be.
        known: strong convexity and smoothness, where the user knows them.

    Raises:
        InvalidSetting: nobody knows strong convexity or smoothness, or `time_unit_s` is too short.
    """
    count, place = len(peer.members), peer.members.index(peer.rank)
    own = getattr(peer.labour, "curvature", None) or (0.0, 0.0)
    computing = peer.spawn(usual_seconds(peer, peer.gradient))
    loads, slowest_s = torch.zeros(count, dtype=DTYPE), 0.0
    for partner, rate in partners.items():
        if partner > peer.rank:
            seconds = await probe.seconds(partner)
            slowest_s = max(slowest_s, seconds)
            loads[[place, peer.members.index(partner)]] += rate * seconds
    mine = spread(peer, [await computing, peer.now, slowest_s, *own])
    reduced = await peer.all_reduce(torch.cat([loads, mine]), tag="start")
    load = float(summed(reduced)[:count].max())
    rows = rows_of(peer, Reduced(reduced.mean[count:], reduced.contributors), mine.numel() // count)
    gradient_s, latest, slowest_s = (max(row[column] for row in rows) for column in range(3))
    mu = min(row[3] for row in rows) if known[0] is None else known[0]
    largest = max(row[4] for row in rows) if known[1] is None else known[1]
    needed_s = max(gradient_s, load / MOST_LOAD)
    if time_unit_s is not None and time_unit_s < needed_s:
        raise InvalidSetting(
            "strategy.time_unit_s", time_unit_s, f"at least {needed_s:.4g}",
            f"A gradient takes {gradient_s:.3g} s at the slowest peer, and exchanges on these links would be out of "
            "date: it may diverge. Leave time_unit_s out, and it is chosen.")
    unit_s = needed_s if time_unit_s is None else time_unit_s
    timeout_s = max(PATIENCE * slowest_s, unit_s)
    pace = Pace(unit_s, latest, 0.0 if before is None else before.pace.at(latest))
    # A reduction passes twice around all members, and takes half an exchange for each hop.
    step_s = peer.board.ends_at / (peer.step + 1)
    period = math.ceil(SLACK * count * slowest_s / step_s) or 1
    return Terms(mu, largest, chi1, pace, 1.0, timeout_s, period)


def next_terms(terms: Terms, rows: Sequence[Sequence[float]], ends_at: float, fixed: bool) -> Terms:
    """Return the terms for the next step, from what all did in the last one.

    Args:
        rows: the values of every peer's `Tally`.
        ends_at: when the present step ends, and the next begins, on the run's clock.
        fixed: whether the user gave the unit of time.
    """
    tallies = [Tally(*row) for row in rows]
    due, attempted, succeeded = (sum(getattr(tally, name) for tally in tallies)
                                 for name in ("due", "attempted", "succeeded"))
    stretch = max([_shortfall(due, attempted), *[_shortfall(tally.due_gradients, tally.gradients)
                                                for tally in tallies]])
    if succeeded > 0 and succeeded < attempted:
        terms = replace(terms, boost=min(attempted / succeeded, MOST_BOOST))
    if stretch > 1 and not fixed:
        factor = min(max(stretch, LEAST_STRETCH), MOST_STRETCH)
        terms = replace(terms, pace=terms.pace.changed(factor * terms.pace.unit_s, ends_at))
    return terms


def _shortfall(due: float, done: float) -> float:
    """Return how many times more was due than was done; 1 where chance explains the difference."""
    if done >= KEPT_UP * due - DEVIATIONS * due**0.5:
        return 1.0
    return due / max(done, 1.0)
