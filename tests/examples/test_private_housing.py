"""The example on house prices runs on a file of the same columns."""
import runpy
from pathlib import Path

import numpy as np
import pytest

import fedcore
from fedcore.clients.tasks.tables import NUMBERS, PROXIMITIES, PROXIMITY, TARGET

FOLDER = Path(__file__).parents[2] / "examples" / "private_housing"


@pytest.fixture
def prices(tmp_path):
    """Write a small file of made-up districts."""
    draw, rows = np.random.default_rng(0), 300
    figures = draw.normal(size=(rows, len(NUMBERS)))
    worth = 200_000 + 50_000 * figures[:, -1] + 5_000 * draw.normal(size=rows)
    lines = [",".join([*NUMBERS, TARGET, PROXIMITY])]
    lines += [",".join([*(f"{value:.4f}" for value in row), f"{price:.0f}", PROXIMITIES[index % len(PROXIMITIES)]])
              for index, (row, price) in enumerate(zip(figures, worth, strict=True))]
    file = tmp_path / "housing.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_private_network_learns_and_keeps_its_budget(prices, tmp_path):
    overrides = [f"task.path={prices}", "stop.rounds=10", "evaluate.every=10", "strategy.epsilon=50",
                 "strategy.restart_interval=5", "strategy.server_lr=0.02", "strategy.clip_gradient=4"]
    run = fedcore.simulate(FOLDER / "experiment.yaml", out=tmp_path / "run", overrides=overrides)
    losses = run.curve("loss")[1]
    assert losses[-1] < 0.6 * losses[0]
    assert run.summary["epsilon"] == pytest.approx(50)


def test_the_study_gives_both_methods_the_same_budget(prices):
    study = runpy.run_path(str(FOLDER / "study.py"))
    seen = []

    def recorded(file, out, overrides):
        run = fedcore.simulate(file, out=out, overrides=[*overrides, "stop.rounds=2"])
        seen.append((run.summary["strategy"], run.summary["epsilon"]))
        return run

    losses = study["losses"]
    losses.__globals__["SEEDS"] = (0,)
    losses.__globals__["fedcore"] = type("Short", (), {"simulate": staticmethod(recorded)})
    assert all(losses(prices, method, 3.0) for method in study["METHODS"])
    assert seen == [("diff2", pytest.approx(3.0)), ("dp_gd", pytest.approx(3.0))]
