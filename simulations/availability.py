"""When nodes are online."""
import csv
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedcore.errors import InvalidSetting, MissingData
from fedcore.registry import build
from fedcore.simulations.distributions import check_number, fraction

NEVER = math.inf
COLUMNS = ("partition", "start_s", "end_s")


class Availability(ABC):
    """Says for any node and any time whether the node is online; a pure function of both."""

    @abstractmethod
    def is_on(self, partition: int, at_s: float) -> bool:
        """Say whether a node is online; at the very moment of a change, what it is from then on."""

    @abstractmethod
    def next_change(self, partition: int, at_s: float) -> float:
        """Return when a node next comes or goes, strictly after `at_s`; infinity when it never will."""

    @staticmethod
    def from_settings(spec: str | Mapping[str, Any] | None, seed: int, num_nodes: int,
                      path: str = "simulation.availability") -> "Availability | None":
        """Return what a file's section describes, None when all nodes are always online.

        Raises:
            InvalidSetting: with the setting's full path.
        """
        if spec is None:
            return None
        found = build("availability", spec, path, seed=seed, num_nodes=num_nodes)
        return None if isinstance(found, Always) else found


class Always(Availability):
    """Every node is always online."""

    def is_on(self, partition: int, at_s: float) -> bool:
        return True

    def next_change(self, partition: int, at_s: float) -> float:
        return NEVER


class Markov(Availability):
    """Nodes that come and go: online and offline periods of exponential length, each node on its own.

    A node begins online with probability mean_on_s / (mean_on_s + mean_off_s), which is also the share of time that it
    is online. Period k of a node follows from (seed, node, k); a cursor per node remembers the last one asked about,
    so that time moving on costs a constant, and an earlier time is found again from the start.

    Args:
        mean_on_s: mean length of an online period, seconds, above 0.
        mean_off_s: mean length of an offline period, seconds, above 0.
        seed: of the periods.
    """

    def __init__(self, mean_on_s: float, mean_off_s: float, seed: int = 0):
        self.mean_on_s = check_number("mean_on_s", mean_on_s, above=0)
        self.mean_off_s = check_number("mean_off_s", mean_off_s, above=0)
        self.seed = seed
        self._cursors: dict[int, _Period] = {}

    def is_on(self, partition: int, at_s: float) -> bool:
        return self._period(partition, at_s).is_on

    def next_change(self, partition: int, at_s: float) -> float:
        return self._period(partition, at_s).end_s

    def _first(self, partition: int) -> "_Period":
        share_on = self.mean_on_s / (self.mean_on_s + self.mean_off_s)
        is_on = fraction(self.seed, "begins online", partition) < share_on
        return _Period(0, is_on, 0.0, self._length(partition, 0, is_on))

    def _length(self, partition: int, k: int, is_on: bool) -> float:
        mean = self.mean_on_s if is_on else self.mean_off_s
        return -mean * math.log(fraction(self.seed, "availability", partition, k))

    def _period(self, partition: int, at_s: float) -> "_Period":
        """Return the period that holds `at_s`."""
        period = self._cursors.get(partition)
        if period is None or at_s < period.start_s:
            period = self._first(partition)
        while period.end_s <= at_s:
            k, is_on = period.k + 1, not period.is_on
            period = _Period(k, is_on, period.end_s, period.end_s + self._length(partition, k, is_on))
        self._cursors[partition] = period
        return period


class _Period(NamedTuple):
    """A node's k-th period, online or not."""

    k: int
    is_on: bool
    start_s: float
    end_s: float


class Trace(Availability):
    """Recorded online intervals.

    Args:
        path: CSV file with the columns partition, start_s, end_s: one online interval per line. A node that the file
            does not mention is never online.
        repeat_s: begin again after so many seconds (e.g. 86400 for a day); None: after its last interval a node is
            gone for good.
        num_nodes: how many nodes the run has.
    """

    def __init__(self, path: Path, repeat_s: float | None = None, num_nodes: int | None = None):
        self.repeat_s = None if repeat_s is None else check_number("repeat_s", repeat_s, above=0)
        self._changes = {partition: _changes(intervals, self.repeat_s)
                         for partition, intervals in read_intervals(Path(path)).items()}
        if num_nodes is not None and not any(0 <= partition < num_nodes for partition in self._changes):
            listed = ", ".join(str(partition) for partition in sorted(self._changes)[:5]) or "no node at all"
            raise InvalidSetting("path", str(path), f"a trace of at least one of the nodes 0 to {num_nodes - 1}",
                                 f"It mentions {listed}.")

    def is_on(self, partition: int, at_s: float) -> bool:
        changes = self._changes.get(partition)
        return changes is not None and changes.is_on(at_s)

    def next_change(self, partition: int, at_s: float) -> float:
        changes = self._changes.get(partition)
        return NEVER if changes is None else changes.next_after(at_s)


class _Changes:
    """The moments at which one node comes (even places) and goes (odd places), perhaps again and again."""

    def __init__(self, moments: list[float], repeat_s: float | None, first_is_on: bool):
        self._moments, self._repeat_s, self._first_is_on = moments, repeat_s, first_is_on

    def _moment(self, index: int) -> float:
        """Return the time of a change; minus infinity before the first, infinity after the last."""
        if index < 0:
            return -math.inf
        if self._repeat_s is None:
            return self._moments[index] if index < len(self._moments) else NEVER
        lap, place = divmod(index, len(self._moments))
        return lap * self._repeat_s + self._moments[place]

    def _last(self, at_s: float) -> int:
        """Return the number of the last change at or before `at_s`, -1 when there is none."""
        if not self._moments:
            return -1
        lap = 0 if self._repeat_s is None else int(at_s // self._repeat_s)
        rest = at_s if self._repeat_s is None else at_s - lap * self._repeat_s
        index = lap * len(self._moments) + bisect_right(self._moments, rest) - 1
        # `rest` is rounded; the times of the changes themselves decide.
        while index >= 0 and self._moment(index) > at_s:
            index -= 1
        while self._moment(index + 1) <= at_s:
            index += 1
        return index

    def is_on(self, at_s: float) -> bool:
        return self._first_is_on == (self._last(at_s) % 2 == 0)

    def next_after(self, at_s: float) -> float:
        return self._moment(self._last(at_s) + 1) if self._moments else NEVER


def _changes(intervals: list[tuple[float, float]], repeat_s: float | None) -> _Changes:
    """Return the changes of one node from its intervals, which may touch and overlap."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        end = end if repeat_s is None else min(end, repeat_s)
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        elif start < end:
            merged.append((start, end))
    moments = [moment for interval in merged for moment in interval]
    if repeat_s is None or not merged or not (merged[0][0] == 0 and merged[-1][1] == repeat_s):
        return _Changes(moments, repeat_s, first_is_on=True)
    # Online from the end of one lap into the next: the two moments where the laps meet are no changes.
    return _Changes(moments[1:-1], repeat_s, first_is_on=False)


def read_intervals(path: Path) -> dict[int, list[tuple[float, float]]]:
    """Return each node's online intervals from a CSV file with the columns partition, start_s, end_s.

    Raises:
        MissingData: the file cannot be read, or a line is no interval.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return _intervals(csv.DictReader(file, skipinitialspace=True), path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MissingData(f"{path} cannot be read as a CSV file: {error}.") from error


def _intervals(rows: "csv.DictReader[str]", path: Path) -> dict[int, list[tuple[float, float]]]:
    if not set(COLUMNS) <= set(rows.fieldnames or ()):
        raise MissingData(f"{path} must begin with the line {','.join(COLUMNS)!r}, but it begins with "
                          f"{','.join(rows.fieldnames or ())!r}.")
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        try:
            partition, start, end = int(row["partition"]), float(row["start_s"]), float(row["end_s"])
        except (TypeError, ValueError):
            partition, start, end = -1, 0.0, 0.0
        if partition < 0 or not 0 <= start < end:
            raise MissingData(f"{path}, line {rows.line_num}: expected a node's number and 0 <= start_s < end_s, found "
                              f"{','.join(str(row[name]) for name in COLUMNS)!r}.")
        found.setdefault(partition, []).append((start, end))
    return found
