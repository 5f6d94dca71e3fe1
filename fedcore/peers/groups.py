"""Groups that all peers draw alike, without a message."""
from collections import OrderedDict

import numpy as np

Groups = dict[int, tuple[int, ...]]
# Peers of one process ask for the same few steps. Members are recognised by identity: hashing thousands of them at
# every call would cost more than the rest of a step.
KEPT_STEPS = 16
_drawn: OrderedDict[tuple[int, int, int, int], tuple[tuple[int, ...], Groups]] = OrderedDict()


def draw_groups(members: tuple[int, ...], group_size: int, seed: int, step: int) -> Groups:
    """Return each member's group of a step, itself included, in ascending order.

    Members that do not fill a group are each a group of their own.

    Args:
        members: ranks in ascending order.
        group_size: at least 2.

    Source: Kolehmainen et al., 2025, arXiv:2506.10911: a permutation that all draw alike, split with a stride.
    """
    order = [members[index] for index in np.random.default_rng(seed + step + 1).permutation(len(members)).tolist()]
    count = len(members) // group_size
    full = [tuple(sorted(order[index:count * group_size:count])) for index in range(count)]
    alone = [(rank,) for rank in order[count * group_size:]]
    return {rank: group for group in [*full, *alone] for rank in group}


def group_of(rank: int, members: tuple[int, ...], group_size: int, seed: int, step: int) -> tuple[int, ...]:
    """Return a peer's group of a step, itself included, in ascending order; see `draw_groups`."""
    key = (id(members), group_size, seed, step)
    found = _drawn.get(key)
    if found is None or found[0] is not members:
        found = _drawn[key] = (members, draw_groups(members, group_size, seed, step))
        if len(_drawn) > KEPT_STEPS:
            _drawn.popitem(last=False)
    return found[1][rank]
