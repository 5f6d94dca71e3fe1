"""CO2: communication is free up to the time of a round's steps; late averages need brakes where problems are stiff.

Source: Sun et al., 2024, arXiv:2401.16265.
"""
import pytest

from fedcore.strategies.all_reduce_sgd import AllReduceSgd
from fedcore.strategies.co2 import Co2
from fedcore.strategies.local_sgd import LocalSgd, SlowMo
from tests.peer_lab import play

pytestmark = pytest.mark.paper

TAU, ROUNDS, STEP_S, PEERS = 12, 8, 0.1, 4
HOPS = 2 * (PEERS - 1)


@pytest.mark.parametrize("steps_per_average", [0.3, 3.0, 12.0, 30.0])
def test_a_run_takes_the_time_of_its_model(steps_per_average, tmp_path):
    """With A the time of an average and c of a local step: CO2 max(tau c, A) per round, Local SGD tau c + A."""
    average_s = steps_per_average * STEP_S
    world = {"devices": {"seconds_per_step": STEP_S}, "network": {"latency_s": average_s / HOPS}}
    times = {}
    for name, strategy, rounds in (("co2", Co2(TAU), ROUNDS), ("local", LocalSgd(TAU), ROUNDS),
                                   ("synchronous", AllReduceSgd(), TAU * ROUNDS)):
        times[name] = play(strategy, tmp_path / name, PEERS, stop={"rounds": rounds}, simulation=world).host.time_s
    computing = TAU * STEP_S
    # The first round has nothing to wait for, and the last average is waited for at the end.
    hidden = computing + (ROUNDS - 1) * max(computing, average_s) + average_s
    assert times["co2"] == pytest.approx(hidden, rel=1e-9)
    assert times["local"] == pytest.approx(ROUNDS * (computing + average_s), rel=1e-9)
    assert times["synchronous"] == pytest.approx(ROUNDS * TAU * (STEP_S + average_s), rel=1e-9)


def test_late_averages_diverge_on_a_stiff_problem_unless_they_are_braked(tmp_path):
    # Every direction's curvature is at least 0.1: 48 steps of 0.5 remove 0.9 of what is left in each.
    task = {"name": "logistic", "dimension": 8, "examples": 40, "l2": 0.1}
    losses = {}
    for name, strategy in {
        "plain": Co2(48, outer_momentum=0.5, penalty="none"), "penalty": Co2(48, outer_momentum=0.5),
        "clip": Co2(48, outer_momentum=0.5, penalty="none", clip_threshold=0.1),
        "both": Co2(48, outer_momentum=0.5, clip_threshold=0.1), "constant": Co2(48, outer_momentum=0.5, penalty=2.0),
        "slowmo": SlowMo(48, outer_momentum=0.5),
    }.items():
        run = play(strategy, tmp_path / name, PEERS, task=task, stop={"rounds": 30}, evaluate={"where": "server"},
                   train={"lr": 0.5, "batch_size": 40})
        losses[name] = run.host.scores.latest["excess_loss"]
    print(losses)
    assert losses["plain"] > 5 * losses["both"] and losses["plain"] > 5 * losses["constant"]
    assert losses["both"] < losses["penalty"] and losses["both"] <= losses["clip"]
    assert losses["slowmo"] < losses["both"]
