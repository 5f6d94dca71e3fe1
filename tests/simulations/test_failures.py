import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidSetting, UnknownSetting
from fedcore.simulations.failures import Failures

TASKS = [(partition, index) for partition in range(40) for index in range(100)]


def test_crashes_come_as_often_as_asked_and_anywhere_in_the_work():
    points = [Failures(crash_probability=0.25).crash_point(*task) for task in TASKS]
    crashed = [point for point in points if point is not None]
    assert len(crashed) / len(TASKS) == pytest.approx(0.25, abs=0.03)
    assert all(0 < point < 1 for point in crashed)
    assert statistics.fmean(crashed) == pytest.approx(0.5, abs=0.04)


def test_requests_and_replies_are_lost_apart_from_each_other():
    failures = Failures(request_loss=0.3, reply_loss=0.2)
    requests = [failures.loses_request(*task) for task in TASKS]
    replies = [failures.loses_reply(*task) for task in TASKS]
    assert statistics.fmean(requests) == pytest.approx(0.3, abs=0.03)
    assert statistics.fmean(replies) == pytest.approx(0.2, abs=0.03)
    assert statistics.fmean(a and b for a, b in zip(requests, replies, strict=True)) == pytest.approx(0.06, abs=0.02)


@given(seed=st.integers(0, 100), partition=st.integers(0, 1000), index=st.integers(0, 1000))
def test_certain_failures_always_and_impossible_ones_never_happen(seed, partition, index):
    certain, impossible = Failures(1.0, 1.0, 1.0, seed), Failures(0.0, 0.0, 0.0, seed)
    assert certain.crash_point(partition, index) is not None
    assert certain.loses_request(partition, index) and certain.loses_reply(partition, index)
    assert impossible.crash_point(partition, index) is None
    assert not impossible.loses_request(partition, index) and not impossible.loses_reply(partition, index)


@given(partition=st.integers(0, 1000), index=st.integers(0, 1000))
def test_failures_are_repeatable(partition, index):
    one, other = Failures(0.5, 0.5, 0.5, seed=4), Failures(0.5, 0.5, 0.5, seed=4)
    other.loses_reply(partition + 1, index)
    assert one.crash_point(partition, index) == other.crash_point(partition, index)
    assert one.loses_reply(partition, index) == other.loses_reply(partition, index)


def test_nothing_is_made_where_nothing_can_fail():
    assert Failures.from_settings(None, 0, 10) is None
    assert Failures.from_settings({"crash_probability": 0.0}, 0, 10) is None
    for name in ("crash_probability", "request_loss", "reply_loss"):
        made = Failures.from_settings({name: 0.1}, 3, 10)
        assert made is not None and (getattr(made, name), made.seed) == (0.1, 3)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"reply_los": 0.1}, UnknownSetting, "simulation.failures.reply_los=.*Did you mean reply_loss"),
        ({"crash_probability": 1.1}, InvalidSetting, "failures.crash_probability=1.1.*at least 0 and at most 1"),
        ({"request_loss": -0.1}, InvalidSetting, "simulation.failures.request_loss=-0.1"),
        ({"reply_loss": "often"}, InvalidSetting, "simulation.failures.reply_loss='often'"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(section, error, message):
    with pytest.raises(error, match=message):
        Failures.from_settings(section, 0, 10)
