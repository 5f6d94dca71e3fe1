"""Time a local iteration of FZooS beside scikit-learn's GaussianProcessRegressor of the same size.

    python benchmarks/bench_zeroth.py [--tries 5]

One iteration takes six new queries for six old ones, and yields the gradient at a point and the uncertainties of 100
candidates. The regressor fits the same queries anew, with its hyperparameters fixed, and predicts mean and deviation at
the same 100 candidates; it has no gradient. One thread.
"""
import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from threadpoolctl import threadpool_limits

from fedcore.strategies.gaussian_process import GaussianProcess

HISTORIES, DIMENSIONS = (150, 500), (300, 2000)
NEW, CANDIDATES, NOISE = 6, 100, 1e-6


def best_of(tries: int, work: Callable[[int], object]) -> float:
    """Return the least wall seconds of several tries; each is given its number."""
    times = []
    for attempt in range(tries):
        started = time.perf_counter()
        work(attempt)
        times.append(time.perf_counter() - started)
    return min(times)


def compare(history: int, dimension: int, tries: int) -> tuple[float, float, float]:
    """Return seconds of an iteration: ours, ours when the factor is made anew, and the regressor's."""
    draws = np.random.default_rng(0)
    # Queries along a path, as a search leaves them.
    steps = 0.01 * draws.standard_normal((history + NEW * (tries + 1), dimension))
    points = draws.random(dimension) + np.cumsum(steps, axis=0)
    values = ((points - 0.5) ** 2).mean(1)
    lengthscale = dimension**0.5 / 6

    def window(step: int) -> np.ndarray:
        return np.arange(NEW * step, NEW * step + history)

    def iterate(process: GaussianProcess, step: int) -> None:
        names = window(step)
        process.condition(names.tolist(), points[names], values[names])
        point = points[names[-1]]
        process.gradient(point)
        process.uncertainty(point + 0.01 * draws.uniform(-1, 1, (CANDIDATES, dimension)))

    kept = GaussianProcess(lengthscale, NOISE)
    iterate(kept, 0)
    updated = best_of(tries, lambda attempt: iterate(kept, attempt + 1))
    anew = best_of(tries, lambda attempt: iterate(GaussianProcess(lengthscale, NOISE), attempt + 1))

    def regress(attempt: int) -> None:
        names = window(attempt + 1)
        regressor = GaussianProcessRegressor(RBF(lengthscale), alpha=NOISE, optimizer=None)
        regressor.fit(points[names], values[names])
        regressor.predict(points[names[-1]] + 0.01 * draws.uniform(-1, 1, (CANDIDATES, dimension)), return_std=True)

    return updated, anew, best_of(tries, regress)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tries", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{'history':>8}{'d':>6}{'update_ms':>11}{'anew_ms':>9}{'sklearn_ms':>12}{'sklearn/update':>16}")
    with threadpool_limits(1):
        for history in HISTORIES:
            for dimension in DIMENSIONS:
                ours, anew, theirs = compare(history, dimension, options.tries)
                print(f"{history:8}{dimension:6}{1e3 * ours:11.2f}{1e3 * anew:9.2f}{1e3 * theirs:12.2f}"
                      f"{theirs / ours:16.1f}", flush=True)


if __name__ == "__main__":
    main()
