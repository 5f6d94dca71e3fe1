import json

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from fedcore.report.facts import busiest_share, facts_of, histogram_bins, offline_spans, tasks_of
from fedcore.runs import Run


def task(node, start, compute, transfer=0.0, **more):
    return {"task": 0, "node": node, "kind": "train", "start_s": start, "end_s": start + compute + 2 * transfer,
            "download_s": transfer, "queue_s": 0.0, "compute_s": compute, "upload_s": transfer, "local_steps": 10,
            "outcome": "ok"} | more


@pytest.fixture
def facts_from(tmp_path):
    def write(timeline=(), metrics=(), clients=()):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timeline))
        (tmp_path / "clients.json").write_text(json.dumps(list(clients)))
        return facts_of(Run(tmp_path))
    return write


def test_time_that_nothing_explains_is_waiting(facts_from):
    facts = facts_from([task(0, 0, 6, 1), task(1, 0, 2, 1), task(1, 6, 3, 0.5)],
                       [{"time_s": 10.0, "event": "stop"}])
    spent = {client.node: client.spent for client in facts.clients}
    assert (spent[0].training, spent[0].transfer, spent[0].waiting) == (6, 2, 2)
    assert (spent[1].training, spent[1].transfer, spent[1].waiting) == (5, 3, 2)
    assert facts.spent.online == 20


def test_time_away_is_not_waiting(facts_from):
    facts = facts_from([task(0, 0, 2)], [{"time_s": 2.0, "event": "leave", "node": 0},
                                         {"time_s": 8.0, "event": "join", "node": 0},
                                         {"time_s": 10.0, "event": "stop"}])
    assert facts.clients[0].spent.waiting == 2
    assert facts.clients[0].spent.offline == 6


def test_a_client_that_left_for_good_is_away_until_the_end(facts_from):
    facts = facts_from([task(0, 0, 2)], [{"time_s": 4.0, "event": "leave", "node": 0},
                                         {"time_s": 9.0, "event": "stop"}])
    assert facts.offline == {0: [(4.0, 9.0)]}


def test_who_joins_late_was_away_before():
    metrics = [{"time_s": 5.0, "event": "join", "node": 0}]
    assert offline_spans(metrics, [], 10.0) == {0: [(0.0, 5.0)]}
    assert offline_spans(metrics, tasks_of([task(0, 1, 1)]), 10.0) == {}


def test_contributions_count_what_was_applied(facts_from):
    updates = [{"time_s": 1.0, "event": "update", "nodes": [0, 1], "staleness": [0, 2], "weights": [0.5, 0.25]},
               {"time_s": 2.0, "event": "update", "nodes": [1], "staleness": [4], "weights": [0.25]}]
    first, second = facts_from(metrics=updates).clients
    assert (first.updates, first.weight, first.staleness) == (1, 0.5, 0)
    assert (second.updates, second.weight, second.staleness) == (2, 0.5, 3)


def test_weights_are_unknown_when_one_update_lacks_them(facts_from):
    updates = [{"time_s": 1.0, "event": "update", "nodes": [0], "staleness": [0], "weights": [1.0]},
               {"time_s": 2.0, "event": "update", "nodes": [0], "staleness": [0]}]
    assert facts_from(metrics=updates).clients[0].weight is None


def test_steps_of_lost_work_are_counted_apart(facts_from):
    facts = facts_from([task(0, 0, 1), task(0, 1, 1, outcome="failed"), task(0, 2, 1, outcome="refused"),
                        task(0, 3, 1, kind="evaluate")])
    assert facts.clients[0].steps == 10
    assert facts.lost_steps == 20


def test_a_task_whose_parts_are_unknown_counts_as_work():
    [only] = tasks_of([task(0, 1.0, 3.0) | {"download_s": None, "queue_s": None, "compute_s": None, "upload_s": None}])
    assert (only.compute, only.download, only.upload) == (3.0, 0.0, 0.0)


def test_a_task_of_a_round_ends_when_its_client_was_done_not_when_the_round_closed():
    [only] = tasks_of([task(0, 0.0, 3.0, 0.5) | {"end_s": 10.0}])
    assert (only.end, only.worked_from, only.worked_until) == (4.0, 0.5, 3.5)


def test_waiting_for_its_turn_on_a_busy_client_is_no_second_work(facts_from):
    late = task(0, 0, 2) | {"queue_s": 4.0, "end_s": 6.0}
    facts = facts_from([task(0, 0, 4), late], [{"time_s": 6.0, "event": "stop"}])
    assert facts.tasks[1].worked_from == 4
    assert (facts.spent.training, facts.spent.waiting) == (6, 0)


def test_work_called_off_lasts_as_long_as_its_steps_take_and_the_rest_is_waiting(facts_from):
    row = task(0, 0, 9) | {"compute_s": None, "download_s": None, "upload_s": None, "outcome": "cancelled"}
    facts = facts_from([row], [{"time_s": 9.0, "event": "stop"}],
                       [{"node": 0, "num_examples": 1, "seconds_per_step": 0.2}])
    assert (facts.spent.training, facts.spent.waiting) == (2, 7)
    assert (facts.clients[0].steps, facts.lost_steps) == (0, 0)


@pytest.mark.parametrize("broken", [{"end_s": None}, {"start_s": "soon"}, {"node": "1"}, {"node": True},
                                    {"end_s": float("nan")}, {"end_s": -1.0}])
def test_a_row_without_usable_times_or_node_is_left_out(broken):
    assert len(tasks_of([task(0, 0, 1), task(0, 0, 1) | broken])) == 1


def test_slowest_and_fastest_client(facts_from):
    rows = [{"node": node, "num_examples": 5, "seconds_per_step": speed} for node, speed in enumerate([0.1, 0.4, 0.2])]
    slow, fast = facts_from(clients=rows).slow_to_fast
    assert (slow.node, fast.node) == (1, 0)
    assert facts_from(clients=[row | {"seconds_per_step": 1.0} for row in rows]).slow_to_fast is None


@given(lists(integers(0, 10_000), min_size=1))
def test_a_histogram_counts_every_value_once_in_few_bins(values):
    bins = histogram_bins(values)
    assert sum(amount for _, amount in bins) == len(values)
    assert len(bins) <= 32


def test_the_busiest_tenth():
    assert busiest_share([9.0, *[1.0] * 9]) == 0.5
    assert busiest_share([0.0, 0.0]) is None
