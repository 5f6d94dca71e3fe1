import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidSetting, UnknownSetting
from fedcore.simulations import devices as module
from fedcore.simulations.devices import Devices
from fedcore.simulations.distributions import Exponential, Trace


@given(steps=st.integers(0, 1000), partition=st.integers(0, 100), index=st.integers(0, 100))
def test_constant_devices_take_steps_times_seconds_per_step(steps, partition, index):
    assert Devices(seconds_per_step=0.25).compute_seconds(partition, index, steps) == 0.25 * steps


tasks = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(questions=st.lists(tasks, min_size=1, max_size=20), seed=st.integers(0, 9))
def test_times_do_not_depend_on_the_order_of_questions(questions, seed):
    def answers(order):
        devices = Devices(Exponential(0.1), jitter=0.3, seed=seed)
        return {each: devices.compute_seconds(*each, 10) for each in order}

    assert answers(questions) == answers(reversed(questions))


def test_a_full_memory_changes_no_draw(monkeypatch):
    devices = Devices(Exponential(0.1))
    before = [devices.seconds_per_step(partition) for partition in range(10)]
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    forgetful = Devices(Exponential(0.1))
    assert [forgetful.seconds_per_step(partition) for partition in [*range(10), *range(10)]] == before * 2
    assert len(forgetful._step._drawn) <= 3


def test_jitter_differs_by_task_around_the_nodes_own_speed():
    devices = Devices(Exponential(0.1), jitter=0.1, seed=3)
    times = [devices.compute_seconds(7, index, 1) for index in range(2000)]
    assert len(set(times)) == 2000
    assert statistics.fmean(times) == pytest.approx(devices.seconds_per_step(7), rel=0.02)


def test_tasks_of_unknown_work_take_seconds_per_task():
    devices = Devices(0.1, seconds_per_task=Trace([3.0, 5.0]))
    assert [devices.compute_seconds(partition, 0, None) for partition in (0, 1)] == [3.0, 5.0]


def test_no_work_takes_no_time():
    assert Devices(jitter=0.5).compute_seconds(0, 0, 0.0) == 0.0


def test_settings_are_those_of_the_experiment_file():
    section = {"seconds_per_step": {"name": "exponential", "mean": 0.2}, "jitter": 0.1, "seconds_per_task": 4}
    devices = Devices.from_settings(section, seed=5, num_nodes=10)
    direct = Devices(Exponential(0.2), jitter=0.1, seconds_per_task=4, seed=5)
    for partition in range(10):
        assert devices.compute_seconds(partition, 3, 7) == direct.compute_seconds(partition, 3, 7)
        assert devices.compute_seconds(partition, 3, None) == direct.compute_seconds(partition, 3, None)
    assert Devices.from_settings(None, 0, 10).compute_seconds(0, 0, 1) == Devices().compute_seconds(0, 0, 1)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"jiter": 0.1}, UnknownSetting, "simulation.devices.jiter=.*Did you mean jitter"),
        ({"jitter": -0.1}, InvalidSetting, "simulation.devices.jitter=-0.1.*at least 0"),
        ({"jitter": math.nan}, InvalidSetting, "simulation.devices.jitter=nan"),
        ({"seconds_per_step": 0}, InvalidSetting, "simulation.devices.seconds_per_step=.*above 0"),
        ({"seconds_per_step": "slow"}, InvalidSetting, "simulation.devices.seconds_per_step='slow'"),
        ({"seconds_per_step": {"name": "uniform", "low": 2, "high": 1}}, InvalidSetting, "seconds_per_step.high=1"),
        ({"seconds_per_task": -1}, InvalidSetting, "simulation.devices.seconds_per_task=-1"),
        ({"seconds_per_step": {"name": "trace", "values": [0.1] * 9}}, InvalidSetting, "at least 10.*cycle: true"),
        ({"seconds_per_step": {"name": "trace", "values": [0.0], "cycle": True}}, InvalidSetting, "distribution gave"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(section, error, message):
    with pytest.raises(error, match=message):
        Devices.from_settings(section, seed=0, num_nodes=10)
