"""How fast fedcore's simulator is, beside a bare torch loop and Flower's own simulation on Ray, all in one run.

    python benchmarks/bench_sim.py [--quick] [--sizes 8k 80k 6M] [--no-ray] [--json FILE]

CPU time, medians of interleaved repetitions; what each figure means is in docs/benchmarks.md.
"""
import argparse
import gc
import importlib.util
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent)]

import torch  # noqa: E402 (torch reads OMP_NUM_THREADS when it is imported)
from simbench import report  # noqa: E402
from simbench.contenders import CONTENDERS  # noqa: E402
from simbench.measure import Stamps, in_own_process, median  # noqa: E402
from simbench.scale import event_loop, send_and_receive  # noqa: E402
from simbench.workload import HIDDEN, PER_ROUND  # noqa: E402

IN_PROCESS = [name for name in CONTENDERS if name != "flower_ray"]
# Per model size: repetitions and rounds of each, and Ray's runs and rounds of each.
FULL = {"8k": (9, 10, 3, 15), "80k": (7, 6, 2, 12), "6M": (5, 1, 1, 4)}
QUICK = {"8k": (3, 6, 1, 8), "80k": (3, 3, 1, 5), "6M": (2, 1, 1, 2)}


def say(text: str) -> None:
    """Report progress, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def overhead(size: str, plan: tuple[int, int, int, int], with_ray: bool) -> dict[str, list[float]]:
    """Return CPU milliseconds per client-training of every contender, one value for each repetition."""
    repetitions, rounds, ray_runs, ray_rounds = plan
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for name in IN_PROCESS:    # imports, caches, allocator: not part of any figure
        CONTENDERS[name](size, 1, Stamps())
    for repetition in range(repetitions):
        say(f"{size}: repetition {repetition + 1} of {repetitions}")
        for name in IN_PROCESS:
            gc.collect()
            stamps = Stamps()
            CONTENDERS[name](size, rounds, stamps)
            found[name].append(1000 * stamps.cpu_per_round() / PER_ROUND)
        if with_ray and repetition < ray_runs:
            say(f"{size}: Flower's simulation on Ray, run {repetition + 1} of {ray_runs}")
            cold = in_own_process("cold", contender="flower_ray", size=size, rounds=ray_rounds)
            found["flower_ray"].append(1000 * cold["cpu_s_per_round"] / PER_ROUND)
    return found


def starts(sizes: list[str], with_ray: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Return start-up time and peak memory of each contender in a process of its own, by size and name."""
    names = [name for name in CONTENDERS if name != "tuned_loop" and (with_ray or name != "flower_ray")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for size in sizes:
        say(f"{size}: start-up and memory")
        found[size] = {name: in_own_process("cold", contender=name, size=size, rounds=2) for name in names}
    return found


def main() -> int:
    """Measure, print, and say with the exit status whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: two minutes instead of ten")
    parser.add_argument("--sizes", nargs="+", choices=HIDDEN, default=list(HIDDEN), help="models")
    parser.add_argument("--no-ray", action="store_true", help="leave Flower's own simulation out")
    parser.add_argument("--json", type=Path, help="write every figure to this file, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    logging.getLogger("fedcore").setLevel(logging.ERROR)
    with_ray = not arguments.no_ray and importlib.util.find_spec("ray") is not None
    if not with_ray:
        print("Flower's simulation on Ray is left out: " + (
            "--no-ray was given." if arguments.no_ray else "Ray is not installed (pip install 'fedcore[ray]')."
        ))
    plans, began = QUICK if arguments.quick else FULL, time.time()
    figures: dict[str, Any] = {"machine": machine()}
    figures["overhead"] = {size: overhead(size, plans[size], with_ray) for size in arguments.sizes}
    figures["starts"] = starts(arguments.sizes, with_ray)
    say("clients that do nothing")
    tries = 3 if arguments.quick else 7
    pairs = [(send_and_receive(5000), event_loop(5000)) for _ in range(tries)]
    figures["throughput"] = {
        "send_and_receive": median(pair[0] for pair in pairs), "event_loop": median(pair[1] for pair in pairs)
    }
    figures["registered"] = {}
    for count in (100, 1000, 10_000, 100_000):
        say(f"{count:,} registered clients")
        figures["registered"][count] = in_own_process("registered", count=count, active=1000, updates=5000, size=None)
    say("100,000 registered clients, 1,000 of which train 80k parameters at a time")
    figures["active"] = in_own_process("registered", count=100_000, active=1000, updates=2000, size="80k")
    events = 100_000 if arguments.quick else 1_000_000
    say(f"{events:,} client updates of simulated training")
    figures["events"] = in_own_process("registered", count=1000, active=1000, updates=events, size=None)
    figures["took_s"] = time.time() - began
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if report.show(figures) else 1


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    from importlib.metadata import version

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processors": os.cpu_count(), "processor": processor_name(), "load": load, "python": platform.python_version(),
        "torch": torch.__version__, "flwr": version("flwr"),
    }


def processor_name() -> str:
    """Return the processor's name where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
