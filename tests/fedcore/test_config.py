"""Experiment files that are right: what they mean."""
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config import Experiment, load_experiment
from fedcore.errors import BadExperiment

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "experiment.yaml"


def load(**settings: object) -> Experiment:
    return load_experiment({"strategy": "fedavg", **settings})


def test_an_experiment_needs_no_more_than_a_strategy():
    experiment = load()
    assert (experiment.task_name, experiment.clients.count, experiment.train.local_steps) == ("digits", 10, 10)
    assert experiment.stop.rounds == 30


def test_the_quickstart_file_says_what_it_says():
    experiment = load_experiment(QUICKSTART)
    assert experiment.strategy == {"name": "fedcompass", "min_local_steps": 20, "max_local_steps": 100}
    assert experiment.stop.target == {"accuracy": 0.93}
    assert experiment.stop.rounds is None
    assert experiment.simulation.network.uplink_mbps == 20


@pytest.mark.parametrize("settings", [
    {},
    {"task": "quadratic", "seed": 7, "evaluate": {"where": "clients", "every": 2.5, "unit": "seconds"}},
    {"strategy": {"name": "dp_server_fixed_clipping", "strategy": {"name": "fedavgm", "server_momentum": 0.5},
                  "noise_multiplier": 0.1, "clipping_norm": 1, "num_sampled_clients": 10}},
    {"train": {"local_epochs": 2, "optimizer": {"name": "adam", "betas": [0.9, 0.99]},
               "schedule": {"name": "cosine", "total_steps": 100, "unit": "versions"}}},
    {"simulation": {"availability": {"name": "markov", "mean_on_s": 100, "mean_off_s": 10},
                    "devices": {"seconds_per_step": "exponential"} | {"seconds_per_step": {"name": "trace", "values": [
                        0.1] * 10}}, "network": {"latency_s": {"name": "uniform", "low": 0, "high": 1}}}},
])
def test_resolved_settings_load_to_the_same_settings(settings):
    experiment = load_experiment({"strategy": "fedavg"} | settings)
    resolved = experiment.resolved()
    assert load_experiment(yaml.safe_load(yaml.safe_dump(resolved))).resolved() == resolved


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: fedavg\ntrain: {lr: 1e-3, optimizer: {name: sgd, momentum: 9e-1}}\n")
    experiment = load_experiment(file)
    assert experiment.train.lr == 1e-3
    assert experiment.train.optimizer == {"name": "sgd", "momentum": 0.9}


def test_numbers_in_quotes_are_numbers():
    experiment = load(train={"lr": "1e-3"}, simulation={"network": {"latency_s": "0.5"}})
    assert (experiment.train.lr, experiment.simulation.network.latency_s) == (1e-3, 0.5)


def test_a_heading_with_nothing_under_it_is_an_empty_section(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: fedavg\ntrain:\nsimulation:\n  network:\n")
    assert load_experiment(file).resolved() == load().resolved()


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_bytes(b"\xef\xbb\xbfstrategy: fedavg\r\nseed: 3\r\n")
    assert load_experiment(file).seed == 3


def test_relative_paths_start_at_the_file_and_then_at_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    trace = "partition,seconds\n" + "\n".join(f"{node},0.1" for node in range(10))
    (tmp_path / "here" / "speeds.csv").write_text(trace)
    (tmp_path / "there" / "links.csv").write_text(trace)
    file = tmp_path / "here" / "experiment.yaml"
    file.write_text("strategy: fedavg\nsimulation: {devices: {seconds_per_step: {name: trace, path: speeds.csv}}, "
                    "network: {latency_s: {name: trace, path: links.csv}}}")
    monkeypatch.chdir(tmp_path / "there")
    simulation = load_experiment(file).simulation
    assert simulation.devices.seconds_per_step["path"] == str(tmp_path / "here" / "speeds.csv")
    assert simulation.network.latency_s["path"] == str(tmp_path / "there" / "links.csv")


def test_a_class_beside_the_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "halves_beside_the_file.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n\n\nclass Halves(FedAvg):\n"
        "    def __init__(self, share: float = 0.5):\n        super().__init__(fraction_train=share)\n"
    )
    file = tmp_path / "experiment.yaml"
    file.write_text("strategy: {name: halves_beside_the_file:Halves, share: 0.25}\n")
    assert load_experiment(file).build_strategy().fraction_train == 0.25


def test_a_setting_below_a_plug_ins_name_keeps_the_name():
    experiment = load_experiment({"strategy": "fedbuff"}, ["strategy.server_lr=0.5"])
    assert experiment.strategy == {"name": "fedbuff", "server_lr": 0.5}


def test_an_override_replaces_what_the_file_says_and_the_last_one_wins():
    experiment = load_experiment(QUICKSTART, ["strategy=fedavg", "seed=1", "seed=2", "train.lr=1e-2",
                                              "stop.target={accuracy: 0.5}"])
    assert (experiment.strategy, experiment.seed, experiment.train.lr) == ("fedavg", 2, 0.01)
    assert experiment.stop.target == {"accuracy": 0.5}


def test_an_override_leaves_the_given_mapping_alone():
    given = {"strategy": "fedavg", "train": {"lr": 0.1}}
    load_experiment(given, ["train.lr=0.2"])
    assert given == {"strategy": "fedavg", "train": {"lr": 0.1}}


def test_an_experiment_that_was_loaded_can_be_overridden():
    assert load_experiment(load(seed=1), ["seed=5"]).seed == 5


def test_settings_without_effect_are_said():
    experiment = load_experiment({"strategy": "fedcompass", "train": {"local_steps": 5}, "round": {"deadline_s": 9}})
    assert [warning.split()[0] for warning in experiment.warnings] == ["train.local_steps", "round.deadline_s"]
    assert load_experiment(QUICKSTART, ["strategy=fedavg"]).warnings == ()


@given(key=st.text(min_size=1), value=st.none() | st.booleans() | st.integers() | st.floats() | st.text())
def test_no_top_level_setting_crashes_the_reader(key, value):
    try:
        experiment = load_experiment({"strategy": "fedavg", key: value})
    except BadExperiment as error:
        assert error.problems
    else:
        assert key in Experiment.model_fields
        assert load_experiment(experiment.resolved()).resolved() == experiment.resolved()


@given(
    section=st.sampled_from(["clients", "train", "stop", "evaluate", "round", "checkpoint"]), data=st.data(),
    value=st.booleans() | st.integers(-3, 10**30) | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
)
def test_no_value_crashes_the_reader(section, data, value):
    names = list(Experiment.model_fields[section].annotation.model_fields)
    name = data.draw(st.sampled_from([name for name in names if name not in ("count", "device")]))
    try:
        experiment = load_experiment({"strategy": "fedavg", section: {name: value}})
    except BadExperiment as error:
        assert all(section in str(problem) for problem in error.problems)
    else:
        assert load_experiment(experiment.resolved()).resolved() == experiment.resolved()
