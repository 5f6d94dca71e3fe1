"""How often edges are used: the least total rate, and the shares that make it least."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import floats, integers

from fedcore import edge_rates
from fedcore.edge_rates import (
    best_shares_by_descent,
    best_shares_by_program,
    edge_shares,
    least_total_rate,
    paced_rates,
    required_rates,
)
from fedcore.errors import InvalidSetting
from fedcore.graphs import EdgeRates
from fedcore.registry import build

BELL = build("graphs", "barbell").graph(16, 0)


def uniform(name, size):
    return edge_shares(build("graphs", name).graph(size, 0), "uniform")


@pytest.mark.parametrize("name, total", [
    ("star", 15.0), ("complete", 15 / 2**0.5), ("ring", 39.705), ("path", 76.517), ("grid", 26.252),
])
def test_the_least_total_rate_of_sixteen_peers_is_the_published_one(name, total):
    assert least_total_rate(uniform(name, 16)) == pytest.approx(total, rel=2e-5)


@given(integers(2, 12), floats(1, 50), integers(0, 3))
def test_required_rates_meet_the_condition_exactly_and_more_meets_it_amply(size, multiplier, pick):
    shares = uniform(["star", "ring", "path", "complete"][pick], size)
    rates = required_rates(shares)
    assert rates.chi1 * rates.chi2 == pytest.approx(0.5, rel=1e-9)
    faster = required_rates(shares, multiplier)
    assert faster.chi1 * faster.chi2 == pytest.approx(0.5 / multiplier**2, rel=1e-9)
    assert faster.total == pytest.approx(multiplier * rates.total)


@given(integers(2, 12), floats(0.1, 10))
def test_paced_rates_give_a_node_so_many_exchanges(size, pace):
    assert np.mean(paced_rates(uniform("star", size), pace).node_rates) == pytest.approx(pace)


@pytest.mark.parametrize("graph, total", [(build("graphs", "grid").graph(16, 0), 24.8901), (BELL, 32.9244)])
def test_the_best_shares_are_those_of_the_exact_program(graph, total):
    # The totals are the program's, solved by cvxpy 1.9.3 with Clarabel.
    assert least_total_rate(best_shares_by_descent(graph)) == pytest.approx(total, rel=1e-3)


def test_two_groups_with_one_bridge_need_a_quarter_of_the_exchanges_when_the_bridge_is_used_more():
    plain, best = edge_shares(BELL, "uniform"), edge_shares(BELL, "optimal")
    assert least_total_rate(plain) == pytest.approx(126.148, rel=1e-4)
    assert least_total_rate(best) < 33.1
    bridge = BELL.edges.index((7, 8))
    assert best.rates[bridge] > 20 * np.median(best.rates)


@pytest.mark.parametrize("name", ["ring", "star", "path", "complete"])
def test_uniform_shares_are_best_where_all_edges_are_alike(name):
    plain = uniform(name, 9)
    assert least_total_rate(edge_shares(plain.graph, "optimal")) == pytest.approx(least_total_rate(plain), rel=1e-6)


@settings(max_examples=15)
@given(integers(0, 1000))
def test_optimal_shares_never_need_more_than_uniform_ones_and_no_random_ones_need_less(seed):
    graph = build("graphs", {"name": "random_geometric", "radius": 0.5}).graph(8, seed)
    best = least_total_rate(edge_shares(graph, "optimal"))
    assert best <= least_total_rate(edge_shares(graph, "uniform")) * (1 + 1e-12)
    draws = np.random.default_rng(seed)
    for _ in range(20):
        weights = draws.dirichlet(np.ones(len(graph.edges)))
        assert best <= least_total_rate(EdgeRates(graph, tuple(weights))) * (1 + 2e-3)


def test_the_program_and_the_descent_agree():
    pytest.importorskip("cvxpy")
    for seed in range(3):
        graph = build("graphs", {"name": "random_geometric", "radius": 0.45}).graph(10, seed)
        exact, near = least_total_rate(best_shares_by_program(graph)), least_total_rate(best_shares_by_descent(graph))
        assert near == pytest.approx(exact, rel=1e-3)


def test_without_the_solver_the_descent_serves(monkeypatch):
    monkeypatch.setattr(edge_rates, "find_spec", lambda name: None)
    assert edge_shares(BELL, "optimal") == best_shares_by_descent(BELL)


@pytest.mark.parametrize("size, total", [(1, 0.0), (2, 0.5**0.5)])
def test_graphs_without_a_choice_have_one_answer(size, total):
    graph = build("graphs", "path").graph(size, 0)
    assert edge_shares(graph, "optimal") == edge_shares(graph, "uniform")
    assert least_total_rate(edge_shares(graph, "optimal")) == pytest.approx(total)


def test_unknown_kinds_are_refused():
    with pytest.raises(InvalidSetting, match="uniform, optimal"):
        edge_shares(BELL, "best")
