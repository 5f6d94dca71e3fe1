"""The local optimiser of methods that search a black box: fresh in every round."""
from typing import Protocol

import numpy as np

OPTIMIZERS = ("adam", "sgd")
FIRST_DECAY, SECOND_DECAY, ADAM_EPSILON = 0.9, 0.999, 1e-8


class LocalOptimizer(Protocol):
    """Turns gradients into steps."""

    def step(self, gradient: np.ndarray) -> np.ndarray: ...


class Sgd:
    """Steps of lr times the gradient."""

    def __init__(self, lr: float):
        self.lr = lr

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """Return what to subtract from the point, shape (d,)."""
        return self.lr * gradient


class Adam:
    """Steps scaled by running means of the gradient and its square.

    Source: Kingma and Ba, 2015, arXiv:1412.6980, algorithm 1.
    """

    def __init__(self, lr: float):
        self.lr, self.count = lr, 0
        self.first: np.ndarray | float = 0.0     # m
        self.second: np.ndarray | float = 0.0    # v

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """Return what to subtract from the point, shape (d,)."""
        self.count += 1
        self.first = FIRST_DECAY * self.first + (1 - FIRST_DECAY) * gradient
        self.second = SECOND_DECAY * self.second + (1 - SECOND_DECAY) * gradient**2
        first = self.first / (1 - FIRST_DECAY**self.count)
        second = self.second / (1 - SECOND_DECAY**self.count)
        return np.asarray(self.lr * first / (np.sqrt(second) + ADAM_EPSILON))


def local_optimizer(name: str, lr: float) -> LocalOptimizer:
    """Return an optimiser of `OPTIMIZERS`, fresh."""
    return Adam(lr) if name == "adam" else Sgd(lr)
