"""The commands from end to end."""
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import fedcore as package
from fedcore.runs import Run
from fedcore.simulations import run as run_module

ROOT = Path(__file__).parents[2]
FAST = {
    "task": "digits", "strategy": "fedbuff", "clients": {"count": 4}, "train": {"local_steps": 2},
    "stop": {"rounds": 3}, "simulation": {"network": {"latency_s": 0.01}},
}


@pytest.fixture
def experiment(tmp_path) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(FAST))
    return file


# ---- simulate -----------------------------------------------------------------------------------------------------


def test_simulate_writes_a_complete_folder_and_says_where(fedcore, experiment, tmp_path):
    result = fedcore("simulate", experiment, "--out", "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "config.yaml", "metrics.jsonl", "timeline.jsonl", "summary.json", "model.safetensors", "clients.json",
        "report.html",
    }
    for words in ("fedbuff on digits, 4 clients, seed 0: out", "all rounds are done", "report: out/report.html"):
        assert words in result.stdout
    summary = Run(tmp_path / "out").summary
    assert f"client updates   {summary['client_updates']} ({summary['client_steps']} local steps)" in result.stdout


def test_without_out_every_run_gets_a_folder_of_its_own(fedcore, experiment, tmp_path):
    for _ in range(2):
        assert fedcore("simulate", experiment).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits-fedbuff-seed0-1", "digits-fedbuff-seed0-2"
    ]


def test_an_existing_folder_is_never_overwritten(fedcore, experiment, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    result = fedcore("simulate", experiment, "--out", "out")
    assert result.exit_code == 2
    assert "out exists and is not empty. Choose another --out" in " ".join(result.stderr.split())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_overrides_reach_the_run(fedcore, experiment, tmp_path):
    assert fedcore("simulate", experiment, "--out", "out", "--set", "seed=5", "--set", "strategy=fedavg").exit_code == 0
    summary = Run(tmp_path / "out").summary
    assert (summary["seed"], summary["strategy"]) == (5, "fedavg")


def test_a_missed_target_is_status_3_and_a_reached_one_0(fedcore, experiment, tmp_path):
    missed = fedcore("simulate", experiment, "--out", "missed", "--set", "stop.target={accuracy: 1.0}")
    assert missed.exit_code == 3
    assert "The target was not reached: 100 % accuracy." in missed.stdout
    reached = fedcore("simulate", experiment, "--out", "reached", "--set", "stop.target={accuracy: 0.01}")
    assert reached.exit_code == 0
    assert "the target is reached" in reached.stdout


def test_settings_without_effect_are_noted(fedcore, experiment):
    result = fedcore("simulate", experiment, "--set", "strategy=fedcompass")
    assert result.exit_code == 0
    assert result.stderr == (
        "Note: train.local_steps has no effect: fedcompass chooses every client's local steps itself.\n"
    )


def test_a_run_that_fails_is_status_1_with_its_folder_and_report(fedcore, experiment, tmp_path):
    result = fedcore("simulate", experiment, "--out", "out", "--set", "simulation.failures={crash_probability: 0.999}")
    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert Run(tmp_path / "out").summary["stop_reason"] == "error"


def test_a_defect_is_one_line_and_its_traceback_a_file_in_the_run_folder(fedcore, experiment, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(run_module, "run_until_asked", broken)
    result = fedcore("simulate", experiment, "--out", "out")
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first.startswith(f"Error: ZeroDivisionError: a defect ({__file__}, line ")
    assert second == "The full traceback is in out/error.log."
    assert "Traceback (most recent call last)" in (tmp_path / "out" / "error.log").read_text()


def test_a_defect_in_a_users_strategy_leaves_the_report_of_what_was_done(fedcore, experiment, tmp_path):
    (tmp_path / "hasty_strategy.py").write_text(
        "from fedcore.strategies.fedbuff import FedBuff\n\n\nclass Hasty(FedBuff):\n"
        "    def on_reply(self, hub, reply):\n        raise LookupError('lost my way')\n"
    )
    result = fedcore("simulate", experiment, "--out", "out", "--set", "strategy=hasty_strategy:Hasty")
    assert result.exit_code == 1
    assert f"LookupError: lost my way ({tmp_path / 'hasty_strategy.py'}, line 6)" in result.stderr
    assert {"error.log", "report.html", "summary.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()}


def test_a_terminal_without_unicode_gets_question_marks(process, experiment):
    result = process("simulate", experiment, "--set", "stop.rounds=1", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr


def test_whoever_reads_the_output_may_leave_early(experiment, tmp_path):
    command = f"{sys.executable} -m fedcore list strategies | head -n 1"
    result = subprocess.run(command, shell=True, cwd=ROOT, text=True, capture_output=True, check=False)
    assert result.stdout == "strategies, named under strategy\n"
    assert result.stderr == ""


def test_bad_input_found_late_leaves_no_empty_folder(fedcore, experiment, tmp_path):
    (tmp_path / "junk.safetensors").write_text("junk")
    result = fedcore("simulate", experiment, "--out", "out", "--set", "initial_model=junk.safetensors")
    assert result.exit_code == 2
    assert "junk.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["simulate"], "name an experiment file"),
    (["simulate", "file.yaml", "--resume", "out"], "leave out FILE and --out"),
    (["simulate", "--resume", "nowhere"], "nowhere is not a run folder"),
    (["simulate", "--flower-app", "a", "--resume", "b"], "cannot be resumed"),
    (["simulate", "file.yaml", "--workers", "-1"], "-1 is not in the range x>=0"),
    (["simulate", "file.yaml", "--nothing"], "No such option"),
    (["simulat"], "Did you mean 'simulate'?"),
    (["list", "strategi"], "Did you mean strategies?"),
    (["list", "strategies", "fedbuf"], "Did you mean fedbuff?"),
    (["compare", "nowhere"], "nowhere is not the folder of a run"),
    (["compare", "nowhere", "--target", "0.9"], "of the form metric=value"),
    (["compare", "nowhere", "--target", "accuracy=high"], "with a number"),
    (["compare"], "Missing argument"),
    (["report", "nowhere"], "nowhere is not the folder of a run"),
])
def test_a_wrong_command_line_is_status_2_with_what_is_wrong(words, message, fedcore):
    result = fedcore(*words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_resume_continues_to_the_same_bits(process, experiment, tmp_path):
    settings = ["--set", "stop={rounds: 100}", "--set", "checkpoint.every_s=0.1"]
    command = [sys.executable, "-m", "fedcore", "simulate", str(experiment), "--out", "stopped", *settings]
    child = subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    while child.poll() is None and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert "continue: fedcore simulate --resume stopped" in stdout
    assert "Traceback" not in stderr
    assert Run(tmp_path / "stopped").summary["stop_reason"] == "interrupted"
    assert process("simulate", "--resume", "stopped").returncode == 0
    assert process("simulate", experiment, "--out", "whole", *settings).returncode == 0
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors").read_bytes()


# ---- check, compare, report, list ---------------------------------------------------------------------------------


def test_check_shows_all_settings_the_model_and_the_data(fedcore, experiment):
    result = fedcore("check", experiment, "--set", "simulation.network.uplink_mbps=1")
    assert result.exit_code == 0, result.output
    settings, facts = result.stdout.split("\n\n", 1)
    assert yaml.safe_load(settings)["train"]["lr"] == 0.05
    for words in (r"model +7 510 parameters, 30 kB", r"examples per client +359 to 360, median 360, 1 438 together",
                  r"seconds per local step +0.1 s to 0.1 s", r"upload of one model +0.24 s",
                  r"can be run: fedcore simulate"):
        assert re.search(words, facts), (words, facts)


def test_check_runs_nothing(fedcore, experiment, tmp_path):
    fedcore("check", experiment)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


def test_compare_prints_a_table_and_writes_a_page(fedcore, experiment, tmp_path):
    for name in ("fedavg", "fedbuff"):
        assert fedcore("simulate", experiment, "--set", f"strategy={name}", "--out", name).exit_code == 0
    result = fedcore("compare", "fedavg", "fedbuff", "--target", "accuracy=0.05", "--out", "page.html")
    assert result.exit_code == 0, result.output
    assert "time to 5 % accuracy" in result.stdout
    assert re.search(r"^fedavg +1 ", result.stdout, re.MULTILINE)
    assert re.search(r"^fedbuff +1 ", result.stdout, re.MULTILINE)
    assert "<html" in (tmp_path / "page.html").read_text()


def test_report_writes_the_page_again(fedcore, experiment, tmp_path):
    fedcore("simulate", experiment, "--out", "out")
    (tmp_path / "out" / "report.html").unlink()
    assert fedcore("report", "out").stdout == "out/report.html\n"
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("words, expected", [
    (["list"], ["strategies", "fedcompass", "clients.partition", "dual_dirichlet", "package.module:Class"]),
    (["list", "strategies"], ["fedcompass  events  Li et al., 2024", "max_local_steps=100", "rounds, from Flower"]),
    (["list", "strategy"], ["fedcompass"]),
    (["list", "tasks"], ["digits", "shakespeare", "path=null"]),
    (["list", "partitions"], ["dirichlet", "alpha", "min_examples=1"]),
    (["list", "graphs"], ["ring", "random_regular", "degree=4"]),
    (["list", "strategies", "fedbuff"], ["buffer_size", "Nguyen et al., 2022", "strategy: {name: fedbuff"]),
    (["list", "strategies", "fedadam"], ["eta", "Server-side learning rate", "beta_1"]),
    (["list", "partitions", "dirichlet"], ["alpha", "required", "partition: dirichlet"]),
    (["--version"], [f"fedcore {package.__version__}"]),
])
def test_what_there_is_can_be_listed(words, expected, fedcore):
    result = fedcore(*words)
    assert result.exit_code == 0, result.output
    for text in expected:
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_wide_terminal_gets_strategies_as_a_table(fedcore, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert re.search(r"name +kind +what it does +paper +main settings", fedcore("list", "strategies").stdout)


@pytest.mark.parametrize("command", ["simulate", "list", "check", "compare", "report"])
def test_every_command_explains_itself_with_an_example(command, fedcore):
    result = fedcore(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?\s+fedcore {command} ", result.stdout)
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["simulate", "--help"]])
def test_help_does_not_wait_for_heavy_imports(words):
    code = ("import sys, contextlib\nfrom fedcore.cli import main\n"
            "with contextlib.suppress(SystemExit):\n    main()\n"
            "print([name for name in ('torch', 'flwr', 'pydantic', 'matplotlib', 'sklearn') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, text=True, capture_output=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_metrics_of_a_run_are_json_lines(fedcore, experiment, tmp_path):
    fedcore("simulate", experiment, "--out", "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "start"
    assert rows[-1]["event"] == "stop"


@pytest.mark.slow
def test_the_quickstart_reaches_its_target(process):
    result = process("simulate", ROOT / "examples" / "quickstart" / "experiment.yaml", "--out", "out")
    assert result.returncode == 0, result.stderr
    assert "the target is reached" in result.stdout
