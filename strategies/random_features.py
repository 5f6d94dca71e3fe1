"""A copy of a Gaussian process that is small enough to be sent: M weights on random Fourier features.

phi(x) = sqrt(2 / M) cos(V x + c), rows of V from N(0, I / l^2), c uniform in [0, 2 pi): phi(a).phi(b) is about k(a, b).
All clients draw the same V and c from a shared seed, so their weights can be averaged:

    w_i = span Phi^T (Phi Phi^T + s2 I)^{-1} y,        h(w, x) = -sqrt(2 / M) V^T (w * sin(V x + c)).

Source: Shu, Lin, Dai and Low, 2023, arXiv:2308.04077, section 4.2; Rahimi and Recht, 2007 (the features).
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from fedcore.errors import SingularKernel
from fedcore.seeds import numpy_generator
from fedcore.strategies.gaussian_process import LEAST_RAISED_NOISE, MOST_NOISE


@lru_cache(maxsize=2)
def draw(seed: int, count: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return V for l = 1, shape (count, dimension), and c, shape (count,); shared by all clients of a process."""
    generator = numpy_generator(seed, "features")
    return generator.standard_normal((count, dimension)), generator.uniform(0, 2 * np.pi, count)


@dataclass(frozen=True)
class Features:
    """The feature map that all clients of a run share.

    Attributes:
        seed: that V and c are drawn from.
        count: M, at least 1.
        dimension: d.
        lengthscale: l, above 0.
    """

    seed: int
    count: int
    dimension: int
    lengthscale: float

    def _phases(self, points: np.ndarray) -> np.ndarray:
        """Return V x + c, shape (points, M)."""
        directions, shifts = draw(self.seed, self.count, self.dimension)
        return (points / self.lengthscale) @ directions.T + shifts

    def map(self, points: np.ndarray) -> np.ndarray:
        """Return phi of points of shape (n, d), shape (n, M)."""
        return np.sqrt(2 / self.count) * np.cos(self._phases(points))

    def weights(self, points: np.ndarray, values: np.ndarray, noise: float) -> np.ndarray:
        """Return w_i of queries, shape (M,), in the units of their values: the span is in it.

        Args:
            points: shape (n, d).
            values: shape (n,).
            noise: s2.

        Raises:
            SingularKernel: not even much noise makes the features' Gram matrix invertible.
        """
        low, span = values.min(), np.ptp(values)
        if span == 0:
            return np.zeros(self.count)
        features = self.map(points)
        gram = features @ features.T
        while True:
            try:
                factor = cho_factor(gram + noise * np.eye(len(gram)), lower=True)
            except np.linalg.LinAlgError:
                if noise >= MOST_NOISE:
                    raise SingularKernel(len(gram), noise) from None
                noise = min(MOST_NOISE, max(10 * noise, LEAST_RAISED_NOISE))
            else:
                return span * (cho_solve(factor, (values - low) / span) @ features)

    def gradient(self, weights: np.ndarray, point: np.ndarray) -> np.ndarray:
        """Return h(w, x), shape (d,): linear in w."""
        directions, _ = draw(self.seed, self.count, self.dimension)
        bent = weights * np.sin(self._phases(point[None])[0])
        return -np.sqrt(2 / self.count) / self.lengthscale * (bent @ directions)
