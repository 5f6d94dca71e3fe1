import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidSetting, MissingData, UnknownName
from fedcore.simulations.distributions import (
    Constant,
    Exponential,
    LogNormal,
    Normal,
    Trace,
    Uniform,
    as_distribution,
    jitter_factor,
)

RANDOM = [
    Uniform(0.2, 0.8), Normal(2.0, relative_std=0.3), Normal(1.0, std=1.0), LogNormal(0.5, relative_std=0.7),
    Exponential(0.1),
]
names = st.sampled_from(range(len(RANDOM)))


def draws(distribution, count=4000, seed=0):
    return [distribution.draw(seed, partition, "speed") for partition in range(count)]


@given(which=names, seed=st.integers(0, 2**31), partition=st.integers(0, 10**6))
def test_draws_are_positive_finite_and_repeatable(which, seed, partition):
    value = RANDOM[which].draw(seed, partition, "speed")
    assert 0 < value < math.inf
    assert RANDOM[which].draw(seed, partition, "speed") == value


@given(which=names)
def test_seed_node_and_purpose_each_change_the_draw(which):
    arguments = [(0, 1, "speed"), (1, 1, "speed"), (0, 2, "speed"), (0, 1, "latency")]
    assert len({RANDOM[which].draw(*each) for each in arguments}) == 4


@pytest.mark.parametrize(
    ("distribution", "mean", "std"),
    [
        (Uniform(1.0, 4.0), 2.5, 3 / math.sqrt(12)),
        (Normal(2.0, std=0.5), 2.0, 0.5),
        (Normal(2.0, relative_std=0.25), 2.0, 0.5),
        (LogNormal(2.0, relative_std=0.5), 2.0, 1.0),
        (Exponential(0.7), 0.7, 0.7),
    ],
)
def test_moments_are_those_of_the_distribution(distribution, mean, std):
    values = draws(distribution)
    assert statistics.fmean(values) == pytest.approx(mean, abs=4 * std / math.sqrt(len(values)))
    assert statistics.stdev(values) == pytest.approx(std, rel=0.08)


def test_wide_normal_is_cut_at_zero_and_not_folded():
    # The mean of a unit normal around 1 that is cut at zero: 1 + pdf(1) / cdf(1).
    values = draws(Normal(1.0, std=1.0))
    assert min(values) > 0
    assert statistics.fmean(values) == pytest.approx(1.2876, abs=0.05)


def test_normal_without_spread_is_its_mean():
    assert draws(Normal(0.3, std=0.0), count=3) == [0.3, 0.3, 0.3]


@pytest.mark.parametrize("distribution", [Normal(1.0, std=1.0, minimum=0.5), LogNormal(1.0, std=1.0, minimum=0.5),
                                          Exponential(1.0, minimum=0.5)])
def test_minimum_bounds_the_draws_and_leaves_the_others_alone(distribution):
    free = type(distribution)(1.0, std=1.0) if not isinstance(distribution, Exponential) else Exponential(1.0)
    assert draws(distribution, 200) == [max(value, 0.5) for value in draws(free, 200)]


def test_jitter_has_mean_one_and_the_given_spread():
    factors = [jitter_factor(0.2, 0, "compute", 3, index) for index in range(4000)]
    assert statistics.fmean(factors) == pytest.approx(1, abs=0.015)
    assert statistics.stdev(factors) == pytest.approx(0.2, rel=0.08)


def test_trace_gives_each_node_its_value_and_refuses_further_nodes():
    trace = Trace([0.1, 0.2, 0.3])
    assert draws(trace, 3) == [0.1, 0.2, 0.3]
    with pytest.raises(InvalidSetting, match="at least 4.*cycle: true"):
        trace.draw(0, 3, "seconds_per_step")


def test_trace_begins_again_when_told_to_cycle():
    assert draws(Trace([0.1, 0.2], cycle=True), 5) == [0.1, 0.2, 0.1, 0.2, 0.1]


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("speeds.json", json.dumps([0.5, 2, 1e-3]), None),
        ("speeds.csv", "0.5\n2\n\n0.001\n", None),
        ("speeds.csv", "seconds\n0.5\n2\n0.001\n", None),
        ("speeds.csv", "seconds,device\n0.5,a\n2,b\n0.001,c\n", "seconds"),
        ("speeds.csv", "device, seconds\na, 0.5\nb, 2\nc, 0.001\n", None),
    ],
)
def test_trace_reads_json_and_csv(tmp_path, name, text, column):
    path = tmp_path / name
    path.write_text(text)
    assert Trace(path=path, column=column).values == [0.5, 2.0, 0.001]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("speeds.csv", "0.5\nfast\n", None, "'fast' where a number was expected"),
        ("speeds.csv", "a,b\n1,2\n", "c", "no column 'c'.*a,b"),
        ("speeds.csv", "a,b\n1,2\n3\n", "b", "'3' where a number was expected"),
        ("speeds.json", "[1, 2", None, "cannot be read"),
        ("absent.csv", None, None, "cannot be read"),
    ],
)
def test_unreadable_traces_say_what_is_wrong(tmp_path, name, text, column, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(MissingData, match=message):
        Trace(path=path, column=column)


@pytest.mark.parametrize("text", ['{"a": 1}', "[]", '["x"]', "[-1]", "[true]", "[NaN]"])
def test_json_traces_that_are_no_list_of_numbers_are_refused(tmp_path, text):
    path = tmp_path / "speeds.json"
    path.write_text(text)
    with pytest.raises(InvalidSetting):
        Trace(path=path)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Constant(-1), lambda: Constant(math.inf), lambda: Constant("fast"), lambda: Constant(True),
        lambda: Uniform(2, 1), lambda: Uniform(-1, 1), lambda: Uniform(0, 0),
        lambda: Normal(0, std=1), lambda: Normal(1), lambda: Normal(1, std=1, relative_std=1),
        lambda: Normal(1, std=-1), lambda: Normal(math.nan, std=1), lambda: LogNormal(-1, std=1),
        lambda: LogNormal(1, relative_std=-0.1), lambda: Exponential(0), lambda: Exponential(1, minimum=-1),
        lambda: Trace(), lambda: Trace([1.0], path="x"), lambda: Trace([]), lambda: Trace([1.0, -1.0]),
    ],
)
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(InvalidSetting):
        build()


def test_settings_become_distributions():
    assert as_distribution(0.5, "speed").draw(0, 0, "speed") == 0.5
    assert isinstance(as_distribution({"name": "exponential", "mean": 0.1}, "speed"), Exponential)
    assert isinstance(as_distribution({"name": "uniform", "low": 0.1, "high": 0.2}, "speed"), Uniform)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "exponentil", "mean": 1}, UnknownName, "speed.name='exponentil'.*Did you mean exponential"),
        ({"name": "exponential", "mean": -1}, InvalidSetting, r"speed.mean=-1.0, but it must be .* above 0"),
        ("quick", UnknownName, "speed='quick'"),
        (-1, InvalidSetting, "speed=-1"),
        ([1, 2], InvalidSetting, "speed=.*A distribution is written"),
    ],
)
def test_wrong_distributions_are_named_with_their_path(spec, error, message):
    with pytest.raises(error, match=message):
        as_distribution(spec, "speed")
