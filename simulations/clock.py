"""Virtual time: what happens next, in an order that two runs share."""
import heapq
from dataclasses import dataclass
from typing import Any

# Cancelled entries stay in the heap until they surface, or until they outnumber the live ones.
COMPACT_ABOVE = 1024


@dataclass(slots=True, eq=False)
class Entry:
    """Something that will happen at `at`."""

    at: float
    item: Any
    cancelled: bool = False


class EventHeap:
    """Future events, ordered by time, then priority, then tie, then the order in which they were pushed."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Any, int, Entry]] = []
        self._pushed = 0
        self._cancelled = 0

    def push(self, at: float, priority: int, tie: Any, item: Any) -> Entry:
        """Plan an event; the entry serves to cancel it. Ties are compared with each other, so all of one type."""
        entry = Entry(at, item)
        heapq.heappush(self._heap, (at, priority, tie, self._pushed, entry))
        self._pushed += 1
        return entry

    def cancel(self, entry: Entry) -> None:
        """Let an event not happen."""
        if not entry.cancelled:
            entry.cancelled = True
            self._cancelled += 1
            if self._cancelled > COMPACT_ABOVE and 2 * self._cancelled > len(self._heap):
                self._heap = [row for row in self._heap if not row[4].cancelled]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def next_at(self) -> float | None:
        """Return when the next event happens, None when there is none."""
        while self._heap and self._heap[0][4].cancelled:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0][0] if self._heap else None

    def pop(self) -> Entry:
        """Remove and return the next event; `next_at` must have said that there is one."""
        entry = heapq.heappop(self._heap)[4]
        # It can be cancelled no more; whoever tries later must not upset the count.
        entry.cancelled = True
        return entry

    def items(self) -> list[tuple[float, Any]]:
        """Return all that will happen, with its time, in the order in which it was pushed."""
        live = sorted((row for row in self._heap if not row[4].cancelled), key=lambda row: row[3])
        return [(row[0], row[4].item) for row in live]

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled
