"""Graphs of peers: how well they mix, against closed forms and theorems."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import composite, floats, integers, lists

from fedcore.errors import DisconnectedGraph, InvalidSetting, MalformedGraph
from fedcore.graphs import EdgeRates, Graph, laplacian, mixing_matrix, mixing_weights, spectral_gap
from fedcore.registry import build


def unit_rates(name, num_nodes):
    graph = build("graphs", name).graph(num_nodes, 0)
    return EdgeRates(graph, (1.0,) * len(graph.edges))


@composite
def rated_graphs(draw):
    """Random trees with some more edges, and rates between 0.1 and 10."""
    size = draw(integers(2, 9))
    tree = [(draw(integers(0, node - 1)), node) for node in range(1, size)]
    more = draw(lists(integers(0, size * size - 1), max_size=8))
    graph = Graph(size, tuple(tree + [divmod(code, size) for code in more if code // size != code % size]))
    count = len(graph.edges)
    return EdgeRates(graph, tuple(draw(lists(floats(0.1, 10), min_size=count, max_size=count))))


@pytest.mark.parametrize("size", [3, 4, 7, 16])
@pytest.mark.parametrize("name, connectivity, resistance", [
    ("ring", lambda n: 2 - 2 * math.cos(2 * math.pi / n), lambda n: (n - 1) / n),
    ("complete", lambda n: n, lambda n: 2 / n),
    ("star", lambda n: 1, lambda n: 1),
    ("path", lambda n: 2 - 2 * math.cos(math.pi / n), lambda n: 1),
])
def test_chi_of_simple_graphs_is_their_closed_form(name, size, connectivity, resistance):
    rates = unit_rates(name, size)
    assert rates.chi1 == pytest.approx(1 / connectivity(size), rel=1e-10)
    assert rates.chi2 == pytest.approx(resistance(size) / 2, rel=1e-10)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_chi_of_the_hypercube_is_its_closed_form(dimensions):
    size = 2**dimensions
    rates = unit_rates("hypercube", size)
    assert rates.chi1 == pytest.approx(1 / 2, rel=1e-10)
    # All edges are alike, and n - 1 is what their resistances add up to.
    assert rates.chi2 == pytest.approx((size - 1) / (dimensions * size), rel=1e-10)


@given(rated_graphs())
def test_rates_times_resistances_add_up_to_the_nodes_less_one(rates):
    assert np.dot(rates.rates, rates.resistances) == pytest.approx(rates.graph.num_nodes - 1, rel=1e-9)    # Foster


@given(rated_graphs())
def test_chi2_never_exceeds_chi1(rates):
    assert 0 < rates.chi2 <= rates.chi1 * (1 + 1e-9)


@given(rated_graphs(), floats(0.01, 100))
def test_faster_edges_shorten_both_times_in_proportion(rates, factor):
    faster = rates.scaled(factor)
    assert faster.chi1 == pytest.approx(rates.chi1 / factor, rel=1e-9)
    assert faster.chi2 == pytest.approx(rates.chi2 / factor, rel=1e-9)


@given(rated_graphs())
def test_the_laplacian_takes_squared_differences_over_edges(rates):
    values = np.arange(rates.graph.num_nodes) ** 2.0
    expected = sum(rate * (values[i] - values[j]) ** 2
                   for (i, j), rate in zip(rates.graph.edges, rates.rates, strict=True))
    assert values @ laplacian(rates.graph, rates.rates) @ values == pytest.approx(expected, rel=1e-12)


@given(rated_graphs())
def test_every_exchange_counts_for_both_its_ends(rates):
    assert math.fsum(rates.node_rates) == pytest.approx(2 * rates.total)
    for node in range(rates.graph.num_nodes):
        assert math.fsum(rates.of_node(node).values()) == pytest.approx(rates.node_rates[node])
        assert sorted(rates.of_node(node)) == list(rates.graph.neighbours(node))


@given(rated_graphs())
def test_the_mixing_matrix_is_symmetric_doubly_stochastic_and_mixes(rates):
    matrix = mixing_matrix(rates.graph)
    assert np.array_equal(matrix, matrix.T) and (matrix >= 0).all()
    assert np.allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-15)
    assert 0 < spectral_gap(matrix) <= 1


def test_the_mixing_matrix_of_the_complete_graph_averages_at_once():
    matrix = mixing_matrix(build("graphs", "complete").graph(5, 0))
    assert np.allclose(matrix, 1 / 5) and spectral_gap(matrix) == pytest.approx(1)


def test_a_node_mixes_with_its_neighbours_and_itself_in_ascending_order():
    assert mixing_weights(Graph(4, ((0, 1), (1, 2), (2, 3))), 1) == {0: 1 / 3, 1: 1 - 2 / 3, 2: 1 / 3}
    assert list(mixing_weights(Graph(3, ((0, 2), (0, 1))), 2)) == [0, 2]


def test_edges_are_ordered_and_kept_once_however_they_are_given():
    assert Graph(3, ((2, 1), (1, 0), (1, 2))).edges == ((0, 1), (1, 2))


def test_one_node_alone_is_a_graph_without_exchanges():
    rates = EdgeRates(Graph(1, ()), ())
    assert (rates.chi1, rates.chi2, rates.total, rates.node_rates) == (0.0, 0.0, 0.0, (0.0,))
    assert mixing_weights(rates.graph, 0) == {0: 1.0} and spectral_gap(mixing_matrix(rates.graph)) == 1.0


def test_an_edge_that_never_fires_does_not_count_for_chi2():
    ring = Graph(4, ((0, 1), (1, 2), (2, 3), (0, 3)))
    path = Graph(4, ((0, 1), (1, 2), (2, 3)))
    rates = EdgeRates(ring, (1.0, 0.0, 1.0, 1.0))     # edges in order: 0-1, 0-3, 1-2, 2-3
    assert rates.chi2 == pytest.approx(EdgeRates(path, (1.0,) * 3).chi2)
    assert rates.chi1 == pytest.approx(EdgeRates(path, (1.0,) * 3).chi1)


@pytest.mark.parametrize("edges, parts", [
    (((0, 1), (2, 3)), [[0, 1], [2, 3]]),
    ((), [[0], [1], [2], [3]]),
    (((1, 3), (3, 2)), [[0], [1, 2, 3]]),
])
def test_a_graph_in_parts_is_refused_and_the_parts_are_named(edges, parts):
    with pytest.raises(DisconnectedGraph, match="is not connected") as caught:
        Graph(4, edges)
    assert caught.value.parts == parts
    for part in parts:
        assert ", ".join(map(str, part)) in str(caught.value)


def test_rates_of_zero_that_cut_the_graph_are_refused():
    with pytest.raises(DisconnectedGraph):
        EdgeRates(Graph(3, ((0, 1), (1, 2))), (1.0, 0.0))


@pytest.mark.parametrize("size, edges, words", [
    (0, (), "nobody"), (2, ((1, 1), (0, 1)), "Node 1 has an edge to itself"), (2, ((0, 1), (1, 2)), "edge 1 - 2"),
    (2, ((0, -1),), "edge 0 - -1"),
])
def test_edges_that_cannot_be_are_refused(size, edges, words):
    with pytest.raises(MalformedGraph, match=words):
        Graph(size, edges)


@pytest.mark.parametrize("rates", [(1.0,), (1.0, -1.0), (1.0, math.nan), (math.inf, 1.0), (1e-200, 1.0)])
def test_rates_that_cannot_be_are_refused(rates):
    with pytest.raises((InvalidSetting, DisconnectedGraph)):
        EdgeRates(Graph(3, ((0, 1), (1, 2))), rates)
