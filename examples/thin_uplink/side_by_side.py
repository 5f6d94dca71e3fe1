"""What thin uplinks cost with and without compression: bytes, virtual time and accuracy, side by side.

    python examples/thin_uplink/side_by_side.py [--out runs/thin_uplink]
"""
import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

import fedcore

HERE = Path(__file__).parent
TOP = {"name": "top_k", "fraction": 0.01}
LOCAL = {"stop": {"rounds": 40}, "train": {"batch_size": 32, "local_steps": 10, "lr": 0.1}}
# One gradient a round, or ten local steps a round and their difference.
METHODS: dict[str, dict[str, Any]] = {
    "distributed SGD": {"strategy": {"name": "distributed_sgd", "server_lr": 0.2}},
    "EControl, Top-1 %": {},
    "EF14, Top-1 %": {"strategy": {"name": "ef14", "server_lr": 0.2, "compressor": TOP}},
    "FedAvg": {"strategy": "fedavg", **LOCAL},
    "FedAvg, Top-1 %": {"strategy": "fedavg", **LOCAL, "compression": TOP},
    "FedAvg, one bit": {"strategy": "fedavg", **LOCAL, "compression": "sign"},
}


def main(arguments: list[str]) -> None:
    """Run every method, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/thin_uplink"))
    out = parser.parse_args(arguments).out
    experiment = yaml.safe_load((HERE / "experiment.yaml").read_text(encoding="utf-8"))
    print(f"{'':20}{'accuracy':>10}{'MB up':>10}{'times fewer':>13}{'virtual time':>14}")
    whole = 0.0
    for number, (name, changes) in enumerate(METHODS.items()):
        summary = fedcore.simulate({**experiment, **changes}, out=out / str(number)).summary
        sent = summary["bytes_up"]
        if "%" not in name and "bit" not in name:
            whole = sent    # what the lines below it are compared with
        print(f"{name:20}{summary['final_accuracy']:10.1%}{sent / 1e6:10.3f}{whole / sent:13.1f}"
              f"{summary['time_s']:12.0f} s", flush=True)
    print(f"\nReports: {out}/*/report.html")


if __name__ == "__main__":
    main(sys.argv[1:])
