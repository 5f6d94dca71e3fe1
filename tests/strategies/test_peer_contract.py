"""What every registered strategy without a server keeps.

Same seed, same bits. Stopped, loaded and continued equals never stopped, to the last row. A run folder says what was
exchanged, and how far from each other the peers ended.
"""
import json

import pytest
import torch

from fedcore.checkpoint import Checkpoints
from fedcore.peers.roll import from_checkpoint
from fedcore.peers.strategy import PeerStrategy
from fedcore.registry import build, names, resolve
from fedcore.runs import Run
from tests.peer_lab import models, play, prepare, same

# Settings without which a strategy would take long, or do nothing special.
SETTINGS = {
    "noloco": {"inner_steps": 2}, "diloco": {"inner_steps": 2}, "co2": {"inner_steps": 2},
    "slowmo": {"inner_steps": 2}, "local_sgd": {"inner_steps": 2},
}
COMPRESSION = {"name": "top_k", "fraction": 0.2}
PACKED = " compressed"    # behind the names of those that can: the same with compression
STRATEGIES = [name for name in names("strategies") if issubclass(resolve("strategies", name), PeerStrategy)]
NETWORK = {"latency_s": 0.05, "uplink_mbps": {"name": "uniform", "low": 0.02, "high": 0.2}, "jitter": 0.1}
PEERS = 5


def make(name):
    name = name.removesuffix(PACKED)
    return build("strategies", {"name": name, **SETTINGS.get(name, {})})


BOTH_WAYS = [*STRATEGIES, *(name + PACKED for name in STRATEGIES if not make(name).no_compression)]


def world(name, **settings):
    strategy = make(name)
    if name.endswith(PACKED):
        settings["compression"] = COMPRESSION
    stop = {"seconds": 6, "rounds": None} if strategy.by_time else {"rounds": 12}
    task = {"name": "logistic", "dimension": 6, "examples": 30, "l2": 0.1}
    return strategy, {"task": task, "stop": stop, "simulation": {"network": NETWORK}, **settings}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name, tmp_path):
    runs = []
    for index, seed in enumerate((3, 3, 4)):
        strategy, settings = world(name, seed=seed, evaluate={"where": "server"})
        runs.append(play(strategy, tmp_path / str(index), PEERS, **settings))
    rows = [Run(tmp_path / str(index)).metrics for index in range(3)]
    assert same(models(runs[0]), models(runs[1])) and rows[0] == rows[1]
    assert not same(models(runs[0]), models(runs[2])) and runs[0].host.version > 0


@pytest.mark.parametrize("stop_after", [0, 3])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_saved_loaded_and_continued_equals_never_stopped(name, stop_after, tmp_path):
    settings = world(name, evaluate={"where": "server"})[1]
    whole = play(make(name), tmp_path / "whole", PEERS, **settings)
    parted = prepare(make(name), tmp_path / "parts", PEERS, **settings)
    closed = parted.host.close_step

    def close(step, reports):
        closed(step, reports)
        if step == stop_after:
            parted.host.stop_run("interrupted")

    parted.host.close_step = close
    parted.play()
    parted.recorder.close()
    assert parted.board.stop_reason == "interrupted" and parted.host.version < whole.host.version
    again = prepare(make(name), tmp_path / "parts", PEERS, **settings)
    again.play(resuming=True)
    again.recorder.close()
    assert same(models(again), models(whole)) and again.host.totals == whole.host.totals
    assert Run(tmp_path / "parts").metrics == Run(tmp_path / "whole").metrics
    assert Run(tmp_path / "parts").timeline == Run(tmp_path / "whole").timeline


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_leaves_its_folder(name, tmp_path):
    strategy, settings = world(name, evaluate={"where": "clients"})
    simulation = prepare(strategy, tmp_path, PEERS, **settings)
    run = simulation.run(resuming=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["exchanges"] > 0 and summary["gradients"] > 0 and summary["consensus_distance"] >= 0
    assert summary["bytes_up"] > 0 and summary["stop_reason"] == ("seconds" if strategy.by_time else "rounds")
    mean = torch.cat([values.reshape(-1) for values in run.model().values()])
    assert torch.allclose(mean, torch.stack(models(simulation)).mean(0), rtol=1e-12, atol=1e-14)
    last = run.rows("evaluate")[-1]
    assert last["peer_loss_min"] <= last["peer_loss_mean"] <= last["peer_loss_max"]
    assert {row["node"] for row in run.timeline} == set(range(PEERS))
    for row in run.timeline:
        parts = row["download_s"] + row["queue_s"] + row["compute_s"] + row["upload_s"]
        assert row["start_s"] + parts == pytest.approx(row["end_s"])
    page = (tmp_path / "report.html").read_text()
    assert "Loss of the mean model and of the peers" in page and "Bytes sent by each peer" in page


def test_a_checkpoint_holds_the_list_of_members_once(tmp_path):
    play(make("noloco"), tmp_path, PEERS, **world("noloco")[1])
    saved, _ = Checkpoints(tmp_path / "checkpoints").load_newest()
    lists = [peer["members"] for peer in saved["peers"].values()]
    assert len(lists) == PEERS and all(held is lists[0] for held in lists)
    loaded = [from_checkpoint(held) for held in lists]
    assert loaded[0] == tuple(range(PEERS)) and all(members is loaded[0] for members in loaded)
    assert from_checkpoint([0, 2]) == (0, 2)    # as earlier versions wrote them
