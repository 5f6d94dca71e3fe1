"""How peers that stop by time agree on what one unit of time is."""
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedcore.peers.meeting import Meeting
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Reduced

# Numbers that are agreed on stay as they are in float64.
DTYPE = torch.float64
# Before anything is known of the links, an answer may take so long.
FIRST_TIMEOUT_S = 10.0
# A probe that fails is repeated with more patience: messages may be lost, or slow.
PATIENCES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# What is done for the first time takes longer on a real machine: it is done so many times more, unless that takes long.
MORE_TIMES, LONG_S = 3, 0.3


@dataclass(frozen=True)
class Pace:
    """A clock in units: the same at all peers.

    Attributes:
        unit_s: seconds of one unit.
        since_s: moment of the run's clock from which that holds.
        since: units that had passed by then.
    """

    unit_s: float
    since_s: float = 0.0
    since: float = 0.0

    def at(self, now_s: float) -> float:
        """Return how many units have passed at a moment of the run's clock."""
        return self.since + (now_s - self.since_s) / self.unit_s

    def changed(self, unit_s: float, now_s: float) -> "Pace":
        """Return the clock that goes on with another unit from a moment on."""
        return self if unit_s == self.unit_s else Pace(unit_s, now_s, self.at(now_s))


class Hold:
    """Lets proposals of a kind of meeting wait until this peer can answer them: `with Hold(peer, "tag"): await ...`."""

    def __init__(self, peer: Peer, tag: str):
        self._peer = peer
        # Answered once somebody rebinds the meeting and the turn is free.
        peer.meeting(tag, lambda: peer.params, _nothing, FIRST_TIMEOUT_S)

    def __enter__(self) -> None:
        self._peer.turn.take(self, _nothing)

    def __exit__(self, *_: object) -> None:
        self._peer.turn.leave(self)


def spread(peer: Peer, values: Sequence[float]) -> torch.Tensor:
    """Return a table with one row for each member, zero but for this peer's own, flat; to be reduced over members."""
    rows = torch.zeros(len(peer.members), len(values), dtype=DTYPE)
    rows[peer.members.index(peer.rank)] = torch.tensor(values, dtype=DTYPE)
    return rows.reshape(-1)


def rows_of(peer: Peer, reduced: Reduced, width: int) -> list[list[float]]:
    """Return the rows of those who contributed to a reduction of such tables, in ascending order of rank."""
    table = summed(reduced).reshape(-1, width).tolist()
    return [row for rank, row in zip(peer.members, table, strict=True) if rank in reduced.contributors]


def summed(reduced: Reduced) -> torch.Tensor:
    """Return the sum behind a mean; the same bits at all members."""
    return reduced.mean * len(reduced.contributors)


async def gather(peer: Peer, values: Sequence[float], tag: str) -> list[list[float]]:
    """Return every member's values, in ascending order of rank; the same bits at all members."""
    return rows_of(peer, await peer.all_reduce(spread(peer, values), tag=tag), len(values))


async def usual_seconds(peer: Peer, act: Callable[[], Awaitable[Any]]) -> float:
    """Return how long something takes: the mean of a few times but the first, or the first where it takes long."""
    began = peer.now
    await act()
    first_s, began = peer.now - began, peer.now
    if first_s >= LONG_S:
        return first_s
    for _ in range(MORE_TIMES):
        await act()
    return (peer.now - began) / MORE_TIMES


class Probe:
    """Measures how long a pairwise exchange takes on links that carry nothing else. Make it before the first await."""

    def __init__(self, peer: Peer):
        self._peer = peer
        self._meeting(FIRST_TIMEOUT_S)

    def _meeting(self, timeout_s: float) -> Meeting:
        return self._peer.meeting("probe", lambda: self._peer.params, _nothing, timeout_s, exclusive=False)

    async def seconds(self, partner: int) -> float:
        """Return how long an exchange with a partner of higher rank takes; where none comes about, the longest wait."""
        for patience_s in PATIENCES_S:
            began = self._peer.now
            if await self._meeting(patience_s).with_(partner):
                first_s = self._peer.now - began
                return min(first_s, await self._usual(partner)) if first_s < LONG_S else first_s
            if partner in self._peer.mailbox.lost:
                return 0.0
        return PATIENCES_S[-1]

    async def _usual(self, partner: int) -> float:
        began, came_about = self._peer.now, 0
        for _ in range(MORE_TIMES):
            came_about += await self._meeting(PATIENCES_S[0]).with_(partner)
        return (self._peer.now - began) / came_about if came_about else PATIENCES_S[0]


def _nothing(*_: object) -> None:
    """Neither a probe nor a turn that is held changes anything."""
