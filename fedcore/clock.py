"""What "now" is, and how a grid says that something happened.

A fedcore grid has two members beyond Flower's `Grid`: `now`, and `next_event(until)`, which waits (or moves virtual
time) until something happens. On any other Flower grid `PolledGrid` provides both by polling with back-off.
"""
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid


class Clock(Protocol):
    """Something that knows the time."""

    @property
    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...


class WallClock:
    """Monotonic seconds since the object was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self._start


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened on a grid.

    Attributes:
        kind: `reply` (with `message`), `join`, `leave` (with `node_id`), `time` (the asked-for moment has come), or
            `wake` (nothing happened, but somebody wants to be heard: the user wants to stop).
        at: the grid's clock, seconds.
    """

    kind: Literal["reply", "join", "leave", "time", "wake"]
    at: float
    node_id: int | None = None
    message: Message | None = None


@runtime_checkable
class EventfulGrid(Protocol):
    """The members that fedcore's own grids have in addition to Flower's."""

    @property
    def now(self) -> float: ...

    def next_event(self, until: float | None) -> Event | None:
        """Return what happens next, at `until` at the latest; None when nothing can ever happen."""
        ...


class PolledGrid:
    """Any Flower grid, asked again and again with growing pauses: replies, joins and leaves become events.

    Args:
        grid: where messages go; its own polling rate bounds how soon a reply is noticed.
        shortest_pause_s, longest_pause_s: bounds of the pause between two questions, seconds.

    Attributes:
        slow_messages: a round trip takes seconds, whatever the work; strategies that measure speed must know.
    """

    slow_messages = True

    def __init__(self, grid: Grid, shortest_pause_s: float = 0.05, longest_pause_s: float = 2.0):
        self._grid, self._clock = grid, WallClock()
        self._shortest, self._longest = shortest_pause_s, longest_pause_s
        self._waiting: dict[str, None] = {}
        self._known: dict[int, None] | None = None    # None until somebody asks for the first time
        self._ready: deque[Event] = deque()

    @property
    def now(self) -> float:
        return self._clock.now

    @property
    def nodes_meet(self) -> bool:
        """Whether nodes work at the same time, and could talk to each other."""
        return not getattr(self._grid, "simulated", False)

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are online, ascending; who came and went since the first question becomes an event."""
        found = dict.fromkeys(sorted(self._grid.get_node_ids()))
        before, self._known = self._known, found
        if before is not None:
            self._ready += [Event("leave", self.now, node_id) for node_id in before if node_id not in found]
            self._ready += [Event("join", self.now, node_id) for node_id in found if node_id not in before]
        return list(found)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        """Send messages; a refused one has None for its id."""
        ids: list[str | None] = list(self._grid.push_messages(messages))
        self._waiting.update(dict.fromkeys(found for found in ids if found))
        return ids

    def next_event(self, until: float | None) -> Event | None:
        """Wait for a reply, a join, a leave, or `until`."""
        pause = self._shortest
        while not self._ready:
            self._look()
            if self._ready:
                break
            if until is not None and self.now >= until:
                return Event("time", until)
            left = self._longest if until is None else until - self.now
            time.sleep(max(0.0, min(pause, left)))
            pause = min(2 * pause, self._longest)
        return self._ready.popleft()

    def _look(self) -> None:
        for reply in self._grid.pull_messages(list(self._waiting)) if self._waiting else []:
            # One that answers nothing, or for the second time, is for the hub to refuse and to count.
            self._waiting.pop(reply.metadata.reply_to_message_id, None)
            self._ready.append(Event("reply", self.now, reply.metadata.src_node_id, reply))
        self.get_node_ids()
