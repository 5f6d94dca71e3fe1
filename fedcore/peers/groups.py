"""Groups that all peers draw alike, without a message."""
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)
def draw_groups(members: tuple[int, ...], group_size: int, seed: int, step: int) -> dict[int, tuple[int, ...]]:
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


def group_of(rank: int, members: Sequence[int], group_size: int, seed: int, step: int) -> tuple[int, ...]:
    """Return a peer's group of a step, itself included, in ascending order; see `draw_groups`."""
    return draw_groups(tuple(members), group_size, seed, step)[rank]
