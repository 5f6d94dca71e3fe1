"""What the live page knows of a run: its rows, bounded in number, and what belongs together."""
import json
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedcore.recorder import CONFIG_FILE, METRICS_FILE, TIMELINE_FILE, Row
from fedcore.runs import finite

# Of more points every second one is dropped, and the curve looks the same.
MOST_POINTS = 4000
MOST_TASKS = 2000
MOST_TROUBLES = 30
TROUBLES = ("failure", "refused", "late", "incident")
TOTALS = ("client_updates", "client_steps", "bytes_up", "bytes_down")


@dataclass
class Seen:
    """What has happened so far; the page is drawn from it.

    Attributes:
        now_s: the run's clock.
        totals: the newest `client_updates`, `client_steps`, `bytes_up`, `bytes_down`.
        evaluations: rows with figures, in order of time.
        traffic: (time, bytes up, bytes down, version) at every version.
        tasks: rows of the timeline, the newest.
        finished: how many tasks of each node have ended.
        troubles: the newest failures and refusals, newest last; `counts` has all of them by kind.
        settings: the experiment's, as far as it is written down already.
    """

    now_s: float = 0.0
    version: int = 0
    started: bool = False
    stop_reason: str | None = None
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0.0))
    evaluations: list[Row] = field(default_factory=list)
    traffic: list[tuple[float, float, float, int]] = field(default_factory=list)
    tasks: deque[Row] = field(default_factory=lambda: deque(maxlen=MOST_TASKS))
    finished: dict[object, int] = field(default_factory=dict)
    troubles: deque[Row] = field(default_factory=lambda: deque(maxlen=MOST_TROUBLES))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TROUBLES, 0))
    settings: dict[str, Any] = field(default_factory=dict)


class Feed:
    """Collects a run's rows; may be told and asked from different threads.

    Args:
        folder: of the run; what a run that is resumed did before is read from there.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._seen, self._lock = Seen(), threading.Lock()
        self._heard_at = time.monotonic()
        for name, take in ((METRICS_FILE, self.on_row), (TIMELINE_FILE, self.on_task)):
            for row in _rows(folder / name) if folder is not None else ():
                take(row)

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Take note of a row of metrics."""
        with self._lock:
            self._heard_at = time.monotonic()
            self._take(row)

    def on_task(self, row: Mapping[str, Any]) -> None:
        """Take note of a row of the timeline."""
        with self._lock:
            tasks, at = self._seen.tasks, finite(row.get("end_s"))
            # A run that was resumed writes again what came after its checkpoint.
            while tasks and at is not None and (_after(tasks[-1], "end_s", at)
                                                or tasks[-1].get("task", at) == row.get("task")):
                self._count_task(tasks.pop(), -1)
            tasks.append(dict(row))
            self._count_task(row, 1)

    def look(self) -> tuple[Seen, float]:
        """Return a copy of what is known, and how long ago the last row came, seconds."""
        with self._lock:
            seen = self._seen
            if not seen.settings:
                seen.settings = self._read_settings()
            copy = Seen(**{**vars(seen), "totals": dict(seen.totals), "evaluations": list(seen.evaluations),
                           "traffic": list(seen.traffic), "tasks": deque(seen.tasks), "counts": dict(seen.counts),
                           "finished": dict(seen.finished), "troubles": deque(seen.troubles)})
            return copy, time.monotonic() - self._heard_at

    def _take(self, row: Mapping[str, Any]) -> None:
        seen, event = self._seen, row.get("event")
        at = finite(row.get("time_s"))
        if at is None:
            return
        version = int(finite(row.get("version")) or 0)
        if at < seen.now_s:
            # A run that was resumed goes on from a moment before the last row that is on the disk.
            while seen.evaluations and (_after(seen.evaluations[-1], "time_s", at)
                                        or seen.evaluations[-1].get("version") == version):
                seen.evaluations.pop()
            while seen.traffic and (seen.traffic[-1][0] > at or seen.traffic[-1][3] == version):
                seen.traffic.pop()
        seen.now_s, seen.version = at, version
        seen.started = seen.started or event == "start"
        seen.stop_reason = str(row.get("reason")) if event == "stop" else None
        for name in TOTALS:
            seen.totals[name] = finite(row.get(name)) or seen.totals[name]
        if event == "evaluate":
            seen.evaluations.append(dict(row))
            _halve(seen.evaluations)
        elif event == "update":
            seen.traffic.append((at, seen.totals["bytes_up"], seen.totals["bytes_down"], version))
            _halve(seen.traffic)
        elif event in TROUBLES:
            seen.counts[str(event)] += 1
            seen.troubles.append(dict(row))

    def _count_task(self, row: Mapping[str, Any], change: int) -> None:
        if row.get("outcome") == "ok":
            node = row.get("node")
            self._seen.finished[node] = self._seen.finished.get(node, 0) + change

    def _read_settings(self) -> dict[str, Any]:
        try:
            found = yaml.safe_load((self.folder / CONFIG_FILE).read_text(encoding="utf-8")) if self.folder else {}
        except (FileNotFoundError, yaml.YAMLError):
            return {}    # it is written when the run begins
        return found if isinstance(found, dict) else {}


def _rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; a line that a crash cut short is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _after(row: Mapping[str, Any], name: str, at: float) -> bool:
    """Say whether a row is of a later time."""
    return (finite(row.get(name)) or -math.inf) > at


def _halve(points: list[Any]) -> None:
    """Drop every second point of what has grown too long, never the newest."""
    if len(points) > MOST_POINTS:
        points[:] = points[len(points) % 2 ^ 1::2]
