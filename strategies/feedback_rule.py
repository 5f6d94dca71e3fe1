"""What a client of a method with error feedback does with its gradient, and what the server makes of the answers.

The methods, and where they come from, are listed in `error_feedback.py`.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.compression.base import Codec
from fedcore.compression.dense import Identity

INITS = ("full", "compressed", "zero")
# No round of this client's was used yet.
NEVER = -1


@dataclass(frozen=True)
class Rule:
    """What distinguishes a method.

    Attributes:
        feedback: eta, factor on the error memory; None: there is none.
        estimates: whether messages are differences to an estimate h.
        gradient_weight: a, of the new gradient in the client's momentum; None: no momentum.
    """

    feedback: float | None = None
    estimates: bool = False
    gradient_weight: float | None = None


@dataclass(frozen=True)
class Memory:
    """What a client keeps from round to round, each of shape (d,); None where the method has no such thing.

    Attributes:
        error: e, in units of the gradient.
        estimate: h.
        momentum: v.
    """

    error: Tensor | None = None
    estimate: Tensor | None = None
    momentum: Tensor | None = None

    @classmethod
    def at(cls, rule: Rule, gradient: Tensor, estimate: Tensor | None) -> "Memory":
        """Return the memory before the first round: e_0 = 0, h_0 as given, v_0 = g_0."""
        return cls(
            error=None if rule.feedback is None else torch.zeros_like(gradient),
            estimate=estimate,
            momentum=None if rule.gradient_weight is None else gradient,
        )


def respond(
    rule: Rule, memory: Memory, gradient: Tensor, compress: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Memory, Tensor]:
    """Return a client's memory after a round, and the payload it sends.

    Args:
        gradient: g, shape (d,).
        compress: returns the payload of a vector, and what a receiver decodes from it: D.
    """
    target = gradient
    if rule.gradient_weight is not None and memory.momentum is not None:
        target = (1 - rule.gradient_weight) * memory.momentum + rule.gradient_weight * gradient    # v
    difference = target if memory.estimate is None else target - memory.estimate                   # g - h
    message = difference
    if rule.feedback is not None and memory.error is not None:
        message = rule.feedback * memory.error + difference
    payload, sent = compress(message)
    return Memory(
        error=None if memory.error is None else memory.error + difference - sent,
        estimate=None if memory.estimate is None else memory.estimate + sent,
        momentum=None if memory.momentum is None else target,
    ), payload


def mean(vectors: Mapping[int, Tensor], count: int) -> Tensor:
    """Return the sum of vectors of shape (d,), in the order of their partitions, over `count`."""
    ordered = [vectors[partition] for partition in sorted(vectors)]
    total = ordered[0].clone()
    for vector in ordered[1:]:
        total += vector
    return total / count


def server_step(params: Tensor, direction: Tensor, server_lr: float) -> Tensor:
    """Return x - gamma u, shape (d,)."""
    return params - server_lr * direction


def start_codec(codec: Codec, init: str) -> Codec | None:
    """Return how a client sends its h_0 for a given `init`, None when h_0 is zero."""
    if init == "full":
        return Identity().codec([(codec.num_values,)], codec.dtype)
    return codec if init == "compressed" else None
