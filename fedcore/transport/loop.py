"""The one event loop of a process on which gRPC runs, in a thread of its own.

gRPC's asyncio side shares one queue of events among all loops of a process, and does not bear that one of them ends
while calls are open. So there is one, and it never ends.
"""
import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}    # by process, for a child that was forked


def link_loop() -> asyncio.AbstractEventLoop:
    """Return the loop; it is started when it is asked for first."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="fedcore-link", daemon=True).start()
        return loop


def submit(coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
    """Run a coroutine on the loop, from any other thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, link_loop())
