"""FedCompass and FedFix beside FedAvg, FedAsync and FedBuff: virtual time until MNIST is learnt to 95 %.

Every method chooses its rates from the same grid, on a seed that is not reported. Then each runs on the report seeds.

    python study.py --data mnist.npz --out study          # about a quarter of an hour on one core
"""
import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

import fedcore
from fedcore.report import write_comparison

HERE = Path(__file__).parent
LOCAL_RATES = (0.2, 0.1, 0.05)    # the fastest first: what falls behind the best so far is cut off
SERVER_RATES = (2.0, 4.0, 1.0, 0.5)
MANY, FEW = 50, 10
TUNING_SEED, REPORT_SEEDS = 100, (0, 1, 2)

# FedAvgM without momentum is FedAvg with a server rate.
FEDAVG = {"name": "fedavgm", "server_momentum": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "FedCompass, 10 to 50": {
        "strategy": {"name": "fedcompass", "min_local_steps": FEW, "max_local_steps": MANY, "latest_time_factor": 1.2},
        "local_steps": MANY,    # not used: it chooses them itself
    },
}
for steps in (MANY, FEW):
    METHODS[f"FedAvg, {steps}"] = {"strategy": FEDAVG, "rate": "server_learning_rate", "local_steps": steps}
    # FedAsync mixes models: a rate above 1 would extrapolate.
    METHODS[f"FedAsync, {steps}"] = {"strategy": {"name": "fedasync"}, "local_steps": steps, "highest_rate": 1.0}
    METHODS[f"FedBuff, {steps}"] = {"strategy": {"name": "fedbuff", "buffer_size": 3}, "local_steps": steps}
    METHODS[f"FedFix, {steps}"] = {"strategy": {"name": "fedfix"}, "local_steps": steps}


def choices(method: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings that a method may choose from."""
    for lr, rate in itertools.product(LOCAL_RATES, SERVER_RATES):
        if rate <= method.get("highest_rate", float("inf")):
            yield {"lr": lr, "server_rate": rate}


def run(name: str, choice: Mapping[str, Any], seed: int, data: Path, folder: Path, limit_s: float) -> float | None:
    """Run a method once, and return the virtual seconds until it reached the target, None when it did not."""
    method = METHODS[name]
    experiment = yaml.safe_load((HERE / "experiment.yaml").read_text())
    experiment["task"]["path"] = str(data)
    experiment["seed"] = seed
    experiment["strategy"] = {**method["strategy"], method.get("rate", "server_lr"): choice["server_rate"]}
    experiment["train"] |= {"lr": choice["lr"], "local_steps": method["local_steps"]}
    experiment["stop"]["seconds"] = limit_s
    experiment["checkpoint"] = {"every_s": 1e9}
    summary = fedcore.simulate(experiment, out=folder).summary
    found: float | None = summary["time_to_target_s"]
    return found


def tune(name: str, data: Path, out: Path, limit_s: float) -> dict[str, Any]:
    """Return a method's best choice on the tuning seed; a run that falls behind the best so far is cut off."""
    best: dict[str, Any] = {}
    best_s = limit_s
    for index, choice in enumerate(choices(METHODS[name])):
        folder = out / "tuning" / f"{slug(name)}-{index}"
        reached = run(name, choice, TUNING_SEED, data, folder, best_s)
        shutil.rmtree(folder)
        outcome = "not before the best" if reached is None else f"{reached:.0f} s"
        print(f"  {name}: {choice} -> {outcome}", flush=True)
        if reached is not None:
            best, best_s = choice, reached
    return best or next(choices(METHODS[name]))


def study(name: str, data: Path, out: Path, limit_s: float) -> dict[str, Any]:
    """Tune a method, run it on the report seeds, and return the figures."""
    choice = tune(name, data, out, limit_s)
    times, folders = [], []
    for seed in REPORT_SEEDS:
        folder = out / f"{slug(name)}-seed{seed}"
        times.append(run(name, choice, seed, data, folder, limit_s))
        folders.append(str(folder))
        print(f"{name}, seed {seed}: {times[-1]}", flush=True)
    return {"method": name, "choice": choice, "time_to_target_s": times, "folders": folders}


def slug(name: str) -> str:
    """Return a name for folders."""
    return name.lower().replace(", ", "-").replace(" ", "-")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = ["| method, local steps | local rate, server rate | 95 % after (virtual s), seeds 0, 1, 2 | median |",
             "| --- | --- | --- | --- |"]
    for row in rows:
        choice = row["choice"]
        chosen = f"{choice['lr']:g}, {choice['server_rate']:g}"
        times = [float("inf") if found is None else found for found in row["time_to_target_s"]]
        shown = ", ".join("not reached" if found == float("inf") else f"{found:.0f}" for found in times)
        lines.append(f"| {row['method']} | {chosen} | {shown} | {statistics.median(times):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--jobs", type=int, default=1, help="methods that run at the same time")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help="some of the methods, e.g. 'FedAvg, 10'")
    parser.add_argument("--limit", type=float, default=2000.0,
                        help="virtual seconds after which a run counts as missed")
    arguments = parser.parse_args()
    print(f"Grid: local rate {LOCAL_RATES}, server rate {SERVER_RATES}; tuning seed {TUNING_SEED}", flush=True)
    data = arguments.data.absolute()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(study, name, data, arguments.out, arguments.limit) for name in arguments.only]
        rows = [future.result() for future in futures]
    print(table(rows))
    (arguments.out / "figures.json").write_text(json.dumps(rows, indent=2))
    folders = [Path(folder) for row in rows for folder in row["folders"]]
    print(f"Overlay: {write_comparison(folders, arguments.out / 'comparison.html')}")


if __name__ == "__main__":
    main()
