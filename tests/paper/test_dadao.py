"""DADAO's published claims at small scale, and what must be said beside them.

The figures, and the command that prints them, are in docs/algorithms/dadao.md.
"""
import math

import pytest
import torch

from fedcore.edge_rates import edge_shares, required_rates
from tests.paper.dadao_study import (
    TARGET,
    dadao,
    graph_of,
    make_logistic,
    make_problem,
    run_adom_plus,
    run_dadao,
    tuned_gradient_tracking,
)

pytestmark = pytest.mark.paper
MOST_ROUNDS, PEERS = 15_000, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def problem():
    """Uneven least squares of eight peers, condition number about 6,000; the study has sixteen."""
    found = make_problem(decay=1.69, peers=PEERS, seed=0)
    assert 5_900 < found.curvatures[1] / found.curvatures[0] < 6_300
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, steps", [("ring", (2.0, 2.2, 2.4)), ("star", (1.8, 2.0, 2.2))])
def test_badly_conditioned_it_needs_fewer_gradients_and_vectors_than_gradient_tracking_and_adom_plus(
    problem, name, steps
):
    graph = graph_of(name, PEERS)
    ours = dadao(problem, graph)
    # The published rate is a bound on the mean squared error.
    mu, largest = problem.curvatures
    assert ours.reached and ours.time < math.log(1 / TARGET) * 8 * math.sqrt(2 * largest / mu)
    tracking, best = tuned_gradient_tracking(problem, graph, MOST_ROUNDS, steps)
    assert tracking.reached and best == steps[1]    # its neighbours are slower, or diverge
    theirs = run_adom_plus(problem, graph, MOST_ROUNDS)
    assert theirs.reached
    assert 1.5 * ours.gradients < tracking.gradients and ours.gradients < theirs.gradients
    assert 1.5 * ours.vectors < tracking.vectors and 10 * ours.vectors < theirs.vectors


@pytest.mark.slow
def test_better_conditioned_it_loses_to_gradient_tracking():
    graph = graph_of("ring")
    logistic = make_logistic()      # condition number 96
    ours, (tracking, _) = dadao(logistic, graph), tuned_gradient_tracking(logistic, graph, 1_000, (0.07, 0.1, 0.14))
    assert ours.reached and tracking.reached
    assert tracking.gradients < ours.gradients and tracking.vectors < ours.vectors


def test_with_a_tenth_of_the_required_rates_it_diverges(problem):
    rates = required_rates(edge_shares(graph_of("ring", PEERS), "uniform"))
    assert run_dadao(problem, rates.scaled(0.1), until=50.0, check_every=50).error > 1e6
    assert run_dadao(problem, rates, until=50.0, check_every=50).error < 1


def test_with_optimal_edge_rates_two_groups_need_a_quarter_of_the_exchanges():
    problem, graph, costs = make_problem(), graph_of("barbell"), {}
    for kind in ("uniform", "optimal"):
        costs[kind] = run_dadao(problem, required_rates(edge_shares(graph, kind)), until=60.0)
    assert 3.5 * costs["optimal"].vectors < costs["uniform"].vectors
    assert costs["optimal"].error < 1.1 * costs["uniform"].error < 1
