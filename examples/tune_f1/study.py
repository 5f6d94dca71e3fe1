"""F1 of a small network on the breast cancer table, against queries.

    python study.py --out study          # some minutes on one core
"""
import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import fedcore

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
MARKS = (500, 1100, 2200, 3200, 4300)
DIFFERENCES = {"difference": 0.1, "directions": 20}
METHODS: dict[str, dict[str, Any]] = {
    "FZooS": {},    # as in experiment.yaml
    "FedZO": {"name": "fedzo", **DIFFERENCES},
    "SCAFFOLD-ZO II": {"name": "scaffold_zo_2", **DIFFERENCES},
}


def best_by(method: str, seed: int, folder: Path) -> Mapping[int, tuple[float, float]]:
    """Run a method, and return its best F1 on the clients' rows, with that on the test rows, by queries made."""
    experiment = yaml.safe_load((HERE / "experiment.yaml").read_text())
    experiment |= {"strategy": METHODS[method] or experiment["strategy"], "seed": seed}
    experiment["stop"]["rounds"] = 10 if method == "FZooS" else 4    # 380 and 1,055 queries a round
    run = fedcore.simulate(experiment, out=folder)
    made = {row["version"]: row["queries"] for row in run.rows("update")}
    rows = [(made.get(row["version"], 0), row["f1"], row["test_f1"]) for row in run.rows("evaluate")]
    return {mark: max((f1, test) for queries, f1, test in rows if queries <= mark) for mark in MARKS}


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    print(f"| method | {' | '.join(f'{mark:,}' for mark in MARKS)} |\n| --- |{' --- |' * len(MARKS)}")
    for method in METHODS:
        found = [best_by(method, seed, arguments.out / f"{method}-{seed}") for seed in SEEDS]
        cells = (tuple(statistics.mean(values) for values in zip(*(one[mark] for one in found), strict=True))
                 for mark in MARKS)
        print(f"| {method} | {' | '.join(f'{tuned:.3f} / {test:.3f}' for tuned, test in cells)} |", flush=True)


if __name__ == "__main__":
    main()
