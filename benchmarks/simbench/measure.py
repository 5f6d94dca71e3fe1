"""Clocks, memory, and processes of their own."""
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

BENCHMARKS = Path(__file__).resolve().parent.parent
POLL_S = 0.25


@dataclass
class Stamps:
    """Moments of a run: one when the first work is handed out, one after each round.

    Args:
        cpu: what counts, seconds.
    """

    cpu: Callable[[], float] = time.process_time
    moments: list[tuple[float, float]] = field(default_factory=list)    # (CPU seconds, Unix time)

    def __call__(self) -> None:
        self.moments.append((self.cpu(), time.time()))

    def cpu_per_round(self, skip: int = 0) -> float:
        """Return the mean CPU time of a round, seconds, without the first `skip` rounds."""
        later = self.moments[skip:]
        return (later[-1][0] - later[0][0]) / (len(later) - 1)


def family_cpu() -> float:
    """Return the CPU time of this process and all its descendants, seconds; ticks of 10 ms each."""
    me = psutil.Process()
    return sum(_cpu(process) for process in [me, *me.children(recursive=True)])


def _cpu(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:4]))    # its own, and that of descendants that have ended
    except psutil.Error:
        return 0.0


def family_memory(pid: int) -> float:
    """Return the memory of a process and its descendants, MiB; pages that they share count once."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0.0
    return sum(_memory(process) for process in processes) / 2**20


def _memory(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss)
    except psutil.Error:
        return 0.0


def in_own_process(part: str, **arguments: Any) -> dict[str, Any]:
    """Run a part of the benchmark (see `simbench.child`) in a fresh process; returns its figures and its peak memory.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [sys.executable, "-W", "ignore", "-m", "simbench.child", part, json.dumps(arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, family_memory(process.pid))
        time.sleep(POLL_S)
    assert process.stdout is not None
    lines = process.stdout.read().strip().splitlines()
    if process.returncode != 0:
        raise RuntimeError(f"{part} {arguments} failed:\n" + "\n".join(lines[-15:]))
    figures: dict[str, Any] = json.loads(lines[-1])
    return {"peak_mib": max(peak, figures.pop("own_peak_mib", 0.0)), **figures}


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)
