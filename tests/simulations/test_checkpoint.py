"""A run that is broken off anywhere and resumed ends in the same bits and the same rows as one never stopped."""
import os
import shutil

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fedcore.checkpoint import Checkpoints
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.recorder import Recorder
from fedcore.rounds import FlowerRounds
from fedcore.simulations.availability import Markov
from fedcore.simulations.devices import Devices
from fedcore.simulations.distributions import Exponential
from fedcore.simulations.failures import Failures
from fedcore.simulations.network import Network
from fedcore.strategies.fedasync import FedAsync
from fedcore.strategies.fedbuff import FedBuff
from fedcore.strategies.fedcompass import FedCompass
from fedcore.strategies.fedfix import FedFix
from tests.support import Federation, Toy, files_of

CLIENTS, SEED = 5, 11


def world(rough):
    """Return a grid's settings: uneven devices and thin links; `rough` adds crashes, losses, absence."""
    settings = {
        "devices": Devices(Exponential(0.3), jitter=0.2, seed=SEED),
        "network": Network(0.05, uplink_mbps=0.02, downlink_mbps=0.05, server_uplink_mbps=0.1,
                           server_downlink_mbps=0.04, jitter=0.1, seed=SEED),
    }
    if rough:
        settings["availability"] = Markov(6.0, 2.0, seed=SEED)
        settings["failures"] = Failures(crash_probability=0.1, request_loss=0.08, reply_loss=0.08, seed=SEED)
    return settings




STRATEGIES = {
    "fedbuff": lambda: FedBuff(buffer_size=2),
    "fedbuff, drawing": lambda: FedBuff(buffer_size=2, concurrency=3),
    "fedasync": lambda: FedAsync(),
    "fedasync, corrected": lambda: FedAsync(mixing="delta", weights="corrected", server_lr=0.3),
    "fedcompass": lambda: FedCompass(min_local_steps=2, max_local_steps=8),
    "fedfix": lambda: FedFix(),
    "fedavg": lambda: FlowerRounds(FedAvg(min_available_nodes=1, min_train_nodes=1, min_evaluate_nodes=1,
                                          fraction_train=0.7, fraction_evaluate=0.5)),
}


@pytest.fixture(autouse=True)
def hasty_disk(monkeypatch):
    """Do not wait for the disk: no test here cuts the power, and there are hundreds of checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


def federation(name, folder, rough, updates, **more):
    options = RunOptions(
        seed=SEED, expected=CLIENTS, min_nodes=2, task_timeout_s=8.0, round_deadline_s=5.0, min_replies_share=0.3,
        stop=StopRule(client_updates=updates, seconds=400.0),
        evaluation=Evaluation("clients", 3) if name != "fedavg" else Evaluation("server", fn=lambda model: {
            "loss": float(model.params.square().sum())
        }),
    )
    app = Toy(lazy="draw" not in name and "fedavg" != name, keeps_state=True, num_examples=(3, 5, 8))
    return Federation(STRATEGIES[name](), CLIENTS, options, app, recorder=Recorder(folder), grid=world(rough), **more)


def params_and_files(run, folder):
    return run.hub.model.params, files_of(folder)


@pytest.mark.parametrize("rough", [False, True], ids=["smooth", "rough"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resuming_at_any_event_ends_in_the_same_bits(tmp_path, name, rough):
    updates = 16
    whole = tmp_path / "whole"
    everything = Checkpoints(whole / "checkpoints", keep=10**6)
    run = federation(name, whole, rough, updates, checkpoints=everything).run()
    expected, rows = params_and_files(run, whole)
    assert torch.isfinite(expected).all() and run.hub.totals["client_updates"] >= updates
    saved = sorted((whole / "checkpoints").iterdir())
    assert len(saved) > 4
    for path in saved[:: 1 if len(saved) < 40 else 2]:
        folder = tmp_path / path.stem
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(path, folder / "checkpoints")
        for file in whole.glob("*.jsonl"):
            shutil.copy(file, folder)
        checkpoints = Checkpoints(folder / "checkpoints")
        again = federation(name, folder, rough, updates, checkpoints=checkpoints, save_every_s=1e9).run(resume=True)
        found, found_rows = params_and_files(again, folder)
        assert torch.equal(found, expected), path.name
        assert found_rows == rows, path.name
        shutil.rmtree(folder)


def test_a_run_that_is_interrupted_again_and_again_ends_in_the_same_bits(tmp_path):
    run = federation("fedcompass", tmp_path / "whole", True, 20).run()
    expected, rows = params_and_files(run, tmp_path / "whole")
    checkpoints = Checkpoints(tmp_path / "broken" / "checkpoints")
    for attempt in range(200):
        events = iter(range(4))
        again = federation("fedcompass", tmp_path / "broken", True, 20, checkpoints=checkpoints,
                           interrupted=lambda events=events: next(events, None) is None)
        again.run(resume=attempt > 0)
        if again.hub.stop_reason != "interrupted":
            break
    assert attempt > 3
    assert torch.equal(again.hub.model.params, expected)
    assert files_of(tmp_path / "broken") == rows


@pytest.mark.parametrize("name", ["fedbuff", "fedcompass", "fedavg"])
def test_a_finished_run_has_nothing_left_to_do(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    run = federation(name, tmp_path, True, 10, checkpoints=checkpoints).run()
    before = files_of(tmp_path)
    again = federation(name, tmp_path, True, 10, checkpoints=checkpoints).run(resume=True)
    assert torch.equal(again.hub.model.params, run.hub.model.params)
    assert files_of(tmp_path) == before and again.hub.stop_reason == run.hub.stop_reason


@pytest.mark.parametrize("name", ["fedbuff", "fedavg"])
def test_a_resumed_run_with_a_higher_limit_is_the_longer_run(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / "short" / "checkpoints")
    federation(name, tmp_path / "short", True, 8, checkpoints=checkpoints).run()
    resumed = federation(name, tmp_path / "short", True, 16, checkpoints=checkpoints).run(resume=True)
    whole = federation(name, tmp_path / "whole", True, 16).run()
    assert torch.equal(resumed.hub.model.params, whole.hub.model.params)
    assert files_of(tmp_path / "short") == files_of(tmp_path / "whole")


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(tmp_path):
    for folder in ("a", "b"):
        federation("fedbuff", tmp_path / folder, True, 12).run()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
