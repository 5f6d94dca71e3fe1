"""Peers that a Flower server hosts over real gRPC: the bits of a simulation, and what becomes of those who die."""
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from fedcore.clients.build import build_client, build_task, train_settings
from fedcore.clients.modules import initial_model
from fedcore.config import load_experiment
from fedcore.payload import VectorRecord
from fedcore.peers.hosting import HostRules
from fedcore.simulations.run import simulate
from tests.fedcore.transport.kit import Pki, deployed
from tests.fedcore.transport.test_peer_wire import free_ports


def experiment(name="noloco", rounds=7, **settings):
    return load_experiment({
        "task": "logistic", "strategy": {"name": name, "inner_steps": 3}, "clients": {"count": 4},
        "train": {"lr": 0.1, "dtype": "float32", "optimizer": {"name": "sgd", "momentum": 0.9}},
        "stop": {"rounds": rounds}, "seed": 3, "evaluate": {"where": "none"}, **settings})


def node_configs(count, folder=None):
    ports = free_ports(count)
    configs = [{"partition-id": index, "peer-listen": f"127.0.0.1:{port}"} for index, port in enumerate(ports)]
    if folder is not None:
        configs = [{**config, "peer-tls": str(folder / f"node-{index}")} for index, config in enumerate(configs)]
    return configs


def hosted(settings, pki=None, rules=None, evaluate_fn=None, **more):
    """Run an experiment's strategy from a ServerApp's `start`; returns its result."""
    configs = iter(node_configs(settings.clients.count, pki and pki.folder))
    with deployed(lambda: build_client(settings), 0, pki) as (grid, clients):
        from tests.fedcore.transport.kit import Client, wait_for
        for index in range(settings.clients.count):
            clients.append(Client(build_client(settings), grid.address, index, node_config=next(configs),
                                  credentials=None if pki is None else pki.node(index)))
        wait_for(lambda: len(grid.get_node_ids()) == settings.clients.count)
        model = initial_model(build_task(settings), settings.seed, train_settings(settings).torch_dtype)
        return settings.build_strategy().start(
            grid, ArrayRecord(dict(VectorRecord(model))), settings.stop.rounds,
            train_config=ConfigRecord({"seed": settings.seed}), evaluate_fn=evaluate_fn, rules=rules, **more)


def same(result, run):
    return all(torch.equal(torch.from_numpy(result.arrays[name].numpy()), values)
               for name, values in run.model().items())


@pytest.mark.parametrize("name", ["noloco", "diloco", "co2"])
def test_hosted_peers_end_with_the_bits_of_a_simulation(name, tmp_path):
    settings = experiment(name)
    run = simulate(settings, out=tmp_path / "virtual")
    versions = []
    result = hosted(settings, Pki(tmp_path / "pki", nodes=4), HostRules(segment=3),
                    lambda version, arrays: versions.append(version) or MetricRecord({"loss": 1.0}))
    assert same(result, run)
    assert versions == [0, 3, 6, 7]
