"""FedCompass with clients that are late, leave, fail and return, and a run that is stopped and continued."""
import shutil

import pytest
import torch

from fedcore.checkpoint import Checkpoints
from fedcore.session import Session
from fedcore.strategies.fedcompass import FedCompass
from tests.strategies.compass_world import TARGETS, Crashes, Presence, Pull, StepTimes, build, run


def test_a_late_update_is_kept_and_applied_with_the_next_group(tmp_path):
    devices = StepTimes([1.0, 1.0], {(1, 2): 2.0})    # client 1 needs 200 s for its second task; the limit is 150 s
    outcome = run(FedCompass(), devices, tmp_path, updates=8)
    late = next(row for row in outcome.tasks_of(1) if row["end_s"] == 220)
    assert late["base_version"] == 2 and late["group"] == 0
    assert not [row for row in outcome.updates if row["time_s"] == 220]    # a late upload changes nothing by itself
    assert [row["start_s"] for row in outcome.tasks_of(1)][2] == 220       # and its client does not wait
    used = next(row for row in outcome.updates if row.get("late") == 1)
    assert used["time_s"] > 220
    assert used["staleness"][used["nodes"].index(1)] == used["version"] - 1 - late["base_version"]


def test_a_client_that_is_late_twice_has_both_updates_applied(tmp_path):
    devices = StepTimes([1.0, 50.0], {(0, index): 2.0 for index in range(2, 6)})
    outcome = run(FedCompass(min_local_steps=5, max_local_steps=5), devices, tmp_path, updates=12)
    both = [row for row in outcome.updates if row["nodes"].count(0) > 1]
    assert both and all(len(row["nodes"]) == len(row["staleness"]) == len(row["weights"]) for row in both)
    assert sum(len(row["nodes"]) for row in outcome.updates) == outcome.hub.totals["client_updates"]


def test_stopping_applies_what_is_buffered_in_one_last_update(tmp_path):
    outcome = run(FedCompass(), [1.0, 1.0, 1.0, 1.1], tmp_path, updates=6)    # stops while two wait for two others
    assert [len(row["nodes"]) for row in outcome.updates] == [1, 1, 1, 1, 2]
    assert outcome.updates[-1]["nodes"] == [0, 3]
    assert outcome.metrics[-1]["event"] == "stop"


def test_a_run_that_stops_with_empty_buffers_publishes_nothing_more(tmp_path):
    outcome = run(FedCompass(), [1.0], tmp_path, task=Pull([[1.0, 1.0, 1.0]]), updates=3)
    assert [row["version"] for row in outcome.updates] == [1, 2, 3]


def test_a_group_is_released_when_the_client_it_waits_for_leaves(tmp_path):
    presence = Presence({1: [130.0]})
    devices = StepTimes([1.0, 1.25], {(1, 2): 1.3})
    outcome = run(FedCompass(), devices, tmp_path, updates=5, grid={"availability": presence})
    group = outcome.updates[2]
    assert (group["time_s"], group["nodes"]) == (130.0, [0])    # in group 0 since 20 s, and waiting from 120 s
    assert [row["start_s"] for row in outcome.tasks_of(0)][2] == 130.0


def test_the_update_of_a_client_that_leaves_while_it_waits_is_applied_with_the_next_group(tmp_path):
    presence = Presence({0: [122.0]})
    devices = StepTimes([1.0, 1.0, 1.05], {(2, 2): 1.3})
    outcome = run(FedCompass(), devices, tmp_path, updates=8, grid={"availability": presence})
    group = outcome.updates[3]
    assert group["nodes"] == [0, 1, 2] and group["late"] == 1
    assert all(0 not in row["nodes"] for row in outcome.updates[4:])


def test_a_client_that_returns_gets_a_first_task_and_its_upload_is_applied_at_once(tmp_path):
    presence = Presence({1: [50.0, 300.0]})
    outcome = run(FedCompass(), [1.0, 1.0], tmp_path, updates=9, grid={"availability": presence})
    back = [row for row in outcome.tasks_of(1) if row["start_s"] >= 300.0][0]
    assert (back["start_s"], back["local_steps"], back.get("group"), back["outcome"]) == (300.0, 20, None, "ok")
    assert any(row["time_s"] == back["end_s"] and row["nodes"] == [1] for row in outcome.updates)


def test_a_client_whose_task_failed_gets_other_work_and_nobody_waits_for_it(tmp_path):
    crashes = Crashes({(1, 2)})
    outcome = run(FedCompass(), [1.0, 1.0], tmp_path, updates=6, grid={"failures": crashes})
    failed = next(row for row in outcome.tasks_of(1) if row["outcome"] != "ok")
    following = next(row for row in outcome.tasks_of(1) if row["start_s"] >= failed["end_s"])
    assert failed["end_s"] == 70.0 and following["start_s"] == 70.0
    # What is left of its group's time suffices for half the work.
    assert (failed["group"], following["group"], following["local_steps"]) == (0, 0, 50)
    assert outcome.updates[2]["nodes"] == [0, 1] and outcome.updates[2]["time_s"] == 120.0


def test_a_first_task_that_failed_is_given_again(tmp_path):
    outcome = run(FedCompass(), [1.0, 1.0], tmp_path, updates=4, grid={"failures": Crashes({(1, 1)})})
    first, second = outcome.tasks_of(1)[:2]
    assert (first["outcome"], second["outcome"]) != ("ok", "failed")
    assert (second["start_s"], second["local_steps"], second.get("group")) == (10.0, 20, None)


def test_a_client_beyond_the_expected_ones_is_turned_away(tmp_path):
    presence = Presence({2: [30.0]}, absent_at_first=(2,))
    outcome = run(FedCompass(), [1.0, 1.0, 1.0], tmp_path, updates=6, expected=2, grid={"availability": presence})
    assert [row["turned_away"] for row in outcome.metrics if "turned_away" in row] == [2]
    assert outcome.tasks_of(2) == []


EVENTFUL = {
    "availability": Presence({2: [250.0, 400.0], 0: [333.0, 350.0]}),
    "failures": Crashes({(1, 3)}),
}
EVENTFUL_TIMES = StepTimes([10.0, 40.0, 13.0], {(0, 3): 2.5, (2, 2): 2.0, (0, 5): 3.0})


def eventful(strategy, folder, saved):
    """A run with late, failing and returning clients that can be saved and continued."""
    setup, _, _ = build(strategy, EVENTFUL_TIMES, folder, Pull(TARGETS), 24, None, (), EVENTFUL, {})
    return Session(setup, strategy, Checkpoints(saved, keep=1000), save_every_s=0.0)


def finish(session, strategy):
    strategy.drive(session)
    session.hub.recorder.close()
    return session.hub.model


FEW_STEPS = {"min_local_steps": 2, "max_local_steps": 10}


@pytest.mark.parametrize(
    "options", [FEW_STEPS, {**FEW_STEPS, "normalise_steps": True, "link_estimate": True, "lr_decay": 0.9}]
)
def test_saving_at_any_event_and_continuing_equals_never_having_stopped(tmp_path, options):
    strategy, whole = FedCompass(**options), tmp_path / "whole"
    expected = finish(eventful(strategy, whole, tmp_path / "saved"), strategy)
    checkpoints = sorted((tmp_path / "saved").iterdir())
    assert len(checkpoints) > 30
    for checkpoint in checkpoints:
        again = tmp_path / checkpoint.stem
        shutil.copytree(whole, again)
        (again / "saved").mkdir()
        shutil.copy(checkpoint, again / "saved")
        strategy = FedCompass(**options)
        session = eventful(strategy, again, again / "saved")
        session.save_every_s = 1e9
        assert session.restore() == []
        assert torch.equal(finish(session, strategy).params, expected.params), checkpoint.stem
        for name in ("metrics.jsonl", "timeline.jsonl"):
            assert (again / name).read_text() == (whole / name).read_text(), (name, checkpoint.stem)


def test_a_run_is_the_same_every_time(tmp_path):
    files = []
    for attempt in ("first", "second"):
        strategy = FedCompass(**FEW_STEPS)
        finish(eventful(strategy, tmp_path / attempt, tmp_path / f"{attempt}-saved"), strategy)
        files.append([(tmp_path / attempt / name).read_text() for name in ("metrics.jsonl", "timeline.jsonl")])
    assert files[0] == files[1]
