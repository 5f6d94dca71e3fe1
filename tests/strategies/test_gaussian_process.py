"""The Gaussian process beside its definitions, and the random features beside the kernel they stand for."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import SingularKernel
from fedcore.strategies.black_box import mean
from fedcore.strategies.gaussian_process import (
    MOST_NOISE,
    GaussianProcess,
    kernel,
    likeliest_lengthscale,
    median_lengthscale,
)
from fedcore.strategies.local_steps import Adam, Sgd
from fedcore.strategies.random_features import Features
from fedcore.strategies.surrogates import History

DIMENSION, LENGTH = 5, 0.7


def queries(count, seed=0, dimension=DIMENSION):
    draws = np.random.default_rng(seed)
    points = draws.random((count, dimension))
    return points, np.sin(points @ draws.standard_normal(dimension)) * 3 + 1


def process_on(points, values, noise=1e-4, lengthscale=LENGTH):
    process = GaussianProcess(lengthscale, noise)
    process.condition(range(len(points)), points, values)
    return process


def test_the_gradient_is_the_central_difference_of_the_posterior_mean():
    points, values = queries(40)
    process, step = process_on(points, values), 1e-5
    for point in np.random.default_rng(1).random((5, DIMENSION)):
        shifts = step * np.eye(DIMENSION)
        numeric = (process.mean(point + shifts) - process.mean(point - shifts)) / (2 * step)
        assert np.abs(process.gradient(point) - numeric).max() <= 1e-6 * np.abs(numeric).max()


def brute_force(process, points):
    gram = kernel(process.points, process.points, LENGTH)
    inverse = np.linalg.inv(gram + process.noise * np.eye(len(gram)))
    found = []
    for point in points:
        slopes = (point - process.points) * kernel(point[None], process.points, LENGTH)[0][:, None]
        found.append(DIMENSION / LENGTH**2 - np.trace(slopes.T @ inverse @ slopes) / LENGTH**4)
    return np.array(found)


def test_the_uncertainty_is_that_of_brute_force():
    process = process_on(*queries(30), noise=1e-2)
    points = 0.5 + 0.1 * np.random.default_rng(2).uniform(-1, 1, (20, DIMENSION))
    found = process.uncertainty(points)
    assert np.abs(found - brute_force(process, points)).max() < 1e-10
    assert ((0 <= found) & (found <= DIMENSION / LENGTH**2)).all()


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 25), seed=st.integers(0, 1000))
def test_a_further_query_never_makes_it_less_sure(count, seed):
    points, values = queries(count + 1, seed)
    where = np.random.default_rng(seed).random((4, DIMENSION))
    before = process_on(points[:-1], values[:-1], noise=1e-3).uncertainty(where)
    assert (process_on(points, values, noise=1e-3).uncertainty(where) <= before + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_updating_the_factor_is_factoring_anew(data):
    points, values = queries(40, seed=data.draw(st.integers(0, 100)))
    process = GaussianProcess(LENGTH, 1e-4)
    for _ in range(4):
        names = data.draw(st.lists(st.integers(0, 39), min_size=2, max_size=30, unique=True))
        process.condition(names, points[names], values[names])
        fresh = GaussianProcess(LENGTH, 1e-4)
        fresh.condition(process._names, points[process._names], values[process._names])
        assert sorted(process._names) == sorted(names)
        assert np.allclose(process._factor, fresh._factor, atol=1e-10)
        assert np.allclose(process.gradient(points[0]), fresh.gradient(points[0]), atol=1e-6)


def test_small_changes_do_not_factor_anew(monkeypatch):
    points, values = queries(60)
    process = process_on(points[:50], values[:50])
    monkeypatch.setattr(process, "_start", lambda *_: pytest.fail("factored anew"))
    for first in range(1, 8):
        names = list(range(first, first + 50))
        process.condition(names, points[names], values[names])
        assert sorted(process._names) == names


def test_a_linear_function_shows_its_direction():
    points, _ = queries(8, dimension=6)
    slope = np.arange(1.0, 7.0)
    gradient = process_on(points, points @ slope, noise=1e-8, lengthscale=20.0).gradient(np.full(6, 0.5))
    assert gradient @ slope / np.linalg.norm(gradient) / np.linalg.norm(slope) > 0.99


def test_equal_values_have_no_gradient():
    process = process_on(queries(10)[0], np.full(10, 3.0))
    assert process.flat and not process.gradient(np.zeros(DIMENSION)).any()


def test_a_singular_kernel_gets_more_noise_until_it_is_an_error(monkeypatch):
    points, values = queries(12)
    doubled = np.concatenate((points, points))
    process = GaussianProcess(LENGTH, 0.0)
    process.condition(range(24), doubled, np.concatenate((values, values)))
    assert 0 < process.noise <= MOST_NOISE and np.isfinite(process.gradient(points[0])).all()
    monkeypatch.setattr("fedcore.strategies.gaussian_process.kernel", lambda left, right, _: -np.ones((len(left),) * 2))
    with pytest.raises(SingularKernel, match="24 queries"):
        GaussianProcess(LENGTH, 1e-6).condition(range(24), doubled, np.zeros(24))


def test_lengthscales_fit_the_queries():
    points, _ = queries(60, dimension=3)
    smooth, rough = np.sin(points[:, 0]), np.sin(25 * points[:, 0])
    assert likeliest_lengthscale(points, smooth, 1e-6) > likeliest_lengthscale(points, rough, 1e-6)
    square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert median_lengthscale(square) == 1.0


# ---- random features ----------------------------------------------------------------------------------------------


def test_features_stand_for_the_kernel_with_an_error_that_falls_as_their_root():
    points, _ = queries(20)
    truth = kernel(points, points, LENGTH)
    errors = []
    for count in (100, 1600, 25_600):
        found = [Features(seed, count, DIMENSION, LENGTH).map(points) for seed in range(3)]
        errors.append(np.mean([np.abs(rows @ rows.T - truth).mean() for rows in found]))
    assert 2.5 < errors[0] / errors[1] < 6.5 and 2.5 < errors[1] / errors[2] < 6.5


def test_the_surrogates_gradient_is_that_of_its_mean_and_linear_in_the_weights():
    points, values = queries(30)
    features, step = Features(1, 500, DIMENSION, LENGTH), 1e-6
    first, second = (features.weights(points, shape * values, 1e-6) for shape in (1.0, -0.5))
    point, shifts = points[3] + 0.01, step * np.eye(DIMENSION)
    numeric = (features.map(point + shifts) - features.map(point - shifts)) @ first / (2 * step)
    assert np.allclose(features.gradient(first, point), numeric, atol=1e-6)
    mixed = features.gradient(0.3 * first + 0.7 * second, point)
    assert np.allclose(mixed, 0.3 * features.gradient(first, point) + 0.7 * features.gradient(second, point), atol=1e-9)


def test_the_surrogate_follows_the_process_it_stands_for():
    points, values = queries(30)
    features = Features(0, 20_000, DIMENSION, LENGTH)
    point = points.mean(0)
    found = features.gradient(features.weights(points, values, 1e-2), point)
    truth = process_on(points, values, noise=1e-2).gradient(point)
    assert np.linalg.norm(found - truth) < 0.05 * np.linalg.norm(truth)


def test_corrections_add_up_to_nothing_and_equal_clients_have_none():
    features = Features(0, 300, DIMENSION, LENGTH)
    own = {client: torch.from_numpy(features.weights(*queries(20, client), 1e-6)) for client in range(3)}
    shares = {0: 1, 1: 5, 2: 2}
    common = mean(own, shares).numpy()
    point = np.full(DIMENSION, 0.4)
    corrections = [shares[client] * features.gradient(common - own[client].numpy(), point) for client in own]
    scale = max(np.abs(correction).max() for correction in corrections)
    assert np.abs(sum(corrections)).max() < 1e-10 * scale
    alike = {client: own[0] for client in range(3)}
    assert not features.gradient((mean(alike, shares) - own[0]).numpy(), point).any()


def test_queries_that_say_nothing_have_no_weights():
    features = Features(0, 50, DIMENSION, LENGTH)
    assert not features.weights(queries(5)[0], np.full(5, 2.0), 1e-6).any()
    doubled = np.concatenate((queries(5)[0],) * 2)
    assert np.isfinite(features.weights(doubled, np.arange(10.0), 0.0)).all()


# ---- history and steps --------------------------------------------------------------------------------------------


def test_a_history_holds_no_point_twice_and_nothing_that_is_not_finite():
    points, values = queries(4)
    values[2] = np.nan
    history = History.empty(DIMENSION)
    for rows in ([0, 1, 2, 3], [0, 1], [3, 3]):
        history = history.add(points[rows], values[rows])
    assert len(history) == 3 and np.isfinite(history.values).all()
    assert history.newest(2).values.tolist() == history.values[-2:].tolist()
    assert history.nearest(points[3], 1).tolist() == [2]


def test_adam_does_not_care_about_the_gradients_scale():
    gradients = np.random.default_rng(0).standard_normal((20, 3))
    small, large = Adam(0.01), Adam(0.01)
    for gradient in gradients:
        assert np.allclose(small.step(gradient), large.step(1000 * gradient), rtol=1e-5, atol=1e-9)
    assert np.array_equal(Sgd(0.5).step(gradients[0]), 0.5 * gradients[0])
