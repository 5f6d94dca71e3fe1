"""What the live page remembers of a run."""
import json

from hypothesis import given
from hypothesis import strategies as st

from fedcore.dashboard.feed import MOST_POINTS, MOST_TASKS, MOST_TROUBLES, Feed
from fedcore.recorder import Recorder
from tests.fedcore.dashboard.conftest import rows_of_a_run


def test_a_run_that_is_resumed_begins_with_what_it_did_before(run_folder):
    metrics, tasks = rows_of_a_run()
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"time_s": 3')
    (run_folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    seen, _ = Feed(run_folder).look()
    assert (seen.version, seen.totals["client_updates"], len(seen.evaluations)) == (40, 40, 40)
    assert len(seen.tasks) == 40 and seen.finished == {0: 10, 1: 9, 2: 10, 3: 10}
    assert seen.settings["task"] == "digits"


def test_rows_that_are_written_again_after_a_restart_count_once():
    metrics, tasks = rows_of_a_run()
    once, twice = Feed(), Feed()
    for feed, parts in ((once, (slice(None),)), (twice, (slice(60), slice(31, None)))):
        for part in parts:
            for row in metrics[part]:
                feed.on_row(row)
    for feed, parts in ((once, (slice(None),)), (twice, (slice(30), slice(15, None)))):
        for part in parts:
            for row in tasks[part]:
                feed.on_task(row)
    (one, _), (two, _) = once.look(), twice.look()
    for name in ("evaluations", "traffic", "tasks", "version", "totals", "now_s"):
        assert getattr(one, name) == getattr(two, name), name


@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 3))
def test_curves_stay_in_order_whatever_comes(times, repeat):
    feed = Feed()
    for at in times * repeat:
        feed.on_row({"time_s": at, "event": "evaluate", "version": 1, "accuracy": 0.5})
        feed.on_row({"time_s": at, "event": "update", "version": 1, "bytes_up": 1, "bytes_down": 2})
    seen, _ = feed.look()
    for found in ([row["time_s"] for row in seen.evaluations], [row[0] for row in seen.traffic]):
        assert found == sorted(found)


def test_memory_is_bounded_however_long_a_run_is():
    feed = Feed()
    for index in range(3 * MOST_POINTS):
        feed.on_row({"time_s": float(index), "event": "evaluate", "version": index, "accuracy": 0.5})
        feed.on_row({"time_s": float(index), "event": "refused", "version": index, "node": 1, "reason": "x"})
        feed.on_task({"node": 1, "end_s": float(index), "outcome": "ok"})
    seen, _ = feed.look()
    assert len(seen.evaluations) <= MOST_POINTS and len(seen.troubles) == MOST_TROUBLES
    assert len(seen.tasks) == MOST_TASKS
    assert seen.evaluations[-1]["time_s"] == 3 * MOST_POINTS - 1       # the newest is never dropped
    assert seen.counts["refused"] == 3 * MOST_POINTS and seen.finished == {1: 3 * MOST_POINTS}


def test_what_is_looked_at_does_not_change_meanwhile():
    feed = Feed()
    feed.on_row({"time_s": 1.0, "event": "evaluate", "version": 1, "accuracy": 0.5})
    seen, _ = feed.look()
    feed.on_row({"time_s": 2.0, "event": "evaluate", "version": 2, "accuracy": 0.6})
    assert (len(seen.evaluations), seen.version) == (1, 1)


def test_a_recorder_tells_of_tasks_too(tmp_path):
    feed, recorder = Feed(), Recorder(tmp_path)
    recorder.task_listeners.append(feed.on_task)
    recorder.task({"task": 0, "node": 3, "end_s": 1.0, "outcome": "ok"})
    recorder.close()
    assert feed.look()[0].finished == {3: 1}
