import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidSetting, MissingData, UnknownName, UnknownSetting
from fedcore.simulations.availability import Always, Availability, Markov, Trace

times = st.floats(0, 5000, allow_nan=False)


def changes(availability, partition, until):
    """Return the moments of change up to `until`, walking as a simulation does."""
    found, at = [], 0.0
    while (at := availability.next_change(partition, at)) <= until:
        found.append(at)
    return found


def trace(tmp_path, lines, **settings):
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["partition,start_s,end_s", *lines]))
    return Trace(path, **settings)


def test_always_means_always():
    assert Always().is_on(3, 1e9)
    assert Always().next_change(3, 1e9) == math.inf


@given(questions=st.lists(st.tuples(st.integers(0, 4), times), min_size=1, max_size=30), seed=st.integers(0, 20))
def test_markov_does_not_depend_on_the_order_of_questions(questions, seed):
    def answers(order):
        markov = Markov(60, 30, seed)
        return {each: (markov.is_on(*each), markov.next_change(*each)) for each in order}

    assert answers(questions) == answers(sorted(questions, reverse=True)) == answers(sorted(questions))


@given(partition=st.integers(0, 50), at=times)
def test_markov_changes_exactly_at_its_changes(partition, at):
    markov = Markov(60, 30, seed=1)
    change = markov.next_change(partition, at)
    assert change > at
    assert markov.is_on(partition, math.nextafter(change, 0)) == markov.is_on(partition, at)
    assert markov.is_on(partition, change) != markov.is_on(partition, at)


def test_markov_shares_and_lengths_are_those_asked_for():
    markov = Markov(60, 30)
    nodes = range(1500)
    for at in (0.0, 1000.0):
        assert sum(markov.is_on(node, at) for node in nodes) / len(nodes) == pytest.approx(2 / 3, abs=0.04)
    on, off = [], []
    for node in range(200):
        moments = changes(markov, node, 3000)
        for start, end in zip(moments, moments[1:], strict=False):
            (on if markov.is_on(node, start) else off).append(end - start)
    assert sum(on) / len(on) == pytest.approx(60, rel=0.06)
    assert sum(off) / len(off) == pytest.approx(30, rel=0.06)


def test_markov_remembers_a_bounded_amount_per_node():
    markov = Markov(1, 1)
    markov.next_change(0, 10.0)
    tracemalloc.start()
    markov.next_change(0, 20_000.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20_000


def test_trace_is_on_within_its_intervals_only(tmp_path):
    found = trace(tmp_path, ["0,10,20", "0,30,40", "2,0,5"])
    assert [found.is_on(0, at) for at in (0, 9.9, 10, 19.9, 20, 30, 39, 40, 1e6)] == [
        False, False, True, True, False, True, True, False, False]
    assert changes(found, 0, 1e9) == [10, 20, 30, 40]
    assert found.is_on(2, 0.0) and found.next_change(2, 0.0) == 5
    assert not found.is_on(1, 15.0) and found.next_change(1, 0.0) == math.inf


def test_intervals_that_touch_overlap_or_come_unsorted_are_one(tmp_path):
    assert changes(trace(tmp_path, ["0,20,30", "0,10,20", "0,12,25"]), 0, 1e9) == [10, 30]


def test_trace_repeats(tmp_path):
    found = trace(tmp_path, ["0,10,20", "1,0,5", "1,90,100", "2,0,100", "3,95,200", "4,150,160"], repeat_s=100)
    assert changes(found, 0, 320) == [10, 20, 110, 120, 210, 220, 310, 320]
    # Node 1 is online from the end of one lap into the next: nothing changes where they meet.
    assert changes(found, 1, 300) == [5, 90, 105, 190, 205, 290]
    assert found.is_on(1, 100) and found.is_on(1, 99) and not found.is_on(1, 5)
    assert found.is_on(2, 12345) and found.next_change(2, 0) == math.inf
    assert changes(found, 3, 300) == [95, 100, 195, 200, 295, 300]
    assert not found.is_on(4, 155) and found.next_change(4, 0) == math.inf


# Hundredths of a lap: an interval may be too short for the clock's floating-point numbers to see.
@given(lap=st.floats(0.1, 10), start=st.integers(0, 90), length=st.integers(1, 100), at=st.floats(0, 1e5))
def test_repeated_changes_are_strictly_later_and_change_something(tmp_path_factory, lap, start, length, at):
    lines = [f"0,{start / 100 * lap!r},{(start + length) / 100 * lap!r}"]
    found = trace(tmp_path_factory.mktemp("trace"), lines, repeat_s=lap)
    change = found.next_change(0, at)
    assert change > at
    if change < math.inf:
        assert found.is_on(0, change) != found.is_on(0, at)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node,start,end\n0,1,2\n", "must begin with the line"),
        ("", "must begin with the line"),
        ("partition,start_s,end_s\n0,5,5\n", "line 2: expected.*'0,5,5'"),
        ("partition,start_s,end_s\n0,1,2\n-1,0,5\n", "line 3"),
        ("partition,start_s,end_s\n0,x,5\n", "line 2"),
        ("partition,start_s,end_s\n0,1\n", "line 2"),
        ("partition,start_s,end_s\n0,1,nan\n", "line 2"),
        ("partition,start_s,end_s\n0,-1,3\n", "line 2"),
    ],
)
def test_broken_traces_say_where(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(MissingData, match=message):
        Trace(path)


def test_a_trace_of_other_nodes_is_refused(tmp_path):
    with pytest.raises(InvalidSetting, match="nodes 0 to 4.*It mentions 7"):
        trace(tmp_path, ["7,0,5"], num_nodes=5)


def test_settings_are_those_of_the_experiment_file(tmp_path):
    assert Availability.from_settings(None, 0, 10) is None
    assert Availability.from_settings("always", 0, 10) is None
    markov = Availability.from_settings({"name": "markov", "mean_on_s": 60, "mean_off_s": 30}, 5, 10)
    assert isinstance(markov, Markov) and markov.seed == 5
    path = tmp_path / "trace.csv"
    path.write_text("partition,start_s,end_s\n0,1,2\n")
    recorded = Availability.from_settings({"name": "trace", "path": str(path), "repeat_s": 10}, 0, 10)
    assert recorded is not None and recorded.is_on(0, 11.5)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("markof", UnknownName, "simulation.availability='markof'.*Did you mean markov"),
        ({"name": "markov", "mean_on_s": 0, "mean_off_s": 1}, InvalidSetting, "availability.mean_on_s=0.*above 0"),
        ({"name": "markov", "mean_on_s": 1}, InvalidSetting, "simulation.availability.mean_off_s is missing"),
        ({"name": "markov", "mean_on_s": 1, "mean_off_s": 1, "on": 2}, UnknownSetting, "simulation.availability.on=2"),
        ({"name": "trace", "path": "absent.csv"}, MissingData, "simulation.availability.path='absent.csv'"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(spec, error, message):
    with pytest.raises(error, match=message):
        Availability.from_settings(spec, 0, 10)
