"""NoLoCo: its equations, what they become in special cases, and its settings."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config import load_experiment
from fedcore.errors import BadExperiment, InvalidSetting
from fedcore.peers.envelope import ENVELOPE_BYTES
from fedcore.peers.groups import draw_groups
from fedcore.strategies.diloco import DiLoCo
from fedcore.strategies.local_sgd import LocalSgd
from fedcore.strategies.noloco import NoLoCo, PeerState, largest_gossip_lr, offer, outer_step
from tests.peer_lab import models, play, same

EQUAL = {"simulation": {"devices": {"seconds_per_step": 0.1}}}


def random_states(count, size, seed):
    draw = torch.randn(3, count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    states = [PeerState(slow, momentum) for slow, momentum in zip(draw[0], draw[1], strict=True)]
    return states, [offer(state, trained) for state, trained in zip(states, draw[2], strict=True)]


def step_all(states, offers, groups, alpha, beta, gamma):
    return [outer_step(states[rank], {member: offers[member] for member in groups[rank]}, beta, alpha, gamma)
            for rank in range(len(states))]


@given(count=st.integers(1, 9), group_size=st.integers(2, 4), alpha=st.floats(0, 0.9), beta=st.floats(0.1, 1),
       gamma=st.floats(0, 2), seed=st.integers(0, 50))
def test_the_mean_moves_as_if_there_were_one_peer_whatever_the_groups(count, group_size, alpha, beta, gamma, seed):
    states, offers = random_states(count, 3, seed)
    groups = draw_groups(tuple(range(count)), group_size, seed, 0)
    after = step_all(states, offers, groups, alpha, beta, gamma)
    slow, momentum, moved = (torch.stack(rows).mean(0) for rows in (
        [state.slow_params for state in states], [state.momentum for state in states],
        [sent["moved"] for sent in offers]))
    mean = torch.stack([state.slow_params for state in after]).mean(0)
    assert torch.allclose(mean, slow + alpha * momentum - beta * moved, rtol=1e-13, atol=1e-13)


def test_without_momentum_and_with_full_steps_a_pair_averages_its_models():
    states, offers = random_states(2, 4, 1)
    after = step_all(states, offers, {0: (0, 1), 1: (0, 1)}, 0.0, 1.0, 1.0)
    trained = [state.slow_params - sent["moved"] for state, sent in zip(states, offers, strict=True)]
    for state in after:
        assert torch.allclose(state.slow_params, (trained[0] + trained[1]) / 2, rtol=1e-14, atol=1e-15)


def test_a_peer_alone_makes_a_heavy_ball_step_and_its_loss_falls():
    state, target = PeerState.at(torch.tensor([4.0, -2.0], dtype=torch.float64)), torch.zeros(2, dtype=torch.float64)
    losses = []
    for _ in range(20):
        trained = state.slow_params + 0.3 * (target - state.slow_params)
        losses.append(float(state.slow_params.norm()))
        state = outer_step(state, {0: offer(state, trained)}, 0.7, 0.5, 0.7)
    assert losses[1] < losses[0] and losses[-1] < 0.01 * losses[0]


def test_a_group_of_everybody_is_heavy_ball_diloco(tmp_path):
    gossip = play(NoLoCo(3, group_size=4, outer_lr=0.7, outer_momentum=0.5), tmp_path / "a", 4, **EQUAL)
    average = play(DiLoCo(3, outer_lr=0.7, outer_momentum=0.5, nesterov=False), tmp_path / "b", 4, **EQUAL)
    for first, second in zip(models(gossip), models(average), strict=True):
        assert torch.allclose(first, second, rtol=1e-12, atol=1e-13)


def test_a_group_of_everybody_with_full_steps_and_no_momentum_is_local_sgd(tmp_path):
    gossip = play(NoLoCo(3, 4, outer_lr=1.0, outer_momentum=0.0), tmp_path / "a", 4, **EQUAL)
    average = play(LocalSgd(3), tmp_path / "b", 4, **EQUAL)
    for first, second in zip(models(gossip), models(average), strict=True):
        assert torch.allclose(first, second, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("alpha, gamma, rate", [(0.5, 0.7, 0.6965), (0.5, 1.0, 0.7871)])
def test_disagreement_decays_at_the_rate_of_its_recursion_when_nobody_trains(alpha, gamma, rate):
    states, _ = random_states(64, 400, 3)
    states = [PeerState(state.slow_params, torch.zeros_like(state.slow_params)) for state in states]
    spreads = []
    for step in range(60):
        offers = [offer(state, state.slow_params) for state in states]
        states = step_all(states, offers, draw_groups(tuple(range(64)), 2, 0, step), alpha, 0.7, gamma)
        slow = torch.stack([state.slow_params for state in states])
        spreads.append(float((slow - slow.mean(0)).square().sum()))
    assert (spreads[-1] / spreads[9]) ** (1 / 50) == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("alpha, group_size, count",
                         [(0.0, 2, 64), (0.5, 2, 64), (0.9, 2, 16), (0.5, 4, 64), (0.5, 8, 8)])
def test_the_bound_on_the_pull_is_where_the_recursion_stops_contracting(alpha, group_size, count):
    q = (group_size - 1) / group_size * count / (count - 1)

    def radius(g):
        a = alpha
        recursion = [[1 - 2 * g * q + g * g * q, 2 * a - 2 * a * g * q, a * a],
                     [-g * q + g * g * q, a - 2 * a * g * q, a * a], [g * g * q, -2 * a * g * q, a * a]]
        return max(abs(np.linalg.eigvals(recursion)))

    bound = largest_gossip_lr(alpha, group_size, count)
    assert radius(0.999 * bound) < 1 < radius(1.001 * bound)


def test_the_bound_has_its_known_values():
    limits = {(0.0, 2): 2.0, (0.3, 2): 1.82, (0.5, 2): 1.5, (0.9, 2): 0.38, (0.5, 4): 2.0, (0.5, 8): 2.4}
    for (alpha, size), bound in limits.items():
        assert largest_gossip_lr(alpha, size, 10**9) == pytest.approx(bound, rel=1e-6)


def test_an_odd_number_of_peers_steps_on_and_nobody_is_left_out_of_training(tmp_path):
    simulation = play(NoLoCo(2), tmp_path, 5, stop={"rounds": 6})
    assert simulation.host.totals["exchanges"] == 6 * 4 and simulation.host.totals["gradients"] == 6 * 5 * 2
    assert len({tuple(model.tolist()) for model in models(simulation)}) == 5


def test_what_was_handed_in_stays_as_it_was():
    states, offers = random_states(2, 3, 5)
    before = [state.slow_params.clone() for state in states]
    step_all(states, offers, {0: (0, 1), 1: (0, 1)}, 0.5, 0.7, 0.7)
    assert all(torch.equal(state.slow_params, old) for state, old in zip(states, before, strict=True))


@pytest.mark.parametrize("settings, name", [
    ({"inner_steps": 0}, "inner_steps"), ({"group_size": 1}, "group_size"), ({"outer_lr": 0.0}, "outer_lr"),
    ({"outer_momentum": 1.0}, "outer_momentum"), ({"gossip_lr": 0.0}, "gossip_lr"),
    ({"gossip_lr": -1.0}, "gossip_lr"), ({"pair_timeout_s": 0.0}, "pair_timeout_s"),
    ({"outer_lr": float("nan")}, "outer_lr"), ({"allow_no_consensus": 1}, "allow_no_consensus"),
])
def test_a_setting_out_of_its_range_is_refused_by_name(settings, name):
    with pytest.raises(InvalidSetting) as caught:
        NoLoCo(**settings)
    assert caught.value.name == name


def test_a_pull_that_lets_disagreement_grow_is_refused_with_the_bound():
    with pytest.raises(BadExperiment, match=r"strategy.gossip_lr=1.6, but it must be below 1.5"):
        load_experiment({"strategy": {"name": "noloco", "gossip_lr": 1.6}, "clients": {"count": 64}})
    with pytest.raises(BadExperiment, match="group_size=8.*from 2 to the number of peers, 4"):
        load_experiment({"strategy": {"name": "noloco", "group_size": 8}, "clients": {"count": 4}})
    assert NoLoCo(gossip_lr=0.0, allow_no_consensus=True).gossip_lr == 0


@pytest.mark.parametrize("compression", [None, {"name": "top_k", "fraction": 0.5}])
@pytest.mark.parametrize("group_size", [2, 3])
def test_slow_weights_that_are_sent_before_training_change_no_bit(group_size, compression, tmp_path):
    # A vector of 6 numbers takes 0.35 s on the way, training 0.1 s a step: one of two vectors travels meanwhile.
    settings = {"simulation": {"network": {"uplink_mbps": 0.005, "latency_s": 0.01}},
                **({} if compression is None else {"compression": compression})}
    runs = {early: play(NoLoCo(4, group_size, early_sending=early), tmp_path / str(early), 5, stop={"rounds": 6},
                        **settings) for early in (False, True)}
    assert same(models(runs[True]), models(runs[False]))
    sent = {early: run.host.totals["bytes_sent"] for early, run in runs.items()}
    messages = 6 * (4 if group_size == 2 else 6)    # five peers: two pairs, or a group of three
    assert sent[True] - sent[False] == messages * ENVELOPE_BYTES
    assert runs[True].host.time_s < runs[False].host.time_s
    assert runs[True].host.totals["exchanges"] == runs[False].host.totals["exchanges"]


def test_partners_of_whom_one_part_is_lost_are_left_out_of_a_step(tmp_path):
    lossy = {"simulation": {"failures": {"request_loss": 0.2}}}
    run = play(NoLoCo(2, pair_timeout_s=1.0, early_sending=True), tmp_path, 4, stop={"rounds": 30}, **lossy)
    assert run.host.version == 30 and run.host.totals["silent"] > 0
    assert all(torch.isfinite(params).all() for params in models(run))
