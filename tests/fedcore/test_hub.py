"""The hub: what a strategy sends, what comes back, and what must never touch the model."""
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from fedcore.clock import Event
from fedcore.errors import AllNodesFailed, InvalidSetting, NothingCanHappen
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.payload import VectorRecord
from fedcore.session import Session
from fedcore.tasks import REFUSED, Answer, Failure, Reply
from tests.support import VECTOR_LAYOUT, Adding, Notes, ScriptedGrid, vector_model


@pytest.fixture
def grid():
    return ScriptedGrid()


@pytest.fixture
def hub(grid):
    return opened(grid)


def opened(grid, **options):
    """Return a hub whose nodes are known and whose clock stands at zero."""
    hub = Hub(grid, vector_model(), RunOptions(**options), Notes())
    Session(hub, Adding()).open()
    hub.recorder.rows.clear()
    return hub


def update(value=1.0, kind="update", task_id=None, version=None, **metrics):
    """Return a good reply's content."""
    figures = MetricRecord({"num-examples": 10, "work-steps": 4, "loss": 0.5, **metrics})
    values = VectorRecord.of(torch.full((6,), value), {}, VECTOR_LAYOUT)
    echo = {"kind": kind} | ({} if task_id is None else {"task-id": task_id}) | (
        {} if version is None else {"version": version}
    )
    return RecordDict({"arrays": values, "metrics": figures, "reply": ConfigRecord(echo)})


def answered(hub, grid, content, after=1.0, **request):
    """Train on node 0, let it answer, and return what the hub makes of it."""
    hub.train(hub.nodes[0], **request)
    grid.answer(grid.sent[-1], content, grid.now + after)
    outcome = hub.next_outcome(None)
    return hub.read_reply(outcome) if isinstance(outcome, Answer) else outcome


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_a_request_carries_the_model_and_its_settings(hub, grid):
    task_id = hub.train(hub.nodes[1], local_steps=7, config={"lr-scale": 0.5})
    message = grid.sent[0]
    assert message.metadata.dst_node_id == 1001 and message.metadata.message_type == "train"
    config = dict(message.content["config"])
    assert config == {"task-id": task_id, "version": 0, "draw": 0, "seed": 0, "reply": "update", "lr-scale": 0.5,
                      "local-steps": 7}
    assert torch.equal(message.content["arrays"].model.params, hub.model.params)


def test_draws_are_counted_per_partition(hub, grid):
    for node in (hub.nodes[0], hub.nodes[1], hub.nodes[0], hub.nodes[0]):
        hub.train(node)
    assert [message.content["config"]["draw"] for message in grid.sent] == [0, 0, 1, 2]


def test_settings_of_the_run_go_into_every_request_and_the_strategys_win(grid):
    hub = opened(grid, train_config={"lr-scale": 2.0, "proximal-mu": 1.0}, seed=5)
    hub.train(hub.nodes[0], config={"lr-scale": 0.5})
    config = grid.sent[0].content["config"]
    assert (config["lr-scale"], config["proximal-mu"], config["seed"]) == (0.5, 1.0, 5)


def test_all_messages_of_a_version_share_one_record(hub, grid):
    for node in hub.nodes:
        hub.train(node)
    records = {id(message.content["arrays"]) for message in grid.sent}
    hub.publish(hub.model.params + 1)
    hub.train(hub.nodes[0])
    assert len(records) == 1 and id(grid.sent[-1].content["arrays"]) not in records


def test_a_refused_push_fails_at_the_next_turn_and_not_at_once(hub, grid):
    grid.refusing.add(1000)
    task_id = hub.train(hub.nodes[0])
    outcome = hub.next_outcome(None)
    assert isinstance(outcome, Failure) and outcome.task_id == task_id and "could not be reached" in outcome.reason
    assert hub.counts["lost"] == 1 and hub.totals["bytes_down"] == 0
    assert hub.recorder.tasks[-1]["outcome"] == "lost"


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_a_good_reply_is_read(hub, grid):
    reply = answered(hub, grid, update(2.0, **{"train-seconds": 0.7}), after=3.0, local_steps=4)
    assert isinstance(reply, Reply)
    assert torch.equal(reply.update, torch.full((6,), 2.0))
    assert (reply.node.partition, reply.base_version, reply.local_steps, reply.num_examples) == (0, 0, 4, 10)
    assert (reply.elapsed_s, reply.train_seconds, reply.metrics["loss"]) == (3.0, 0.7, 0.5)
    assert hub.totals == {"client_updates": 1, "client_steps": 4, "bytes_up": hub.totals["bytes_up"],
                          "bytes_down": hub.totals["bytes_down"]}
    assert hub.totals["bytes_up"] > 24 and hub.totals["bytes_down"] > 24


def test_a_client_cannot_claim_more_steps_than_asked_nor_more_seconds_than_passed(hub, grid):
    reply = answered(hub, grid, update(**{"work-steps": 99, "train-seconds": 50.0}), after=2.0, local_steps=4)
    assert (reply.local_steps, reply.train_seconds) == (4, 2.0)
    reply = answered(hub, grid, update(**{"work-steps": 3}), local_steps=4)
    assert reply.local_steps == 3
    reply = answered(hub, grid, update(**{"work-steps": 9}))
    assert reply.local_steps == 9


def test_a_model_where_an_update_was_wanted_becomes_an_update(grid):
    hub = Hub(grid, vector_model(), RunOptions(), Notes())
    hub.add_nodes([(node, "") for node in opened(grid).nodes])
    hub.publish(torch.full((6,), 10.0))
    hub.train(hub.nodes[0])
    hub.publish(torch.full((6,), 50.0))
    grid.answer(grid.sent[-1], update(12.0, kind="model"), 1.0)
    reply = hub.read_reply(hub.next_outcome(None))
    assert torch.equal(reply.update, torch.full((6,), 2.0)) and reply.staleness == 1


def test_staleness_is_measured_when_it_is_used(hub, grid):
    reply = answered(hub, grid, update())
    assert reply.staleness == 0
    hub.publish(hub.model.params + 1)
    hub.publish(hub.model.params + 1)
    assert reply.staleness == 2
    hub.publish(hub.model.params + 1, used=[reply])
    assert hub.recorder.of("update")[-1]["staleness"] == [2]


def test_a_reply_survives_a_restart_as_plain_data(hub, grid):
    reply = answered(hub, grid, update(2.0))
    hub.publish(hub.model.params + 1)
    again = hub.restore_reply(reply.state())
    assert again.staleness == 1 and torch.equal(again.update, reply.update)
    assert again.state().keys() == reply.state().keys() and again.node == reply.node
    hub.remove_node(1000)
    assert hub.restore_reply(reply.state()).node.partition == 0


# ---- what must not touch the model ----------------------------------------------------------------------------------


def nan_values():
    return update(math.nan)


def no_arrays():
    content = update()
    del content["arrays"]
    return content


def other_shape():
    content = update()
    content["arrays"] = ArrayRecord({"params": Array(np.zeros((2, 3), np.float32))})
    return content


def unknown_dtype():
    content = update()
    content["arrays"] = ArrayRecord()
    content["arrays"]["params"] = Array("nonsense", (6,), "numpy.ndarray", b"123")
    return content


MALFORMED = {
    "NaN": (nan_values, "NaN or infinite"),
    "no arrays": (no_arrays, "one record of arrays, found 0"),
    "shape": (other_shape, "must be float32"),
    "dtype": (unknown_dtype, "nonsense"),
    "no examples": (lambda: update(**{"num-examples": 0}), "num-examples is 0"),
    "kind": (lambda: update(kind="gradient"), "kind is 'gradient'"),
    "a model instead of an update": (lambda: update(kind="model"), "kind 'model', but 'update' was asked for"),
    "another task's id": (lambda: update(task_id=99), "answers task 99"),
}


@pytest.mark.parametrize(("make", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_is_refused_counted_logged_and_changes_nothing(hub, grid, caplog, make, words):
    before = hub.model
    with caplog.at_level(logging.WARNING, "fedcore"):
        failure = answered(hub, grid, make())
    assert isinstance(failure, Failure) and failure.code == REFUSED and words in failure.reason
    assert hub.model is before and hub.version == 0
    assert hub.totals["client_updates"] == 0 and hub.counts["refused"] == 1
    (row,) = hub.recorder.of("refused")
    assert row["node"] == 0 and words in row["reason"]
    assert "node 0" in caplog.text and words.split("'")[0] in caplog.text
    assert hub.recorder.tasks[-1]["outcome"] == "refused"
    assert hub.failures_in_a_row == {0: 1}
    assert isinstance(answered(hub, grid, update()), Reply), "the run goes on"
    assert hub.failures_in_a_row == {}


def test_a_second_reply_to_the_same_task_is_refused(hub, grid):
    assert isinstance(answered(hub, grid, update()), Reply)
    grid.answer(grid.sent[0], update(5.0), 2.0)
    assert hub.next_outcome(2.5).kind == "time"
    assert hub.counts["refused"] == 1 and hub.totals["client_updates"] == 1
    (row,) = hub.recorder.of("refused")
    assert row["node"] == 0 and "unknown task, or a second one" in row["reason"]


def test_a_reply_to_a_task_that_was_never_given_is_refused(hub, grid):
    other = ScriptedGrid()
    stranger = opened(other)
    stranger.train(stranger.nodes[2])
    grid.answer(other.sent[0], update(), 1.0)
    assert hub.next_outcome(2.0).kind == "time"
    assert hub.counts["refused"] == 1
    assert hub.recorder.of("refused")[0]["node"] == 2


def test_a_reply_from_another_node_than_was_asked_is_refused(hub, grid):
    hub.train(hub.nodes[0])
    hub.train(hub.nodes[1])
    first, second = grid.sent
    grid.answer(first, update(), 1.0)
    forged = grid.next_event(None).message
    forged.metadata.__dict__["_src_node_id"] = 1001
    grid.plan(Event("reply", 1.0, 1001, forged))
    assert hub.next_outcome(2.0).kind == "time"
    assert hub.counts["refused"] == 1 and "another node" in hub.recorder.of("refused")[0]["reason"]
    grid.answer(first, update(), 3.0)
    assert isinstance(hub.next_outcome(None), Answer), "the real one still counts"


def test_a_cancelled_tasks_reply_is_dropped_and_billed(hub, grid):
    task_id = hub.train(hub.nodes[0])
    hub.cancel(task_id)
    grid.answer(grid.sent[0], update(), 1.0)
    assert hub.next_outcome(2.0).kind == "time"
    assert hub.totals["client_updates"] == 0 and hub.totals["bytes_up"] > 24
    assert hub.recorder.tasks[-1]["outcome"] == "cancelled" and hub.recorder.tasks[-1]["end_s"] == 1.0
    assert hub.counts["late"] == 1


def test_a_reply_after_the_deadline_is_dropped_counted_and_named(hub, grid):
    sent = [hub.task(hub.train(node)) for node in hub.nodes[:2]]
    grid.answer(grid.sent[0], update(), 1.0)
    grid.answer(grid.sent[1], update(), 9.0)
    replies = hub.collect(sent, deadline_s=5.0, min_replies=1)
    assert [answer.node.partition for answer in replies.arrived] == [0]
    assert [(failure.node.partition, failure.code) for failure in replies.missing] == [(1, 3)]
    assert "5" in replies.missing[0].reason and hub.now == 5.0
    assert hub.next_outcome(20.0).kind == "time"
    assert hub.counts["late"] == 1 and hub.totals["client_updates"] == 0
    (row,) = hub.recorder.of("late")
    assert row["node"] == 1 and "after 9 s" in row["reason"]


def test_an_error_reply_is_a_failure_with_its_node_and_words(hub, grid, caplog):
    with caplog.at_level(logging.ERROR, "fedcore"):
        for _ in range(2):
            failure = answered(hub, grid, Error(2, "Traceback ...\nValueError: 42"))
    assert isinstance(failure, Failure) and failure.code == 2 and "ValueError: 42" in failure.reason
    assert hub.counts["failures"] == 2 and len(hub.recorder.of("failure")) == 2
    assert hub.recorder.of("failure")[0]["node"] == 0
    assert caplog.text.count("ValueError: 42") == 1, "shown once"


def test_a_long_traceback_is_shown_with_its_end(hub, grid, caplog):
    trace = "Traceback\n" + "  File x\n" * 5000 + "ValueError: the reason"
    with caplog.at_level(logging.ERROR, "fedcore"):
        answered(hub, grid, Error(2, trace))
    assert "Traceback" in caplog.text and "ValueError: the reason" in caplog.text and len(caplog.text) < 20_000


def test_what_a_node_writes_cannot_steer_the_terminal(hub, grid, caplog):
    with caplog.at_level(logging.ERROR, "fedcore"):
        answered(hub, grid, Error(2, "\x1b[2Jgone\x07"))
    assert "\x1b" not in caplog.text and "gone" in caplog.text


def test_lost_messages_are_counted_apart_from_failures(hub, grid):
    for code in (3, 4, 5):
        answered(hub, grid, Error(code, "gone"))
    assert hub.counts == {**hub.counts, "lost": 3, "failures": 0}


# ---- asking and waiting ---------------------------------------------------------------------------------------------


def test_answers_come_in_ascending_partition_order(hub, grid):
    content = RecordDict({"config": ConfigRecord({"what": 1})})
    tasks = [hub.send_to(node, "train.custom", content) for node in reversed(hub.nodes)]
    for at, message in enumerate(grid.sent):
        grid.answer(message, RecordDict(), float(3 - at))
    replies = hub.collect(tasks)
    assert [answer.node.partition for answer in replies.arrived] == [0, 1, 2] and replies.missing == []
    assert grid.sent[0].metadata.message_type == "train.custom"


def test_each_nodes_own_content_and_steps(hub, grid):
    def content(node):
        return RecordDict({"config": ConfigRecord({"local-steps": node.partition + 1})})

    grid.refusing.add(1002)
    hub.grid = Immediate(grid)
    replies = hub.ask(hub.nodes, "train.custom", content)
    assert [message.content["config"]["local-steps"] for message in grid.sent] == [1, 2]
    assert [answer.node.partition for answer in replies.arrived] == [0, 1]
    assert [failure.node.partition for failure in replies.missing] == [2]
    assert [row["local_steps"] for row in hub.recorder.tasks] == [3]
    hub.end_unread()
    assert sorted((row["node"], row["local_steps"], row["outcome"]) for row in hub.recorder.tasks) == [
        (0, 1, "ok"), (1, 2, "ok"), (2, 3, "lost")
    ]


class Immediate:
    """A scripted grid that answers every message after a second."""

    def __init__(self, grid):
        self.grid = grid

    def __getattr__(self, name):
        return getattr(self.grid, name)

    def push_messages(self, messages):
        ids = self.grid.push_messages(messages)
        if ids[0] is not None:
            self.grid.answer(self.grid.sent[-1], RecordDict(), self.grid.now + 1)
        return ids


def test_the_deadline_waits_on_for_the_least_share(grid):
    hub = opened(grid, round_deadline_s=2.0, min_replies_share=0.6)
    sent = [hub.task(hub.train(node)) for node in hub.nodes]
    for message, at in zip(grid.sent, (1.0, 4.0, 9.0), strict=True):
        grid.answer(message, update(), at)
    replies = hub.collect(sent)
    assert hub.now == 4.0 and len(replies.arrived) == 2 and len(replies.missing) == 1


@pytest.mark.parametrize(("share", "nodes", "least"), [(0.07, 100, 7), (0.29, 100, 29), (0.5, 3, 2), (1.0, 3, 3)])
def test_the_least_share_is_not_rounded_up_by_float_errors(share, nodes, least):
    grid = ScriptedGrid(nodes)
    hub = opened(grid, round_deadline_s=5.0, min_replies_share=share)
    sent = [hub.task(hub.train(node)) for node in hub.nodes]
    for at, message in enumerate(grid.sent):
        grid.answer(message, update(), 10.0 + at)
    assert len(hub.collect(sent).arrived) == least


def test_failures_end_the_waiting_for_their_tasks(hub, grid):
    sent = [hub.task(hub.train(node)) for node in hub.nodes]
    grid.answer(grid.sent[0], update(), 1.0)
    grid.answer(grid.sent[1], Error(8, "crashed"), 2.0)
    grid.answer(grid.sent[2], update(), 3.0)
    replies = hub.collect(sent)
    assert [answer.node.partition for answer in replies.arrived] == [0, 2]
    assert [failure.code for failure in replies.missing] == [8]


def test_nothing_can_happen_is_an_error_and_not_a_hang(hub):
    sent = [hub.task(hub.train(node)) for node in hub.nodes]
    with pytest.raises(NothingCanHappen, match="3 of 3 nodes are here"):
        hub.collect(sent)


def test_when_all_nodes_failed_the_error_says_so(hub, grid):
    for node in hub.nodes:
        hub.train(node)
        grid.answer(grid.sent[-1], Error(2, f"ValueError of {node.partition}"), 1.0)
        hub.next_outcome(None)
    with pytest.raises(AllNodesFailed, match="ValueError of 2"):
        hub.next_outcome(None)


# ---- versions, timers, figures --------------------------------------------------------------------------------------


def test_publishing_makes_a_version_and_leaves_old_models_alone(hub):
    first = hub.model
    hub.publish(hub.model.params + 1, weights=[0.5], note=3)
    assert hub.version == 1 and torch.equal(first.params, torch.zeros(6))
    (row,) = hub.recorder.of("update")
    assert row["version"] == 1 and row["weights"] == [0.5] and row["note"] == 3


def test_timers_come_in_the_order_of_their_times_then_of_their_setting(hub):
    for name, at in (("late", 3.0), ("b", 1.0), ("a", 1.0), ("gone", 0.5)):
        hub.set_timer(name, at)
    hub.cancel_timer("gone")
    hub.cancel_timer("never set")
    assert hub.next_timer() == 1.0
    hub.next_outcome(hub.next_timer())
    assert list(hub.pop_due_timers()) == ["b", "a"] and hub.now == 1.0


def test_setting_a_timer_again_replaces_it(hub):
    hub.set_timer("a", 1.0)
    hub.set_timer("a", 5.0)
    assert hub.next_timer() == 5.0


def test_a_timer_in_the_past_is_due_now_but_after_the_replies_of_now(hub, grid):
    hub.train(hub.nodes[0])
    hub.train(hub.nodes[1])
    for message in grid.sent:
        grid.answer(message, update(), 4.0)
    hub.next_outcome(None)
    hub.set_timer("past", 1.0)
    assert isinstance(hub.next_outcome(hub.next_timer()), Answer)
    assert hub.next_outcome(hub.next_timer()).kind == "time"
    assert hub.now == 4.0 and list(hub.pop_due_timers()) == ["past"]


def test_a_timer_at_infinity_never_comes(hub):
    hub.set_timer("a", 1.0)
    hub.set_timer("a", math.inf)
    assert hub.next_timer() is None


def test_a_timer_at_no_number_is_refused(hub):
    with pytest.raises(InvalidSetting, match="at=nan"):
        hub.set_timer("a", math.nan)


def test_logged_figures_are_rows(hub):
    hub.log(speed=2.5)
    (row,) = hub.recorder.of("log")
    assert row == {"time_s": 0.0, "event": "log", "version": 0, "speed": 2.5}


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluations(hub):
    return [(row["version"], row["loss"]) for row in hub.recorder.of("evaluate")]


def test_every_n_versions_are_evaluated_on_the_server(grid):
    hub = opened(grid, evaluation=Evaluation("server", 3, "versions", lambda model: {"loss": float(model.params[0])}))
    for value in range(1, 8):
        hub.publish(torch.full((6,), float(value)))
    assert evaluations(hub) == [(3, 3.0), (6, 6.0)] and hub.counts["evaluations"] == 3


def test_every_so_many_seconds_the_next_version_is_evaluated(grid):
    hub = opened(grid, evaluation=Evaluation("server", 2.5, "seconds", lambda model: {"loss": float(model.params[0])}))
    for second in range(1, 9):
        hub.next_outcome(float(second))
        hub.publish(torch.full((6,), float(second)))
    assert [version for version, _ in evaluations(hub)] == [3, 5, 8]


def figures(loss, examples):
    return RecordDict({"metrics": MetricRecord({"num-examples": examples, "loss": loss})})


def test_clients_evaluations_are_averaged_by_examples_in_a_fixed_order(grid):
    hub = polling(grid)
    losses, examples = [0.1, 0.7, 1e-9], [3, 5, 11]
    for order in ([0, 1, 2], [2, 0, 1]):
        hub.publish(hub.model.params + 1)
        asked = grid.sent[-3:]
        for at, partition in enumerate(order):
            grid.answer(asked[partition], figures(losses[partition], examples[partition]), grid.now + at)
        hub.finish_polls()
    expected = (0.1 * 3 + 0.7 * 5 + 1e-9 * 11) / 19
    assert evaluations(hub) == [(1, expected), (2, expected)]
    assert {row["kind"] for row in hub.recorder.tasks} == {"evaluate"}


def polling(grid, **options):
    hub = Hub(grid, vector_model(), RunOptions(evaluation=Evaluation("clients"), **options), Notes())
    hub.add_nodes([(node, "update,model") for node in opened(grid).nodes])
    return hub


def test_a_malformed_or_failed_evaluation_leaves_its_client_out(grid):
    hub = polling(grid)
    for bad in (figures(math.nan, 4), Error(2, "no")):
        hub.publish(hub.model.params + 1)
        for message, answer in zip(grid.sent[-3:], (figures(0.5, 4), bad, figures(0.7, 4)), strict=True):
            grid.answer(message, answer, grid.now + 1.0)
        hub.finish_polls()
    assert evaluations(hub) == [(1, pytest.approx(0.6)), (2, pytest.approx(0.6))]
    assert hub.counts["refused"] == 1 and hub.counts["failures"] == 1
    assert hub.failures_in_a_row == {}, "who cannot evaluate may still train"


def test_the_figures_of_a_few_clients_are_not_taken_for_all(grid):
    hub = polling(grid)
    hub.publish(hub.model.params + 1)
    for message, answer in zip(grid.sent, (figures(0.5, 4), Error(2, "no"), Error(2, "no")), strict=True):
        grid.answer(message, answer, 1.0)
    hub.finish_polls()
    assert evaluations(hub) == []
    assert hub.recorder.of("log")[0] | {"answers": 1, "asked": 3} == hub.recorder.of("log")[0]


def test_a_node_that_cannot_be_asked_does_not_hold_up_the_evaluation(grid):
    hub = polling(grid)
    grid.refusing.add(1001)
    hub.publish(hub.model.params + 1)
    for message in grid.sent:
        grid.answer(message, figures(0.5, 4), 1.0)
    hub.finish_polls()
    assert evaluations(hub) == [(1, 0.5)]


def test_without_nodes_there_is_nothing_to_evaluate(grid):
    hub = polling(grid)
    for node in hub.nodes:
        hub.remove_node(node.id)
    hub.publish(hub.model.params + 1)
    hub.finish_polls()
    assert evaluations(hub) == []


def test_a_clients_figures_cannot_pass_for_the_runs_own(grid):
    hub = polling(grid)
    hub.publish(hub.model.params + 1)
    content = figures(0.5, 4)
    content["metrics"].update({"version": 99, "event": 1, "time_s": -1.0, "where": 7, "bytes_up": -5})
    for message in grid.sent:
        grid.answer(message, content, 1.0)
    hub.finish_polls()
    (row,) = hub.recorder.of("evaluate")
    assert (row["version"], row["event"], row["time_s"], row["where"]) == (1, "evaluate", 1.0, "clients")
    assert row["bytes_up"] == hub.totals["bytes_up"] and row["loss"] == 0.5


def test_nodes_that_come_and_go_during_an_evaluation_are_not_missed(grid):
    hub = polling(grid)
    hub.publish(hub.model.params + 1)
    grid.plan(Event("leave", 0.5, 1002))
    grid.plan(Event("join", 0.6, 1009))
    for message in grid.sent:
        grid.answer(message, figures(0.5, 4), 1.0)
    hub.finish_polls()
    assert [node.id for node in hub.nodes] == [1000, 1001] and hub.pop_waiting() == [1009]


def test_a_target_stops_the_run_once_all_its_figures_are_reached(grid):
    values = iter([{"loss": 0.9, "accuracy": 0.95}, {"loss": 0.4, "accuracy": 0.5}, {"loss": 0.4, "accuracy": 0.92}])
    rule = StopRule(target={"accuracy": 0.9, "loss": 0.5})
    options = RunOptions(stop=rule, evaluation=Evaluation("server", fn=lambda model: next(values)))
    hub = Hub(grid, vector_model(), options)
    for reached in (None, None, "target"):
        hub.publish(hub.model.params + 1)
        assert hub.stop_reason == reached
    assert hub.scores.best_accuracy == 0.95 and hub.scores.time_to_target_s == 0.0


def test_an_evaluation_that_is_no_number_is_neither_the_best_nor_a_target(grid):
    values = iter([{"accuracy": math.nan}, {"accuracy": 0.3}])
    rule = StopRule(target={"accuracy": 0.2})
    options = RunOptions(stop=rule, evaluation=Evaluation("server", fn=lambda model: next(values)))
    hub = Hub(grid, vector_model(), options)
    hub.publish(hub.model.params + 1)
    assert hub.stop_reason is None
    hub.publish(hub.model.params + 1)
    assert hub.scores.best_accuracy == 0.3 and hub.stop_reason == "target"
