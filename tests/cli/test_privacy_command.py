"""`fedcore privacy`, and the report's section, tell a data protection officer what was promised."""
import re

import pytest
from typer.testing import CliRunner

import fedcore
from fedcore.cli import app
from fedcore.privacy.words import guess_rate

FILE = """
task: {name: digits, model: logistic}
strategy: {name: NAME, epsilon: 3.0, SETTINGS}
clients: {count: 4}
stop: {rounds: 6}
"""


@pytest.fixture
def show(tmp_path):
    def run(name="diff2", settings="restart_interval: 3", *arguments):
        file = tmp_path / "experiment.yaml"
        file.write_text(FILE.replace("NAME", name).replace("SETTINGS", settings))
        return CliRunner().invoke(app, ["privacy", str(file), *arguments])

    return run


def test_the_budget_is_shown_before_anything_runs(show):
    shown = show()
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "(3, 1e-05)-differential privacy of diff2 over 6 rounds" in text
    assert "one record of one client is replaced" in text and "the server included" in text
    assert re.search(r"gradients +2 +2.78", shown.output) and re.search(r"differences +4 +3.93", shown.output)
    assert re.search(r"^ +6 +3 *$", shown.output, re.M)


@pytest.mark.parametrize("name, settings, words", [
    ("diff2", "routine: bvr_l_sgd", "local steps"), ("dp_srm", "gradient_weight: 0.2", "mixtures"),
    ("dp_gd", "noise_mode: central", "everybody but the server"),
    ("dp_sgd", "sample_rate: 0.5", "left out"),
])
def test_every_private_method_has_a_budget_table(show, name, settings, words):
    shown = show(name, settings)
    assert shown.exit_code == 0 and words in " ".join(shown.output.split())


def test_a_strategy_without_a_budget_is_refused_by_name(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("{task: digits, strategy: fedavg}\n")
    shown = CliRunner().invoke(app, ["privacy", str(file)])
    assert shown.exit_code == 2 and "promises no privacy" in " ".join(shown.output.split())


def test_a_budget_that_promises_nothing_is_refused(show):
    shown = show("diff2", "delta: 0.01")
    assert shown.exit_code == 2 and "strategy.delta=0.01" in shown.output


def test_the_report_says_what_was_spent_and_for_whom(tmp_path):
    experiment = {"task": {"name": "digits", "model": "logistic"}, "clients": {"count": 3}, "stop": {"rounds": 3},
                  "strategy": {"name": "diff2", "epsilon": 2.0, "restart_interval": 2, "noise_mode": "central"}}
    run = fedcore.simulate(experiment, out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("Privacy spent", "(2, 1e-05)-differentially", "everybody but the server", "replace-one",
                  "Epsilon spent over rounds", "Clip norm and noise", "Accuracy against epsilon"):
        assert words in page
    assert run.summary["epsilon"] == pytest.approx(2.0) and run.summary["delta"] == 1e-5
    assert "loss" not in {name for row in run.rows("update") for name in row.get("train", {})}


def test_an_attackers_chances_grow_with_epsilon_and_are_those_of_the_exact_bound():
    assert guess_rate(3.0, 1e-5, sampled=False) == pytest.approx(0.6404, abs=1e-3)
    assert guess_rate(3.0, 1e-5, sampled=True) == pytest.approx(0.9526, abs=1e-3)
    assert 0.5 < guess_rate(0.1, 1e-5, False) < guess_rate(1.0, 1e-5, False) < guess_rate(1.0, 1e-5, True) < 1
