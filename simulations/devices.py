"""How fast each node computes."""
from collections.abc import Mapping
from typing import Any

from fedcore.errors import InvalidSetting
from fedcore.simulations.distributions import (
    Constant,
    Distribution,
    as_distribution,
    check_keys,
    check_number,
    jitter_factor,
)

# Draws that are kept; beyond that the memory is emptied and draws are made again, to the same values.
MAX_REMEMBERED = 65_536


class NodeValues:
    """One value per node, drawn when it is asked for."""

    def __init__(self, name: str, distribution: Distribution, seed: int, above: float | None = None):
        self.name, self.distribution, self.seed, self._above = name, distribution, seed, above
        self._advice = "" if isinstance(distribution, Constant) else "This is what the distribution gave."
        self.constant = self._checked(distribution.value) if isinstance(distribution, Constant) else None
        self._drawn: dict[int, float] = {}

    def of(self, partition: int) -> float:
        """Return a node's value.

        Raises:
            InvalidSetting: the distribution gave something that no node can have.
        """
        if self.constant is not None:
            return self.constant
        value = self._drawn.get(partition)
        if value is None:
            value = self._checked(self.distribution.draw(self.seed, partition, self.name))
            if len(self._drawn) >= MAX_REMEMBERED:
                self._drawn.clear()
            self._drawn[partition] = value
        return value

    def check(self, num_nodes: int) -> None:
        """Draw the last node's value, so that a trace that is too short is noticed before a run begins."""
        if num_nodes > 0:
            self.of(num_nodes - 1)

    def _checked(self, value: float) -> float:
        return check_number(self.name, value, above=self._above, at_least=0 if self._above is None else None,
                            advice=self._advice)


class Devices:
    """Compute times: work steps x the node's seconds per step x a random factor per task.

    Args:
        seconds_per_step: time of one work step (one minibatch gradient), above 0; a distribution gives each node
            its own.
        jitter: relative standard deviation of a log-normal factor with mean 1, drawn for each task, at least 0.
        seconds_per_task: time of a task that does not say how many work steps it took, above 0; or a distribution.
        seed: of the draws.
    """

    def __init__(self, seconds_per_step: float | Distribution = 0.1, jitter: float = 0.0,
                 seconds_per_task: float | Distribution = 1.0, seed: int = 0):
        self.jitter = check_number("jitter", jitter, at_least=0)
        self.seed = seed
        per_step, per_task = "seconds_per_step", "seconds_per_task"
        self._step = NodeValues(per_step, as_distribution(seconds_per_step, per_step), seed, above=0)
        self._task = NodeValues(per_task, as_distribution(seconds_per_task, per_task), seed, above=0)

    def seconds_per_step(self, partition: int) -> float:
        """Return how long a node takes for one work step, seconds, before jitter."""
        return self._step.of(partition)

    def seconds_per_task(self, partition: int) -> float:
        """Return how long a node takes for a task of unknown work, seconds, before jitter."""
        return self._task.of(partition)

    def compute_seconds(self, partition: int, task_index: int, work_steps: float | None) -> float:
        """Return how long a node computes.

        Args:
            task_index: how many tasks this node was given before.
            work_steps: the task's size; None when it is unknown.
        """
        seconds = self._task.of(partition) if work_steps is None else self._step.of(partition) * work_steps
        if self.jitter:
            seconds *= jitter_factor(self.jitter, self.seed, "compute", partition, task_index)
        return seconds

    @classmethod
    def from_settings(cls, section: Mapping[str, Any] | None, seed: int, num_nodes: int,
                      path: str = "simulation.devices") -> "Devices":
        """Return what a file's section describes; None: the defaults.

        Raises:
            InvalidSetting: with the setting's full path.
        """
        section = dict(section or {})
        check_keys(section, path, ("seconds_per_step", "jitter", "seconds_per_task"))
        for key in section.keys() & {"seconds_per_step", "seconds_per_task"}:
            section[key] = as_distribution(section[key], f"{path}.{key}")
        try:
            devices = cls(**section, seed=seed)
            devices._step.check(num_nodes)
            devices._task.check(num_nodes)
        except InvalidSetting as error:
            raise error.under(path) from error
        return devices
