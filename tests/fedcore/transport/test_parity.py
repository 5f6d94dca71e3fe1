"""The same strategy and clients give the same bits in virtual time and over the link."""
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from fedcore.clients.build import build_client, build_task
from fedcore.config import load_experiment
from fedcore.hub import Hub
from fedcore.options import RunOptions, StopRule
from fedcore.rounds import FlowerRounds
from fedcore.session import Session
from fedcore.simulations.grid import VirtualGrid
from fedcore.vectors import Model
from tests.fedcore.transport.kit import Pki, deployed

EXPERIMENT = {"task": "digits", "strategy": "fedavg", "clients": {"count": 3, "partition": "iid"},
              "train": {"lr": 0.1, "batch_size": 16, "local_steps": 4}}


def train(grid, model: Model) -> Model:
    hub = Hub(grid, model, RunOptions(expected=3, stop=StopRule(rounds=3), train_config={"local-steps": 4}))
    strategy = FlowerRounds(FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=3))
    strategy.drive(Session(hub, strategy))
    assert hub.version == 3
    return hub.model


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mutual TLS"])
def test_fedavg_gives_the_same_bits_as_in_virtual_time(secure, tmp_path):
    experiment = load_experiment(EXPERIMENT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model.of(build_task(experiment).model())
    expected = train(VirtualGrid(build_client(experiment), 3, seed=0), model)
    with deployed(lambda: build_client(experiment), 3, Pki(tmp_path) if secure else None) as (grid, _):
        found = train(grid, model)
    assert torch.equal(found.params, expected.params)
    assert not torch.equal(found.params, model.params)
