"""FZooS beside finite differences on the paper's quadratics; prints the tables of docs/algorithms/fzoos.md.

    python -m tests.paper.fzoos_study

d = 300, 5 clients, T = 10, Adam 0.01 in the unit cube; FZooS with l = 3, M = 1000, 150 nearest queries, 400 for the
weights, 20 and 60 candidates; finite differences with 20 directions and a difference of 0.01. The gap ratio is
(F(x) - F*) / (F(x_0) - F*). Every run is a simulation of the registered strategy.
"""
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fedcore

TARGET = 0.1
FZOOS = {"name": "fzoos", "lengthscale": 3.0, "features": 1000, "feature_queries": 400, "active_candidates": 20,
         "end_candidates": 60}
METHODS: dict[str, Mapping[str, Any]] = {
    "FZooS": FZOOS,
    "FZooS, gamma = 0": {**FZOOS, "correction": 0.0},
    "FZooS, gamma = 1": {**FZOOS, "correction": 1.0},
    "FZooS, one exchange": {**FZOOS, "exchanges": 1},
    "FZooS, l = sqrt(d)/6": {**FZOOS, "lengthscale": "dimension"},
    "FZooS, likeliest l": {**FZOOS, "lengthscale": "likelihood"},
    "FZooS, median l": {**FZOOS, "lengthscale": "median"},
    "FZooS, improvements only": {**FZOOS, "accept": "improve"},
    "FedZO": {"name": "fedzo"},
    "FedProx-ZO": {"name": "fedprox_zo", "proximal": 0.01},
    "SCAFFOLD-ZO I": {"name": "scaffold_zo_1"},
    "SCAFFOLD-ZO II": {"name": "scaffold_zo_2"},
}
BASELINES = ("FedZO", "FedProx-ZO", "SCAFFOLD-ZO I", "SCAFFOLD-ZO II")
BOTH_SEEDS = ("FZooS", "FZooS, gamma = 0", *BASELINES)


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        ratios: gap ratio after each round, from the start on.
        queries: of all clients together until then.
    """

    ratios: Sequence[float]
    queries: Sequence[int]

    @property
    def reached(self) -> int | None:
        """The first round after which the gap ratio is at the target, None when it never is."""
        return next((index for index, ratio in enumerate(self.ratios) if ratio <= TARGET), None)


def course(method: str, heterogeneity: float, seed: int, rounds: int, stop_at: float = 0.0) -> Course:
    """Run a method.

    Args:
        stop_at: end early at this gap ratio.
    """
    experiment = {
        "task": {"name": "blackbox_quadratics", "dimension": 300, "heterogeneity": heterogeneity},
        "strategy": dict(METHODS[method]), "clients": {"count": 5}, "seed": seed, "checkpoint": {"every_s": 1e9},
        "stop": {"rounds": rounds, "target": {"gap_ratio": stop_at}},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = fedcore.simulate(experiment, out=Path(folder) / "run")
        rows = list(run.rows("evaluate"))
        made = {row["version"]: row["queries"] for row in run.rows("update")}
        return Course([row["gap_ratio"] for row in rows], [made.get(row["version"], 0) for row in rows])


@cache
def to_target(method: str, heterogeneity: float, seed: int, most: int) -> tuple[int, int] | None:
    """Return after how many rounds and queries the target is reached, None when it is not in `most` rounds."""
    found = course(method, heterogeneity, seed, most, stop_at=TARGET)
    return None if found.reached is None else (found.reached, found.queries[found.reached])


def shown(found: tuple[int, int] | None, most: int) -> str:
    """Return rounds and queries as a table shows them."""
    return f"not in {most}" if found is None else f"{found[0]} / {found[1]:,}"


def main() -> None:
    """Print the tables."""
    print("Rounds / queries to a gap ratio of 0.1, seeds 0 and 1\n")
    print("| method | C = 0.5, seed 0 | seed 1 | C = 5, seed 0 | seed 1 |\n| --- | --- | --- | --- | --- |")
    for method in METHODS:
        most = 12 if method.startswith("FZooS") else 30
        cells = [shown(to_target(method, heterogeneity, seed, most), most) if seed == 0 or method in BOTH_SEEDS else ""
                 for heterogeneity in (0.5, 5.0) for seed in (0, 1)]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print("\nGap ratio after 10 and after 20 rounds (queries), seed 0\n")
    print("| method | C = 0.5 | C = 5 | C = 50 |\n| --- | --- | --- | --- |")
    for method in ("FZooS", "FZooS, improvements only", *BASELINES):
        cells = []
        for heterogeneity in (0.5, 5.0, 50.0):
            found = course(method, heterogeneity, 0, 20)
            cells.append(f"{found.ratios[10]:.3g}, {found.ratios[20]:.3g} ({found.queries[20]:,})")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
