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
from simbench.contenders import CONTENDERS  # noqa: E402
from simbench.measure import Stamps, in_own_process, median  # noqa: E402
from simbench.report import Report  # noqa: E402
from simbench.scale import event_loop, send_and_receive  # noqa: E402
from simbench.workload import HIDDEN, PER_ROUND  # noqa: E402

Figures = dict[str, Any]
IN_PROCESS = [name for name in CONTENDERS if name != "flower_ray"]
# Per model size: repetitions and rounds of each, and Ray's runs and rounds of each.
FULL = {"8k": (9, 10, 3, 15), "80k": (7, 6, 2, 12), "6M": (5, 1, 1, 4)}
QUICK = {"8k": (3, 6, 1, 8), "80k": (3, 3, 1, 5), "6M": (2, 1, 1, 2)}


def say(text: str) -> None:
    """Report progress, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def overhead(size: str, plan: tuple[int, int, int, int], with_ray: bool) -> tuple[dict[str, list[float]], Figures]:
    """Return CPU milliseconds per client-training of every contender, one value for each repetition.

    Returns:
        The values by contender; and what the first run on Ray said about its start-up and memory.
    """
    repetitions, rounds, ray_runs, ray_rounds = plan
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    ray: Figures = {}
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
            run = in_own_process("cold", contender="flower_ray", size=size, rounds=ray_rounds)
            found["flower_ray"].append(1000 * run["cpu_s_per_round"] / PER_ROUND)
            ray = ray or run
    return found, ray


def start_ups(size: str) -> dict[str, Figures]:
    """Return start-up time and peak memory of each contender but Ray, in processes of their own."""
    say(f"{size}: start-up and memory")
    names = [name for name in IN_PROCESS if name != "tuned_loop"]
    return {name: in_own_process("cold", contender=name, size=size, rounds=2) for name in names}


def scale(quick: bool) -> Figures:
    """Return throughput and growth."""
    say("clients that do nothing")
    pairs = [(send_and_receive(5000), event_loop(5000)) for _ in range(3 if quick else 7)]
    found: Figures = {
        "send_and_receive": median(pair[0] for pair in pairs), "event_loop": median(pair[1] for pair in pairs),
        "registered": {},
    }
    for count in (100, 1000, 10_000, 100_000):
        say(f"{count:,} registered clients")
        updates = 5000 if quick else 20_000
        found["registered"][count] = in_own_process("registered", count=count, active=1000, updates=updates, size=None)
    say("100,000 registered clients, 1,000 of which train 80k parameters at a time")
    found["active"] = in_own_process("registered", count=100_000, active=1000, updates=2000, size="80k")
    updates = 100_000 if quick else 1_000_000
    say(f"{updates:,} client updates of simulated training")
    found["events"] = in_own_process("registered", count=1000, active=1000, updates=updates, size=None)
    return found


def main() -> int:
    """Measure, print, and say with the exit status whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller scale")
    parser.add_argument("--sizes", nargs="+", choices=HIDDEN, default=list(HIDDEN), help="models")
    parser.add_argument("--no-ray", action="store_true", help="leave Flower's own simulation out")
    parser.add_argument("--json", type=Path, help="write every figure to this file, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    logging.getLogger("fedcore").setLevel(logging.ERROR)
    with_ray = not arguments.no_ray and importlib.util.find_spec("ray") is not None
    plans, report, began = QUICK if arguments.quick else FULL, Report(), time.time()
    figures: Figures = {"machine": machine(), "overhead": {}, "start_ups": {}}
    report.machine(figures["machine"])
    if not with_ray:
        why = "--no-ray was given" if arguments.no_ray else "Ray is not installed (pip install 'fedcore[ray]')"
        print(f"Flower's simulation on Ray is left out: {why}.")
    for size in arguments.sizes:
        values, ray = overhead(size, plans[size], with_ray)
        figures["overhead"][size] = values
        report.overhead(size, values)
        figures["start_ups"][size] = {**start_ups(size), **({"flower_ray": ray} if ray else {})}
        report.start_ups(size, figures["start_ups"][size])
    figures["scale"] = scale(arguments.quick)
    report.scale(figures["scale"])
    figures["took_s"] = time.time() - began
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'All targets were met.' if report.all_met else 'NOT all targets were met.'} "
          f"({figures['took_s'] / 60:.0f} minutes)")
    return 0 if report.all_met else 1


def machine() -> Figures:
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
