"""Problems whose optimum is known: they show exactly how far from it a method ends."""
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.data import Dataset, Samples, in_order
from fedcore.clients.task import Site
from fedcore.errors import BadInput, InvalidSetting
from fedcore.seeds import numpy_generator

# Newton's method doubles the number of right digits at every step; so many are never needed.
MOST_NEWTON_STEPS = 100
NEWTON_TOLERANCE = 1e-13
# Close to the optimum, rounding alone lets the objective rise by so much; a rise beyond it halves the step.
ROUNDING = 1e-12


class Point(nn.Module):
    """A model that is a point: returns its displacement from each input, shape (batch, dimension)."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.position = nn.Parameter(start)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.position - inputs


class Quadratic:
    """Minimise the mean of f_i(x) = 1/2 sum_j h_i l_j (x_j - c_ij)^2 over the clients i.

    An example is a noisy view of a client's own optimum c_i, so a minibatch gradient is the exact one plus noise that
    does not depend on x. `excess_loss` is the global objective above its minimum, and exact.

    Args:
        dimension: of x; at least 1.
        condition: largest curvature over smallest; the curvatures l_j fall from 1 to 1/condition in equal ratios.
        heterogeneity: deviation of the c_i around a common point, at least 0.
        curvature_spread: clients' curvatures h_i spread between exp(-s) and exp(s); at least 0; 0: all equal to 1.
        noise: deviation of an example around c_i, at least 0; a client's examples have c_i as their exact mean.
        examples: of each client, at least 1.
    """

    metric_names: tuple[str, ...] = ("loss", "excess_loss")

    def __init__(
        self, dimension: int = 20, condition: float = 10.0, heterogeneity: float = 1.0, curvature_spread: float = 0.0,
        noise: float = 0.0, examples: int = 32, num_clients: int = 10, seed: int = 0,
    ):
        _check_least("dimension", dimension, 1)
        _check_least("examples", examples, 1)
        _check_least("condition", condition, 1)
        for name, value in (("heterogeneity", heterogeneity), ("curvature_spread", curvature_spread), ("noise", noise)):
            _check_least(name, value, 0)
        self.dimension, self.heterogeneity, self.curvature_spread = dimension, heterogeneity, curvature_spread
        self.noise, self.examples, self.num_clients, self.seed = noise, examples, num_clients, seed
        self.curvatures = np.logspace(0, -np.log10(condition), dimension)

    def model(self) -> nn.Module:
        """Return a point at the origin."""
        return Point(torch.zeros(self.dimension))

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over a batch of 1/2 sum_j targets_j (x_j - inputs_j)^2; targets are curvatures."""
        return 0.5 * (targets * model(inputs).square()).sum(1).mean()

    def data(self, site: Site) -> Samples:
        """Return a client's noisy views of its optimum, with its curvatures as targets; float64."""
        centre, curvatures, generator = self._client(site)
        noise = self.noise * generator.standard_normal((self.examples, self.dimension))
        views = torch.from_numpy(centre + (noise - noise.mean(axis=0)))
        return Samples(views, torch.from_numpy(curvatures).expand(self.examples, -1))

    def validation_data(self, site: Site) -> None:
        """Nothing is held back: the objective is the training loss."""

    def test_data(self) -> Samples:
        """Return every client's own optimum and curvatures: their mean loss is the global objective."""
        centres, curvatures = self._everybody
        return Samples(torch.from_numpy(centres), torch.from_numpy(curvatures))

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return the mean loss on the data, and the global objective above its minimum."""
        total = sum(self.loss(model, *batch).item() * len(batch[0]) for batch in in_order(data))
        distance = next(model.parameters()).detach().double().cpu().numpy() - self.optimum
        excess = 0.5 * float(self._everybody[1].mean(axis=0) @ distance**2)
        return {"loss": total / len(data), "excess_loss": excess}

    def curvature(self, site: Site) -> tuple[float, float]:
        """Return the smallest and the largest curvature of a client's objective."""
        curvatures = self._client(site)[1]
        return float(curvatures.min()), float(curvatures.max())

    @cached_property
    def optimum(self) -> np.ndarray:
        """The minimiser of the global objective, shape (dimension,): the mean of the c_i, weighted by curvature."""
        centres, curvatures = self._everybody
        return np.asarray((curvatures * centres).sum(axis=0) / curvatures.sum(axis=0))

    @cached_property
    def _common(self) -> np.ndarray:
        return numpy_generator(self.seed, "quadratic", "common").standard_normal(self.dimension)

    @cached_property
    def _everybody(self) -> tuple[np.ndarray, np.ndarray]:
        clients = [self._client(site) for site in range(self.num_clients)]
        return np.stack([client[0] for client in clients]), np.stack([client[1] for client in clients])

    def _client(self, site: Site) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """Return a client's optimum c_i, its curvatures h_i l, and the generator of its noise."""
        generator = numpy_generator(self.seed, "quadratic", _number(site))
        centre = self._common + self.heterogeneity * generator.standard_normal(self.dimension)
        scale = np.exp(self.curvature_spread * generator.uniform(-1, 1))
        return centre, scale * self.curvatures, generator


class Scores(nn.Module):
    """Linear scores, shape (batch,), and the squared norm of the weights, which a regularised loss needs."""

    def __init__(self, dimension: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(dimension))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs @ self.weights, self.weights.square().sum()


@dataclass(frozen=True)
class Optimum:
    """The minimiser of a convex problem, shape (dimension,), and the objective there."""

    weights: np.ndarray
    value: float


class Logistic:
    """Binary logistic regression with an l2 penalty: minimise mean log(1 + exp(-y a.w)) + l2/2 |w|^2.

    Each client has as many examples of its own: features are normal with a common decay of their scale, labels follow
    a logistic law whose weights differ from client to client. `excess_loss` is the global objective above its minimum.

    Args:
        dimension: of w; at least 1.
        examples: of each client, at least 1.
        l2: strength of the penalty, above 0 (without it the optimum may lie at infinity).
        heterogeneity: deviation of the clients' weights around common ones, at least 0.
        condition: largest variance of a feature over smallest, at least 1.
    """

    metric_names: tuple[str, ...] = ("loss", "accuracy", "excess_loss")

    def __init__(
        self, dimension: int = 20, examples: int = 100, l2: float = 0.01, heterogeneity: float = 1.0,
        condition: float = 10.0, num_clients: int = 10, seed: int = 0,
    ):
        _check_least("dimension", dimension, 1)
        _check_least("examples", examples, 1)
        _check_least("heterogeneity", heterogeneity, 0)
        _check_least("condition", condition, 1)
        if not 0 < l2 < np.inf:
            raise InvalidSetting("l2", l2, "a finite number above 0")
        self.dimension, self.examples, self.l2, self.heterogeneity = dimension, examples, l2, heterogeneity
        self.num_clients, self.seed = num_clients, seed
        self.scales = np.sqrt(np.logspace(0, -np.log10(condition), dimension))

    def model(self) -> nn.Module:
        """Return weights of zero."""
        return Scores(self.dimension)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the regularised mean loss of a batch; targets are -1 or 1."""
        scores, squared_norm = model(inputs)
        return functional.softplus(-targets * scores).mean() + 0.5 * self.l2 * squared_norm

    def data(self, site: Site) -> Samples:
        """Return a client's features and labels (-1 or 1); float64."""
        features, labels = self._client(site)
        return Samples(torch.from_numpy(features), torch.from_numpy(labels))

    def validation_data(self, site: Site) -> None:
        """Nothing is held back: the objective is the training loss."""

    def test_data(self) -> Samples:
        """Return all clients' examples: their loss is the global objective."""
        features, labels = self._everybody
        return Samples(torch.from_numpy(features), torch.from_numpy(labels))

    def labels(self, site: Site) -> list[int]:
        """Return how many labels of a client are -1, and how many 1."""
        labels = self._client(site)[1]
        return [int((labels < 0).sum()), int((labels > 0).sum())]

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return loss and accuracy on the data, and the global objective above its minimum."""
        loss, correct = 0.0, 0
        for inputs, targets in in_order(data):
            loss += self.loss(model, inputs, targets).item() * len(targets)
            correct += int((model(inputs)[0] * targets > 0).sum())
        weights = next(model.parameters()).detach().double().cpu().numpy()
        excess = self.objective(weights) - self.optimum.value
        return {"loss": loss / len(data), "accuracy": correct / len(data), "excess_loss": excess}

    def curvature(self, site: Site) -> tuple[float, float]:
        """Return the strong convexity of a client's objective, which is `l2`, and a bound on its smoothness."""
        features = self._client(site)[0]
        return self.l2, float(np.linalg.norm(features, 2) ** 2) / (4 * len(features)) + self.l2

    def objective(self, weights: np.ndarray) -> float:
        """Return the global objective at weights of shape (dimension,)."""
        features, labels = self._everybody
        return float(np.logaddexp(0, -labels * (features @ weights)).mean() + 0.5 * self.l2 * weights @ weights)

    @cached_property
    def optimum(self) -> Optimum:
        """The minimiser of the global objective, by Newton's method with step halving."""
        features, labels = self._everybody
        weights = np.zeros(self.dimension)
        for _ in range(MOST_NEWTON_STEPS):
            # The logistic function by way of tanh, which cannot overflow.
            wrong = 0.5 * (1 - np.tanh(0.5 * labels * (features @ weights)))
            gradient = self.l2 * weights - features.T @ (labels * wrong) / len(labels)
            hessian = (features.T * (wrong * (1 - wrong))) @ features / len(labels) + self.l2 * np.eye(self.dimension)
            step = np.linalg.solve(hessian, gradient)
            size, most = 1.0, self.objective(weights) * (1 + ROUNDING)
            while size > NEWTON_TOLERANCE and self.objective(weights - size * step) > most:
                size /= 2
            weights = weights - size * step
            if np.linalg.norm(step) <= NEWTON_TOLERANCE * (1 + np.linalg.norm(weights)):
                break
        return Optimum(weights, self.objective(weights))

    @cached_property
    def _common(self) -> np.ndarray:
        return numpy_generator(self.seed, "logistic", "common").standard_normal(self.dimension)

    @cached_property
    def _everybody(self) -> tuple[np.ndarray, np.ndarray]:
        clients = [self._client(site) for site in range(self.num_clients)]
        return np.concatenate([client[0] for client in clients]), np.concatenate([client[1] for client in clients])

    def _client(self, site: Site) -> tuple[np.ndarray, np.ndarray]:
        generator = numpy_generator(self.seed, "logistic", _number(site))
        weights = self._common + self.heterogeneity * generator.standard_normal(self.dimension)
        features = self.scales * generator.standard_normal((self.examples, self.dimension))
        certainty = 0.5 * (1 + np.tanh(0.5 * (features @ weights)))
        return features, np.where(generator.random(self.examples) < certainty, 1.0, -1.0)


def _number(site: Site) -> int:
    if not isinstance(site, int):
        raise BadInput(f"This task makes its data up from a partition number; there is nothing to read at {site!r}.")
    return site


def _check_least(name: str, value: float, least: float) -> None:
    if not least <= value < np.inf:
        raise InvalidSetting(name, value, f"a finite number of at least {least}")
