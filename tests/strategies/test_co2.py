"""CO2: its outer step, what it becomes in special cases, and that communication really is hidden."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config import load_experiment
from fedcore.errors import EmptyRound, InvalidSetting
from fedcore.peers.peer import Peer
from fedcore.strategies.co2 import Co2, Co2State, clip, gap_penalty, outer_step
from fedcore.strategies.local_sgd import LocalSgd, SlowMo
from tests.peer_lab import models, play, prepare, same

PLAIN = {"outer_lr": 1.0, "outer_momentum": 0.0, "penalty": "none"}


def delayed_local_sgd(simulation, rounds, steps):
    """Return what Local SGD one round late ends with: x_{t+1} = x_t - (x_{t-1} - mean of what round t-1 trained)."""
    work = [simulation.work.peer(rank) for rank in range(2)]
    before = now = simulation.model.params
    late = None
    for _ in range(rounds):
        trained = [peer.train(now, {}, steps).params for peer in work]
        following = now if late is None else now - (before - late)
        late, before, now = (trained[0] + trained[1]) / 2, now, following
    return now - (before - late)


def test_without_penalty_and_momentum_it_is_local_sgd_one_round_late_bit_for_bit(tmp_path):
    simulation = play(Co2(3, **PLAIN), tmp_path, 2, stop={"rounds": 6})
    expected = delayed_local_sgd(prepare(Co2(3), tmp_path / "bare", 2), 6, 3)
    assert same(models(simulation), [expected] * 2)


@pytest.mark.parametrize("outer_momentum", [0.0, 0.5])
def test_without_delay_it_is_slowmo_bit_for_bit(outer_momentum, tmp_path):
    settings = {"outer_lr": 0.9, "outer_momentum": outer_momentum}
    assert same(models(play(Co2(3, **settings, penalty="none", delay=0), tmp_path / "a")),
                models(play(SlowMo(3, **settings), tmp_path / "b")))


def test_one_peer_without_delay_is_the_local_optimizer(tmp_path):
    alone = models(play(Co2(3, **PLAIN, delay=0), tmp_path / "a", 1))[0]
    assert torch.allclose(alone, models(play(LocalSgd(3), tmp_path / "b", 1))[0], rtol=1e-13, atol=1e-14)


def test_all_peers_start_every_round_from_the_same_bits(tmp_path):
    held = models(play(Co2(3, outer_momentum=0.5), tmp_path, 5, simulation={"network": {"latency_s": 0.4}}))
    assert same(held, [held[0]] * 5)


def test_a_constant_of_one_is_no_penalty_bit_for_bit(tmp_path):
    assert same(models(play(Co2(2, penalty=1.0), tmp_path / "a")), models(play(Co2(2, penalty="none"), tmp_path / "b")))


@given(seed=st.integers(0, 100), threshold=st.floats(0.01, 2), lr=st.floats(0.1, 2), beta=st.floats(0, 0.9))
def test_a_clipped_momentum_bounds_every_step(seed, threshold, lr, beta):
    draw = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    state = Co2State(draw[0], draw[1], 3 * draw[2])
    after = outer_step(state, 5 * draw[3], lr, beta, "gap", threshold, "value")
    assert after.momentum.abs().max() <= threshold
    assert (after.params - state.params).abs().max() <= lr * threshold * (1 + 1e-9)
    assert torch.equal(after.previous, state.params)
    assert torch.linalg.vector_norm(clip(draw[0], threshold, "norm")) <= threshold * (1 + 1e-12)


@given(gaps=st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_the_gap_penalty_stays_between_one_and_two(gaps):
    largest = 0.0
    for gap in gaps:
        largest = max(largest, gap)
        assert 1 <= gap_penalty(gap, largest) <= 2
    assert gap_penalty(0.0, 0.0) == 1 and gap_penalty(3.0, 3.0) == 2


def test_a_round_begins_before_the_average_of_the_round_before_is_there(tmp_path, monkeypatch):
    begun, averaged = {}, {}
    train, reduce = Peer.train, Peer.all_reduce

    async def noting_train(peer, steps):
        begun.setdefault(peer.step, peer.now)
        await train(peer, steps)

    def noting_reduce(peer, vector, **options):
        found = reduce(peer, vector, **options)
        step = peer.step
        found._future.add_done_callback(lambda _: averaged.__setitem__(step, peer.now))
        return found

    monkeypatch.setattr(Peer, "train", noting_train)
    monkeypatch.setattr(Peer, "all_reduce", noting_reduce)
    # A step takes 0.1 s, a round 1 s, an average 2 hops of 0.4 s: hidden, but not free.
    world = {"devices": {"seconds_per_step": 0.1}, "network": {"latency_s": 0.4}}
    simulation = play(Co2(10), tmp_path, 2, stop={"rounds": 5}, simulation=world)
    assert all(begun[step + 1] < averaged[step] < begun[step + 2] for step in range(3))
    assert simulation.host.time_s == pytest.approx(5 * 1.0 + 0.8)      # the last average is waited for
    waiting = play(Co2(10, delay=0), tmp_path / "w", 2, stop={"rounds": 5}, simulation=world)
    assert waiting.host.time_s == pytest.approx(5 * 1.8)


def test_it_says_how_many_local_steps_would_hide_the_average(tmp_path):
    world = {"devices": {"seconds_per_step": 0.1}, "network": {"latency_s": 1.0}}
    simulation = prepare(Co2(5), tmp_path, 2, stop={"rounds": 8}, simulation=world)
    rows = []
    simulation.recorder._listeners = (rows.append,)
    simulation.play()
    told = [row for row in rows if "advised_inner_steps" in row]
    # An average takes two hops of 1 s, a local step 0.1 s.
    assert len(told) == 1 and told[0]["advised_inner_steps"] == 20 and told[0]["exposed_share"] == pytest.approx(0.75)


def test_rounds_without_a_usable_average_are_skipped_and_three_in_a_row_end_the_run(tmp_path):
    diverging = {"train": {"lr": 1e308}, "stop": {"rounds": 9}}
    with pytest.raises(EmptyRound, match="3 rounds in a row"):
        play(Co2(3), tmp_path, 2, **diverging)


@pytest.mark.parametrize("eta, beta, penalty, grows", [(0.8, 0.5, "none", True), (0.8, 0.5, 2.0, False),
                                                      (0.45, 0.5, "none", False)])
def test_late_averages_are_stable_below_the_known_bound(eta, beta, penalty, grows):
    """On a quadratic, with eta the share of a direction removed per round: stable iff alpha eta / Lambda < 1 - beta."""
    state = Co2State.at(torch.ones(1, dtype=torch.float64))
    sizes, late = [], torch.zeros(1, dtype=torch.float64)
    for _ in range(200):
        moved = eta * state.params
        state = outer_step(state, late, 1.0, beta, penalty, None, "value")
        late = moved
        sizes.append(float(state.params.abs()))
    assert (max(sizes[-10:]) > 10) == grows and (max(sizes[-10:]) < 0.1) != grows


@pytest.mark.parametrize("settings, name", [
    ({"inner_steps": 0}, "inner_steps"), ({"outer_lr": 0.0}, "outer_lr"), ({"outer_momentum": 1.0}, "outer_momentum"),
    ({"penalty": 0.5}, "penalty"), ({"penalty": "adaptive"}, "penalty"), ({"clip_threshold": 0.0}, "clip_threshold"),
    ({"clip_mode": "max"}, "clip_mode"), ({"delay": 2}, "delay"),
])
def test_a_setting_out_of_its_range_is_refused_by_name(settings, name):
    with pytest.raises(InvalidSetting) as caught:
        Co2(**settings)
    assert caught.value.name == name


def test_settings_that_can_diverge_are_warned_of_before_the_run():
    risky = load_experiment({"strategy": {"name": "co2", "outer_momentum": 0.6}, "evaluate": {"where": "none"}})
    assert any("outer_lr" in warning for warning in risky.warnings)
    calm = load_experiment({"strategy": {"name": "co2", "penalty": "none", "outer_lr": 0.5}})
    assert not any("outer_lr" in warning for warning in calm.warnings)
