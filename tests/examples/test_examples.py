"""Every example runs as its first lines say, and learns something."""
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fedcore
from fedcore.config import load_experiment

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT_DATA = {"uneven_mnist": ["task=digits"], "blackbox_attack": ["task=blackbox_quadratics", "stop.target={}"],
                "private_housing": ["task=digits"], "char_lm_peers": ["task=digits"]}
RUNNABLE = ["quickstart", "custom_round_strategy", "custom_event_strategy", "custom_peer_strategy",
            "bring_your_own_task", "thin_uplink"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_example_learns(name, tmp_path):
    run = fedcore.simulate(EXAMPLES / name / "experiment.yaml", out=tmp_path / "run")
    assert run.summary["best_accuracy"] > 0.9
    assert (tmp_path / "run" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize("name", ["custom_round_strategy", "custom_event_strategy"])
def test_a_users_strategy_resumes_to_the_same_bits(name, tmp_path):
    file = EXAMPLES / name / "experiment.yaml"
    limit = ["stop.target={}", "stop.rounds=null", "stop.seconds=20"]
    whole = fedcore.simulate(file, out=tmp_path / "whole", overrides=limit)
    fedcore.simulate(file, out=tmp_path / "parts", overrides=[*limit[:2], "stop.seconds=8"])
    resumed = fedcore.simulate(resume=tmp_path / "parts", overrides=limit[2:])
    for tensor_name, values in whole.model().items():
        assert torch.equal(values, resumed.model()[tensor_name])


def test_every_example_file_is_valid():
    for file in sorted(EXAMPLES.glob("*/experiment.yaml")):
        # Some want data from the user's disk; everything else about them can be checked without.
        overrides = WITHOUT_DATA.get(file.parent.name, [])
        assert load_experiment(file, overrides).clients.count >= 2


def test_every_method_of_the_thin_uplinks_is_valid():
    folder = EXAMPLES / "thin_uplink"
    methods = runpy.run_path(str(folder / "side_by_side.py"))["METHODS"]
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    assert len({load_experiment({**experiment, **changes}).strategy_name for changes in methods.values()}) == 4


def test_f1_is_tuned_by_evaluating_it_only(tmp_path):
    run = fedcore.simulate(EXAMPLES / "tune_f1" / "experiment.yaml", out=tmp_path / "run", overrides=["stop.rounds=2"])
    before, *_, after = run.rows("evaluate")
    assert before["f1"] < 0.8 and after["f1"] > 0.9 and after["test_f1"] > 0.85
    assert run.summary["queries"] == 5 * (11 + 2 * 76)


def test_a_users_strategy_without_a_server_resumes_to_the_same_bits(tmp_path):
    file = EXAMPLES / "custom_peer_strategy" / "experiment.yaml"
    whole = fedcore.simulate(file, out=tmp_path / "whole")
    fedcore.simulate(file, out=tmp_path / "parts", overrides=["stop.rounds=12"])
    resumed = fedcore.simulate(resume=tmp_path / "parts", overrides=["stop.rounds=30"])
    assert all(torch.equal(values, resumed.model()[name]) for name, values in whole.model().items())
    assert resumed.metrics[-1] == whole.metrics[-1]


@pytest.mark.slow
def test_real_peers_on_one_machine_end_with_the_simulations_model(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, EXAMPLES / "peers_on_loopback" / "run.py", tmp_path], env=environment,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "the same, bit for bit" in done.stdout
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 5


def test_the_notebook_style_example_runs_from_top_to_bottom(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, EXAMPLES / "python_api" / "uneven_digits.py"], env=environment,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "fedcompass" in done.stdout and "side by side" in done.stdout
