"""FZooS: its identities and its counters, and what becomes of it when clients, messages and memories are lost."""
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedcore.clients.blackbox import OwnBlackBox
from fedcore.clients.blackbox_client import BlackBoxApp, BlackBoxClient
from fedcore.clients.blackbox_request import read_counts
from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.blackbox_quadratics import BlackBoxQuadratics
from fedcore.errors import InvalidSetting, MalformedRequest
from fedcore.payload import ARRAYS, CONFIG, METRICS, VectorRecord
from fedcore.registry import build
from fedcore.strategies.black_box import DESCEND, EXTRA, SURROGATE, VALUES, extra_record, message_type, settings_entry
from fedcore.strategies.fzoos import FZooS, correction_lengths
from fedcore.strategies.surrogates import Search
from fedcore.vectors import Model

CLIENTS, DIMENSION = 3, 6
TIMES_S = [1.0, 1.1, 1.2]
SMALL = {"local_iterations": 3, "features": 40, "nearest": 20, "feature_queries": 20, "initial_queries": 4,
         "active_queries": 2, "active_candidates": 6, "end_queries": 3, "end_candidates": 8, "memory": 100}
PER_ROUND, FIRST = 3 + 2 * 2 + 3 + 1, 4 + 1
DOUBLE = TrainSettings(dtype="float64")


class Double:
    """A task whose model is in float64."""

    def __init__(self, task):
        self.task = task

    def model(self):
        return self.task.model().double()


@pytest.fixture
def run(federate):
    """Run FZooS on black-box quadratics in float64."""

    def start(strategy, rounds=4, clients=CLIENTS, heterogeneity=2.0, task=None, app=None, **options):
        task = task or BlackBoxQuadratics(DIMENSION, heterogeneity, num_clients=clients, **options.pop("limits", {}))
        app = app or task.client_app(DOUBLE)
        return federate(strategy, TIMES_S[:clients], task=Double(task), app=app, rounds=rounds, **options)

    return start


def fzoos(**changed):
    return FZooS(**{**SMALL, **changed})


# ---- identities and counters --------------------------------------------------------------------------------------


def test_alone_and_uncorrected_the_features_do_not_matter_and_are_not_sent(run):
    few, many = run(fzoos(correction=0), clients=1), run(fzoos(correction=0, features=80), clients=1)
    assert torch.equal(few.params, many.params)
    assert few.hub.totals == many.hub.totals and few.strategy.weights is None
    corrected = run(fzoos(), clients=1)
    # With one client w = w_1, so the correction is nothing.
    assert torch.equal(few.params, corrected.params)


def test_with_several_clients_the_correction_matters_after_the_first_round(run):
    plain, corrected = run(fzoos(correction=0)), run(fzoos())
    assert torch.equal(plain.trajectory[0], corrected.trajectory[0])
    assert not torch.equal(plain.trajectory[1], corrected.trajectory[1])


@pytest.mark.parametrize("exchanges, first", [(2, FIRST), (1, FIRST - 1)])
def test_queries_are_those_of_the_formula(run, exchanges, first):
    strategy = fzoos(exchanges=exchanges)
    outcome = run(strategy, rounds=5)
    assert strategy.queries == dict.fromkeys(range(CLIENTS), 5 * PER_ROUND + first)
    assert strategy.settings.queries_per_round() == PER_ROUND
    assert outcome.of("update")[-1]["client_queries"] == [5 * PER_ROUND + first] * CLIENTS
    assert Search(active_queries=5, end_queries=50).queries_per_round() == 106


def test_a_round_has_two_exchanges_and_its_time_is_that_of_its_queries(run):
    outcome = run(fzoos(), rounds=2)
    assert [task["kind"] for task in outcome.tasks if task["node"] == 0] == [
        message_type(DESCEND), message_type(SURROGATE)] * 2
    assert [task["local_steps"] for task in outcome.tasks if task["kind"] == message_type(DESCEND)] == [
        FIRST + 7] * CLIENTS + [7] * CLIENTS
    assert {task["local_steps"] for task in outcome.tasks if task["kind"] == message_type(SURROGATE)} == {4}
    reply = run(fzoos(exchanges=1), rounds=2)
    assert {task["kind"] for task in reply.tasks} == {message_type(DESCEND)}


def test_surrogates_and_gradients_are_measured_where_the_truth_is_known(run):
    rows = run(fzoos(lengthscale=3.0)).of("update")
    assert all(0 < row["surrogate_error"] < 1.5 and row["gradient_error"] > 0 for row in rows)


def test_it_descends(run):
    outcome = run(fzoos(local_lr=0.03), rounds=12)
    task = BlackBoxQuadratics(DIMENSION, 2.0, num_clients=CLIENTS)
    assert task.excess(outcome.params.numpy()) < 0.2 * task.excess(task.start())


def test_projected_points_stay_in_the_box(run):
    wild = {"local_lr": 0.5, "rounds": 3}
    free, kept = (run(fzoos(local_lr=0.5, project=project), rounds=wild["rounds"]) for project in (False, True))
    assert ((kept.params >= 0) & (kept.params <= 1)).all() and not ((free.params >= 0) & (free.params <= 1)).all()


def test_only_improvements_are_accepted_when_so_asked(run):
    wild = {"local_lr": 0.4, "local_optimizer": "adam"}
    outcome = run(fzoos(accept="improve", **wild), rounds=8)
    task = BlackBoxQuadratics(DIMENSION, 2.0, num_clients=CLIENTS)
    values = [task.excess(task.start()), *(task.excess(point.numpy()) for point in outcome.trajectory)]
    accepted = [row["accepted"] for row in outcome.of("update")]
    assert 0 in accepted
    assert all(after <= before + 1e-9 for before, after in zip(values, values[1:], strict=False))
    assert outcome.strategy.queries[0] == 8 * PER_ROUND + FIRST
    assert any(task.excess(point.numpy()) > values[0] for point in run(fzoos(**wild), rounds=8).trajectory)


@pytest.mark.parametrize("rule", ["likelihood", "median"])
@pytest.mark.parametrize("exchanges", [1, 2])
def test_clients_agree_on_one_lengthscale(run, rule, exchanges):
    outcome = run(fzoos(lengthscale=rule, exchanges=exchanges))
    used = [row["lengthscale"] for row in outcome.of("update")]
    assert used[0] == DIMENSION**0.5 / 6 and len(set(used[1:])) == 1 and used[1] == outcome.strategy.lengthscale
    assert outcome.hub.counts["failures"] == 0 and outcome.strategy.weights is not None


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_client_lost_between_the_two_messages_is_missing_in_the_weights_only(run):
    # Node 1's task 0 is the introduction, task 4 the second message of the second round.
    outcome = run(fzoos(), failures=Lost((1, 4)))
    rows = outcome.of("update")
    assert [row["surrogates"] for row in rows] == [3, 2, 3, 3] and rows[1]["nodes"] == [0, 1, 2]
    assert outcome.strategy.queries == dict.fromkeys(range(CLIENTS), 4 * PER_ROUND + FIRST)


def test_a_client_lost_before_the_first_message_is_not_asked_for_the_second(run):
    outcome = run(fzoos(), failures=Lost((1, 3)))
    rows = outcome.of("update")
    assert rows[1]["nodes"] == [0, 2] and rows[1]["surrogates"] == 2 and rows[2]["nodes"] == [0, 1, 2]


def test_a_round_that_nobody_answers_starts_again_from_the_same_point(run):
    lost = [(client, 3) for client in range(CLIENTS)]
    outcome = run(fzoos(), failures=Lost(*lost))
    assert outcome.logged("failed_round") == [True] and outcome.hub.version == 3
    assert outcome.strategy.weights_round == 3


class Lost:
    """Loses some replies, by (partition, index of the node's task); nothing else goes wrong."""

    def __init__(self, *lost):
        self.lost = lost

    def crash_point(self, partition, task_index):
        return None

    def loses_request(self, partition, task_index):
        return False

    def loses_reply(self, partition, task_index):
        return (partition, task_index) in self.lost


class Flat:
    """A black box with the same value everywhere."""

    dimension, box = DIMENSION, (0.0, 1.0)

    def evaluate(self, point):
        return 3.0


def test_a_function_that_is_the_same_everywhere_moves_nothing_and_is_said(run):
    task = OwnBlackBox(Flat(), CLIENTS)
    outcome = run(fzoos(), task=task)
    assert torch.equal(outcome.params, task.model().double().params.detach())
    assert "same value everywhere" in outcome.logged("warning")[-1]


class Moody(Flat):
    """A black box that answers every third question only."""

    def __init__(self):
        self.asked = 0

    def evaluate(self, point):
        self.asked += 1
        return float((point**2).sum()) if self.asked % 3 == 0 else float("nan")


def test_values_that_are_not_finite_are_counted_and_not_learnt_from(run):
    outcome = run(fzoos(), task=OwnBlackBox(Moody(), CLIENTS))
    assert outcome.strategy.queries == dict.fromkeys(range(CLIENTS), 4 * PER_ROUND + FIRST)
    assert torch.isfinite(outcome.params).all() and outcome.hub.counts["failures"] == 0


def test_the_run_ends_when_a_client_has_no_budget_left(run):
    outcome = run(fzoos(), rounds=50, limits={"budget": 30})
    assert outcome.hub.stop_reason == "queries" and outcome.strategy.queries == dict.fromkeys(range(CLIENTS), 30)


def test_a_client_that_has_forgotten_begins_again_and_is_not_corrected_at_first(run):
    task = BlackBoxQuadratics(DIMENSION, 2.0, num_clients=CLIENTS)

    class Forgetful(BlackBoxClient):
        def act(self, action, message, context):
            if action == DESCEND and message.content[CONFIG]["round"] == 2 and context.node_config["partition-id"] == 1:
                context.state.clear()
            return super().act(action, message, context)

    outcome = run(fzoos(), app=BlackBoxApp(Forgetful(task, DOUBLE)), task=task)
    assert outcome.hub.counts["failures"] == 0
    assert outcome.strategy.queries[1] == outcome.strategy.queries[0] + FIRST


# ---- the client's side --------------------------------------------------------------------------------------------


@pytest.fixture
def node():
    """Return a client that has done a round, its context, a model, and its weights."""
    task = BlackBoxQuadratics(DIMENSION, 2.0, num_clients=CLIENTS)
    node = new_node(task)
    ask(node, DESCEND)
    ask(node, SURROGATE)
    return node


def new_node(task):
    context = Context(0, 1000, {"partition-id": 0}, RecordDict(), {})
    return task.client_app(DOUBLE), context, Model.of(task.model().double())


def ask(node, action, weights=None, search=None, whole=False, **changed):
    config = {"seed": 0, "round": 0, "version": 0, "method": "Search",
              "settings": settings_entry(search or Search(**SMALL)), "lengthscale": 1.0, "proposal": "",
              "corrections": [1.0, 1.0, 1.0], "weights_round": -1,
              "surrogate": action == SURROGATE, "weights": True, **changed}
    content = RecordDict({ARRAYS: VectorRecord(node[2]), CONFIG: ConfigRecord(config)})
    if weights is not None:
        content[EXTRA] = extra_record(torch.from_numpy(np.asarray(weights, dtype=float)))
    reply = node[0](Message(content, 1000, message_type(action)), node[1])
    return reply if whole else reply.content


def test_a_surrogate_that_is_asked_for_twice_is_the_same_bytes(node):
    first, again = ask(node, SURROGATE), ask(node, SURROGATE)
    assert first[EXTRA][VALUES].data == again[EXTRA][VALUES].data and dict(first[METRICS]) == dict(again[METRICS])


@pytest.mark.parametrize("weights, weights_round, corrected", [
    (np.ones(40), 0, True), (np.ones(40), 5, False), (None, 0, False),
])
def test_weights_of_another_round_correct_nothing(node, weights, weights_round, corrected):
    twin = node[0], Context(0, 1000, {"partition-id": 0}, RecordDict(dict(node[1].state)), {}), node[2]
    plain = ask(twin, DESCEND, round=1)
    found = ask(node, DESCEND, weights, round=1, weights_round=weights_round)
    assert (found[ARRAYS]["params"].data != plain[ARRAYS]["params"].data) == corrected


@pytest.mark.parametrize("change", [
    {"weights": np.ones(39)}, {"seed": 1}, {"lengthscale": 2.0}, {"lengthscale": 0.0}, {"corrections": [1.0]},
    {"corrections": [1.0, 2.0, 0.0]}, {"search": Search(**{**SMALL, "features": 39})}, {"lengthscale": "long"},
])
def test_what_makes_weights_meaningless_is_refused_by_name(node, change):
    with pytest.raises(MalformedRequest):
        ask(node, DESCEND, **{"weights": np.ones(40), "round": 1, "weights_round": 0, **change})


def test_a_black_box_without_any_answer_is_an_error():
    task = OwnBlackBox(type("Silent", (Flat,), {"evaluate": lambda self, point: float("nan")})(), 1)
    node = new_node(task)
    first = ask(node, DESCEND, whole=True)
    assert "BlackBoxFailed" in first.error.reason and "nothing to begin with" in first.error.reason
    # Ten in a row, over both requests; what was asked is counted all the same.
    assert "10 times in a row" in ask(node, DESCEND, whole=True).error.reason
    assert read_counts(node[1]).queries == 10


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, name", [
    ({"local_iterations": 0}, "local_iterations"), ({"local_lr": 0}, "local_lr"), ({"server_lr": -1}, "server_lr"),
    ({"local_optimizer": "sgdm"}, "local_optimizer"), ({"features": 0}, "features"),
    ({"lengthscale": 0}, "lengthscale"), ({"lengthscale": "best"}, "lengthscale"), ({"noise": -1e-6}, "noise"),
    ({"nearest": 1}, "nearest"),
    ({"feature_queries": 1}, "feature_queries"), ({"initial_queries": 1}, "initial_queries"),
    ({"initial_radius": 0}, "initial_radius"), ({"active_queries": 101}, "active_queries"),
    ({"active_queries": -1}, "active_queries"), ({"active_radius": 0}, "active_radius"),
    ({"end_queries": 201}, "end_queries"), ({"end_candidates": -1}, "end_candidates"),
    ({"correction": 1.5}, "correction"), ({"correction": "grow"}, "correction"), ({"accept": "maybe"}, "accept"),
    ({"exchanges": 3}, "exchanges"),
    ({"accept": "improve", "exchanges": 1}, "accept"), ({"memory": 400}, "memory"),
])
def test_settings_out_of_range_are_refused_by_their_full_name(settings, name):
    with pytest.raises(InvalidSetting, match=f"^strategy.{name}[^a-z_]"):
        build("strategies", {"name": "fzoos", **settings})


def test_the_corrections_length_decays_or_is_what_a_function_says():
    assert correction_lengths("decay", 4) == [1, 1 / 2, 1 / 3, 1 / 4]
    assert correction_lengths(0.5, 2) == [0.5, 0.5] and correction_lengths(lambda t: t / 2, 3) == [0, 0.5, 1]
    with pytest.raises(InvalidSetting, match=r"correction\(t=3\)"):
        FZooS(correction=lambda t: t / 2)


def test_too_few_features_are_warned_about(run):
    outcome = run(fzoos(features=30), rounds=1)
    assert "rough" in outcome.logged("warning")[0]
