"""Compressed gradients on MNIST, two classes a client: accuracy after 500 rounds, and bytes up.

    python examples/thin_uplink/mnist.py --data mnist.npz [--out runs/thin_mnist] [--jobs 2] [--tune]

With `--tune` every choice of each method's grid runs on a seed that is not reported; else the choices that were best
there run on three others. Bytes are those of whole messages, first gradients included.
"""
import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fedcore

TOP = {"name": "top_k", "fraction": 0.01}
TUNING_SEED, REPORT_SEEDS = 100, (0, 1, 2)
ROUNDS = 500
MODEL = {"name": "cnn", "width": 16}    # 28,938 parameters
RATES = (0.1, 0.2, 0.4)
COSINE = {"name": "cosine", "total_steps": ROUNDS}
SCHEDULES = (None, COSINE)
# Method -> its fixed settings, its grid, and what was best on the tuning seed.
METHODS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]], dict[str, Any]]] = {
    "distributed SGD": ({"name": "distributed_sgd"}, {"server_lr": RATES, "schedule": SCHEDULES}, {"server_lr": 0.2}),
    "EControl": ({"name": "econtrol", "compressor": TOP, "init": "zero"},
                 {"server_lr": (0.1, 0.2, 0.3), "feedback": (0.02, 0.05, 0.1)}, {"server_lr": 0.2, "feedback": 0.05}),
    "EControl, whole first gradients": ({"name": "econtrol", "compressor": TOP, "init": "full"},
                                        {"server_lr": (0.2, 0.3, 0.4), "feedback": (0.035, 0.05, 0.07),
                                         "schedule": SCHEDULES},
                                        {"server_lr": 0.3, "feedback": 0.05, "schedule": COSINE}),
    "EF21-SGDM": ({"name": "ef21_sgdm", "compressor": TOP}, {"server_lr": RATES}, {"server_lr": 0.2}),
    "EF14": ({"name": "ef14", "compressor": TOP}, {"server_lr": RATES}, {"server_lr": 0.2}),
}


def run(strategy: dict[str, Any], seed: int, rounds: int, data: Path, folder: Path) -> tuple[float, int]:
    """Run a method once, and return its final accuracy and its bytes up."""
    summary = fedcore.simulate({
        "task": {"name": "mnist", "path": str(data), "model": MODEL}, "strategy": strategy, "seed": seed,
        "clients": {"count": 10, "partition": {"name": "classes", "classes_per_client": 2}},
        "train": {"batch_size": 32}, "stop": {"rounds": rounds}, "evaluate": {"where": "server", "every": 100},
        "checkpoint": {"every_s": 1e9},
    }, out=folder).summary
    return summary["final_accuracy"], summary["bytes_up"]


def main(arguments: list[str]) -> None:
    """Run the study, and print one line for each choice or method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="x_train, y_train, x_test, y_test in one .npz")
    parser.add_argument("--out", type=Path, default=Path("runs/thin_mnist"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fewer, to try this program out")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS), help="methods; all of them")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args(arguments)
    seeds = (TUNING_SEED,) if options.tune else REPORT_SEEDS
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        found = {}
        for name in options.only:
            fixed, grid, best = METHODS[name]
            choices = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
            for choice in choices if options.tune else [best]:
                words = f"{name} {choice}"
                folder = options.out / str(len(found))
                found[words] = [pool.submit(run, fixed | choice, seed, options.rounds, options.data,
                                            folder / str(seed)) for seed in seeds]
        for words, futures in found.items():
            results = [future.result() for future in futures]
            accuracies = ", ".join(f"{accuracy:.2%}" for accuracy, _ in results)
            print(f"{words}: {accuracies} (mean {statistics.mean(accuracy for accuracy, _ in results):.2%}), "
                  f"{results[0][1] / 1e6:.2f} MB up", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
