"""Peers by torch.distributed, in four real processes: the bits of virtual time, and a named end when one dies."""
import os
import subprocess
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.config import load_experiment
from fedcore.simulations.peers import PeerSimulation
from fedcore.vectors import Model
from tests.fedcore.transport.test_peer_wire import free_ports
from tests.fedcore.transport.torch_peers import DIES, NAMES, ROUNDS, TRAIN, strategy
from tests.peer_lab import models, play, same

PATIENCE_S = 300.0


@pytest.mark.slow
def test_processes_end_with_the_bits_of_virtual_peers_and_name_the_one_that_dies(tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "4"}
    started = [subprocess.Popen([sys.executable, "-m", "tests.fedcore.transport.torch_peers", str(tmp_path)],
                                env={**os.environ, **place, "RANK": str(rank)}) for rank in range(4)]
    assert [process.wait(PATIENCE_S) for process in started] == [9 if rank == DIES else 0 for rank in range(4)]
    for name in NAMES:
        virtual = play(strategy(name), tmp_path / name, 4, stop={"rounds": ROUNDS}, **TRAIN)
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(4)]
        assert same(found, models(virtual)) and found[0].dtype == torch.float32
    for rank in {0, 1, 2, 3} - {DIES}:
        # Whoever is told first goes, too: each names the first that it misses, and one of them the dead.
        assert "does not survive the loss of a member" in (tmp_path / f"error-{rank}.txt").read_text()
    assert any((tmp_path / f"error-{rank}.txt").read_text().startswith(f"{DIES} ") for rank in {0, 1, 2, 3} - {DIES})


@pytest.mark.slow
def test_torchrun_starts_the_peers_of_an_experiment(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({
        "task": "logistic", "strategy": {"name": "noloco", "inner_steps": 3}, "clients": {"count": 4},
        "train": {"lr": 0.05}, "stop": {"rounds": 5}, "evaluate": {"where": "none"}}))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port",
                    str(free_ports(1)[0]), "-m", "fedcore", "peer", str(file), "--torch-distributed", "gloo",
                    "--out", str(tmp_path / "real")], check=True, timeout=PATIENCE_S)
    experiment = load_experiment(file)
    virtual = PeerSimulation(experiment, experiment.build_strategy(), tmp_path / "virtual")
    virtual.play()
    virtual.recorder.close()
    found = [Model.load(tmp_path / "real" / f"rank-{rank}" / "model.safetensors", virtual.model.layout).params
             for rank in range(4)]
    assert same(found, models(virtual))


@pytest.mark.parametrize("given, said", [
    (["--torch-distributed", "gloo"], "torchrun starts the peers"),
    (["--torch-distributed", "mpi"], "with gloo or nccl, not with mpi"),
    (["--torch-distributed", "gloo", "--name", "a"], "goes without --roster"),
    ([], "Give --roster FILE and --name NAME"),
])
def test_a_command_that_cannot_work_says_what_is_missing(given, said, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "experiment.yaml"
    file.write_text("task: logistic\nstrategy: noloco\n")
    result = CliRunner().invoke(app, ["peer", str(file), *given])
    assert result.exit_code != 0 and said in " ".join(f"{result.output} {result.exception}".split())
