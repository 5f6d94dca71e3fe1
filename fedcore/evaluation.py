"""How good the model is: the evaluations of a run, and polls of the clients that make one."""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import MetricRecord, RecordDict

from fedcore.errors import MalformedReply
from fedcore.measures import reaches
from fedcore.payload import read_num_examples, single_record

# Entries of a metrics record that say what was done, not how well.
NOT_FIGURES = ("num-examples", "work-steps", "train-seconds")


def read_evaluation(content: RecordDict) -> tuple[int, dict[str, float]]:
    """Return how many examples an evaluation was made on, and its figures.

    Raises:
        MalformedReply: no usable metrics record, or a figure that is not a finite number.
    """
    metrics = single_record(content, MetricRecord, "metrics")
    examples = read_num_examples(metrics)
    figures: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list) or not math.isfinite(value):
            raise MalformedReply(f"the evaluation's {name[:40]!r} is not a finite number")
        if name not in NOT_FIGURES:
            figures[name] = value
    return examples, figures


@dataclass
class Scores:
    """The best and the latest of all evaluations.

    Attributes:
        latest: figures of the latest evaluation.
        time_to_target_s: when the target was first reached, seconds.
        evaluated_version: the version whose evaluation was asked for last.
        due_s: when the next evaluation is due, where they are counted in seconds.
    """

    latest: dict[str, float] = field(default_factory=dict)
    best_accuracy: float | None = None
    time_to_target_s: float | None = None
    evaluated_version: int = -1
    due_s: float = 0.0

    def add(self, figures: Mapping[str, float], now: float, target: Mapping[str, float]) -> bool:
        """Take note of an evaluation; returns whether it reaches the target."""
        self.latest = dict(figures)
        accuracy = figures.get("accuracy", math.nan)
        if not math.isnan(accuracy):
            self.best_accuracy = accuracy if self.best_accuracy is None else max(self.best_accuracy, accuracy)
        reached = self.reached(target)
        if reached and self.time_to_target_s is None:
            self.time_to_target_s = now
        return reached

    def reached(self, target: Mapping[str, float]) -> bool:
        """Say whether the latest evaluation reaches a target."""
        return bool(target) and all(
            name in self.latest and reaches(name, self.latest[name], value) for name, value in target.items()
        )


@dataclass
class Poll:
    """One version's evaluation at the clients.

    Attributes:
        asked: how many clients were asked.
        pending: answers still awaited.
        figures: by metric, then by partition: the value and the examples it was measured on.
    """

    version: int
    asked: int
    pending: int
    figures: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)

    def add(self, partition: int, content: RecordDict) -> None:
        """Count a client's answer.

        Raises:
            MalformedReply: no usable metrics; it is counted as an answer all the same.
        """
        self.pending -= 1
        examples, found = read_evaluation(content)
        for name, value in found.items():
            self.figures.setdefault(name, {})[partition] = (value, examples)

    @property
    def answers(self) -> int:
        """How many clients have given usable figures."""
        return max((len(by_partition) for by_partition in self.figures.values()), default=0)

    def means(self) -> dict[str, float]:
        """Return each metric's mean, weighted by examples, summed in ascending partition order."""
        means = {}
        for name in sorted(self.figures):
            rows = [self.figures[name][partition] for partition in sorted(self.figures[name])]
            means[name] = sum(value * examples for value, examples in rows) / sum(examples for _, examples in rows)
        return means
