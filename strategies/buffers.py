"""Values of a model that are not trained, such as BatchNorm statistics: blended by weight, never stepped.

A server optimizer or a pseudo-gradient makes no sense for a running mean, so these entries are averaged over the
replies that are used, and where the replies carry less than the whole weight the rest stays with the old value.
"""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def add_buffers(total: Mapping[str, Tensor], buffers: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return a running weighted sum with one reply's buffers added; `total` is empty before the first.

    Entries that are not floating point (counters such as `num_batches_tracked`) have no mean: the largest is kept.
    """
    if not total:
        return {name: weight * value if value.is_floating_point() else value for name, value in buffers.items()}
    return {
        name: torch.add(total[name], value, alpha=weight) if value.is_floating_point() else total[name].maximum(value)
        for name, value in buffers.items()
    }


def settle_buffers(old: Mapping[str, Tensor], total: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return the new buffers from a weighted sum whose weights add up to `weight`.

    A weight of 1 or more replaces the old values by the weighted mean; a smaller one moves that share of the way.
    """
    if not total or weight <= 0:
        return dict(old)
    share = min(1.0, weight)
    return {
        name: (1.0 - share) * old[name] + (share / weight) * value if value.is_floating_point()
        else old[name].maximum(value)
        for name, value in total.items()
    }


def blend_buffers(
    old: Mapping[str, Tensor], replies: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the old buffers blended with those of the replies, each with its weight (see `settle_buffers`)."""
    total: dict[str, Tensor] = {}
    for buffers, weight in zip(replies, weights, strict=True):
        total = add_buffers(total, buffers, weight)
    return settle_buffers(old, total, sum(weights))
