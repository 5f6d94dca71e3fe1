"""Gossip SGD, gradient tracking and A2CiD2 on virtual peers: identities and what averaging keeps."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from fedcore.checkpoint import Checkpoints
from fedcore.errors import BadInput, Diverged
from fedcore.graphs import Graph, mixing_weights
from fedcore.registry import build
from fedcore.simulations.run import simulate
from fedcore.strategies.gradient_tracking import TRACKED, combine
from fedcore.strategies.graph_peers import without
from fedcore.topologies import Topology
from tests.peer_lab import models, play

EXACT = {"task": {"name": "quadratic", "dimension": 5, "condition": 10.0, "examples": 4},
         "train": {"lr": 0.5, "batch_size": 4}}


def graph_of(name, size) -> Graph:
    topology: Topology = build("graphs", name)
    return topology.graph(size, 0)


@given(sampled_from(["ring", "star", "path", "exponential"]), integers(2, 9), integers(0, 99))
def test_combining_keeps_the_mean_of_all_peers(name, size, seed):
    graph = graph_of(name, size)
    values = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    offers = {rank: {"x": row} for rank, row in enumerate(values)}
    after = [combine({other: offers[other] for other in (*graph.neighbours(rank), rank)},
                     mixing_weights(graph, rank), rank, "x") for rank in range(size)]
    assert torch.allclose(torch.stack(after).mean(0), values.mean(0), rtol=0, atol=1e-14)


def test_the_weight_of_a_silent_neighbour_goes_to_the_peer_itself():
    ones = torch.ones(2, dtype=torch.float64)
    offers = {0: {"x": ones}, 1: {"x": 3 * ones}}
    assert torch.allclose(combine(offers, {0: 0.5, 1: 0.25, 2: 0.25}, 0, "x"), 1.5 * ones)


@given(sampled_from(["ring", "star", "path", "complete", "exponential"]), integers(3, 10), integers(0, 2**10 - 1))
def test_a_connected_graph_stays_connected_when_nodes_go(name, size, mask):
    gone = {node for node in range(size) if mask >> node & 1}
    left = [node for node in range(size) if node not in gone]
    if left:
        places = {node: place for place, node in enumerate(left)}
        edges = without(graph_of(name, size).edges, gone)
        # Raises where it is not connected.
        found = Graph(len(left), tuple((places[one], places[other]) for one, other in edges))
        assert len(found.edges) >= len(left) - 1


@pytest.mark.parametrize("order", ["adapt_then_combine", "combine_then_adapt"])
def test_on_the_complete_graph_it_is_gradient_descent(order, tmp_path):
    strategy = build("strategies", {"name": "gossip_sgd", "graph": "complete", "order": order})
    run = play(strategy, tmp_path, 4, stop={"rounds": 8}, **EXACT)
    task = run.task
    centres, curvatures = task.test_data().batch(torch.arange(4))
    point = torch.zeros(5, dtype=torch.float64)
    for _ in range(8):
        point = point - 0.5 * (curvatures * (point - centres)).mean(0)
    assert torch.allclose(torch.stack(models(run)).mean(0), point, rtol=0, atol=1e-12)
    if order == "adapt_then_combine":
        for params in models(run):
            assert torch.allclose(params, point, rtol=0, atol=1e-12)


def test_gradient_tracking_keeps_the_mean_gradient_and_reaches_the_optimum_where_gossip_stalls(tmp_path):
    settings = {**EXACT, "stop": {"rounds": 220}}
    gaps = {}
    for name, options in (("gradient_tracking", {"lr": 0.7}), ("gossip_sgd", {})):
        strategy = build("strategies", {"name": name, "graph": "ring", **options})
        run = play(strategy, tmp_path / name, 6, **settings)
        optimum = torch.from_numpy(run.task.optimum)
        gaps[name] = max(float((params - optimum).norm()) for params in models(run))
    assert gaps["gradient_tracking"] < 1e-5 < 1e-2 < gaps["gossip_sgd"]
    saved, _ = Checkpoints(tmp_path / "gradient_tracking" / "checkpoints").load_newest()
    states = [peer["state"] for peer in saved["peers"].values()]
    tracked, gradients = (torch.stack([state[name] for state in states]).mean(0) for name in (TRACKED, "gradient"))
    assert torch.allclose(tracked, gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name, options", [("a2cid2", {}), ("gossip_sgd", {"mode": "asynchronous"})])
def test_asynchronous_peers_agree_though_some_are_slow_and_meetings_fail(name, options, tmp_path):
    run = simulate({
        "task": {"name": "logistic", "dimension": 6, "examples": 40, "l2": 0.1, "heterogeneity": 0.3},
        "strategy": {"name": name, "exchanges_per_gradient": 2.0, "timeout_s": 0.5, **options}, "clients": {"count": 6},
        "train": {"lr": 0.2, "batch_size": 40, "dtype": "float64"}, "stop": {"seconds": 30.0},
        "simulation": {"devices": {"seconds_per_step": {"name": "uniform", "low": 0.05, "high": 0.2}},
                       "network": {"latency_s": 0.01}, "failures": {"request_loss": 0.05}},
    }, out=tmp_path)
    assert run.summary["excess_loss"] < 0.01 and run.summary["consensus_distance"] < 0.3
    assert run.summary["failed_meetings"] > 10 and run.summary["gradients"] > 700
    assert run.summary["stop_reason"] == "seconds"


@pytest.mark.parametrize("name", ["gossip_sgd", "gradient_tracking", "a2cid2"])
def test_a_learning_rate_that_is_too_large_is_noticed(name, tmp_path):
    options = {"lr": 1e4} if name == "gradient_tracking" else {}
    strategy = build("strategies", {"name": name, **options})
    stop = {"seconds": 30, "rounds": None} if strategy.by_time else {"rounds": 120}
    with pytest.raises(Diverged, match="Lower"):
        play(strategy, tmp_path, 3, **{**EXACT, "train": {"lr": 1e4}}, stop=stop)


@pytest.mark.parametrize("name, settings, wrong", [
    ("gossip_sgd", {"mode": "both"}, "mode"), ("gossip_sgd", {"order": "none"}, "order"),
    ("gossip_sgd", {"local_steps": 0}, "local_steps"),
    ("gossip_sgd", {"order": "combine_then_adapt", "local_steps": 2}, "local_steps"),
    ("gossip_sgd", {"mode": "asynchronous", "local_steps": 2}, "local_steps"),
    ("gossip_sgd", {"exchanges_per_gradient": 0.0}, "exchanges_per_gradient"), ("gossip_sgd", {"timeout_s": 0},
                                                                                "timeout_s"),
    ("gradient_tracking", {"lr": 0.0}, "lr"), ("gradient_tracking", {"lr": math.inf}, "lr"),
    ("gradient_tracking", {"timeout_s": -1.0}, "timeout_s"), ("a2cid2", {"exchanges_per_gradient": -1.0},
                                                              "exchanges_per_gradient"),
    ("a2cid2", {"edge_rates": "fast"}, "edge_rates"), ("a2cid2", {"timeout_s": 0.0}, "timeout_s"),
    ("a2cid2", {"graph": {"name": "torus", "rows": 2}}, "graph.rows"),
])
def test_settings_out_of_range_are_refused(name, settings, wrong):
    with pytest.raises(BadInput) as caught:
        build("strategies", {"name": name, **settings})
    assert caught.value.name == f"strategy.{wrong}"


def test_a_graph_that_does_not_suit_the_number_of_peers_is_refused_before_a_run(tmp_path):
    base = {"task": "logistic", "stop": {"rounds": 2}}
    for graph, count, words in (("hypercube", 6, "clients.count=6"), ({"name": "grid", "rows": 4}, 6,
                                                                     "strategy.graph.rows=4")):
        with pytest.raises(BadInput, match=words):
            simulate({**base, "clients": {"count": count}, "strategy": {"name": "gossip_sgd", "graph": graph}},
                     out=tmp_path)


def test_a2cid2_on_the_complete_graph_warns_that_nothing_is_gained(caplog):
    build("strategies", {"name": "a2cid2", "graph": "complete"})
    assert "gains nothing" in caplog.text
