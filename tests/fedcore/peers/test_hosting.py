"""Peers that a Flower server hosts over real gRPC: the bits of a simulation, and what becomes of those who die."""
import json

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fedcore.clients.build import build_client, build_task, train_settings
from fedcore.clients.modules import initial_model
from fedcore.clients.peer_client import Door, read_state, step_of, write_state
from fedcore.config import load_experiment
from fedcore.deploy_commands import ClientSettings
from fedcore.errors import AllNodesFailed, BadInput, InvalidSetting, MalformedReply, MalformedRequest
from fedcore.payload import VectorRecord
from fedcore.peers.counters import Counters
from fedcore.peers.hosting import HostedPeers, HostRules
from fedcore.peers.segments import ABOUT, Introduction, Segment, SegmentReport
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.run import simulate
from fedcore.strategies.gossip_sgd import GossipSgd
from fedcore.strategies.noloco import NoLoCo
from tests.fedcore.transport.kit import Client, Pki, deployed, wait_for
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


def hosted(settings, pki=None, rules=None, evaluate_fn=None, configs=None, at_nodes=None):
    """Run an experiment's strategy from a ServerApp's `start`; returns its result."""
    count = settings.clients.count
    configs = configs or node_configs(count, pki and pki.folder)
    with deployed(lambda: build_client(settings), 0, pki) as (grid, clients):
        clients += [Client(build_client(at_nodes or settings), grid.address, index, node_config=configs[index],
                           credentials=None if pki is None else pki.node(index)) for index in range(count)]
        wait_for(lambda: len(grid.get_node_ids()) == count, "all clients connecting")
        model = initial_model(build_task(settings), settings.seed, train_settings(settings).torch_dtype)
        return settings.build_strategy().start(
            grid, ArrayRecord(dict(VectorRecord(model))), settings.stop.rounds,
            train_config=ConfigRecord({"seed": settings.seed}), evaluate_fn=evaluate_fn, rules=rules)


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


def test_strategies_by_time_go_on_from_segment_to_segment():
    settings = experiment(strategy={"name": "gossip_sgd", "mode": "asynchronous", "graph": "ring"}, rounds=15)
    versions = []
    result = hosted(settings, None, HostRules(segment=0.03),
                    lambda version, arrays: versions.append(version) or MetricRecord({"loss": 1.0}))
    assert len(versions) > 2 and versions == list(range(len(versions)))
    start = initial_model(build_task(settings), settings.seed).params
    assert not torch.equal(torch.cat([torch.from_numpy(array.numpy()).reshape(-1) for array in result.arrays.values()]),
                           start)


# ---- who cannot take part --------------------------------------------------------------------------------------------


def test_a_node_without_an_address_is_named_before_anybody_trains():
    configs = node_configs(4)
    del configs[2]["peer-listen"]
    with pytest.raises(BadInput, match="Node 2 cannot take part: This node gives no address .* --peer-listen"):
        hosted(experiment(), configs=configs)


def test_two_nodes_with_one_address_are_told_so():
    configs = node_configs(4)
    configs[3]["peer-listen"] = configs[0]["peer-listen"]
    with pytest.raises(BadInput, match="Another peer has the same address"):
        hosted(experiment(), configs=configs)


def test_nodes_with_other_settings_than_the_server_train_nothing():
    with pytest.raises(AllNodesFailed, match="server's strategy has inner_steps=3, and this node's inner_steps=4"):
        hosted(experiment(), at_nodes=experiment(strategy={"name": "noloco", "inner_steps": 4}))


def test_clients_without_a_strategy_of_peers_are_told_what_they_lack():
    with pytest.raises(BadInput, match="does not answer as a peer"):
        hosted(experiment(), at_nodes=experiment(strategy="fedavg"))


def test_simulated_clients_cannot_talk_to_each_other():
    settings = experiment()
    model = initial_model(build_task(settings), settings.seed)
    with pytest.raises(BadInput, match="fedcore simulate FILE"):
        NoLoCo().start(VirtualGrid(build_client(settings), 4), ArrayRecord(dict(VectorRecord(model))))


@pytest.mark.parametrize("config, words", [
    ({}, "gives no address"), ({"peer-listen": "nowhere"}, "HOST:PORT"), ({"peer-listen": "127.0.0.1:0"}, "1 to 65535"),
    ({"peer-listen": "0.0.0.0:9444"}, "does not say where"), ({"peer-listen": "10.0.0.1:9444"}, "certificates"),
    ({"peer-listen": "0.0.0.0:9444", "peer-advertise": "127.0.0.1:9444"}, "certificates"),
    *(({"peer-listen": "127.0.0.1:9444", "peer-side-port": port}, f"peer-side-port='{port}'")
      for port in ("9444", "x", "-1", "65536", "1.5")),
])
def test_a_door_that_nobody_could_find_or_everybody_could_open_is_refused(config, words):
    with pytest.raises(BadInput, match=words):
        Door.of(config)


def test_segments_have_whole_steps():
    with pytest.raises(InvalidSetting, match="whole number"):
        HostedPeers(NoLoCo(), HostRules(segment=2.5))
    HostedPeers(GossipSgd(mode="asynchronous"), HostRules(segment=2.5))
    with pytest.raises(BadInput, match="peers.segment"):
        experiment(peers={"segment": 2.5})


# ---- what they say to each other -------------------------------------------------------------------------------------


def segment(**changes):
    fields = {
        "run": "r", "number": 2, "epoch": 1, "seed": 3, "first": 4, "steps": 2, "seconds": None, "began_s": 0.5,
        "final": False, "measure": True, "lost_after_s": 9.0, "members": (0, 2), "names": ("a", "b"),
        "addresses": ("h:1", "h:2"), "fingerprints": ("", ""), "donors": (2,), "strategy": {"class": "NoLoCo"}}
    return Segment(**{**fields, **changes})


def test_a_segment_and_an_introduction_survive_their_messages():
    assert Segment.of(segment().content(2)) == (segment(), 2)
    about = Introduction("a", "h:1", "ff", 7)
    assert Introduction.of(about.content()) == about


@pytest.mark.parametrize("content", [
    RecordDict(), segment().content(1), segment(steps=-1).content(0), segment(names=("a",)).content(0),
    RecordDict({"config": ConfigRecord({"segment": "{}", "rank": 0})}),
])
def test_what_describes_no_segment_is_refused(content):
    with pytest.raises(MalformedRequest):
        Segment.of(content)


@pytest.mark.parametrize("change", [
    {"step": -2}, {"at": float("inf")}, {"counters": {}}, {"lost": ["x"]}, {"rows": [["evil", {}]]}, {"at": None},
])
def test_a_report_with_something_odd_in_it_is_refused(change):
    model = initial_model(build_task(experiment()), 0)
    content = SegmentReport(3, 1.0, Counters().as_dict(), 10, 0.5, mean=model, distance=0.1).content()
    found = SegmentReport.of(content, model.layout)
    assert (found.step, found.loss, found.distance) == (3, 0.5, 0.1) and torch.equal(found.mean.params, model.params)
    content["reply"][ABOUT] = json.dumps({**json.loads(content["reply"][ABOUT]), **change})
    with pytest.raises(MalformedReply):
        SegmentReport.of(content, model.layout)


def test_a_mean_that_is_not_finite_is_refused():
    model = initial_model(build_task(experiment()), 0)
    broken = model.replace(model.params * float("nan"))
    with pytest.raises(MalformedReply, match="NaN"):
        SegmentReport.of(SegmentReport(3, 1.0, Counters().as_dict(), 10, mean=broken).content(), model.layout)


def test_what_a_node_keeps_is_its_own_and_of_one_run():
    context = Context(0, 0, {}, RecordDict(), {})
    kept = {"step": 4, "params": torch.arange(3.0), "labour": {"optimizer": {0: torch.ones(2)}}, "pending": []}
    write_state(context, "night", kept)
    found = read_state(context, "night")
    assert torch.equal(found["params"], kept["params"]) and torch.equal(found["labour"]["optimizer"][0], torch.ones(2))
    found["params"] += 1
    assert torch.equal(read_state(context, "night")["params"], torch.arange(3.0))
    assert read_state(context, "another") is None and (step_of(context, "night"), step_of(context, "x")) == (4, -1)


# ---- what a client is started with -----------------------------------------------------------------------------------


def client_options(**changes):
    fields = {"server": "127.0.0.1:1", "tls": None, "insecure": True, "name": "a", "node_config": ("partition-id=0",),
              "state": None, "allow": None, "max_local_steps": None, "max_seconds": None, "max_megabytes": None}
    return ClientSettings(**{**fields, **changes})


def test_a_client_says_at_once_whether_others_can_reach_it():
    options = client_options(peer_listen="127.0.0.1:9444")
    assert options.as_peer(experiment()) == {"peer-listen": "127.0.0.1:9444"}
    found = client_options(peer_listen="127.0.0.1:9444", peer_side_port=9445).as_peer(experiment())
    assert Door.of(found).side_port == 9445 and Door.of({"peer-listen": "127.0.0.1:9444"}).side_port == 0
    assert client_options().as_peer(experiment(strategy="fedavg")) == {}
    with pytest.raises(BadInput, match="gives no address"):
        client_options().as_peer(experiment())
    with pytest.raises(BadInput, match="with fedavg clients talk to the server alone"):
        options.as_peer(experiment(strategy="fedavg"))
