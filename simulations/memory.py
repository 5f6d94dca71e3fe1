"""Python's garbage collector, and a simulation's many small objects."""
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# So many more objects were made than freed since the collector last looked; Python's own figure is 700.
YOUNG_OBJECTS = 50_000


@cache
def exempt_what_is_loaded() -> None:
    """Take everything that exists by now out of garbage collection, for as long as the process lives.

    torch and Flower are 200,000 objects that never go away. A simulation makes so many small ones that the collector
    would walk through all of them every few thousand messages, which took a third of a run's time. Objects that
    nobody refers to any more are freed all the same; only cycles among those that are here already would stay. Calls
    after the first do nothing: what comes later is a run's own, and is collected.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Let the collector look less often, for as long as this lasts.

    The messages of thousands of peers are hundreds of thousands of objects that live for a moment of virtual time and
    are in no cycle: looking at them was a quarter of the time of a run of 8,192 peers.
    """
    usual = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
