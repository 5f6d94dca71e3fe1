"""A2CiD2's equations: what the drift and the exchanges keep, and how much faster they mix."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from fedcore.edge_rates import edge_shares, paced_rates
from fedcore.graphs import EdgeRates, Graph
from fedcore.registry import build
from fedcore.strategies.acid_equations import PLAIN, Mixing, PeerState, advance, exchange_step, gradient_step

mixings = floats(0.01, 2).map(lambda eta: Mixing(eta, 0.5, 2.5))


def some_state(seed, at=0.0, copy=True):
    rows = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return PeerState(rows[0], rows[1] if copy else None, at)


def close(first, second):
    return torch.allclose(first, second, rtol=0, atol=1e-13)


@given(mixings, floats(0, 10), floats(0, 10), integers(0, 99))
def test_drifting_twice_equals_once_and_keeps_the_sum_of_both_copies(mixing, first, second, seed):
    state = some_state(seed)
    once, twice = advance(state, mixing, first + second), advance(advance(state, mixing, first), mixing, first + second)
    assert once.at == twice.at and close(once.params, twice.params) and close(once.copy, twice.copy)
    assert close(once.params + once.copy, state.params + state.copy)


@given(mixings, integers(0, 99))
def test_an_exchange_keeps_both_sums_over_the_pair_and_does_not_care_who_is_first(mixing, seed):
    one, other = some_state(seed), some_state(seed + 1)
    after = exchange_step(one, mixing, one.params, other.params, 0.0)
    beyond = exchange_step(other, mixing, other.params, one.params, 0.0)
    assert close(after.params + beyond.params, one.params + other.params)
    assert close(after.copy + beyond.copy, one.copy + other.copy)
    same = exchange_step(one, mixing, one.params, one.params, 0.0)
    assert torch.equal(same.params, one.params) and torch.equal(same.copy, one.copy)


@given(mixings, floats(0, 5), floats(0, 5), integers(0, 99))
def test_a_late_exchange_ends_where_a_timely_one_would(mixing, when, late, seed):
    state, partner = some_state(seed), some_state(seed + 1)
    timely = advance(exchange_step(state, mixing, state.params, partner.params, when), mixing, when + late)
    belated = exchange_step(advance(state, mixing, when + late), mixing, state.params, partner.params, when)
    assert close(timely.params, belated.params) and close(timely.copy, belated.copy)


@given(floats(0, 5), integers(0, 99))
def test_without_drift_it_is_pairwise_averaging_bit_for_bit_and_needs_no_copy(now, seed):
    with_copy, without = some_state(seed), some_state(seed, copy=False)
    with_copy = PeerState(with_copy.params, with_copy.params)
    partner, step = some_state(seed + 1), torch.ones(5, dtype=torch.float64)
    for state in (with_copy, without):
        moved = gradient_step(advance(state, PLAIN, now), step)
        after = exchange_step(moved, PLAIN, moved.params, partner.params, now)
        assert torch.equal(after.params, moved.params - 0.5 * (moved.params - partner.params))
        assert after.copy is None or torch.equal(after.copy, after.params)


def test_an_optimizer_step_moves_both_copies_alike():
    state, step = some_state(0), torch.arange(5, dtype=torch.float64)
    after = gradient_step(state, step)
    assert torch.equal(after.params, state.params - step) and torch.equal(after.copy, state.copy - step)


def test_the_constants_follow_from_the_graph():
    rates = EdgeRates(Graph(3, ((0, 1), (1, 2))), (1.0, 1.0))       # chi1 = 1, chi2 = 1/2
    mixing = Mixing.of(rates)
    assert (mixing.eta, mixing.alpha, mixing.alpha_copy) == pytest.approx((2**-0.5, 0.5, 2**-0.5))
    assert Mixing.of(EdgeRates(Graph(1, ()), ())) == PLAIN


def test_on_a_ring_of_32_it_reaches_a_consensus_a_thousand_times_closer():
    graph = build("graphs", "ring").graph(32, 0)
    rates = paced_rates(edge_shares(graph, "uniform"), 1.0)
    remaining = {}
    for name, mixing in (("accelerated", Mixing.of(rates)), ("plain", PLAIN)):
        draws = np.random.default_rng(0)
        start = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        states, now = [PeerState(row, row) for row in start], 0.0
        while now < 150:
            now += draws.exponential(1 / rates.total)
            one, other = graph.edges[draws.integers(len(graph.edges))]
            first, second = (advance(states[node], mixing, now) for node in (one, other))
            states[one] = exchange_step(first, mixing, first.params, second.params, now)
            states[other] = exchange_step(second, mixing, second.params, first.params, now)
        states = [advance(state, mixing, now) for state in states]
        params, copies = (torch.stack([getattr(state, part) for state in states]) for part in ("params", "copy"))
        remaining[name] = float((params - params.mean(0)).square().sum() / (start - start.mean(0)).square().sum())
        for rows in (params, copies):
            assert torch.allclose(rows.mean(0), start.mean(0), rtol=0, atol=1e-14)
    assert remaining["accelerated"] < 1e-3 * remaining["plain"] and remaining["plain"] < 0.05
