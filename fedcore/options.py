"""What a run is told besides its strategy: when to stop, when to evaluate, how long to wait."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedcore.compressed import Compression
from fedcore.vectors import Model

EvaluateFn = Callable[[Model], Mapping[str, float]]


@dataclass(frozen=True)
class StopRule:
    """The run ends as soon as one of these is reached; None means no such limit.

    Attributes:
        seconds: on the run's clock.
        rounds: rounds, or `expected` client updates each for event strategies.
        client_updates: accepted training replies.
        target: metric name -> value that an evaluation must reach, all of them.
    """

    seconds: float | None = None
    rounds: int | None = None
    client_updates: int | None = None
    target: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Who evaluates the model, and how often.

    Attributes:
        where: `server` calls `fn`; `clients` asks every node and weighs by examples.
        every: versions (rounds) or seconds between evaluations.
    """

    where: Literal["server", "clients", "none"] = "none"
    every: float = 1
    unit: Literal["versions", "seconds"] = "versions"
    fn: EvaluateFn | None = None


@dataclass(frozen=True)
class RunOptions:
    """Everything about a run that no strategy decides.

    Attributes:
        seed: of all randomness.
        expected: how many nodes belong to the run; None: those that are there at the start.
        min_nodes: how many must be there before the start; None: all that are expected.
        round_deadline_s: how long a round waits for replies; None: for all of them; `adaptive`: `deadline_factor` times
            the median of what the latest answers took.
        min_replies_share: least share of a round's replies, in (0, 1], that is waited for beyond the deadline.
        train_config: added to every training request.
        task_timeout_s: a task without an answer for so long counts as lost (Flower's time to live, default 12 hours).
        compression: how clients compress what they learn; None: they do not.
        ready_timeout_s: how long to wait for the nodes to come; None: as long as it takes.
    """

    seed: int = 0
    expected: int | None = None
    min_nodes: int | None = None
    stop: StopRule = StopRule()
    evaluation: Evaluation = Evaluation()
    round_deadline_s: float | Literal["adaptive"] | None = None
    deadline_factor: float = 2.0
    min_replies_share: float = 1.0
    train_config: Mapping[str, Any] = field(default_factory=dict)
    task_timeout_s: float = 43_200.0
    ready_timeout_s: float | None = None
    compression: Compression | None = None
