"""Asynchronous strategies in virtual time: the order of events, limits, failures, nodes that come and go."""
import logging
import time

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import ServerApp

from fedcore.errors import AllNodesFailed, NothingCanHappen
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.simulations.availability import Markov
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from tests.support import Adding, Fates, Federation, ForeignGrid, Intervals, TableDevices, Toy, vector_model


def play(strategy=None, *, times=(1.0, 2.0, 3.0), app=None, clients=3, grid=None, evaluation=None, **limits):
    """Run a strategy to its end; options of the run that are no limits are recognised by their names."""
    names = {"expected", "min_nodes", "task_timeout_s", "seed"}
    options = {name: limits.pop(name) for name in names & limits.keys()}
    options["evaluation"] = evaluation or Evaluation()
    settings = {"devices": TableDevices(times), **(grid or {})}
    run = Federation(strategy or Adding(), clients, RunOptions(stop=StopRule(**limits), **options), app or Toy(),
                     grid=settings)
    return run.run()


def what(run, kind):
    return [entry[1:] for entry in run.strategy.diary if entry[0] == kind]


class Timed(Adding):
    """Sets timers at the start."""

    def __init__(self, *timers):
        super().__init__()
        self.timers = timers

    def on_start(self, hub):
        super().on_start(hub)
        for name, at in self.timers:
            hub.set_timer(name, at)


# ---- the order of events --------------------------------------------------------------------------------------------


def test_at_equal_times_replies_come_first_by_partition_then_failures_then_timers():
    run = play(Timed(("tick", 1.0)), times=[1.0], app=Toy(fails=(0, 2)), clients=4, seconds=1.0)
    assert [entry[:3] for entry in run.strategy.diary] == [("reply", 1.0, 1)], "the first ends a run of one second"
    run = play(Timed(("tick", 1.0)), times=[1.0], app=Toy(fails=(0, 2)), clients=4, seconds=1.5)
    assert [(kind, who) for kind, _, who, *_ in run.strategy.diary] == [
        ("reply", 1), ("reply", 3), ("failure", 0), ("failure", 2), ("timer", "tick")
    ]


def test_every_task_of_every_node_is_an_event_in_its_order():
    run = play(seconds=6.5)
    assert what(run, "reply") == [
        (1.0, 0, 0), (2.0, 0, 0), (2.0, 1, 2), (3.0, 0, 1), (3.0, 2, 4), (4.0, 0, 1), (4.0, 1, 3), (5.0, 0, 1),
        (6.0, 0, 0), (6.0, 1, 2), (6.0, 2, 5),
    ]
    assert run.hub.now == 6.5 and run.hub.stop_reason == "seconds"


def test_staleness_is_that_of_the_moment_of_use():
    run = play(client_updates=6)
    assert [row["staleness"] for row in run.notes.of("update")] == [[0], [0], [2], [1], [4], [1]]


def test_timers_are_replaced_cancelled_and_set_again():
    class Ticking(Timed):
        def on_timer(self, hub, name):
            super().on_timer(hub, name)
            if name == "tick" and hub.now < 3:
                hub.set_timer("tick", hub.now + 0.5)
                hub.cancel_timer("never")

    run = play(Ticking(("tick", 9.0), ("tick", 2.2), ("never", 2.5)), seconds=4.5)
    assert what(run, "timer") == [(2.2, "tick"), (2.7, "tick"), (3.2, "tick")]


def test_the_timeline_adds_up():
    network = Network(latency_s=0.1, uplink_mbps=0.01, downlink_mbps=0.02)
    run = play(client_updates=8, grid={"network": network})
    rows = [row for row in run.notes.tasks if row["outcome"] == "ok"]
    assert len(rows) == 8
    for row in rows:
        parts = row["download_s"] + row["queue_s"] + row["compute_s"] + row["upload_s"]
        assert row["start_s"] + parts == pytest.approx(row["end_s"])
    assert sorted(row["task"] for row in run.notes.tasks) == sorted({row["task"] for row in run.notes.tasks})


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limits", "updates", "now"), [
    ({"client_updates": 4}, 4, 3.0), ({"rounds": 2}, 6, 4.0), ({"seconds": 2.5}, 3, 2.5),
    ({"seconds": 99.0, "client_updates": 2, "rounds": 5}, 2, 2.0),
])
def test_each_limit_ends_the_run_and_says_so(limits, updates, now):
    run = play(**limits)
    assert run.hub.totals["client_updates"] == updates and run.hub.now == now
    reason = min(limits, key=lambda name: {"client_updates": 0, "rounds": 1, "seconds": 2}[name])
    assert run.hub.stop_reason == reason and run.notes.rows[-1]["event"] == "stop"
    assert run.notes.rows[-1]["reason"] == reason


def on_server(every=1, unit="versions"):
    return Evaluation("server", every, unit, lambda model: {"loss": float((2.0 - model.params).square().mean())})


def test_a_target_ends_the_run_at_the_first_version_that_reaches_it():
    run = play(evaluation=on_server(), target={"loss": 1.0}, rounds=50)
    losses = [row["loss"] for row in run.notes.of("evaluate")]
    assert run.hub.stop_reason == "target" and losses[-1] <= 1.0 < min(losses[:-1])
    assert run.hub.scores.time_to_target_s == run.hub.now


def test_a_target_that_the_first_model_reaches_costs_no_work():
    run = play(evaluation=on_server(), target={"loss": 5.0}, rounds=50)
    assert run.hub.stop_reason == "target" and run.strategy.diary == [] and run.hub.now == 0.0


def test_a_strategy_may_stop_the_run_at_any_time():
    class Stopping(Adding):
        def on_start(self, hub):
            super().on_start(hub)
            hub.stop("enough")

    run = play(Stopping(), rounds=5)
    assert run.hub.stop_reason == "enough" and run.strategy.diary == []
    assert {row["outcome"] for row in run.notes.tasks} == {"cancelled"}


def test_the_last_version_is_evaluated_once_at_the_end():
    run = play(evaluation=on_server(every=4), client_updates=6)
    assert [row["version"] for row in run.notes.of("evaluate")] == [0, 4, 6]
    run = play(evaluation=on_server(every=3), client_updates=6)
    assert [row["version"] for row in run.notes.of("evaluate")] == [0, 3, 6]


def test_an_evaluation_every_so_many_seconds():
    run = play(evaluation=on_server(2.5, "seconds"), seconds=8.4)
    assert [row["time_s"] for row in run.notes.of("evaluate")] == [0.0, 3.0, 5.0, 8.0, 8.4]


def test_clients_evaluate_the_version_they_are_sent_weighted_by_their_examples():
    run = play(app=Toy(num_examples=(1, 2, 5)), evaluation=Evaluation("clients"), client_updates=3)
    first = run.notes.of("evaluate")[0]
    assert first["version"] == 0 and first["where"] == "clients"
    assert first["loss"] == pytest.approx((1 * 1 + 4 * 2 + 9 * 5) / 8)
    assert [row["version"] for row in run.notes.of("evaluate")][-1] == run.hub.version


def test_an_update_flushed_at_the_end_is_evaluated_at_the_clients():
    class Flushing(Adding):
        def on_stop(self, hub):
            hub.publish(hub.model.params + 1)

    run = play(Flushing(), evaluation=Evaluation("clients"), client_updates=3)
    assert run.notes.of("evaluate")[-1]["version"] == run.hub.version == 4


def test_an_interrupted_run_ends_after_the_present_event():
    strategy, seen = Adding(), []
    run = Federation(strategy, options=RunOptions(stop=StopRule(rounds=9)),
                     interrupted=lambda: seen.append(1) or len(seen) == 3)
    run.run()
    assert run.hub.stop_reason == "interrupted" and len(strategy.diary) == 3


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_client_that_raises_is_shown_once_with_its_traceback_and_left_aside_after_three_times(caplog):
    with caplog.at_level(logging.ERROR, "fedcore"):
        run = play(app=Toy(fails=(1,)), client_updates=20)
    assert what(run, "failure") == [(2.0, 1, 2), (4.0, 1, 2), (6.0, 1, 2)]
    assert caplog.text.count("Traceback") == 1 and "node 1 raised an exception" in caplog.text
    assert "partition 1 is out of order" in caplog.text
    assert run.hub.counts["failures"] == 3 and run.hub.totals["client_updates"] == 20
    assert {partition for _, partition, _ in what(run, "reply")} == {0, 2}


def test_failures_count_anew_after_a_good_reply():
    crashes = {(0, index): 0.5 for index in (1, 2, 4, 5, 7, 8)}
    run = play(times=[1.0], clients=1, grid={"failures": Fates(crashes)}, client_updates=3)
    assert len(what(run, "failure")) == 6 and run.hub.totals["client_updates"] == 3


def test_when_every_client_raises_the_run_ends_with_the_last_failure():
    with pytest.raises(AllNodesFailed, match="(?s)none is left.*partition 2 is out of order"):
        play(app=Toy(fails=(0, 1, 2)), rounds=9)


def test_clients_that_fail_and_come_back_and_fail_do_not_go_on_for_ever():
    with pytest.raises(AllNodesFailed):
        play(app=Toy(fails=(0, 1, 2)), grid={"availability": Markov(5.0, 5.0, seed=1)}, min_nodes=1, expected=3)


def test_a_strategy_that_hands_out_nothing_is_an_error_and_not_a_hang():
    class Idle(Adding):
        def on_start(self, hub):
            pass

    with pytest.raises(NothingCanHappen, match="3 of 3 nodes are here"):
        play(Idle(), rounds=1)


def test_lost_messages_cost_their_time_to_live_and_the_work_is_given_again():
    fates = Fates(requests={(0, 1)}, replies={(1, 1)})
    run = play(times=[1.0], clients=2, grid={"failures": fates}, task_timeout_s=4.0, client_updates=2)
    assert what(run, "failure") == [(4.0, 0, 3), (4.0, 1, 3)] and run.hub.counts["lost"] == 2
    assert what(run, "reply") == [(5.0, 0, 0), (5.0, 1, 1)]


def test_a_crash_is_a_failure_at_its_moment():
    run = play(times=[2.0], clients=1, grid={"failures": Fates({(0, 1): 0.25})}, client_updates=1)
    assert what(run, "failure") == [(0.5, 0, 8)] and what(run, "reply") == [(2.5, 0, 0)]
    assert [row["outcome"] for row in run.notes.tasks][:2] == ["failed", "ok"]


# ---- who is here ----------------------------------------------------------------------------------------------------


def test_a_node_that_leaves_fails_its_tasks_first_and_gets_work_again_when_it_is_back():
    run = play(grid={"availability": Intervals({1: [(0, 2.5), (7.25, 99)]})}, seconds=10.0)
    events = [entry[:3] for entry in run.strategy.diary if entry[2] == 1]
    assert events == [("reply", 2.0, 1), ("failure", 2.5, 1), ("leave", 2.5, 1), ("join", 7.25, 1), ("reply", 9.25, 1)]
    assert [(row["event"], row["time_s"]) for row in run.notes.rows if row["event"] in ("join", "leave")] == [
        ("leave", 2.5), ("join", 7.25)
    ]
    lost = [row for row in run.notes.tasks if row["outcome"] == "lost"]
    assert [(row["node"], row["end_s"]) for row in lost] == [(1, 2.5)], "nobody hands work to a node that is gone"


def test_a_node_that_left_is_not_counted_as_one_that_fails():
    table = {1: [(start, start + 2.5) for start in range(0, 60, 5)]}
    run = play(grid={"availability": Intervals(table)}, seconds=58.0)
    assert len(what(run, "join")) == 11 and run.hub.failures_in_a_row == {}


def test_a_lost_task_of_a_node_that_left_brings_it_not_back_as_a_ghost():
    fates = Fates(requests={(1, 1)})
    run = play(grid={"availability": Intervals({1: [(0, 2.5)]}), "failures": fates}, task_timeout_s=6.0, seconds=12.0)
    assert what(run, "join") == [] and [node.partition for node in run.hub.nodes] == [0, 2]
    assert what(run, "failure") == [(2.5, 1, 5)]


def test_nodes_that_come_while_the_others_are_asked_who_they_are_join_the_run():
    availability = Intervals({2: [(0.05, 99)]})
    run = play(grid={"availability": availability, "network": Network(latency_s=0.1)}, min_nodes=2, seconds=9.0)
    assert [partition for _, partition in what(run, "join")] == [2]
    assert {partition for _, partition, _ in what(run, "reply")} == {0, 1, 2}


def test_nodes_that_leave_while_they_are_asked_who_they_are_get_no_work():
    availability = Intervals({2: [(0, 0.15), (5.0, 99)]})
    latencies = Network(latency_s=0.1)
    run = play(grid={"availability": availability, "network": latencies}, min_nodes=2, seconds=9.0)
    assert what(run, "failure") == []
    assert [partition for _, partition in what(run, "join")] == [2]


def test_the_run_waits_for_its_nodes_and_time_begins_when_they_are_here():
    availability = Intervals({0: [(50, 999)], 2: [(70, 999)]})
    run = play(grid={"availability": availability}, expected=3, client_updates=3)
    assert run.virtual.now == 72.0 and run.hub.now == 2.0


def test_a_run_that_waits_for_nodes_in_vain_says_so():
    with pytest.raises(NothingCanHappen, match="2 nodes are here, but the run needs 3"):
        play(grid={"availability": Intervals({1: []})}, expected=3)


def test_clients_that_know_no_query_take_part_all_the_same(caplog):
    with caplog.at_level(logging.WARNING, "fedcore"):
        run = play(app=Toy(has_query=False, lazy=False), client_updates=5)
    assert run.hub.counts["failures"] == 0 and run.hub.failures_in_a_row == {} and "query" not in caplog.text
    assert torch.equal(run.hub.model.params, play(client_updates=5).hub.model.params)


def test_a_query_that_is_lost_costs_no_node():
    run = play(grid={"failures": Fates(requests={(1, 0)})}, client_updates=6)
    assert [node.partition for node in run.hub.nodes] == [0, 1, 2]


# ---- in somebody else's app -----------------------------------------------------------------------------------------


def server_app(collected, **settings):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        collected.append(Adding().start(grid, ArrayRecord(vector_model().state_dict()), **settings))

    return app


def evaluate_fn(version, arrays):
    return MetricRecord({"loss": float(arrays["params"].numpy()[0]), "list": [1.0]}) if version % 2 else None


def test_our_strategy_runs_in_a_strangers_server_app_with_stock_clients():
    collected = []
    grid = VirtualGrid(Toy(has_query=False, lazy=False), 3, devices=TableDevices([1.0, 2.0, 3.0]))
    settings = {"train_config": ConfigRecord({"local-steps": 2}), "evaluate_fn": evaluate_fn}
    server_app(collected, num_rounds=2, **settings)(grid, None)
    (result,) = collected
    expected = play(rounds=2, app=Toy(lazy=False)).hub.model.params
    assert torch.equal(torch.from_numpy(result.arrays["params"].numpy()), expected)
    assert list(result.evaluate_metrics_serverapp) == [1, 3, 5] and grid.now == 4.0


def test_our_strategy_runs_on_somebody_elses_grid_by_asking_it_again_and_again(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    ids = [2**63 + 5, 17, 2**40]
    for has_query in (True, False):
        collected = []
        grid = ForeignGrid(Toy(has_query=has_query)(), {0: ids}, patience=4)
        server_app(collected, num_rounds=2)(grid, None)
        assert torch.isfinite(torch.from_numpy(collected[0].arrays["params"].numpy())).all()
        assert float(collected[0].arrays["params"].numpy()[0]) > 0.1


def test_nodes_of_somebody_elses_grid_may_come_and_go(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    collected = []
    grid = ForeignGrid(Toy()(), {0: [11, 12], 9: [11], 14: [11, 13]}, patience=2)
    server_app(collected, num_rounds=6)(grid, None)
    sources = {request.metadata.dst_node_id for request, _ in grid._pushed.values()
               if request.metadata.message_type == "train"}
    assert sources == {11, 12, 13}
