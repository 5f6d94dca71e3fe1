"""Problems with a known optimum, against other ways to find it."""
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedcore.clients.evaluation import evaluate_model
from fedcore.clients.modules import flat_module, initial_model
from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.analytic import Logistic, Quadratic
from fedcore.clients.torch_client import torch_client
from fedcore.errors import BadInput, InvalidSetting
from fedcore.payload import read_arrays
from tests.clients.lab import Lab, node


def objective(task: Quadratic | Logistic, point: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean of the clients' losses and its gradient, by autograd over all their examples."""
    flat = flat_module(task, torch.float64)
    flat.load(torch.from_numpy(point), {})
    losses = []
    for site in range(task.num_clients):
        data = task.data(site)
        losses.append(task.loss(flat.module, *data.batch(torch.arange(len(data)))))
    loss = torch.stack(losses).mean()
    gradient = torch.autograd.grad(loss, list(flat.module.parameters()))[0]
    return loss.item(), gradient.numpy()


TASKS = st.one_of(
    st.builds(
        Quadratic, dimension=st.integers(1, 6), condition=st.floats(1, 50), heterogeneity=st.floats(0, 3),
        curvature_spread=st.floats(0, 1), noise=st.floats(0, 2), examples=st.integers(1, 8),
        num_clients=st.integers(1, 6), seed=st.integers(0, 1000),
    ),
    st.builds(
        Logistic, dimension=st.integers(1, 6), examples=st.integers(5, 30), l2=st.floats(0.01, 1),
        heterogeneity=st.floats(0, 3), condition=st.floats(1, 50), num_clients=st.integers(1, 6),
        seed=st.integers(0, 1000),
    ),
)


def best_point(task: Quadratic | Logistic) -> np.ndarray:
    return task.optimum if isinstance(task, Quadratic) else task.optimum.weights


@settings(max_examples=40)
@example(task=Logistic(dimension=1, examples=8, l2=0.4914, heterogeneity=0.0, condition=1.0, num_clients=1, seed=1))
@given(task=TASKS)
def test_the_optimum_is_where_the_clients_gradients_cancel(task):
    assert np.abs(objective(task, best_point(task))[1]).max() < 1e-10


@pytest.mark.parametrize("task", [Quadratic(curvature_spread=1.0, noise=1.0), Logistic()])
def test_the_optimum_is_the_one_that_scipy_finds(task):
    found = minimize(lambda x: objective(task, x), np.zeros(task.dimension), jac=True, method="BFGS",
                     options={"gtol": 1e-9})
    assert np.abs(found.x - best_point(task)).max() < 1e-6


@settings(max_examples=40)
@given(task=TASKS, seed=st.integers(0, 1000))
def test_the_excess_loss_is_the_distance_to_the_least_objective(task, seed):
    point = best_point(task) + np.random.default_rng(seed).standard_normal(task.dimension)
    model = initial_model(task, 0, torch.float64)
    figures = evaluate_model(task, model.replace(torch.from_numpy(point)))
    expected = objective(task, point)[0] - objective(task, best_point(task))[0]
    assert figures["excess_loss"] == pytest.approx(expected, abs=1e-9, rel=1e-9)
    at_optimum = evaluate_model(task, model.replace(torch.from_numpy(best_point(task))))
    assert abs(at_optimum["excess_loss"]) < 1e-14


def test_the_quadratic_optimum_is_the_curvature_weighted_mean_of_the_clients_own():
    task = Quadratic(dimension=3, curvature_spread=1.0, num_clients=5)
    clients = [task.data(site) for site in range(5)]
    centres = torch.stack([client.inputs.mean(0) for client in clients])
    curvatures = torch.stack([client.targets[0] for client in clients])
    assert np.allclose(task.optimum, (curvatures * centres).sum(0) / curvatures.sum(0))
    equal = Quadratic(dimension=3, num_clients=5)
    assert np.allclose(equal.optimum, np.mean([equal.data(site).inputs.mean(0).numpy() for site in range(5)], axis=0))


def test_the_quadratic_noise_averages_to_nothing_at_each_client():
    quiet, noisy = Quadratic(noise=0.0), Quadratic(noise=5.0)
    for site in range(3):
        assert torch.allclose(noisy.data(site).inputs.mean(0), quiet.data(site).inputs[0])
    assert noisy.data(0).inputs.std(0).mean() > 4
    assert np.array_equal(quiet.optimum, noisy.optimum)


def test_the_condition_number_is_the_ratio_of_curvatures():
    curvatures = Quadratic(condition=40.0).data(0).targets[0]
    assert curvatures.max() / curvatures.min() == pytest.approx(40.0)


@pytest.mark.parametrize("make", [
    lambda **provided: Quadratic(noise=1.0, examples=4, **provided), lambda **provided: Logistic(examples=8, **provided)
])
def test_data_follow_from_seed_and_client(make):
    task, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert torch.equal(task.data(1).inputs, again.data(1).inputs)
    assert not torch.equal(task.data(1).inputs, other.data(1).inputs)
    assert not torch.equal(task.data(1).inputs, task.data(2).inputs)


@pytest.mark.parametrize("task", [Quadratic(num_clients=1, condition=2.0), Logistic(num_clients=1, l2=0.1)])
def test_one_client_reaches_the_optimum_in_float64(task):
    train = TrainSettings(dtype="float64", lr=1.0, local_steps=600, batch_size=1000)
    lab = Lab(torch_client(task, train), initial_model(task, 0, torch.float64))
    trained = read_arrays(lab.train(node(0))["arrays"], lab.model.layout)[0]
    assert evaluate_model(task, lab.model.replace(trained))["excess_loss"] < 1e-13


def test_labels_of_the_logistic_task_are_counted():
    task = Logistic(examples=50)
    negative, positive = task.labels(2)
    assert negative + positive == 50 and positive == (task.data(2).targets > 0).sum()


@pytest.mark.parametrize(("make", "name"), [
    (lambda: Quadratic(dimension=0), "dimension"), (lambda: Quadratic(condition=0.5), "condition"),
    (lambda: Quadratic(noise=-1.0), "noise"), (lambda: Quadratic(heterogeneity=float("nan")), "heterogeneity"),
    (lambda: Quadratic(curvature_spread=float("inf")), "curvature_spread"), (lambda: Quadratic(examples=0), "examples"),
    (lambda: Logistic(l2=0.0), "l2"), (lambda: Logistic(dimension=0), "dimension"),
    (lambda: Logistic(examples=0), "examples"), (lambda: Logistic(condition=0.0), "condition"),
    (lambda: Logistic(heterogeneity=-0.1), "heterogeneity"),
])
def test_a_setting_out_of_range_is_refused(make, name):
    with pytest.raises(InvalidSetting, match=name):
        make()


@pytest.mark.parametrize("task", [Quadratic(), Logistic()])
def test_there_is_nothing_to_read_at_a_path(task):
    with pytest.raises(BadInput, match="partition number"):
        task.data("hospital.csv")
