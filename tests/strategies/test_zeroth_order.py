"""Finite differences beside what they should be, and the methods built on them."""
import numpy as np
import pytest
import torch

from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.blackbox_quadratics import BlackBoxQuadratics
from fedcore.errors import InvalidSetting
from fedcore.registry import build
from fedcore.strategies.black_box import mean
from fedcore.strategies.finite_differences import (
    DifferenceDescent,
    Differences,
    descend_by_differences,
    draw_directions,
    estimate,
)
from fedcore.strategies.zeroth_order import FedProxZo, FedZo, ScaffoldZo1, ScaffoldZo2

CLIENTS, DIMENSION = 3, 6
TIMES_S = [1.0, 1.1, 1.2]
FEW = {"directions": 3, "local_iterations": 4}
METHODS = {"fedzo": FedZo, "fedprox_zo": FedProxZo, "scaffold_zo_1": ScaffoldZo1, "scaffold_zo_2": ScaffoldZo2}


class Function:
    """An oracle over a function of rows."""

    spent = False

    def __init__(self, function):
        self.function, self.asked = function, 0

    def ask(self, points):
        self.asked += len(points)
        return self.function(points)


@pytest.fixture
def run(federate):
    """Run a method on black-box quadratics in float64."""

    def start(strategy, rounds=4, clients=CLIENTS, **options):
        task = BlackBoxQuadratics(DIMENSION, 2.0, num_clients=clients)
        app = options.pop("app", None) or task.client_app(TrainSettings(dtype="float64"))
        return federate(strategy, TIMES_S[:clients], task=Double(task), app=app, rounds=rounds, **options)

    return start


class Double:
    """A task whose model is in float64."""

    def __init__(self, task):
        self.task = task

    def model(self):
        return self.task.model().double()


def generator():
    return np.random.default_rng(3)


@pytest.mark.parametrize("kind", ["orthonormal", "gaussian", "sphere"])
def test_directions_are_what_they_are_called(kind):
    rows = draw_directions(kind, 4, 9, generator())
    if kind == "orthonormal":
        assert np.allclose(rows @ rows.T, np.eye(4), atol=1e-12)
    elif kind == "sphere":
        assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    else:
        assert rows.shape == (4, 9) and rows.std() > 0.5


def test_with_all_directions_a_linear_functions_gradient_is_exact():
    slope = np.arange(1.0, 7.0)
    settings = Differences(directions=DIMENSION)
    found, value = estimate(Function(lambda points: points @ slope), np.full(DIMENSION, 0.5), settings, generator())
    assert value == 0.5 * slope.sum()
    assert np.abs(found - slope).max() <= 100 * np.finfo(float).eps * value / settings.difference


def test_on_a_quadratic_the_bias_of_forward_differences_is_exactly_the_curvatures():
    draws = generator()
    factor = draws.standard_normal((DIMENSION, DIMENSION))
    curvature, point, settings = factor @ factor.T, draws.random(DIMENSION), Differences(directions=4)
    found, _ = estimate(Function(lambda points: 0.5 * ((points @ curvature) * points).sum(1)), point, settings,
                        np.random.default_rng(5))
    rows = draw_directions("orthonormal", 4, DIMENSION, np.random.default_rng(5))
    factor = DIMENSION / 4
    projected = factor * rows.T @ (rows @ (curvature @ point))
    bias = settings.difference / 2 * factor * ((rows @ curvature) * rows).sum(1) @ rows
    assert np.allclose(found, projected + bias, atol=1e-10)


def test_the_estimate_is_right_on_average_for_every_kind():
    slope = np.arange(1.0, 7.0)
    for kind in ("orthonormal", "gaussian", "sphere"):
        draws, settings = generator(), Differences(directions=3, kind=kind)
        oracle = Function(lambda points: points @ slope)
        found = np.mean([estimate(oracle, np.zeros(DIMENSION), settings, draws)[0] for _ in range(4000)], axis=0)
        assert np.allclose(found, slope, atol=0.6)


def test_directions_without_an_answer_are_left_out():
    slope = np.arange(1.0, 7.0)

    def sometimes(points):
        values = points @ slope
        return np.where(np.arange(len(values)) == 1, np.nan, values)

    found, _ = estimate(Function(sometimes), np.zeros(DIMENSION), Differences(directions=DIMENSION), generator())
    rows = np.delete(draw_directions("orthonormal", DIMENSION, DIMENSION, generator()), 1, axis=0)
    assert np.allclose(found, 6 / 5 * rows.T @ (rows @ slope), atol=1e-10)
    nothing = estimate(Function(lambda points: np.full(len(points), np.nan)), np.zeros(DIMENSION), Differences(),
                       generator())
    assert not nothing[0].any()


def test_no_control_and_a_control_of_zero_are_the_same_to_the_last_bit():
    ends = []
    for control in (None, np.zeros(DIMENSION)):
        state = DifferenceDescent(np.full(DIMENSION, 0.5))
        descend_by_differences(Function(lambda points: (points**2).sum(1)), state, Differences(directions=3),
                               generator(), control)
        ends.append(state.point)
    assert np.array_equal(*ends)


def test_a_proximal_weight_of_zero_is_fedzo_bit_for_bit(run):
    plain, without, pulled = run(FedZo(**FEW)), run(FedProxZo(0, **FEW)), run(FedProxZo(10.0, **FEW))
    assert torch.equal(plain.params, without.params) and not torch.equal(plain.params, pulled.params)


def test_one_client_and_one_iteration_is_plain_descent(run):
    outcome = run(FedZo(local_iterations=1, directions=DIMENSION, local_optimizer="sgd", local_lr=0.05), 3, clients=1)
    task = BlackBoxQuadratics(DIMENSION, 2.0, num_clients=1)
    point = task.start().astype(np.float32).astype(float)
    for _ in range(3):
        base = task.evaluate_many(point[None], 0)[0]
        shifts = 0.01 * np.eye(DIMENSION)
        # With all directions, forward differences along any orthonormal basis agree up to the curvature's bias.
        bias = 0.01 / 2 * 2 * 400 / (10 * DIMENSION)
        slope = (task.evaluate_many(task.box.clip(point + shifts), 0) - base) / 0.01 - bias
        point = point - 0.05 * slope
    assert np.allclose(outcome.params.numpy(), point, atol=0.05)


@pytest.mark.parametrize("name, extra", [("fedzo", 0), ("fedprox_zo", 0), ("scaffold_zo_1", 4), ("scaffold_zo_2", 0)])
def test_queries_are_those_of_the_formula(run, name, extra):
    strategy = METHODS[name](**FEW)
    outcome = run(strategy, rounds=5)
    per_round = 1 + 4 * (3 + 1) + extra
    assert strategy.queries == dict.fromkeys(range(CLIENTS), 5 * per_round)
    assert strategy.summary_figures() == {"queries": CLIENTS * 5 * per_round}
    assert [row["queries"] for row in outcome.of("update")] == [CLIENTS * per_round * done for done in range(1, 6)]
    assert strategy.settings.queries_per_round() == per_round


@pytest.mark.parametrize("method", [ScaffoldZo1, ScaffoldZo2])
def test_control_variates_add_up_to_nothing_and_change_the_path(run, method):
    strategy = method(**FEW)
    outcome, plain = run(strategy), run(FedZo(**FEW))
    common = mean(strategy.controls, strategy.control_weights)
    total = sum(common - strategy.controls[client] for client in range(CLIENTS))
    assert total.abs().max() < 1e-12 * common.abs().max() and not torch.equal(outcome.params, plain.params)
    # The first round of option II has no control variates yet.
    assert torch.equal(outcome.trajectory[0], plain.trajectory[0]) == (method is ScaffoldZo2)


class Loses:
    """Loses some replies, by (partition, index of the node's task); nothing else goes wrong."""

    def __init__(self, *lost):
        self.lost = lost

    def crash_point(self, partition, task_index):
        return None

    def loses_request(self, partition, task_index):
        return False

    def loses_reply(self, partition, task_index):
        return (partition, task_index) in self.lost


@pytest.mark.parametrize("method, tasks", [(ScaffoldZo1, (3, 4)), (ScaffoldZo2, (2,))])
def test_an_absent_clients_old_control_variate_stays_in_the_mean(run, method, tasks):
    strategy = method(**FEW)
    outcome = run(strategy, rounds=3, failures=Loses(*((1, index) for index in tasks)))
    assert any(row["nodes"] == [0, 2] for row in outcome.of("update"))
    assert set(strategy.controls) == {0, 1, 2} and torch.isfinite(outcome.params).all()
    # A client's own count reaches the server with its next reply: nothing is lost from it.
    assert strategy.queries[1] == strategy.queries[0]


def test_a_lost_client_is_left_out_of_the_mean(run):
    whole, two = run(FedZo(**FEW), rounds=1), run(FedZo(**FEW), rounds=1, failures=Loses((1, 1)))
    alone = run(FedZo(**FEW), rounds=1, failures=Loses((0, 1), (2, 1)))
    assert two.of("update")[0]["nodes"] == [0, 2] and alone.of("update")[0]["nodes"] == [1]
    # The mean of all three is that of the two and the one, each with its share.
    assert torch.allclose(whole.params, (2 * two.params + alone.params) / 3, atol=1e-12)


@pytest.mark.parametrize("settings, name", [
    ({"directions": 0}, "directions"), ({"difference": 0}, "difference"), ({"local_lr": 0}, "local_lr"),
    ({"local_iterations": 0}, "local_iterations"), ({"server_lr": 0}, "server_lr"), ({"kind": "some"}, "kind"),
    ({"local_optimizer": "lbfgs"}, "local_optimizer"), ({"project": "some"}, "project"),
])
@pytest.mark.parametrize("method", METHODS)
def test_settings_out_of_range_are_refused_by_their_full_name(method, settings, name):
    with pytest.raises(InvalidSetting, match=f"^strategy.{name}[^a-z]"):
        build("strategies", {"name": method, **settings})


def test_the_proximal_weight_is_checked_and_so_are_directions_against_the_dimension(caplog):
    with pytest.raises(InvalidSetting, match="^strategy.proximal"):
        build("strategies", {"name": "fedprox_zo", "proximal": -1})
    with pytest.raises(InvalidSetting, match="^directions=20"):
        FedZo().check_dimension(19)
    FedZo(kind="gaussian").check_dimension(19)
    FedZo(directions=5, difference=1e-9).check_dimension(19)
    assert "rounding" in caplog.text
