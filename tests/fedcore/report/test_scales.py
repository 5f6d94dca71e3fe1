import math

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, floats, sampled_from

from fedcore.report.charts import thinned
from fedcore.report.scales import (
    BYTES,
    COUNT,
    NUMBER,
    SECONDS,
    SHARE,
    THIN,
    Scale,
    count,
    data_size,
    figure,
    goal_words,
    log_ticks,
    percent,
    round_ticks,
    scale_over,
    seconds,
)


@given(low=floats(-1e6, 1e6), width=floats(1e-3, 1e6))
def test_ticks_are_round_lie_inside_and_are_few(low, width):
    ticks = round_ticks(low, low + width, 5)
    assert len(ticks) <= 6
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    if len(ticks) > 1:
        mantissa = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


@given(low=floats(1e-9, 1e6), ratio=floats(2, 1e9))
def test_logarithmic_ticks_lie_inside_and_are_few(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) <= 9
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)


@given(values=floats(1e-6, 1e6).flatmap(lambda low: floats(1.001, 1e6).map(lambda ratio: (low, low * ratio))),
       share=floats(0, 1), log=booleans(), kind=sampled_from([SECONDS, BYTES, COUNT, NUMBER]))
def test_a_scale_places_its_ends_and_everything_between(values, share, log, kind):
    scale = Scale(*values, kind, log)
    value = values[0] + share * (values[1] - values[0])
    assert scale.place(values[0]) == pytest.approx(0, abs=1e-9)
    assert scale.place(values[1]) == pytest.approx(1)
    assert 0 <= scale.place(value) <= 1
    assert all(0 <= at <= 1 and label for at, label in scale.ticks())


def test_a_scale_over_one_value_still_has_a_width():
    for kind in (SECONDS, SHARE, NUMBER):
        for log in (False, True):
            scale = scale_over([0.5], kind, log)
            assert scale.low < 0.5 < scale.high


def test_values_that_are_not_finite_do_not_stretch_a_scale():
    scale = scale_over([1.0, math.nan, 2.0, math.inf], NUMBER)
    assert 0.9 < scale.low < 1.0 < 2.0 < scale.high < 2.1


def test_an_accuracy_axis_ends_at_one_hundred_per_cent():
    assert scale_over([0.2, 0.999], SHARE).high == 1.0


@pytest.mark.parametrize("value, words", [
    (0.0, "0 s"), (0.0004, "0.4 ms"), (0.0123, "0.0123 s"), (43.94, "43.9 s"), (312.4, "312 s"), (607.0, "10 min 7 s"),
    (7200.0, "2 h"), (12_000.0, "3 h 20 min"), (200_000.0, "2 days 7 h"), (None, "–"), (math.nan, "–")])
def test_durations_in_words(value, words):
    assert seconds(value).replace(THIN, " ") == words


@pytest.mark.parametrize("function, value, words", [
    (data_size, 812, "812 B"), (data_size, 3_412_000, "3.41 MB"), (data_size, None, "–"), (data_size, 0, "0 B"),
    (count, 640, "640"), (count, 1234, "1 234"), (count, 22_887, "22.9k"), (count, 3.2e6, "3.2M"), (count, None, "–"),
    (percent, 0.9342, "93.4 %"), (percent, 0.9, "90 %"), (percent, 0.99961, "99.96 %"), (percent, 1.0, "100 %"),
    (percent, math.nan, "–"), (figure, 0.123456, "0.123"), (figure, 1_234_567, "1 234 567"), (figure, "text", "text"),
    (figure, None, "–"), (figure, True, "True")])
def test_figures_in_words(function, value, words):
    assert function(value).replace(THIN, " ") == words


def test_a_target_in_words():
    assert goal_words("accuracy", 0.93).replace(THIN, " ") == "93 % accuracy"
    assert goal_words("loss", 0.3) == "a loss of 0.3"


def test_a_thinned_line_keeps_its_ends_and_its_extremes():
    points = [(float(x), math.sin(x / 50)) for x in range(20_000)]
    points[777] = (777.0, 9.0)
    points[12_345] = (12_345.0, -9.0)
    kept = thinned(points, 600)
    assert len(kept) <= 620
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert points[777] in kept and points[12_345] in kept
    assert kept == sorted(kept)


def test_a_line_of_gaps_only_can_be_thinned():
    assert all(math.isnan(y) for _, y in thinned([(float(x), math.nan) for x in range(5_000)], 100))
