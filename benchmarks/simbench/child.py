"""What `measure.in_own_process` starts: one part of the benchmark, its figures as JSON on the last line it prints."""
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil


def cold(contender: str, size: str, rounds: int) -> dict[str, Any]:
    """Run a contender from nothing: its start-up, and then its rounds.

    Start-up is everything up to the end of the first round, less the mean of the rounds after it.
    """
    from simbench.measure import Stamps, family_cpu

    stamps = Stamps(family_cpu if contender == "flower_ray" else time.process_time)
    began = psutil.Process().create_time()

    import torch

    from simbench.contenders import CONTENDERS

    torch.set_num_threads(1)
    CONTENDERS[contender](size, rounds, stamps)
    first_cpu, first_wall = stamps.moments[1]
    per_round, wall_per_round = stamps.cpu_per_round(skip=1), 0.0
    if rounds > 1:
        wall_per_round = (stamps.moments[-1][1] - first_wall) / (rounds - 1)
    return {"startup_cpu_s": first_cpu - per_round, "startup_wall_s": first_wall - began - wall_per_round,
            "cpu_s_per_round": per_round, "wall_s_per_round": wall_per_round}


def registered(count: int, active: int, updates: int, size: str | None) -> dict[str, Any]:
    """Simulate a federation of many registered clients of which few train at a time."""
    from simbench.scale import run_registered

    return run_registered(count, active, updates, size)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"cold": cold, "registered": registered}

if __name__ == "__main__":
    figures = PARTS[sys.argv[1]](**json.loads(sys.argv[2]))
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({**figures, "own_peak_mib": own_peak}), flush=True)
