"""DIFF2 beside DP-GD on house prices, at epsilon 1, 3 and 5; prints a table.

    python examples/private_housing/study.py housing.csv

Both methods get the same budget and the same rounds; their other settings were found by hand, as
docs/algorithms/diff2.md says.
"""
import statistics
import sys
import tempfile
from pathlib import Path

import fedcore

HERE = Path(__file__).parent
EPSILONS, SEEDS = (1.0, 3.0, 5.0), (0, 1, 2)
METHODS = {
    "DIFF2": {},
    "DP-GD": {"name": "dp_gd", "clip_gradient": 8, "server_lr": 0.1},
}


def losses(path: Path, method: str, epsilon: float) -> list[float]:
    """Return a method's test losses, one for each seed."""
    settings = METHODS[method]
    found = []
    for seed in SEEDS:
        overrides = [f"task.path={path}", f"seed={seed}", "evaluate.every=1000"]
        if settings:    # another strategy altogether: it does not know all of DIFF2's settings
            values = {**settings, "epsilon": epsilon, "delta": 1e-5, "noise_mode": "central"}
            overrides.append(f"strategy={{{', '.join(f'{name}: {value}' for name, value in values.items())}}}")
        else:
            overrides.append(f"strategy.epsilon={epsilon}")
        with tempfile.TemporaryDirectory() as folder:
            run = fedcore.simulate(HERE / "experiment.yaml", out=folder, overrides=overrides)
            assert abs(run.summary["epsilon"] - epsilon) < 1e-6
            found.append(run.summary["final_loss"])
    return found


def main() -> None:
    """Run everything and print the table."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/private_housing/study.py HOUSING.CSV")
    path = Path(sys.argv[1]).absolute()
    print("epsilon  method  test loss, mean of seeds  each seed")
    for epsilon in EPSILONS:
        for method in METHODS:
            found = losses(path, method, epsilon)
            each = ", ".join(f"{loss:.4f}" for loss in found)
            print(f"{epsilon:7g}  {method:6}  {statistics.mean(found):24.4f}  {each}", flush=True)


if __name__ == "__main__":
    main()
