"""DADAO's equations: what they must keep whatever happens, in which order and when."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from fedcore.edge_rates import edge_shares, required_rates
from fedcore.errors import InvalidSetting
from fedcore.graphs import EdgeRates, Graph
from fedcore.registry import build
from fedcore.strategies.dadao_equations import (
    Y_COPY,
    Z_COPY,
    Constants,
    PeerState,
    X,
    Y,
    Z,
    advance,
    check_rates,
    drift_matrix,
    exchange_step,
    gradient_step,
    offer,
)
from tests.paper.dadao_study import graph_of, make_problem, run_dadao

conditions = floats(0, 4).map(lambda exponent: 10**exponent)


def constants_for(condition, chi1=3.0):
    return Constants.of(0.7, 0.7 * condition, chi1)


def some_state(seed, at=0.0, dimension=5):
    generator = torch.Generator().manual_seed(seed)
    return PeerState(torch.randn(6, dimension, dtype=torch.float64, generator=generator), at)


def close(first, second, tolerance=1e-12):
    return float((first - second).abs().max()) <= tolerance * max(1.0, float(second.abs().max()))


@given(conditions, floats(0, 50))
def test_the_closed_form_is_the_exponential_of_the_generator(condition, elapsed):
    constants = constants_for(condition)
    exact = torch.linalg.matrix_exp(elapsed * constants.generator)
    assert close(drift_matrix(constants, elapsed), exact, 1e-11)


@given(conditions, floats(0, 30), floats(0, 30), integers(0, 99))
def test_two_drifts_equal_one_of_the_same_length(condition, first, second, seed):
    constants, state = constants_for(condition), some_state(seed)
    twice = advance(advance(state, constants, first), constants, first + second)
    assert twice.at == first + second
    assert close(twice.rows, advance(state, constants, first + second).rows, 1e-12 * max(1.0, constants.theta))


@given(conditions, integers(0, 99))
def test_time_does_not_run_backwards(condition, seed):
    constants, state = constants_for(condition), some_state(seed, at=2.0)
    assert advance(state, constants, 2.0) is state and advance(state, constants, 1.0) is state


@given(conditions, floats(0.01, 20), integers(2, 6), integers(0, 99))
def test_the_optimum_is_a_fixed_point_of_all_three_moves(condition, elapsed, peers, seed):
    constants = constants_for(condition)
    generator = torch.Generator().manual_seed(seed)
    optimum = torch.randn(4, dtype=torch.float64, generator=generator)
    gradients = torch.randn(peers, 4, dtype=torch.float64, generator=generator)
    gradients -= gradients.mean(0)      # at the optimum they add up to zero
    states = []
    for gradient in gradients:
        rows = torch.stack([optimum, optimum, gradient - constants.nu * optimum, gradient - constants.nu * optimum,
                            -gradient, -gradient])
        states.append(PeerState(rows))
    for state, gradient in zip(states, gradients, strict=True):
        assert close(advance(state, constants, elapsed).rows, state.rows)
        assert close(gradient_step(state, constants, gradient).rows, state.rows)
    for state in states[1:]:
        moved = exchange_step(states[0], constants, offer(states[0]), offer(state), 0.0)
        assert close(moved.rows, states[0].rows, 1e-12 * max(1.0, constants.beta_copy))


@given(conditions, integers(0, 99))
def test_both_ends_of_an_exchange_gain_the_same_with_opposite_signs_bit_for_bit(condition, seed):
    constants, first, second = constants_for(condition), some_state(seed), some_state(seed + 1)
    zero = PeerState(torch.zeros(6, 5, dtype=torch.float64))
    mine, theirs = offer(first), offer(second)
    gained = exchange_step(zero, constants, mine, theirs, 0.0).rows
    given_up = exchange_step(zero, constants, theirs, mine, 0.0).rows
    assert torch.equal(gained, -given_up)
    assert gained[Z].abs().max() > 0 and torch.equal(gained[:Z], torch.zeros_like(gained[:Z]))


@given(conditions, integers(0, 99))
def test_an_exchange_of_equal_offers_changes_nothing(condition, seed):
    constants, state = constants_for(condition), some_state(seed)
    assert torch.equal(exchange_step(state, constants, offer(state), offer(state), 0.0).rows, state.rows)


@given(conditions, floats(0, 5), floats(0, 5), integers(0, 99))
def test_a_late_exchange_ends_where_a_timely_one_would(condition, when, late, seed):
    constants, state, partner = constants_for(condition), some_state(seed), some_state(seed + 1)
    mine, theirs = offer(state), offer(partner)
    timely = advance(exchange_step(state, constants, mine, theirs, when), constants, when + late)
    belated = exchange_step(advance(state, constants, when + late), constants, mine, theirs, when)
    assert belated.at == timely.at
    assert close(belated.rows, timely.rows, 1e-12 * max(1.0, constants.beta_copy * constants.theta))


def test_a_gradient_step_is_the_published_one_and_leaves_its_input_alone():
    constants, state = Constants.of(2.0, 8.0, 1.0), some_state(0)
    before, gradient = state.rows.clone(), torch.arange(5, dtype=torch.float64)
    after = gradient_step(state, constants, gradient).rows
    step = gradient - 1.0 * before[X] - before[Y_COPY]                      # nu = mu/2 = 1, r = sqrt(1/8)
    ratio = math.sqrt(1 / 8)
    assert close(after[0], before[0] - step / 32) and close(after[1], before[1] - step / (4 * math.sqrt(8)))
    assert torch.equal(after[Y], before[Y]) and close(after[Y_COPY], before[Y_COPY] + (ratio / 4 + 1) * step)
    assert torch.equal(after[Z:], before[Z:]) and torch.equal(state.rows, before)


def test_an_exchange_is_the_published_one():
    constants, state, other = Constants.of(2.0, 8.0, 1.5), some_state(0), some_state(1)
    after = exchange_step(state, constants, offer(state), offer(other), 0.0).rows
    gap = state.rows[Y] + state.rows[Z] - other.rows[Y] - other.rows[Z]
    assert close(after[Z], state.rows[Z] - gap / 2)
    assert close(after[Z_COPY], state.rows[Z_COPY] - 2 * 1.5 / math.sqrt(1 / 8) * gap)


@pytest.mark.parametrize("name", ["ring", "star", "random_geometric"])
def test_the_consensus_variables_add_up_to_zero_over_ten_thousand_events_of_which_a_fifth_fails(name):
    looked = []

    def watch(now, states):
        rows = torch.stack([state.rows for state in states])
        for row in (Z, Z_COPY):
            assert rows[:, row].sum(0).abs().max() <= 1e-12 * rows[:, row].abs().max()
        looked.append(now)

    rates = required_rates(edge_shares(graph_of(name, 8), "uniform"), 1.25)
    problem = make_problem(decay=0.5, peers=8)
    until = 10_000 / (8 + rates.total)
    cost = run_dadao(problem, rates, until, target=0.0, failing=0.2, watch=watch)
    assert cost.gradients + cost.vectors // 2 > 9_000 and len(looked) > 15 and cost.error < 0.01


def test_one_peer_alone_finds_its_own_minimum():
    problem = make_problem(decay=0.5, peers=1)
    cost = run_dadao(problem, EdgeRates(Graph(1, ()), ()), until=5_000.0, target=1e-20)
    assert cost.error <= 1e-20 and cost.vectors == 0


def test_it_converges_linearly_down_to_rounding():
    problem, errors = make_problem(decay=0.3, peers=4), []
    rates = required_rates(edge_shares(graph_of("ring", 4), "uniform"))
    cost = run_dadao(problem, rates, 3_000.0, target=1e-26, check_every=100,
                     watch=lambda now, states: errors.append(
                         (now, problem.error(torch.stack([state.params for state in states])))))
    assert cost.error <= 1e-26
    mu, largest = problem.curvatures
    # The published rate is a bound: what is measured is faster, and keeps its pace to the end.
    published = math.sqrt(mu / largest) / (8 * math.sqrt(2))
    for start, end in ((errors[0], errors[len(errors) // 2]), (errors[len(errors) // 2], errors[-1])):
        assert math.log(start[1] / end[1]) / (end[0] - start[0]) > published


@pytest.mark.parametrize("mu, largest, chi1, name", [
    (0.0, 1.0, 1.0, "strong_convexity"), (-1.0, 1.0, 1.0, "strong_convexity"), (math.nan, 1.0, 1.0, "strong_convexity"),
    (math.inf, math.inf, 1.0, "strong_convexity"), (1.0, 0.5, 1.0, "smoothness"), (1.0, math.nan, 1.0, "smoothness"),
    (1.0, math.inf, 1.0, "smoothness"), (1.0, 2.0, -1.0, "chi1"), (1.0, 2.0, math.inf, "chi1"),
])
def test_constants_out_of_range_are_refused(mu, largest, chi1, name):
    with pytest.raises(InvalidSetting) as caught:
        Constants.of(mu, largest, chi1)
    assert caught.value.name == name


def test_rates_below_the_condition_are_refused_and_the_least_ones_are_not():
    least = required_rates(edge_shares(build("graphs", "ring").graph(16, 0), "uniform"))
    check_rates(least)
    check_rates(EdgeRates(Graph(1, ()), ()))
    with pytest.raises(InvalidSetting, match="at most 0.5"):
        check_rates(least.scaled(0.999))
