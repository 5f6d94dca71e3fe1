"""The rows of a run: always valid JSON, and cut back to where a resumed run continues."""
import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.recorder import METRICS_FILE, TIMELINE_FILE, Recorder, json_line, write_atomically

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def strict(line):
    """Parse JSON as browsers do: NaN and Infinity are no JSON."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


@given(st.dictionaries(st.text(max_size=3), values, max_size=4))
def test_any_row_is_one_line_of_valid_json(row):
    line = json_line(row)
    assert "\n" not in line
    strict(line)


@pytest.mark.parametrize(("value", "written"), [
    (math.nan, None), (math.inf, None), ([1.0, -math.inf], [1.0, None]), ({"a": {"b": math.nan}}, {"a": {"b": None}}),
    (np.float32(0.5), 0.5), (np.float64("nan"), None), (np.int64(3), 3), (np.bool_(True), True),
    (torch.tensor(1.5), 1.5), (torch.tensor([1.0, math.nan]), [1.0, None]), (np.arange(2), [0, 1]),
    ((1, 2), [1, 2]), (0.1, 0.1), (1e-300, 1e-300),
])
def test_numbers_of_any_kind_are_written_and_those_json_lacks_become_null(value, written):
    assert strict(json_line({"value": value})) == {"value": written}


def test_what_is_no_figure_is_refused():
    with pytest.raises(TypeError):
        json_line({"value": object()})


def lines(folder, name=METRICS_FILE):
    return [strict(line) for line in (folder / name).read_text().splitlines()]


def test_metrics_and_timeline_are_one_object_per_line_time_and_event_first(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.metric(1.5, "evaluate", version=3, loss=math.nan)
    recorder.task({"task": 0, "node": 2})
    recorder.close()
    assert list(lines(tmp_path)[0].items()) == [("time_s", 1.5), ("event", "evaluate"), ("version", 3), ("loss", None)]
    assert lines(tmp_path, TIMELINE_FILE) == [{"task": 0, "node": 2}]


def test_listeners_hear_every_metrics_row_without_a_folder_too(tmp_path):
    heard = []
    for folder in (None, tmp_path):
        Recorder(folder, listeners=(heard.append,)).metric(0.0, "log", a=1)
    assert heard == [{"time_s": 0.0, "event": "log", "a": 1}] * 2
    assert Recorder(None).state_dict() == {}


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path):
    first = Recorder(tmp_path)
    first.metric(0.0, "log", text="Grüße")
    first.task({"task": 0})
    state = first.state_dict()
    first.metric(1.0, "log", text="lost")
    first.task({"task": 1})
    first.close()
    (tmp_path / METRICS_FILE).open("a").write('{"half a li')
    second = Recorder(tmp_path)
    second.load_state_dict(state)
    second.metric(1.0, "log", text="again")
    second.close()
    assert [row["text"] for row in lines(tmp_path)] == ["Grüße", "again"]
    assert lines(tmp_path, TIMELINE_FILE) == [{"task": 0}]


def test_a_file_that_became_shorter_is_not_filled_up_with_zeros(tmp_path, caplog):
    first = Recorder(tmp_path)
    first.metric(0.0, "log", a=1)
    first.metric(1.0, "log", a=2)
    state = first.state_dict()
    first.close()
    whole = (tmp_path / METRICS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / METRICS_FILE).write_text(whole[0])
    second = Recorder(tmp_path)
    with caplog.at_level(logging.WARNING, "fedcore"):
        second.load_state_dict(state)
    second.metric(2.0, "log", a=3)
    second.close()
    assert [row["a"] for row in lines(tmp_path)] == [1, 3]
    assert "is shorter than it was" in caplog.text


def test_flush_makes_rows_readable_while_the_run_goes_on(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.metric(0.0, "log", a=1)
    recorder.flush()
    assert lines(tmp_path) == [{"time_s": 0.0, "event": "log", "a": 1}]


def test_rows_after_the_end_are_dropped(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.close()
    recorder.metric(0.0, "log", a=1)
    assert lines(tmp_path) == []


def test_an_atomic_write_replaces_the_whole_text_and_leaves_nothing_behind(tmp_path):
    write_atomically(tmp_path / "summary.json", "old" * 100)
    write_atomically(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
