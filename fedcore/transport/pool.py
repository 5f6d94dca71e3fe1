"""Memory for what arrives: taken once from the system, and used again when nobody refers to it any more."""
import weakref
from itertools import count

import numpy as np

# As torch aligns its own memory: kernels may round differently on memory that is aligned in another way.
ALIGNMENT = 64
# A buffer that is this much larger than asked for is still handed out.
SLACK = 1.25
# Smaller ones come from the allocator's own pool.
SMALLEST_POOLED = 1 << 16


class BufferPool:
    """Lends byte arrays; one comes back by itself when the last array or tensor over its memory is gone.

    The first touch of fresh memory costs more than copying a model into memory that was touched before.

    Args:
        max_idle_bytes: kept for the next taker; what exceeds it goes back to the system.
    """

    def __init__(self, max_idle_bytes: int):
        self.max_idle_bytes = max_idle_bytes
        # A buffer can come back in any thread, even in the middle of `take`: only single dictionary operations here.
        self._idle: dict[int, np.ndarray] = {}
        self._numbers = count()

    @property
    def idle_bytes(self) -> int:
        """Bytes that nobody uses at present."""
        return sum(memory.nbytes for memory in list(self._idle.values()))

    def take(self, num_bytes: int) -> np.ndarray:
        """Return `num_bytes` bytes of memory with arbitrary content, shape (num_bytes,), aligned as torch does."""
        if num_bytes == 0:
            return np.empty(0, np.uint8)
        needed = num_bytes + ALIGNMENT
        memory = self._pop(needed) if needed >= SMALLEST_POOLED else None
        if memory is None:
            memory = np.empty(needed, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        # Over a memoryview, so that all views of it, and theirs, refer to this array and not to the memory's owner.
        lent = np.frombuffer(memory.data[start:start + num_bytes], np.uint8)
        if needed >= SMALLEST_POOLED:
            weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def expect(self, num_bytes: int) -> None:
        """Keep as many idle bytes from now on, if that is more than before."""
        self.max_idle_bytes = max(self.max_idle_bytes, num_bytes)

    def limit(self, num_bytes: int) -> None:
        """Keep at most so many idle bytes from now on."""
        self.max_idle_bytes = num_bytes
        self._trim()

    def _pop(self, needed: int) -> np.ndarray | None:
        fitting = [(memory.nbytes, number) for number, memory in list(self._idle.items())
                   if needed <= memory.nbytes <= SLACK * needed]
        for _, number in sorted(fitting):
            if (memory := self._idle.pop(number, None)) is not None:
                return memory
        return None

    def _give_back(self, memory: np.ndarray) -> None:
        if memory.nbytes > self.max_idle_bytes:
            return
        self._idle[next(self._numbers)] = memory
        self._trim()

    def _trim(self) -> None:
        for number in list(self._idle):    # the oldest first: the sizes of today are the likelier to be asked for
            if self.idle_bytes <= self.max_idle_bytes:
                return
            self._idle.pop(number, None)
