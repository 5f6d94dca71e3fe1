"""Black-box attacks on MNIST: share of the images that are attacked with success, against queries.

Every method chooses its step size on images that are not reported, or all have the same; then each attacks the same
twenty images.

    python study.py --data mnist.npz --out study                      # about a quarter of an hour on one core
    python study.py --data mnist.npz --out study --step-size 0.01     # the paper's
"""
import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import yaml

import fedcore

HERE = Path(__file__).parent
STEP_SIZES = (0.03, 0.1, 0.3)
TUNING_IMAGES, IMAGES = (20, 21, 22), tuple(range(20))
MOST_QUERIES = 8000
MARKS = (300, 600, 800, 1100, 1600, 2200, 3000, MOST_QUERIES)
DIFFERENCES = {"local_iterations": 5, "directions": 20}
METHODS: dict[str, dict[str, Any]] = {
    "FZooS": {},    # as in experiment.yaml
    "FedZO": {"name": "fedzo", **DIFFERENCES},
    "SCAFFOLD-ZO I": {"name": "scaffold_zo_1", **DIFFERENCES},
    "SCAFFOLD-ZO II": {"name": "scaffold_zo_2", **DIFFERENCES},
}


def attack(method: str, step_size: float, image: int, data: Path, folder: Path) -> int | None:
    """Attack one image, and return how many queries that took; None when it failed."""
    experiment = yaml.safe_load((HERE / "experiment.yaml").read_text())
    experiment["task"] |= {"path": str(data), "image": image}
    experiment["strategy"] = {**(METHODS[method] or experiment["strategy"]), "local_lr": step_size}
    # A round of finite differences takes 530 queries and more, one of FZooS 230.
    experiment["stop"]["rounds"] = MOST_QUERIES // (230 if method == "FZooS" else 530)
    experiment["checkpoint"] = {"every_s": 1e9}
    run = fedcore.simulate(experiment, out=folder)
    queries: int = run.summary["queries"]
    shutil.rmtree(folder)
    return queries if run.summary["success"] == 1 and queries <= MOST_QUERIES else None


def chosen(method: str, data: Path, out: Path) -> float:
    """Return the step size with which a method attacks the tuning images fastest."""
    costs = {}
    for step_size in STEP_SIZES:
        found = [attack(method, step_size, image, data, out / "tuning") for image in TUNING_IMAGES]
        costs[step_size] = statistics.mean(MOST_QUERIES if queries is None else queries for queries in found)
        print(f"  {method}, step {step_size}: {found}", flush=True)
    return min(costs, key=lambda step_size: costs[step_size])


def study(method: str, step_size: float | None, data: Path, out: Path) -> dict[str, Any]:
    """Attack the reported images."""
    step_size = chosen(method, data, out) if step_size is None else step_size
    queries = [attack(method, step_size, image, data, out / "attack") for image in IMAGES]
    print(f"{method}, step {step_size}: {queries}", flush=True)
    return {"method": method, "step_size": step_size, "queries": queries}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    heads = " | ".join(f"{mark:,}" for mark in MARKS)
    lines = [f"| method | step size | median queries | {heads} |", "| --- | --- | --- |" + " --- |" * len(MARKS)]
    for row in rows:
        found = sorted(MOST_QUERIES * 10 if queries is None else queries for queries in row["queries"])
        shares = " | ".join(f"{sum(queries <= mark for queries in found) / len(found):.0%}" for mark in MARKS)
        median = statistics.median(found)
        typical = f"{median:,.0f}" if median <= MOST_QUERIES else f"not in {MOST_QUERIES:,}"
        lines.append(f"| {row['method']} | {row['step_size']:g} | {typical} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--step-size", type=float, help="for all methods; otherwise each chooses its own")
    arguments = parser.parse_args()
    rows = [study(method, arguments.step_size, arguments.data.absolute(), arguments.out) for method in arguments.only]
    print(table(rows))
    (arguments.out / "figures.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
