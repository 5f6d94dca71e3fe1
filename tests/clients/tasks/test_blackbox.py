"""The black boxes that come with fedcore, and those that a user names in a file."""
import sys

import numpy as np
import pytest
import torch

import fedcore
from fedcore.clients.blackbox import Counts, SiteOracle
from fedcore.clients.build import build_task
from fedcore.clients.tasks.blackbox import OwnFunction
from fedcore.clients.tasks.blackbox_attack import Attack, margin
from fedcore.clients.tasks.blackbox_metric import MetricTuning, read_table, score
from fedcore.clients.tasks.blackbox_quadratics import BlackBoxQuadratics
from fedcore.clients.tasks.files import UnreadableData
from fedcore.config import load_experiment
from fedcore.errors import BadExperiment, BadInput, InvalidSetting, MissingData

FUNCTION = """
def f(point):
    return ((point - 0.3) ** 2).sum()
"""
COMMAND = """
import os, sys
for line in sys.stdin:
    print(sum((float(text) - 0.3) ** 2 for text in line.split()) + float(os.environ["FEDCORE_SITE"]))
"""
FZOOS = "{name: fzoos, features: 50, feature_queries: 25, local_lr: 0.05, end_queries: 5}"


@pytest.mark.parametrize("task", ["function: my_box:f", f"command: {sys.executable} my_command.py, batch: true"])
def test_a_black_box_of_ones_own_works_from_a_file_of_a_few_lines(task, tmp_path, monkeypatch):
    (tmp_path / "my_box.py").write_text(FUNCTION)
    (tmp_path / "my_command.py").write_text(COMMAND)
    monkeypatch.chdir(tmp_path)
    lines = [f"task: {{name: blackbox, {task}, dimension: 3, box: [0, 1], start: 0.9}}", f"strategy: {FZOOS}",
             "clients: {count: 2}", "stop: {rounds: 4}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    run = fedcore.simulate(tmp_path / "run.yaml", out=tmp_path / "run", overrides=["train.dtype=float64"])
    offset = 0.5 if "command" in task else 0.0
    assert run.summary["final_loss"] - offset < 0.05 < 3 * 0.36 and len(lines) < 10
    per_round = 10 + 5 * 9 + 5 + 1
    assert run.summary["queries"] == 2 * (4 * per_round + 11)


def own(**settings):
    return OwnFunction(dimension=2, num_clients=2, **settings)


def test_looking_for_large_values_turns_the_sign():
    task = own(command=f"{sys.executable} -c 'print(3)'", maximize=True)
    assert task.evaluate_many(np.zeros((1, 2)), 0).tolist() == [-3.0]


@pytest.mark.parametrize("program, problem", [
    ("import sys; sys.exit('no licence')", "status 1: no licence"), ("print('seven')", "'seven', no number"),
    ("pass", "0 lines for 1 points"),
])
def test_a_command_that_fails_says_why(program, problem):
    task = own(command=f'{sys.executable} -c "{program}"')
    with pytest.raises(Exception, match=problem):
        task.evaluate_many(np.zeros((1, 2)), 0)


def test_a_command_that_hangs_is_ended_and_counted():
    task = own(command=f"{sys.executable} -c 'import time; time.sleep(60)'", timeout_s=0.3, retries=1)
    oracle = SiteOracle(task, 0, Counts())
    assert np.isnan(oracle.ask(np.zeros((1, 2)))).all() and oracle.counts == Counts(2, 1, 1)


@pytest.mark.parametrize("settings, name", [
    ({}, "task.function"), ({"function": "a:b", "command": "c"}, "task.function"),
    ({"function": "box"}, "task.function"), ({"function": "no_such_module:f"}, "task.function"),
    ({"command": "'"}, "task.command"),
    ({"command": "x", "start": 2}, "task.start"), ({"command": "x", "start": [0.1, 0.2, 0.3]}, "task.start"),
    ({"command": "x", "box": [1, 0]}, "task.box"), ({"command": "x", "budget": 0}, "task.budget"),
    ({"command": "x", "retries": -1}, "task.retries"), ({"command": "x", "timeout_s": 0}, "task.timeout_s"),
])
def test_settings_out_of_range_are_refused_by_their_full_name(settings, name):
    with pytest.raises(BadExperiment, match=rf"- {name}"):
        load_experiment({"task": {"name": "blackbox", "dimension": 2, **settings}, "strategy": "fzoos"})


# ---- quadratics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heterogeneity", [0, 0.5, 5, 50])
def test_the_mean_of_the_quadratics_and_its_optimum_do_not_depend_on_the_heterogeneity(heterogeneity):
    task = BlackBoxQuadratics(300, heterogeneity, num_clients=5, seed=1)
    for coefficients in task.coefficients:
        assert np.allclose(coefficients.mean(0), 1, atol=1e-12)
    best = np.full((1, 300), 0.475)
    assert task.optimum == pytest.approx(-0.0246667, abs=1e-7)
    assert np.mean([task.evaluate_many(best, site)[0] for site in range(5)]) == pytest.approx(task.optimum, abs=1e-12)
    assert task.excess(best[0]) == pytest.approx(0, abs=1e-12)
    assert np.allclose(task.mean_gradient(best[0]), 0, atol=1e-12)


def test_the_quadratics_gradients_are_right_and_zero_where_clipped():
    task, point = BlackBoxQuadratics(6, 5.0, num_clients=3), np.array([0.1, 0.4, 0.7, 0.2, 1.3, -0.2])
    step = 1e-6
    shifts = step * np.eye(6)

    def ask(points):
        return task.evaluate_many(task.box.clip(points), 1)

    numeric = (ask(point + shifts) - ask(point - shifts)) / (2 * step)
    assert np.allclose(task.gradient(point, 1), numeric, atol=1e-6)
    assert task.gradient(point, 1)[4:].tolist() == [0, 0]


def test_noise_is_the_same_for_the_same_question():
    task = BlackBoxQuadratics(4, noise=0.1, num_clients=2)
    points = np.random.default_rng(0).random((3, 4))
    first = task.evaluate_many(points, 0)
    assert np.array_equal(first, task.evaluate_many(points, 0)) and not np.array_equal(
        first, BlackBoxQuadratics(4, num_clients=2).evaluate_many(points, 0))
    with pytest.raises(BadInput, match="client"):
        task.evaluate_many(points, 2)


# ---- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_their_definitions():
    positive = np.array([True, True, True, False, False])
    predicted = np.array([[True, True, False, True, False], [False] * 5])
    for name, expected in (("precision", 2 / 3), ("recall", 2 / 3), ("f1", 2 / 3), ("jaccard", 2 / 4)):
        assert score(name, predicted, positive).tolist() == pytest.approx([expected, 0.0])


@pytest.mark.parametrize("metric", ["precision", "recall", "f1", "jaccard"])
def test_a_networks_metric_is_tuned_on_the_clients_rows_and_tested_on_others(metric):
    task = MetricTuning(metric, num_clients=3, train_steps=3)
    points = np.random.default_rng(0).uniform(-1, 1, (4, task.dimension))
    together = task.evaluate_many(points, 1)
    assert np.array_equal(together, [task.evaluate_many(point[None], 1)[0] for point in points])
    assert set(task.figures(points[0])) == {metric, f"test_{metric}"} and ((0 <= together) & (together <= 1)).all()
    assert sum(len(part) for part in task._split) == len(task._tune.positive)


def test_a_table_of_ones_own_is_read_and_made_two_classes(tmp_path):
    rows = "\n".join(f"{row},x{row},{row % 4 if row else ''},{row * 1.5}" for row in range(20))
    (tmp_path / "table.csv").write_text("size,name,floors,price\n" + rows)
    table = read_table(tmp_path / "table.csv", "price", None)
    assert table.features.shape == (20, 2) and table.positive.tolist() == [row > 9 for row in range(20)]
    task = MetricTuning(path=tmp_path / "table.csv", target="price", above=3.0, num_clients=2)
    assert task.table.positive.sum() == 17
    with pytest.raises(UnreadableData, match="colour"):
        read_table(tmp_path / "table.csv", "colour", None)


@pytest.mark.parametrize("settings, name", [
    ({"metric": "auc"}, "metric"), ({"target": "x"}, "target"), ({"hidden": 0}, "hidden"), ({"width": 0}, "width"),
    ({"train_steps": -1}, "train_steps"),
])
def test_metric_settings_are_checked(settings, name):
    with pytest.raises(InvalidSetting, match=f"^{name}"):
        MetricTuning(**settings)


# ---- attacks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """Images of 28 x 28 pixels whose class is the row of a bright bar: learnt in a few steps."""
    draws = np.random.default_rng(0)

    def images(count):
        labels = draws.integers(0, 10, count)
        pixels = draws.integers(0, 40, (count, 28, 28))
        for row, label in enumerate(labels):
            pixels[row, 2 * label + 3:2 * label + 6] += 150
        return pixels.astype(np.uint8), labels.astype(np.uint8)

    path = tmp_path_factory.mktemp("mnist") / "bars.npz"
    (x_train, y_train), (x_test, y_test) = images(600), images(200)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def test_an_attack_begins_unsuccessful_and_a_strong_change_succeeds(digits_file):
    task = Attack(digits_file, size=1.0, classes_per_client=9, train_steps=30, num_clients=2)
    image, label = task.original
    nothing = np.zeros(task.dimension)
    assert task.figures(nothing)["success"] == 0
    assert np.mean([task.evaluate_many(nothing[None], site)[0] for site in range(2)]) > 0
    moved = np.roll(image.numpy().reshape(28, 28), 2, axis=0).reshape(-1) - image.numpy().reshape(-1)
    assert task.figures(moved)["success"] == 1 and 0 <= label < 10


def test_the_margin_says_by_how_much_a_class_wins(digits_file):
    scores, labels = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 1.0]]), torch.tensor([1, 1])
    assert margin(scores, labels, targeted=False).tolist() == [2.0, -3.0]
    assert margin(scores, labels, targeted=True).tolist() == [-2.0, 3.0]
    task = Attack(digits_file, image=10_000, classes_per_client=9, train_steps=30, num_clients=2)
    with pytest.raises(InvalidSetting, match="image"):
        task.figures(task.start())


@pytest.mark.parametrize("settings, name", [
    ({"size": 0}, "size"), ({"classes_per_client": 1}, "classes_per_client"), ({"image": -1}, "image"),
    ({"train_steps": 0}, "train_steps"),
])
def test_attack_settings_are_checked(digits_file, settings, name):
    with pytest.raises(InvalidSetting, match=f"^{name}"):
        Attack(digits_file, **settings)


def test_an_attack_needs_its_file():
    with pytest.raises((BadExperiment, MissingData), match=r"task\.path"):
        build_task(load_experiment({"task": "blackbox_attack", "strategy": "fzoos"}))
