"""The opening of a run, its limits, its checkpoints and its end."""
import logging

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedcore.checkpoint import Checkpoints
from fedcore.clock import Event
from fedcore.errors import NothingCanHappen, UnusableCheckpoint
from fedcore.hub import Hub
from fedcore.options import RunOptions, StopRule
from fedcore.session import Session
from fedcore.tasks import Node
from tests.support import Adding, Federation, Notes, ScriptedGrid, vector_model


def session(grid, strategy=None, checkpoints=None, save_every_s=0.0, **options):
    hub = Hub(grid, vector_model(), RunOptions(**options), Notes())
    return Session(hub, strategy or Adding(), checkpoints, save_every_s)


class Describing(ScriptedGrid):
    """A scripted grid whose nodes answer queries with what a table says; None: they do not answer."""

    def __init__(self, answers):
        super().__init__(len(answers))
        self.answers = dict(zip(self.online, answers, strict=True))

    def answer(self, request, outcome, at):
        if request.metadata.message_type != "query":
            super().answer(request, outcome, at)
        elif (described := self.answers[request.metadata.dst_node_id]) is not None:
            super().answer(request, described, at)


def described(info=None, **metrics):
    content = RecordDict({"metrics": MetricRecord({name.replace("_", "-"): value for name, value in metrics.items()})})
    if info is not None:
        content["info"] = ConfigRecord(info)
    return content


def nodes(opened):
    return [(node.id, node.partition, node.num_examples) for node in opened.hub.nodes]


# ---- who takes part -------------------------------------------------------------------------------------------------


def test_nodes_say_who_they_are_and_are_listed_by_partition():
    grid = Describing([described(partition_id=2, num_examples=5, info={"kinds": "update", "labels": [2, 3]}),
                       described(partition_id=0, num_examples=7)])
    opened = session(grid)
    opened.open()
    assert nodes(opened) == [(1001, 0, 7), (1000, 2, 5)] and opened.hub.expected == 2
    assert opened.clients == {0: {"node": 0, "num_examples": 7, "labels": None},
                              2: {"node": 2, "num_examples": 5, "labels": [2, 3]}}
    assert opened.hub.recorder.of("start")[0]["nodes"] == 2


@pytest.mark.parametrize("strange", [
    described(partition_id=0.5, num_examples=5), described(partition_id=1, num_examples=0),
    described(partition_id=1, num_examples=2.5), described(partition_id=[1], num_examples=5),
])
def test_a_description_that_makes_no_sense_counts_as_one_example(strange, caplog):
    opened = session(Describing([described(partition_id=0, num_examples=7), strange]))
    with caplog.at_level(logging.WARNING, "fedcore"):
        opened.open()
    assert nodes(opened) == [(1000, 0, 7), (1001, 1, 1)]
    assert "cannot be used" in caplog.text


def test_of_two_nodes_with_one_partition_the_later_is_turned_away(caplog):
    grid = Describing([described(partition_id=4, num_examples=1), described(partition_id=4, num_examples=2)])
    opened = session(grid)
    with caplog.at_level(logging.WARNING, "fedcore"):
        opened.open()
    assert nodes(opened) == [(1000, 4, 1)] and "partition 4; the later one is turned away" in caplog.text


def test_a_deadline_of_the_rounds_is_none_for_the_introduction():
    class Slow(ScriptedGrid):
        def answer(self, request, outcome, at):
            super().answer(request, outcome, at + 5.0)

    opened = session(Slow(), round_deadline_s=0.1)
    opened.open()
    assert len(opened.hub.nodes) == 3


def test_whoever_does_not_say_who_it_is_in_time_counts_as_one_example():
    opened = session(Describing([None, described(partition_id=0, num_examples=5), described()]), ready_timeout_s=3.0)
    opened.open()
    assert nodes(opened) == [(1001, 0, 5), (1000, 1, 1), (1002, 2, 1)]


def test_the_run_waits_for_those_that_are_expected():
    grid = ScriptedGrid(2)
    grid.plan(Event("join", 5.0, 1002))
    waiting = session(grid, expected=3)
    arrive(grid, 1002, at=5.0)
    waiting.open()
    assert len(waiting.hub.nodes) == 3 and waiting.hub.now == 0.0 and grid.now == 5.0


def arrive(grid, node_id, at):
    """Let a node be online from a time."""
    before = grid.next_event

    def next_event(until):
        event = before(until)
        if grid.now >= at and node_id not in grid.online:
            grid.online.append(node_id)
        return event

    grid.next_event = next_event


@pytest.mark.parametrize("options", [{"expected": 3}, {"min_nodes": 3}, {"expected": 3, "ready_timeout_s": 10.0}])
def test_too_few_nodes_are_an_error(options):
    with pytest.raises(NothingCanHappen, match="2 nodes are here, but the run needs 3. Start more clients"):
        session(ScriptedGrid(2), **options).open()


def test_a_run_may_begin_with_fewer_nodes_than_belong_to_it():
    opened = session(ScriptedGrid(2), expected=5, min_nodes=2)
    opened.open()
    assert opened.hub.expected == 5 and len(opened.hub.nodes) == 2


def test_a_hundred_thousand_nodes_are_admitted_in_linear_work():
    opened = session(ScriptedGrid(0))
    opened.hub.add_nodes([(Node(10**6 + k, k), "") for k in range(100_000)])
    assert opened.hub.nodes is opened.hub.nodes, "listed once, not for every question"
    assert opened.hub.node_of(99_999).id == 10**6 + 99_999


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_it_saves_when_it_is_time_to(tmp_path, monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr("fedcore.session.time.monotonic", lambda: clock["now"])
    saving = session(ScriptedGrid(), checkpoints=Checkpoints(tmp_path, keep=9), save_every_s=30.0)
    saving.open()
    for now, expected in ((110.0, 0), (130.0, 1), (159.0, 1), (160.0, 2)):
        clock["now"] = now
        saving.safe_point()
        assert len(list(tmp_path.iterdir())) == expected


def test_without_a_folder_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saving = session(ScriptedGrid(), save_every_s=0.0)
    saving.open()
    saving.safe_point()    # would be due
    assert not list(tmp_path.iterdir())


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    run = Federation(Adding(), options=RunOptions(stop=StopRule(rounds=2)), checkpoints=checkpoints).run()
    newest = max(tmp_path.iterdir())
    newest.write_bytes(b"")
    again = Federation(Adding(), options=RunOptions(stop=StopRule(rounds=2)), checkpoints=Checkpoints(tmp_path))
    (problem,) = again.session.restore()
    assert newest.name in problem
    again.strategy.drive(again.session)
    assert torch.equal(again.hub.model.params, run.hub.model.params)


def test_resuming_from_nothing_is_bad_input(tmp_path):
    with pytest.raises(UnusableCheckpoint, match="holds none"):
        session(ScriptedGrid(), checkpoints=Checkpoints(tmp_path)).restore()


def test_time_in_which_nobody_ran_is_not_counted():
    grid = ScriptedGrid()
    opened = session(grid)
    opened.open()
    assert opened.hub.next_outcome(7.0).kind == "time"
    state = opened.hub.state_dict()
    later = ScriptedGrid()
    later.now = 5000.0
    resumed = Hub(later, vector_model(), RunOptions(), Notes())
    resumed.load_state_dict(state)
    assert resumed.now == 7.0
    assert resumed.next_outcome(9.0).kind == "time" and later.now == 5002.0


# ---- the end --------------------------------------------------------------------------------------------------------


def test_the_end_drops_what_is_under_way_and_says_why_it_came():
    grid = ScriptedGrid()
    opened = session(grid)
    opened.open()
    opened.hub.train(opened.hub.nodes[0])
    opened.hub.stop("because")
    order = []
    opened.close(lambda: order.append(opened.hub.closing))
    assert order == [True]
    assert [row["outcome"] for row in opened.hub.recorder.tasks] == ["cancelled"]
    assert opened.hub.recorder.rows[-1]["event"] == "stop" and opened.hub.recorder.rows[-1]["reason"] == "because"


def test_the_first_reason_to_stop_is_the_one_that_counts():
    opened = session(ScriptedGrid())
    opened.hub.stop("first")
    opened.hub.stop("second")
    assert opened.hub.stop_reason == "first"
