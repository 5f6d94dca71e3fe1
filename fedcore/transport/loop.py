"""The one event loop of a process on which gRPC runs, in a thread of its own.

gRPC's asyncio side shares one queue of events among all loops of a process, and does not bear that one of them ends
while calls are open. So there is one, and it never ends.
"""
import asyncio
import ctypes
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

M_ARENA_MAX = -8    # of <malloc.h>
# Chunks come and go in several of gRPC's threads, and each of glibc's arenas keeps what it once had: at 48 clients that
# was most of a 100 MB model.
ARENAS = 2
M_MMAP_THRESHOLD = -3
# By default glibc takes larger and larger arrays from its heaps, which shrink only from their end: the layers of a mean
# that was long freed stayed there, a whole model of them. Chunks are smaller, and stay in the heaps.
MAPPED_BYTES = 4 << 20

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}    # by process, for a child that was forked


def link_loop() -> asyncio.AbstractEventLoop:
    """Return the loop; it is started when it is asked for first."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            _mallopt(M_ARENA_MAX, ARENAS, "MALLOC_ARENA_MAX")
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="fedcore-link", daemon=True).start()
        return loop


def return_large_arrays() -> None:
    """Have the process give the memory of large arrays back as soon as they are freed: for servers.

    Where models are trained, fresh memory for every activation would cost more than it saves.
    """
    _mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES, "MALLOC_MMAP_THRESHOLD_")


def _mallopt(option: int, value: int, variable: str) -> None:
    """Set an option of glibc's allocator, unless the operator has set it; other libraries have none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and variable not in os.environ:
        mallopt(option, value)


def submit(coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
    """Run a coroutine on the loop, from any other thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, link_loop())
