"""Oracles count every query, survive what a black box does, and never ask beyond the box or the budget."""
import time

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clients.blackbox import (
    MOST_FAILURES_IN_A_ROW,
    Box,
    Counts,
    OwnBlackBox,
    SiteOracle,
    is_black_box,
    with_site,
    within,
)
from fedcore.clients.blackbox_request import read_counts
from fedcore.clients.build import build_task
from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.blackbox_quadratics import BlackBoxQuadratics
from fedcore.config import load_experiment
from fedcore.errors import BadExperiment, BlackBoxFailed, InvalidSetting, MalformedRequest
from fedcore.payload import ARRAYS, CONFIG, METRICS, VectorRecord, wire_bytes
from fedcore.strategies.black_box import DESCEND, PROBE, SURROGATE, message_type, settings_entry
from fedcore.strategies.finite_differences import Differences
from fedcore.vectors import Model

MY_BOWL = """
class MyBowl:
    dimension, box = 3, (-1, 1)
    def evaluate(self, point):
        return (point**2).sum()
"""


class Bowl:
    """A black box of a user's own; what it was asked is written down."""

    dimension, box = 2, (-2.0, 4.0)

    def __init__(self, answers=None, **limits):
        self.asked, self.answers = [], answers
        for name, value in limits.items():
            setattr(self, name, value)

    def evaluate(self, point, site):
        self.asked.append((site, point.copy()))
        if self.answers is not None:
            answer = self.answers(len(self.asked))
            if isinstance(answer, Exception):
                raise answer
            return answer
        return float((point**2).sum())


def oracle_of(bowl, **counts):
    return SiteOracle(OwnBlackBox(bowl, 3), 1, Counts(**counts))


def test_points_of_the_unit_cube_reach_the_function_in_its_own_units_and_inside_its_box():
    bowl = Bowl()
    values = oracle_of(bowl).ask(np.array([[0.5, 0.5], [0.0, 1.0], [-1.0, 2.0]]))
    assert values.tolist() == [2.0, 20.0, 20.0]
    assert [site for site, _ in bowl.asked] == [1, 1, 1]


@given(st.lists(st.floats(-1, 2), min_size=3, max_size=3))
def test_a_box_maps_there_and_back(point):
    box = Box.of([[-1, 1], [0, 10], [5, 5.5]], 3)
    assert np.allclose(box.to_unit(box.from_unit(np.array(point))), point, atol=1e-12)


def test_the_unit_box_changes_no_bit():
    points, box = np.random.default_rng(0).random((50, 4)), Box.of((0, 1), 4)
    assert np.array_equal(box.to_unit(points), points) and np.array_equal(box.from_unit(points), points)


@pytest.mark.parametrize("bounds", [[1, 0], [0, 0], [0, float("inf")], [[0, 1]], "wide", [[0, 1], [0, 1], [1, 0]], []])
def test_bounds_that_make_no_box_are_refused(bounds):
    with pytest.raises(InvalidSetting, match="^box"):
        Box.of(bounds, 3)


def test_values_that_are_not_finite_are_counted_and_come_back_as_no_answer():
    oracle = oracle_of(Bowl(lambda count: [1.0, float("nan"), float("inf"), 2.0][count - 1]))
    values = oracle.ask(np.full((4, 2), 0.5))
    assert np.isfinite(values).tolist() == [True, False, False, True]
    assert oracle.counts == Counts(queries=4, failed=2)


def test_ten_useless_answers_in_a_row_are_an_error_and_nine_are_not():
    bowl = Bowl(lambda count: float("nan") if count % MOST_FAILURES_IN_A_ROW else 1.0)
    assert oracle_of(bowl).ask(np.full((50, 2), 0.5)).tolist().count(1.0) == 5
    with pytest.raises(BlackBoxFailed, match="10 times in a row.*not finite"):
        oracle_of(Bowl(lambda count: float("nan"))).ask(np.full((10, 2), 0.5))
    # Ten across two requests are ten too.
    with pytest.raises(BlackBoxFailed):
        oracle_of(Bowl(lambda count: float("nan")), failures_in_a_row=9).ask(np.full((1, 2), 0.5))


def test_a_failing_evaluation_is_tried_again_and_every_attempt_counts():
    fails_twice = Bowl(lambda count: ValueError("out of memory") if count % 3 else 1.0, retries=2)
    oracle = oracle_of(fails_twice)
    assert oracle.ask(np.full((2, 2), 0.5)).tolist() == [1.0, 1.0]
    assert oracle.counts == Counts(queries=6)
    with pytest.raises(BlackBoxFailed, match="ValueError: out of memory"):
        oracle_of(Bowl(lambda count: ValueError("out of memory"))).ask(np.full((10, 2), 0.5))


def test_an_evaluation_that_takes_too_long_is_no_answer():
    bowl = Bowl(lambda count: time.sleep(30) if count == 1 else 1.0, timeout_s=1.0)
    values = oracle_of(bowl).ask(np.full((2, 2), 0.5))
    assert np.isnan(values[0]) and values[1] == 1.0


def test_what_a_thread_raises_is_raised_where_somebody_waits():
    with pytest.raises(KeyError):
        within(5, lambda: {}["nothing"])
    assert within(5, lambda: 3) == 3


def test_the_budget_is_kept_to_the_query():
    bowl = Bowl(budget=5, retries=3)
    oracle = oracle_of(bowl, queries=2)
    assert np.isfinite(oracle.ask(np.full((4, 2), 0.5))).tolist() == [True, True, True, False]
    assert oracle.spent and oracle.queries == 3 and len(bowl.asked) == 3
    assert np.isnan(oracle.ask(np.full((2, 2), 0.5))).all() and len(bowl.asked) == 3


def test_a_batched_box_is_asked_once_and_its_budget_is_kept_too():
    task = BlackBoxQuadratics(4, num_clients=2, budget=3)
    oracle = SiteOracle(task, 0, Counts())
    points = np.random.default_rng(0).random((5, 4))
    values = oracle.ask(points)
    assert np.allclose(values[:3], [task.evaluate_many(point[None], 0)[0] for point in points[:3]], atol=1e-12)
    assert np.isnan(values[3:]).all() and oracle.counts.queries == 3


def test_a_function_may_want_to_know_the_site_or_not():
    point = np.zeros(2)
    assert with_site(lambda point: 1)(point, 7) == 1
    assert with_site(lambda point, site: site)(point, 7) == 7
    assert with_site(lambda point, scale=2.0: scale)(point, 7) == 2.0
    assert with_site(lambda point, site=0: site)(point, 7) == 7


def test_a_plain_class_is_a_task(tmp_path):
    (tmp_path / "my_bowl.py").write_text(MY_BOWL)
    (tmp_path / "run.yaml").write_text("task: my_bowl:MyBowl\nstrategy: fzoos\nclients: {count: 2}\n")
    task = build_task(load_experiment(tmp_path / "run.yaml"))
    assert isinstance(task, OwnBlackBox) and task.num_clients == 2 and not is_black_box(task)
    assert task.metrics(task.model(), None)["loss"] == 0


@pytest.mark.parametrize("settings, name", [
    ({"task": "blackbox_quadratics", "strategy": "fedavg"}, "strategy='fedavg'"),
    ({"task": "digits", "strategy": "fzoos"}, "task='digits'"),
    ({"task": {"name": "blackbox_quadratics", "dimension": 5}, "strategy": "fedzo"}, "strategy.directions=20"),
])
def test_methods_that_only_evaluate_belong_to_tasks_that_can_only_be_evaluated(settings, name):
    with pytest.raises(BadExperiment, match=name):
        load_experiment(settings)


# ---- the client ---------------------------------------------------------------------------------------------------


@pytest.fixture
def node():
    """Return a client, its context and a model."""
    bowl = Bowl()
    task = OwnBlackBox(bowl, 1)
    context = Context(0, 1000, {"partition-id": 0}, RecordDict(), {})
    return task.client_app(TrainSettings()), context, Model.of(task.model()), bowl


def ask(client, context, model, bowl=None, action=DESCEND, settings=None, **changed):
    settings = settings or Differences(directions=2, local_iterations=2)
    config = {"seed": 0, "round": 0, "version": 0, "method": "Differences",
              "settings": settings if isinstance(settings, str) else settings_entry(settings), "control_round": -1,
              **changed}
    content = RecordDict({ARRAYS: VectorRecord(model), CONFIG: ConfigRecord(config)})
    return client(Message(content, 1000, message_type(action)), context).content


def test_a_request_that_comes_twice_is_answered_with_the_same_bytes_and_asks_nothing_again(node):
    first = ask(*node)
    asked = len(node[3].asked)
    again = ask(*node)
    assert len(node[3].asked) == asked == 7
    assert again[ARRAYS]["params"].data == first[ARRAYS]["params"].data
    assert dict(again[METRICS]) == dict(first[METRICS]) and wire_bytes(again) == wire_bytes(first)
    assert read_counts(node[1]).queries == 7
    assert ask(*node, round=1)[METRICS]["total-queries"] == 14


def test_evaluations_for_the_record_are_no_queries(node):
    client, context, model, _ = node
    content = RecordDict({ARRAYS: VectorRecord(model), CONFIG: ConfigRecord({})})
    reply = client(Message(content, 1000, "evaluate"), context)
    assert reply.content[METRICS]["loss"] == 2.0
    assert read_counts(context) == Counts(evaluations=1)


@pytest.mark.parametrize("change", [
    {"round": "x"}, {"settings": "{"}, {"settings": "[]"}, {"settings": '{"directions": 2}'}, {"method": "os"},
    {"settings": settings_entry(Differences()).replace("0.01", "-1")}, {"action": PROBE, "method": "Search"},
    {"action": SURROGATE}, {"settings": settings_entry(Differences(directions=2)).replace('"none"', '"some"')},
])
def test_a_request_without_meaning_is_refused_by_name(node, change):
    with pytest.raises(MalformedRequest):
        ask(*node, **change)


def test_a_point_of_another_dimension_is_refused(node):
    other = Model.of(OwnBlackBox(type("Wide", (Bowl,), {"dimension": 3})(), 1).model())
    with pytest.raises(MalformedRequest, match="params"):
        ask(node[0], node[1], other)


def test_training_with_gradients_is_refused_with_advice(node):
    content = RecordDict({ARRAYS: VectorRecord(node[2]), CONFIG: ConfigRecord({})})
    with pytest.raises(MalformedRequest, match="fzoos"):
        node[0](Message(content, 1000, "train"), node[1])


def test_a_search_stays_within_float32_of_its_point(node):
    reply = ask(*node)
    moved = torch.from_numpy(reply[ARRAYS]["params"].numpy())
    assert moved.dtype == torch.float32 and 0 < moved.abs().max() <= 2 * 0.01 * 6 + 1e-6
