"""What an exported app consists of, and what is refused."""
import tomllib
from pathlib import Path

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedcore.config import load_experiment
from fedcore.errors import BadInput
from fedcore.export import MOST_BYTES, app_name, export_app
from fedcore.flower import adopt_identity
from fedcore.simulations.flower_app import simulate_app
from fedcore.superlink import client_app, overrides_in

EXPERIMENT = {"task": "digits", "strategy": "fedbuff", "clients": {"count": 3}, "train": {"local_steps": 2},
              "stop": {"rounds": 2}}
OWN_TASK = '''
from fedcore.clients.tasks.digits import Digits

class MyDigits(Digits):
    pass
'''


@pytest.fixture
def experiment(tmp_path) -> Path:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT))
    return file


def test_an_app_has_every_setting_and_nothing_that_flower_would_not_ship(experiment, tmp_path):
    folder = export_app(experiment, tmp_path / "my-app", ["train.lr=0.2"])
    assert {path.name for path in folder.iterdir()} == {
        "pyproject.toml", "server_app.py", "client_app.py", "experiment.yaml", "README.md"
    }
    settings = load_experiment(folder / "experiment.yaml")
    assert settings.resolved() == load_experiment(experiment, ["train.lr=0.2"]).resolved()
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-app"
    assert project["tool"]["flwr"]["app"]["components"] == {"serverapp": "server_app:app",
                                                            "clientapp": "client_app:app"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES / 1000


def test_an_exported_app_is_an_app_like_any_other(experiment, tmp_path):
    """It runs in virtual time as a stranger's would, and leaves a run folder of its own."""
    folder = export_app(experiment, tmp_path / "app")
    out = tmp_path / "inner"
    run = simulate_app(folder, {"clients": {"count": 3}}, out=tmp_path / "outer", overrides=[f"out={out}"])
    assert run.summary["stop_reason"] == "finished"
    summary = yaml.safe_load((out / "summary.json").read_text())
    assert (summary["engine"], summary["stop_reason"], summary["client_updates"]) == ("superlink", "rounds", 6)
    assert summary["final_accuracy"] > 0.1
    assert (out / "report.html").is_file() and not (out / "checkpoints").exists()


def test_modules_beside_the_experiment_go_along(experiment, tmp_path):
    (tmp_path / "exported_task.py").write_text(OWN_TASK)
    (tmp_path / "unrelated.py").write_text("")
    folder = export_app(experiment, tmp_path / "app", ["task=exported_task:MyDigits"])
    assert (folder / "exported_task.py").is_file() and not (folder / "unrelated.py").exists()


def test_files_that_must_be_on_other_machines_are_named(experiment, tmp_path):
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"")
    folder = export_app(experiment, tmp_path / "app", [f"initial_model={model}"])
    assert "to be there on the machines that read them: initial_model." in (folder / "README.md").read_text()
    assert not (folder / "model.safetensors").exists()


def test_a_folder_with_something_in_it_is_refused(experiment, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(BadInput, match="exists and is not empty"):
        export_app(experiment, tmp_path / "full")


def test_an_app_of_peers_says_what_its_nodes_need(experiment, tmp_path):
    folder = export_app(experiment, tmp_path / "app", ["strategy=noloco"])
    assert "peer-listen='0.0.0.0:9444'" in (folder / "README.md").read_text()
    assert "peer-listen" not in (export_app(experiment, tmp_path / "other") / "README.md").read_text()


@pytest.mark.parametrize("folder, name", [("my_app", "my-app"), ("3 apps", "fedcore-3-apps"), ("ä", "fedcore"),
                                          ("x" * 60, "x" * 40)])
def test_app_names_are_those_that_flower_allows(tmp_path, folder, name):
    assert app_name(tmp_path / folder) == name


def test_settings_of_a_run_are_split_like_words_of_a_shell():
    assert overrides_in({}) == ()
    assert overrides_in({"set": "train.lr=0.1 'strategy={name: fedbuff, buffer_size: 5}'"}) == (
        "train.lr=0.1", "strategy={name: fedbuff, buffer_size: 5}"
    )
    with pytest.raises(BadInput, match="set=\"'a\" cannot be read"):
        overrides_in({"set": "'a"})


def test_a_node_has_the_last_word_about_its_own_settings(experiment):
    adopt_identity()
    app = client_app(experiment)

    def examples(run_config: dict[str, str], node_config: dict[str, str]) -> int:
        message = Message(RecordDict({"config": ConfigRecord()}), 7, "query")
        context = Context(1, 7, {"partition-id": 0, **node_config}, RecordDict(), dict(run_config))
        return app(message, context).content["metrics"]["num-examples"]

    alone, halves, thirds = (examples({}, {"set": f"clients.count={count}"}) for count in (1, 2, 3))
    assert alone > halves > thirds
    assert examples({"set": "clients.count=1"}, {"set": "clients.count=2"}) == halves
    assert examples({"set": "clients.count=1"}, {}) == alone


def test_the_command_writes_an_app_and_says_what_is_next(experiment, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fedcore.cli import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export-app", str(experiment), "app", "--set", "seed=3"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "wrote app: see app/README.md\n"
    assert load_experiment(tmp_path / "app" / "experiment.yaml").seed == 3
    assert CliRunner().invoke(app, ["export-app", str(experiment), "app"]).exit_code == 2
