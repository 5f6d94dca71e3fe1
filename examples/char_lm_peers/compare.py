"""NoLoCo, DiLoCo, CO2 and synchronous training of one small character model, with equal numbers of local steps.

    python examples/char_lm_peers/compare.py TEXT [FOLDER]
"""
import sys
from pathlib import Path

import fedcore
from fedcore.report import write_comparison

EXPERIMENT = Path(__file__).parent / "experiment.yaml"
METHODS = {
    "noloco": {"name": "noloco", "inner_steps": 20},
    "diloco, nesterov": {"name": "diloco", "inner_steps": 20, "outer_lr": 0.7, "outer_momentum": 0.5},
    "co2": {"name": "co2", "inner_steps": 20},
    "local_sgd": {"name": "local_sgd", "inner_steps": 20},
    "synchronous (DDP)": {"name": "all_reduce_sgd", "steps_per_round": 20},
}


def main(text: str, folder: Path) -> None:
    """Run all methods and print what each reached, after how long, with how much communication."""
    print(f"{'method':<20}{'loss':>8}{'peers':>16}{'virtual time':>14}{'MB per peer':>13}{'exposed':>9}")
    runs = []
    for label, strategy in METHODS.items():
        settings = ", ".join(f"{name}: {value}" for name, value in strategy.items())
        run = fedcore.simulate(EXPERIMENT, out=folder / label.split(",")[0].split(" ")[0],
                               overrides=[f"task.path={text}", f"strategy={{{settings}}}"])
        summary = run.summary
        peers = f"{summary['peer_loss_min']:.3f}-{summary['peer_loss_max']:.3f}"
        megabytes = summary["bytes_up"] / 8 / 1e6
        print(f"{label:<20}{summary['final_loss']:>8.3f}{peers:>16}{summary['time_s']:>12.0f} s{megabytes:>13.1f}"
              f"{100 * summary['waiting_share']:>7.0f} %")
        runs.append(run.folder)
    print(f"side by side: {write_comparison(runs, folder / 'compare.html')}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path("runs/char_lm_peers"))
