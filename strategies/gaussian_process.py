"""A Gaussian process on the queries of a black box: the gradient at any point in closed form, and how sure it is.

With n queries X (n x d), their values y brought to [0, 1] by `span`, the kernel k(a, b) = exp(-|a - b|^2 / (2 l^2)) and
alpha = (k(X, X) + s2 I)^{-1} y, the posterior mean has the gradient

    g(x) = -(span / l^2) sum_j alpha_j k(x, x_j) (x - x_j),

and the trace of its covariance, in units of span^2, is

    u(x) = d / l^2 - (1 / l^4) sum_jm A_jm k_j k_m (x - x_j).(x - x_m),    A = (k(X, X) + s2 I)^{-1}.

Source: Shu, Lin, Dai and Low, 2023, arXiv:2308.04077, section 4.1.
"""
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_solve, lapack, solve_triangular

from fedcore.errors import SingularKernel

# A kernel matrix that is singular gets more noise, tenfold each time, up to here.
MOST_NOISE = 1e-2
LEAST_RAISED_NOISE = 1e-10
# Columns that LAPACK treats at a time.
BLOCK = 32
# A window of which a larger share is new is factored anew: that is cheaper.
MOST_CHANGED = 0.4
# Lengthscales that a fit chooses among, in units of sqrt(d): the cube's half diagonal is 0.5.
SCALES = tuple(0.02 * 2 ** (step / 2) for step in range(17))


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return |a - b|^2 for all rows, shape (rows of left, rows of right)."""
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * (left @ right.T)
    return np.maximum(squares, 0.0)


def kernel(left: np.ndarray, right: np.ndarray, lengthscale: float) -> np.ndarray:
    """Return exp(-|a - b|^2 / (2 l^2)) for all rows, shape (rows of left, rows of right)."""
    return np.exp(squared_distances(left, right) / (-2 * lengthscale**2))


class GaussianProcess:
    """The posterior given a window of queries; its Cholesky factor is updated as queries come and go.

    Args:
        lengthscale: l.
        noise: s2, variance of the noise on values of unit span.

    Attributes:
        noise: as given, or raised where the kernel matrix turned out singular.
        points: X, shape (n, d).
    """

    def __init__(self, lengthscale: float, noise: float):
        self.lengthscale, self.noise = lengthscale, noise
        self.points = np.empty((0, 0))
        self._names: list[int] = []            # of the queries, in the order of the factor's rows
        self._factor = np.empty((0, 0))        # lower triangular, L L^T = k(X, X) + s2 I
        self._alpha = np.empty(0)
        self._span = 0.0

    def condition(self, names: Sequence[int], points: np.ndarray, values: np.ndarray) -> None:
        """Take these queries, no point twice, in place of those before; what both have in common is not computed anew.

        Args:
            names: of the queries, any distinct numbers.
            points: shape (n, d).
            values: shape (n,).

        Raises:
            SingularKernel: not even much noise makes the kernel matrix invertible.
        """
        place = {int(name): index for index, name in enumerate(names)}
        kept = [row for row, name in enumerate(self._names) if name in place]
        held = {self._names[row] for row in kept}
        new = [name for name in place if name not in held]
        changed = len(new) + len(self._names) - len(kept)
        if not kept or changed > MOST_CHANGED * len(place):
            self._start([*place], points)
        else:
            self._drop(kept)
            if new:
                self._append(new, points[[place[name] for name in new]])
        ordered = values[[place[name] for name in self._names]]
        self._span = float(ordered.max() - ordered.min())
        if self._span > 0:
            self._alpha = cho_solve((self._factor, True), (ordered - ordered.min()) / self._span)

    @property
    def flat(self) -> bool:
        """Whether all values are equal: the gradient is zero then."""
        return self._span == 0

    def mean(self, points: np.ndarray) -> np.ndarray:
        """Return the posterior mean without its constant, shape (points,)."""
        return self._span * (kernel(points, self.points, self.lengthscale) @ self._alpha)

    def gradient(self, point: np.ndarray) -> np.ndarray:
        """Return g at a point, both of shape (d,)."""
        if self.flat:
            return np.zeros_like(point)
        pull = self._alpha * kernel(point[None], self.points, self.lengthscale)[0]
        return (self._span / self.lengthscale**2) * (pull @ (self.points - point))

    def uncertainty(self, points: np.ndarray) -> np.ndarray:
        """Return u, from 0 to d / l^2, at each of some points near each other, shape (points,)."""
        centre = points.mean(0)
        here, there = points - centre, self.points - centre     # small numbers, of which little cancels
        weights = kernel(points, self.points, self.lengthscale)             # k_j
        solved = solve_triangular(self._factor, weights.T, lower=True)       # L^{-1} k
        crossed = solve_triangular(self._factor, (weights * (here @ there.T)).T, lower=True)
        inverse = self._inverse()
        spread = ((weights @ (inverse * (there @ there.T))) * weights).sum(1)
        known = (here**2).sum(1) * (solved**2).sum(0) - 2 * (solved * crossed).sum(0) + spread
        most = points.shape[1] / self.lengthscale**2
        return np.clip(most - known / self.lengthscale**4, 0.0, most)

    def _inverse(self) -> np.ndarray:
        """Return A, shape (n, n)."""
        lower, _ = lapack.dpotri(self._factor, lower=1)
        return lower + np.tril(lower, -1).T

    # ---- the factor -------------------------------------------------------------------------------------------------

    def _start(self, names: list[int], points: np.ndarray) -> None:
        self._names, self.points = names, np.array(points)
        gram = kernel(self.points, self.points, self.lengthscale)
        while True:
            self._factor, failed = lapack.dpotrf(gram + self.noise * np.eye(len(gram)), lower=1, clean=1)
            if not failed:
                return
            if self.noise >= MOST_NOISE:
                raise SingularKernel(len(gram), self.noise)
            self.noise = min(MOST_NOISE, max(10 * self.noise, LEAST_RAISED_NOISE))

    def _drop(self, kept: list[int]) -> None:
        """Leave only some rows: L of the rest, with the columns of those that go folded in by a QR factorisation."""
        if len(kept) == len(self._names):
            return
        gone = np.setdiff1d(np.arange(len(self._names)), kept)
        rows = self._factor[kept]
        block = min(BLOCK, len(kept))
        upper, _, _, _ = lapack.dtpqrt(0, block, np.asfortranarray(rows[:, kept].T), np.asfortranarray(rows[:, gone].T))
        factor = np.triu(upper).T
        self._factor = factor * np.where(np.diag(factor) < 0, -1.0, 1.0)    # QR leaves the signs open
        self._names, self.points = [self._names[row] for row in kept], self.points[kept]

    def _append(self, names: list[int], points: np.ndarray) -> None:
        across = solve_triangular(self._factor, kernel(self.points, points, self.lengthscale), lower=True).T
        gram = kernel(points, points, self.lengthscale) + self.noise * np.eye(len(points))
        corner, failed = lapack.dpotrf(gram - across @ across.T, lower=1, clean=1)
        if failed:
            self._start([*self._names, *names], np.concatenate((self.points, points)))
            return
        before = len(self._factor)
        factor = np.zeros((before + len(points),) * 2)
        factor[:before, :before], factor[before:, :before], factor[before:, before:] = self._factor, across, corner
        self._factor = factor
        self._names, self.points = [*self._names, *names], np.concatenate((self.points, points))


def median_lengthscale(points: np.ndarray) -> float:
    """Return the median distance between queries, shape (n, d), of which at least two differ."""
    distances = np.sqrt(squared_distances(points, points)[np.triu_indices(len(points), 1)])
    return float(np.median(distances[distances > 0]))


def likeliest_lengthscale(points: np.ndarray, values: np.ndarray, noise: float) -> float:
    """Return the l of `SCALES` under which the values, of free mean and scale, are likeliest.

    Args:
        points: shape (n, d).
        values: shape (n,), not all equal.
        noise: s2.
    """
    squares = squared_distances(points, points)
    centred = (values - values.mean()) / values.std()
    best, best_fit = SCALES[len(SCALES) // 2], -np.inf
    for scale in SCALES:
        gram = np.exp(squares / (-2 * scale**2 * points.shape[1])) + noise * np.eye(len(points))
        factor, failed = lapack.dpotrf(gram, lower=1, clean=1)
        if failed:
            continue
        explained = float((solve_triangular(factor, centred, lower=True) ** 2).mean())
        fit = -0.5 * len(points) * np.log(explained) - float(np.log(np.diag(factor)).sum())
        if fit > best_fit:
            best, best_fit = scale, fit
    return best * points.shape[1] ** 0.5
