"""Python's garbage collector, and a simulation's many small objects."""
import gc
from functools import cache


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
