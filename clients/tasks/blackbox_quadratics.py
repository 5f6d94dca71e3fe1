"""Quadratics that can only be evaluated, with a known optimum and gradient: how good a method's estimates are."""
from functools import cached_property

import numpy as np

from fedcore.clients.blackbox import BlackBoxTask
from fedcore.clients.task import Site
from fedcore.errors import BadInput, InvalidSetting
from fedcore.seeds import numpy_generator

# The functions' own cube, to which the unit cube is stretched.
SIDE, LOW = 20.0, -10.0


class BlackBoxQuadratics(BlackBoxTask):
    """Minimise the mean of f_i(x) = (sum_j a_ij z_j^2 + sum_j b_ij z_j + 1) / (10 d), z = 20 x - 10, x in [0, 1]^d.

    The coefficients are 1 + C (p - 1/N), each coordinate's p over the N clients from a Dirichlet law of 1/N: their mean
    over the clients is 1, so F and its optimum, (1 - d/4) / (10 d) at x = 0.475, do not depend on C.

    Args:
        dimension: d, at least 1.
        heterogeneity: C, at least 0; 0: all clients have the same function.
        noise: deviation of the noise on an evaluation, at least 0.
        budget, retries, timeout_s: as for every black box.

    Source: Shu, Lin, Dai and Low, 2023, arXiv:2308.04077, section 6.1.
    """

    metric_names = ("loss", "excess_loss", "gap_ratio")
    batched = True

    def __init__(
        self, dimension: int = 300, heterogeneity: float = 5.0, noise: float = 0.0, budget: int | None = None,
        retries: int = 0, timeout_s: float | None = None, num_clients: int = 5, seed: int = 0,
    ):
        super().__init__(dimension, (0.0, 1.0), budget, retries, timeout_s)
        for name, value in (("heterogeneity", heterogeneity), ("noise", noise)):
            if not 0 <= value < np.inf:
                raise InvalidSetting(name, value, "a finite number of at least 0")
        self.heterogeneity, self.noise, self.num_clients, self.seed = heterogeneity, noise, num_clients, seed

    @cached_property
    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """a and b, each of shape (clients, d)."""
        generator, count = numpy_generator(self.seed, "black-box quadratics"), self.num_clients
        shares = generator.dirichlet([1 / count] * count, (2, self.dimension))
        squares, slopes = 1 + self.heterogeneity * (shares - 1 / count)
        return squares.T, slopes.T

    @property
    def optimum(self) -> float:
        """The least value of F."""
        return (1 - self.dimension / 4) / (10 * self.dimension)

    def start(self) -> np.ndarray:
        return numpy_generator(self.seed, "black-box start").random(self.dimension)

    def evaluate_many(self, points: np.ndarray, site: Site) -> np.ndarray:
        values = self._of(points, *self._client(site))
        if self.noise:
            # Noise that follows from the point: the same question has the same answer, whoever computes it.
            values = values + [self.noise * self._draw(point, site) for point in points]
        return values

    def figures(self, point: np.ndarray) -> dict[str, float]:
        """Return F above its least value, and as a share of what it was at the start."""
        excess = self.excess(point)
        return {"excess_loss": excess, "gap_ratio": excess / self.excess(self.start())}

    def excess(self, point: np.ndarray) -> float:
        """Return F above its least value at a point."""
        inside = self.box.clip(np.asarray(point, dtype=float))[None]
        return float(self._of(inside, *(part.mean(0) for part in self.coefficients))[0]) - self.optimum

    def gradient(self, point: np.ndarray, site: Site) -> np.ndarray:
        """Return the gradient of a client's function; zero where a coordinate is clipped."""
        return self._slope(point, *self._client(site))

    def mean_gradient(self, point: np.ndarray) -> np.ndarray:
        """Return the gradient of F."""
        return self._slope(point, *(part.mean(0) for part in self.coefficients))

    def _of(self, points: np.ndarray, squares: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        own = SIDE * points + LOW
        return np.asarray((own**2 @ squares + own @ slopes + 1) / (10 * self.dimension))

    def _slope(self, point: np.ndarray, squares: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        inside = self.box.clip(point)
        slope = SIDE * (2 * squares * (SIDE * inside + LOW) + slopes) / (10 * self.dimension)
        return np.where(inside == point, slope, 0.0)

    def _client(self, site: Site) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(site, int) or not 0 <= site < self.num_clients:
            raise BadInput(f"These quadratics have clients 0 to {self.num_clients - 1}; there is none called {site!r}.")
        squares, slopes = self.coefficients
        return squares[site], slopes[site]

    def _draw(self, point: np.ndarray, site: Site) -> float:
        return float(numpy_generator(self.seed, "noise", site, point.tobytes().hex()).standard_normal())
