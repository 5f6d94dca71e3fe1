"""Learning rates as functions of a position."""
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clients.schedules import make_schedule
from fedcore.errors import InvalidSetting

RATE = 0.2


def rates_of_torch(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE, momentum=0.9)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


SCHEDULERS = torch.optim.lr_scheduler


@pytest.mark.parametrize(("spec", "make"), [
    ({"name": "step", "step_size": 3, "gamma": 0.5}, lambda o: SCHEDULERS.StepLR(o, 3, 0.5)),
    ({"name": "multi_step", "milestones": [2, 5]}, lambda o: SCHEDULERS.MultiStepLR(o, [2, 5])),
    ({"name": "exponential", "gamma": 0.9}, lambda o: SCHEDULERS.ExponentialLR(o, 0.9)),
    ({"name": "linear", "total_iters": 4}, lambda o: SCHEDULERS.LinearLR(o, total_iters=4)),
    ({"name": "polynomial", "total_iters": 9, "power": 2}, lambda o: SCHEDULERS.PolynomialLR(o, 9, 2)),
    ({"name": "cosine_restarts", "T_0": 4}, lambda o: SCHEDULERS.CosineAnnealingWarmRestarts(o, 4)),
    ({"name": "one_cycle", "max_lr": 1.0, "total_steps": 12}, lambda o: SCHEDULERS.OneCycleLR(o, 1.0, 12)),
    ({"name": "cyclic", "base_lr": 0.1, "max_lr": 0.5}, lambda o: SCHEDULERS.CyclicLR(o, 0.1, 0.5)),
])
def test_a_schedule_of_torch_gives_torchs_rates_in_any_order(spec, make):
    expected = rates_of_torch(make, 12)
    schedule, unit = make_schedule(spec, RATE)
    assert unit == "steps"
    assert [schedule.lr(RATE, position) for position in reversed(range(12))] == expected[::-1]


def test_past_its_end_a_schedule_keeps_its_last_rate():
    schedule, _ = make_schedule({"name": "one_cycle", "max_lr": 1.0, "total_steps": 5}, RATE)
    assert schedule.lr(RATE, 100) == schedule.lr(RATE, 4)


@given(total=st.integers(1, 200), floor=st.floats(0, 1))
def test_cosine_without_warm_up_is_torchs(total, floor):
    schedule, _ = make_schedule({"name": "cosine", "total_steps": total, "final_factor": floor}, RATE)
    expected = rates_of_torch(lambda o: SCHEDULERS.CosineAnnealingLR(o, total, floor * RATE), total + 1)
    found = [schedule.lr(RATE, position) for position in range(total + 1)]
    assert all(math.isclose(one, other, abs_tol=1e-9) for one, other in zip(found, expected, strict=True))


@given(warmup=st.integers(1, 50), rest=st.integers(1, 50))
def test_warm_up_rises_in_equal_steps_to_the_full_rate(warmup, rest):
    schedule, _ = make_schedule({"name": "cosine", "warmup_steps": warmup, "total_steps": warmup + rest}, RATE)
    rates = [schedule.lr(RATE, position) for position in range(warmup + rest + 1)]
    rises = [after - before for before, after in pairwise([0.0, *rates[:warmup + 1]])]
    assert rates[warmup] == RATE and max(rises) - min(rises) < 1e-12
    assert all(before >= after for before, after in pairwise(rates[warmup:])) and abs(rates[-1]) < 1e-12


def test_no_schedule_keeps_the_rate():
    for spec in (None, "constant"):
        assert make_schedule(spec, RATE)[0].lr(RATE, 123) == RATE


def test_the_unit_is_told_apart_from_the_settings():
    assert make_schedule({"name": "exponential", "gamma": 0.5, "unit": "versions"}, RATE)[1] == "versions"


@pytest.mark.parametrize(("spec", "words"), [
    ("cosin", "Did you mean cosine"),
    ({"name": "cosine"}, "train.schedule.total_steps"),
    ({"name": "cosine", "total_steps": 0}, "total_steps"),
    ({"name": "cosine", "total_steps": 10, "warmup_steps": 10}, "warmup_steps"),
    ({"name": "cosine", "total_steps": 10, "final_factor": 2}, "final_factor"),
    ({"name": "cosine", "total_steps": 10, "unit": "rounds"}, "train.schedule.unit"),
    ({"name": "step", "step_sise": 3}, "step_sise"),
    ({"name": "one_cycle", "max_lr": 1.0}, "total_steps"),
    ({"name": "torch.optim.lr_scheduler:ReduceLROnPlateau"}, "number of steps alone"),
])
def test_wrong_settings_are_refused_with_their_path(spec, words):
    with pytest.raises(InvalidSetting, match=words):
        make_schedule(spec, RATE)
