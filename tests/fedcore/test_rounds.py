"""Synchronous strategies: exchanges, deadlines, who is missing; and Flower's own strategies under our driver."""
import logging
import random
import time

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedYogi,
)

from fedcore.checkpoint import Checkpoints, load_tree, save_tree
from fedcore.errors import AllNodesFailed, EmptyRound, NothingCanHappen, UnsupportedModel
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.payload import VectorRecord
from fedcore.rounds import FlowerRounds, RoundStrategy, attributes_of, in_model_dtypes, set_attributes, train_all
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from fedcore.vectors import Model
from tests.support import VECTOR_LAYOUT, Fates, Federation, Intervals, TableDevices, Toy, small_net, vector_model


class Mean(RoundStrategy):
    """Averages the updates of all nodes: the smallest synchronous strategy."""

    def __init__(self):
        self.sums = torch.zeros(6)

    def round(self, hub, round_index):
        replies = train_all(hub, hub.nodes)
        hub.require_weight(len(replies), len(replies))
        mean = sum(reply.update for reply in replies) / len(replies)
        self.sums = self.sums + mean
        hub.publish(hub.model.params + mean, replies, round=round_index)

    def state_dict(self):
        return {"sums": self.sums}

    def load_state_dict(self, state):
        self.sums = state["sums"]


OPTIONS = {"seed", "expected", "min_nodes", "task_timeout_s", "round_deadline_s", "min_replies_share", "evaluation"}


def play(strategy=None, *, clients=3, times=(1.0, 2.0, 3.0), app=None, grid=None, model=None, **given):
    options = {name: given.pop(name) for name in OPTIONS & given.keys()}
    extras = {name: given.pop(name) for name in {"checkpoints", "interrupted", "recorder"} & given.keys()}
    run = Federation(strategy or Mean(), clients, RunOptions(stop=StopRule(**given), **options), app or Toy(),
                     model or vector_model(), grid={"devices": TableDevices(times), **(grid or {})}, **extras)
    return run.run()


def flower(strategy=None, **given):
    return play(FlowerRounds(strategy or fedavg()), **given)


def fedavg(kind=FedAvg, **settings):
    return kind(**{"fraction_evaluate": 0.0, "min_available_nodes": 1, "min_train_nodes": 1, **settings})


# ---- our own --------------------------------------------------------------------------------------------------------


def test_a_round_takes_as_long_as_its_slowest_client():
    run = play(rounds=3)
    assert run.hub.now == 9.0 and run.hub.version == 3 and run.hub.round_index == 3
    assert [row["nodes"] for row in run.notes.of("update")] == [[0, 1, 2]] * 3
    assert [row["staleness"] for row in run.notes.of("update")] == [[0, 0, 0]] * 3


def test_every_clients_row_in_the_timeline_ends_when_its_reply_came():
    run = play(rounds=2)
    assert [(row["node"], row["start_s"], row["end_s"]) for row in run.notes.tasks] == [
        (0, 0.0, 1.0), (1, 0.0, 2.0), (2, 0.0, 3.0), (0, 3.0, 4.0), (1, 3.0, 5.0), (2, 3.0, 6.0)
    ]
    assert not run.virtual.engine._times, "nothing is kept of tasks that have ended"


def test_the_order_in_which_replies_come_changes_no_bit():
    first, second = play(rounds=3, times=[1.0, 2.0, 3.0]), play(rounds=3, times=[3.0, 1.0, 2.0])
    assert torch.equal(first.hub.model.params, second.hub.model.params)
    first, second = flower(rounds=3, times=[1.0, 2.0, 3.0]), flower(rounds=3, times=[3.0, 1.0, 2.0])
    assert torch.equal(first.hub.model.params, second.hub.model.params)


def test_a_deadline_goes_on_without_stragglers():
    run = play(rounds=3, round_deadline_s=2.5, min_replies_share=0.5)
    assert run.hub.now == 7.5
    assert [row["nodes"] for row in run.notes.of("update")] == [[0, 1]] * 3
    assert run.hub.counts["late"] == 2 and [row["node"] for row in run.notes.of("late")] == [2, 2]


def test_beyond_the_deadline_the_least_share_is_waited_for():
    run = play(rounds=1, round_deadline_s=0.5, min_replies_share=0.5)
    assert run.hub.now == 2.0 and run.notes.of("update")[0]["nodes"] == [0, 1]


def test_a_strategy_may_exchange_as_often_as_it_likes():
    class Twice(RoundStrategy):
        def round(self, hub, round_index):
            first = hub.ask(hub.nodes, "train.first", RecordDict({"config": ConfigRecord({"n": round_index})}))
            total = sum(answer.content["metrics"]["value"] for answer in first.arrived)
            content = RecordDict({"config": ConfigRecord({"n": total})})
            second = hub.ask(hub.nodes[:1], "train.second", content)
            hub.log(found=second.arrived[0].content["metrics"]["value"])

    app = ClientApp()
    for action, factor in (("first", 1), ("second", 10)):
        def answer(message, context, factor=factor):
            value = message.content["config"]["n"] * factor + context.node_config["partition-id"]
            return Message(RecordDict({"metrics": MetricRecord({"value": value})}), reply_to=message)
        app.train(action)(answer)
    run = play(Twice(), app=app, rounds=2)
    assert [row["found"] for row in run.notes.of("log")] == [30, 60]
    assert [(row["kind"], row["outcome"]) for row in run.notes.tasks] == [
        *[("train.first", "ok")] * 3, ("train.second", "ok"), *[("train.first", "ok")] * 3, ("train.second", "ok")
    ]
    assert not run.virtual.engine._times


def test_the_time_limit_drops_the_round_under_way():
    run = play(seconds=7.0)
    assert run.hub.version == 2 and run.hub.now == 7.0 and run.hub.stop_reason == "seconds"
    assert [row["outcome"] for row in run.notes.tasks[6:]] == ["cancelled"] * 3


def test_evaluation_every_so_many_seconds_happens_after_rounds():
    rule = Evaluation("server", 4.0, "seconds", lambda model: {"loss": 0.0})
    run = play(rounds=4, evaluation=rule)
    assert [row["time_s"] for row in run.notes.of("evaluate")] == [0.0, 6.0, 9.0, 12.0]


def test_a_round_with_nobody_in_it_ends_as_the_strategy_decides():
    with pytest.raises(EmptyRound, match="0 replies"):
        play(app=Toy(fails=(0, 1, 2)), rounds=3)


# ---- who is here ----------------------------------------------------------------------------------------------------


def test_nodes_that_come_and_go_between_rounds_are_taken_note_of():
    availability = Intervals({1: [(0, 4.5)], 2: [(3.5, 99)]})
    for strategy in (Mean(), FlowerRounds(fedavg())):
        run = play(strategy, rounds=4, times=[2.0], grid={"availability": availability}, min_nodes=2)
        assert [row["nodes"] for row in run.notes.of("update")] == [[0, 1], [0, 1], [0, 2], [0, 2]]
        assert [(row["event"], row["node"]) for row in run.notes.rows if row["event"] in ("join", "leave")] == [
            ("join", 2), ("leave", 1)
        ]


def test_a_node_that_leaves_at_the_very_end_of_a_round_is_not_asked_again():
    availability = Intervals({0: [(0, 2.0), (10.0, 99)]})
    run = play(clients=1, times=[2.0], seconds=13.0, grid={"availability": availability})
    assert [row["time_s"] for row in run.notes.of("update")] == [2.0, 12.0]
    assert run.hub.round_index == 2 and run.hub.counts["lost"] == 0


def test_a_node_that_takes_its_work_with_it_does_not_hold_up_the_round():
    availability = Intervals({2: [(0, 2.5)]})
    run = play(rounds=2, grid={"availability": availability})
    assert [row["nodes"] for row in run.notes.of("update")] == [[0, 1], [0, 1]] and run.hub.now == 4.5


def test_without_nodes_the_rounds_wait_for_one():
    availability = Intervals({0: [(0, 1.0), (50, 99)]})
    run = play(clients=1, rounds=2, times=[1.0], grid={"availability": availability})
    assert [row["time_s"] for row in run.notes.of("update")] == [1.0, 51.0]


def test_flowers_wait_for_nodes_hides_no_news_from_the_hub(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.update(now=clock["now"] + seconds))
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", time.sleep)
    availability = Intervals({1: [(0, 1.5), (20, 99)], 2: [(30, 99)]})
    run = flower(fedavg(min_available_nodes=3), rounds=2, times=[1.0], min_nodes=1,
                 grid={"availability": availability})
    assert [row["time_s"] for row in run.notes.of("update")] == [31.0, 32.0]
    assert {(row["event"], row["node"]) for row in run.notes.rows if row["event"] in ("join", "leave")} == {
        ("leave", 1), ("join", 1), ("join", 2)
    }
    assert [node.partition for node in run.hub.nodes] == [0, 1, 2]


# ---- never for ever -------------------------------------------------------------------------------------------------


def test_rounds_that_send_nothing_and_have_no_limit_are_an_error():
    with pytest.raises(NothingCanHappen, match="sent nobody any work in round 1"):
        flower(fedavg(fraction_train=0.0), seconds=100.0)
    assert flower(fedavg(fraction_train=0.0), rounds=3).hub.round_index == 3


def test_clients_that_all_raise_end_the_run_with_their_words():
    with pytest.raises(AllNodesFailed, match="(?s)partition . is out of order"):
        flower(app=Toy(fails=(0, 1, 2)), rounds=50)


def test_clients_that_begin_to_fail_later_end_the_run_too():
    class Tiring(Toy):
        def train(self, message, context):
            if message.content["config"]["server-round"] > 2:
                raise RuntimeError("tired")
            return super().train(message, context)

    run = pytest.raises(AllNodesFailed, flower, app=Tiring(lazy=False), seconds=1e9)
    assert "tired" in str(run.value)


def test_a_failed_round_leaves_the_model_and_the_run_goes_on():
    crashes = {(partition, 1): 0.5 for partition in range(3)}
    run = flower(rounds=3, grid={"failures": Fates(crashes)})
    assert run.hub.version == 2 and run.notes.of("log")[0]["failed_round"] is True


def test_a_lost_reply_costs_the_runs_time_to_live_and_not_flowers_twelve_hours():
    run = flower(rounds=1, task_timeout_s=20.0, grid={"failures": Fates(replies={(1, 0)})})
    assert run.hub.now == 20.0 and run.notes.of("update")[0]["nodes"] == [0, 2]


# ---- Flower's strategies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam, FedYogi, FedMedian])
def test_our_driver_ends_where_flowers_own_loop_ends(kind):
    run = flower(fedavg(kind), rounds=3)
    grid = VirtualGrid(Toy(), 3, devices=TableDevices([1.0, 2.0, 3.0]))
    start = ArrayRecord(vector_model().state_dict())
    result = fedavg(kind).start(grid, start, num_rounds=3, train_config=ConfigRecord({"seed": 0}))
    assert torch.allclose(run.hub.model.params, torch.from_numpy(result.arrays["params"].numpy()).float(), atol=1e-6)
    assert run.hub.now == grid.now == 9.0


def test_a_round_draws_the_same_nodes_whatever_was_drawn_before():
    def asked(**given):
        run = flower(fedavg(fraction_train=0.5), clients=8, times=[1.0], rounds=4, **given)
        return [row["nodes"] for row in run.notes.of("update")]

    first = asked(seed=1)
    random.seed(99)
    random.random()
    assert asked(seed=1) == first and asked(seed=2) != first
    assert len({tuple(nodes) for nodes in first}) > 1


class Drawing(Toy):
    """A client that draws from everybody's generators."""

    def train(self, message, context):
        random.random()
        np.random.rand(3)
        return super().train(message, context)


def test_a_strategys_noise_does_not_depend_on_what_clients_draw():
    def noisy():
        return DifferentialPrivacyServerSideFixedClipping(
            fedavg(), noise_multiplier=0.5, clipping_norm=1.0, num_sampled_clients=3
        )

    calm, drawing = flower(noisy(), rounds=2), flower(noisy(), rounds=2, app=Drawing())
    assert torch.equal(calm.hub.model.params, drawing.hub.model.params)
    assert not torch.equal(calm.hub.model.params, flower(noisy(), rounds=2, seed=5).hub.model.params)


class Odd(Toy):
    """Partition 1 answers in a way of its own."""

    def __init__(self, spoil):
        super().__init__()
        object.__setattr__(self, "spoil", spoil)

    def train(self, message, context):
        reply = super().train(message, context)
        if context.node_config["partition-id"] == 1:
            self.spoil(reply.content)
        return reply


def with_nan(content):
    content["arrays"] = VectorRecord.of(torch.full((6,), torch.nan), {}, VECTOR_LAYOUT)


def as_update(content):
    content["reply"] = ConfigRecord({"kind": "update"})


def more_metrics(content):
    content["metrics"]["surprise"] = 1.0


def fewer_metrics(content):
    del content["metrics"]["loss"]


def other_name(content):
    content["weights"] = content.pop("arrays")


def two_metrics(content):
    content["more"] = MetricRecord({"num-examples": 1})


@pytest.mark.parametrize(("spoil", "words"), [
    (with_nan, "NaN"), (as_update, "of kind 'update', but 'model' was asked for"),
    (more_metrics, "are not those of the other clients"), (fewer_metrics, "are not those of the other clients"),
    (other_name, "'weights'"), (two_metrics, "one record of metrics, found 2"),
])
def test_a_client_that_answers_otherwise_is_refused_and_the_run_goes_on(spoil, words):
    run = flower(rounds=2, app=Odd(spoil))
    assert [row["nodes"] for row in run.notes.of("update")] == [[0, 2], [0, 2]]
    assert run.hub.counts["refused"] == 2 and run.hub.totals["client_updates"] == 4
    assert all(row["node"] == 1 and words in row["reason"] for row in run.notes.of("refused"))
    assert torch.isfinite(run.hub.model.params).all()


def test_flowers_own_federated_evaluation_is_written_with_ours():
    run = flower(fedavg(fraction_evaluate=1.0), rounds=2, evaluation=Evaluation("clients"))
    rows = run.notes.of("evaluate")
    assert [row["version"] for row in rows] == [0, 1, 1, 2, 2] and {row["where"] for row in rows} == {"clients"}
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"])


def test_counters_and_statistics_keep_their_dtypes():
    model = Model.of(small_net())
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = message.content["arrays"]
        arrays = ArrayRecord({name: value + 1 for name, value in arrays.to_torch_state_dict().items()})
        metrics = MetricRecord({"num-examples": context.node_config["partition-id"] + 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    for kind in (FedAvg, FedAdam):
        run = flower(fedavg(kind), rounds=2, app=app, model=model)
        found = run.hub.model
        assert found.buffers["1.num_batches_tracked"].dtype == torch.int64
        assert found.params.dtype == torch.float32
    assert int(flower(rounds=2, app=app, model=model).hub.model.buffers["1.num_batches_tracked"]) == 9


def test_a_strategy_that_returns_another_model_is_named():
    class Other(FedAvg):
        def aggregate_train(self, server_round, replies):
            return ArrayRecord([np.zeros(2)]), MetricRecord()

    with pytest.raises(UnsupportedModel, match="Other returned arrays that do not fit the model"):
        flower(fedavg(Other), rounds=1)


def test_results_in_the_models_dtypes_are_left_as_they_are():
    arrays = ArrayRecord(vector_model().state_dict())
    assert in_model_dtypes(arrays, VECTOR_LAYOUT) is arrays


# ---- what a strategy remembers --------------------------------------------------------------------------------------


def test_a_strategys_attributes_survive_a_checkpoint(tmp_path):
    class Remembering(FedAvgM):
        pass

    def make():
        return DifferentialPrivacyServerSideFixedClipping(Remembering(), 0.5, 1.0, 3)

    strategy = make()
    inner = strategy.strategy
    inner.numbers = {"a": np.float32(1.5), 3: [1, (2, None)]}
    inner.vector, inner.tensor = np.arange(3.0), torch.ones(2)
    inner.records = [ArrayRecord([np.ones(2)]), MetricRecord({"a": 1}), ConfigRecord({"b": "c"})]
    save_tree(tmp_path / "state", attributes_of(strategy))
    other = make()
    set_attributes(other, load_tree(tmp_path / "state"))
    found = other.strategy
    assert found.numbers == inner.numbers and isinstance(found.numbers["a"], np.float32)
    assert np.array_equal(found.vector, inner.vector) and torch.equal(found.tensor, inner.tensor)
    assert [dict(record) for record in found.records[1:]] == [{"a": 1}, {"b": "c"}]
    assert found.train_metrics_aggr_fn is other.strategy.train_metrics_aggr_fn


def test_what_cannot_be_saved_is_told_once(caplog):
    strategy = fedavg()
    strategy.socket_of_mine = object()
    with caplog.at_level(logging.WARNING, "fedcore"):
        for _ in range(3):
            assert "socket_of_mine" not in attributes_of(strategy)
    assert caplog.text.count("FedAvg.socket_of_mine cannot be saved") == 1


@pytest.mark.parametrize("make", [Mean, lambda: FlowerRounds(fedavg(FedAdam, fraction_train=0.7))])
def test_an_interrupted_run_of_rounds_continues_to_the_same_bits(tmp_path, make):
    network = Network(latency_s=0.1)
    whole = play(make(), clients=5, rounds=5, grid={"network": network})
    for attempt in range(10):
        rounds = iter(range(2))
        run = Federation(make(), 5, RunOptions(stop=StopRule(rounds=5)), checkpoints=Checkpoints(tmp_path),
                         interrupted=lambda rounds=rounds: next(rounds, None) != 0, grid={"network": network})
        run.run(resume=attempt > 0)
        if run.hub.stop_reason == "rounds":
            break
    assert attempt > 1 and torch.equal(run.hub.model.params, whole.hub.model.params)
    assert run.hub.now == whole.hub.now
