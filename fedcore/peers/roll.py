"""The list of a run's members as checkpoints hold it: once, however many peers share it."""
from collections.abc import Sequence

import torch
from torch import Tensor

# The list that was converted last, both ways. All peers of a process share one tuple of members, and one tensor is
# stored once in a checkpoint; N lists of N ranks would take a second and a gigabyte at 8,192 peers.
_latest: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0, dtype=torch.int64))


def to_checkpoint(members: tuple[int, ...]) -> Tensor:
    """Return members, ascending, as a tensor, shape (members,); the same object for the same tuple."""
    global _latest
    latest = _latest
    if latest[0] is not members:
        latest = _latest = (members, torch.tensor(members, dtype=torch.int64))
    return latest[1]


def from_checkpoint(saved: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Return the members that a checkpoint holds; the same object for the same tensor."""
    global _latest
    if not isinstance(saved, Tensor):    # written before they were tensors
        return tuple(saved)
    latest = _latest
    if latest[1] is not saved:
        latest = _latest = (tuple(saved.tolist()), saved)
    return latest[0]
