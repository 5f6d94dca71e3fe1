"""Framed messages over a stream, cut off when they make no progress: deadlines follow progress, not fixed totals."""
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fedcore.errors import InvalidSetting, StreamCut, TooSlow
from fedcore.transport.frames import CHUNK_BYTES, Assembler, Framed

Counter = Callable[[int], None]


@dataclass(frozen=True)
class Pace:
    """The least progress that a transfer must make.

    Attributes:
        min_bytes_per_s: on average over every `grace_s` seconds.
        grace_s: how long nothing at all may come.
    """

    min_bytes_per_s: float = 2048.0
    grace_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("min_bytes_per_s", "grace_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidSetting(name, getattr(self, name), "a positive number")

    def too_slow(self) -> TooSlow:
        """Return what breaks off a transfer that makes less progress."""
        return TooSlow(f"fewer than {self.min_bytes_per_s * self.grace_s:.0f} bytes came in {self.grace_s:g} s")


class Progress:
    """Moves a transfer's deadline on whenever enough bytes have passed.

    Args:
        limit: what breaks the transfer off.
        size: bytes that are to pass.
    """

    def __init__(self, limit: asyncio.Timeout, pace: Pace, size: int):
        self._limit, self._pace = limit, pace
        self._left, self._passed = size, 0

    def add(self, num_bytes: int) -> None:
        """Take note of bytes that have passed."""
        self._left -= num_bytes
        self._passed += num_bytes
        if self._passed >= self._pace.min_bytes_per_s * self._pace.grace_s or self._left <= 0:
            self._passed = 0
            self._limit.reschedule(asyncio.get_running_loop().time() + self._pace.grace_s)


@asynccontextmanager
async def progress(pace: Pace, size: int) -> AsyncIterator[Progress]:
    """Break off what happens inside when it makes less progress than `pace` wants.

    Raises:
        TooSlow: it did.
    """
    try:
        async with asyncio.timeout(pace.grace_s) as limit:
            yield Progress(limit, pace, size)
    except TimeoutError as error:
        raise pace.too_slow() from error


async def write_body(
    write: Callable[[bytes], Awaitable[Any]], framed: Framed, pace: Pace, start: int = 0, checked: bool = False,
    count: Counter = lambda _: None, chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Send a message's body from byte `start` on.

    Args:
        write: sends one chunk, and waits while the other end is behind.
        count: told of the bytes that were sent, as they are.

    Raises:
        TooSlow: the other end does not take it.
    """
    async with progress(pace, framed.size - start) as moved:
        for chunk in framed.chunks(start, checked, chunk_bytes):
            await write(chunk)
            moved.add(len(chunk))
            count(len(chunk))


async def read_body(
    read: Callable[[], Awaitable[Any]], assembler: Assembler, pace: Pace, count: Counter = lambda _: None
) -> None:
    """Receive a message's body until it is complete; what came stays in the assembler whatever happens.

    Args:
        read: returns the next chunk, or something that is not bytes at the end of the stream.
        count: told of the bytes that came, as they come.

    Raises:
        TooSlow: the other end does not send it.
        StreamCut: the stream ends too early.
        MalformedFrame: it sends something else.
    """
    async with progress(pace, assembler.missing) as moved:
        while assembler.missing:
            chunk = await read()
            if not isinstance(chunk, bytes):
                raise StreamCut(f"the stream ended with {assembler.missing} bytes missing")
            added = assembler.add(chunk)
            moved.add(added)
            count(added)
