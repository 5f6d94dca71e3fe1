"""Who may upload now: only as many at once as there is memory for; the others wait, in order."""
import asyncio
from collections import deque
from collections.abc import Callable


class Credits:
    """Upload credits. All methods belong to the event loop's thread.

    An upload holds its credit from its admission until the strategy has taken the reply. One that was broken off may
    keep what it has until somebody else wants the place.

    Args:
        max_uploads, max_bytes: admitted at once; a single upload is admitted whatever its size.
        on_evict: told of a broken-off upload that lost its place.
        in_use: returns how many places other things take (old versions of the model that are still being sent).
        patience_s: how long these may keep all uploads waiting; then one is admitted all the same, so that nodes that
            are slow to fetch do not hold up the rest.
    """

    def __init__(self, max_uploads: int, max_bytes: int | None, on_evict: Callable[[str], None],
                 in_use: Callable[[], int] = lambda: 0, patience_s: float = 20.0):
        self.max_uploads, self.max_bytes, self.on_evict, self.in_use = max_uploads, max_bytes, on_evict, in_use
        self.patience_s = patience_s
        self._impatient: asyncio.TimerHandle | None = None    # set while nothing but old models is in the way
        self._out_of_patience = False
        self._held: dict[str, int] = {}
        self._parked: dict[str, None] = {}
        self._waiting: deque[tuple[str, int, asyncio.Future[None]]] = deque()

    @property
    def admitted(self) -> int:
        """Uploads that hold a credit."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """Uploads that wait for one."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """How many more uploads would fit."""
        return max(0, self.max_uploads - len(self._held) - self.in_use())

    def has_room(self, size: int) -> bool:
        """Say whether an upload would be admitted at once."""
        return not self._waiting and self._fits(size, parked_too=True)

    async def acquire(self, name: str, size: int) -> None:
        """Wait for a credit; an upload that kept its own goes on at once."""
        if name in self._held:
            self._parked.pop(name, None)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (name, size, place)
        self._waiting.append(entry)
        self.admit()
        try:
            await place
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif place.done() and not place.cancelled():
                self.release(name)
            raise

    def park(self, name: str) -> None:
        """Let an upload that was broken off keep its place until somebody else wants it."""
        if name in self._held:
            self._parked[name] = None
            self.admit()

    def release(self, name: str) -> None:
        """Give a credit back; one that is not held does not matter."""
        self._parked.pop(name, None)
        if self._held.pop(name, None) is not None:
            self.admit()

    def _fits(self, size: int, parked_too: bool = False) -> bool:
        held = {name: size for name, size in self._held.items() if not (parked_too and name in self._parked)}
        if not held:
            return self._out_of_patience or self.in_use() < self.max_uploads
        return len(held) + self.in_use() < self.max_uploads and (
            self.max_bytes is None or sum(held.values()) + size <= self.max_bytes)

    def admit(self) -> None:
        """Admit whoever there is room for."""
        while self._waiting:
            name, size, place = self._waiting[0]
            if not self._fits(size):
                if not self._fits(size, parked_too=True):
                    if self._held.keys() == self._parked.keys() and self._impatient is None:
                        loop = asyncio.get_running_loop()
                        self._impatient = loop.call_later(self.patience_s, self._lose_patience)
                    return
                oldest = next(iter(self._parked))
                del self._parked[oldest]
                del self._held[oldest]
                self.on_evict(oldest)
                continue
            self._waiting.popleft()
            self._regain_patience()
            if not place.done():
                self._held[name] = size
                place.set_result(None)

    def _lose_patience(self) -> None:
        self._impatient, self._out_of_patience = None, bool(self._waiting)
        self.admit()

    def _regain_patience(self) -> None:
        self._out_of_patience = False
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None
