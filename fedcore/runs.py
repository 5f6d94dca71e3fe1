"""A finished (or interrupted) run, read back from its folder.

    run = Run("runs/digits")
    run.summary["best_accuracy"]
    times, values = run.curve("accuracy")
    seconds = run.time_to("accuracy", 0.93)

Files are read on first use and kept. A run that was killed in the middle has no summary and may end in half a line:
both are accepted, because what such a run did is worth reading too.
"""
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedcore.errors import BadInput
from fedcore.measures import reaches, smaller_is_better
from fedcore.recorder import (
    CLIENTS_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FILE,
    SUMMARY_FILE,
    TIMELINE_FILE,
)

if TYPE_CHECKING:       # reading a report's figures should not take torch's seconds of import
    from torch import Tensor

Row = dict[str, Any]

UNFINISHED = "unfinished: the run was killed or is still going"


class NotARun(BadInput):
    """A folder that no run has written."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"{folder} is not the folder of a run: {reason}. Give the folder that "
                         "`fedcore simulate FILE --out DIR` wrote, with config.yaml and metrics.jsonl in it.")
        self.folder, self.reason = folder, reason


class DamagedRun(BadInput):
    """A file of a run folder that cannot be read."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be read: {reason}. Restore the file, or run the experiment again.")
        self.path, self.reason = path, reason


def number(value: object) -> float | None:
    """Return a JSON value as a float, or None for anything that is not a number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def finite(value: object) -> float | None:
    """Return a JSON value as a float, or None for anything that is not a finite number."""
    as_float = number(value)
    return as_float if as_float is not None and math.isfinite(as_float) else None


def best_of(metric: str, values: Iterable[float]) -> float | None:
    """Return the best finite value of a metric, or None when there is none."""
    usable = [value for value in values if math.isfinite(value)]
    if not usable:
        return None
    return min(usable) if smaller_is_better(metric) else max(usable)


class Run:
    """What one run left behind.

    Args:
        folder: the folder that the run wrote.

    Raises:
        NotARun: the folder does not exist, or holds neither config.yaml nor metrics.jsonl.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._curves: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        if not self.folder.is_dir():
            raise NotARun(self.folder, "there is no such folder")
        if not any((self.folder / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)):
            raise NotARun(self.folder, "it holds neither config.yaml nor metrics.jsonl")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end and wrote its summary."""
        return (self.folder / SUMMARY_FILE).is_file()

    @cached_property
    def summary(self) -> Row:
        """The run in one dict; derived from the metrics when the run never finished."""
        if not self.finished:
            return self._derived_summary()
        content = _json_of(self.folder / SUMMARY_FILE)
        if not isinstance(content, dict):
            raise DamagedRun(self.folder / SUMMARY_FILE, "it does not hold an object")
        return content

    @cached_property
    def metrics(self) -> list[Row]:
        """One row per event, in the order of time."""
        return _json_lines(self.folder / METRICS_FILE)

    @cached_property
    def timeline(self) -> list[Row]:
        """One row per client task, written when the task ended."""
        return _json_lines(self.folder / TIMELINE_FILE)

    @cached_property
    def clients(self) -> list[Row]:
        """One row per client: partition, examples, label histogram, seconds per step."""
        path = self.folder / CLIENTS_FILE
        content = _json_of(path) if path.is_file() else []
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise DamagedRun(path, "it does not hold a list of objects")
        return content

    @cached_property
    def config(self) -> Row:
        """The resolved experiment; empty for a run that had no experiment file."""
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            return {}
        try:
            content = yaml.safe_load(_text_of(path))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            raise DamagedRun(path, "it is not YAML" + (f" (line {mark.line + 1})" if mark else "")) from error
        if not isinstance(content, dict):
            raise DamagedRun(path, "it holds no settings")
        return content

    def model(self) -> "dict[str, Tensor]":
        """Return the final model, tensors by name.

        Raises:
            DamagedRun: the file is missing (the run never finished) or not readable.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / MODEL_FILE
        if not path.is_file():
            raise DamagedRun(path, "it does not exist; a run writes its model when it ends")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DamagedRun(path, _first_line(error)) from error

    def rows(self, event: str) -> list[Row]:
        """Return the metrics rows of one kind: evaluate, update, failure, refused, log, join, leave, ..."""
        return self._by_event.get(event, [])

    @cached_property
    def _by_event(self) -> dict[str, list[Row]]:
        by_event: dict[str, list[Row]] = defaultdict(list)
        for row in self.metrics:
            by_event[str(row.get("event"))].append(row)
        return dict(by_event)

    def curve(self, metric: str, over: str = "time_s") -> tuple[list[float], list[float]]:
        """Return an evaluated metric against time, or against another counter of the same rows.

        Args:
            metric: `accuracy`, `loss` or any other figure of the evaluation rows.
            over: `time_s` (default), `version`, `client_updates`, `client_steps`, `bytes_up`, `bytes_down`, or `bytes`
                (both directions).

        Returns:
            Positions and values, equally long; NaN where an evaluation gave no finite number.
        """
        if (metric, over) not in self._curves:
            times, values = [], []
            for row in self.rows("evaluate"):
                at = _position(row, over) if metric in row else None
                if at is not None:
                    times.append(at)
                    values.append(_measured(row, metric))
            self._curves[metric, over] = times, values
        times, values = self._curves[metric, over]
        return list(times), list(values)

    def time_to(self, metric: str, value: float) -> float | None:
        """Return the seconds until an evaluation first met a target, or None when none did.

        Args:
            metric: `accuracy`, `loss`, ...; for losses, errors and distances lower is better.
            value: the target in the metric's own unit (0.93, not 93).
        """
        return self.cost_to(metric, value, "time_s")

    def cost_to(self, metric: str, value: float, over: str) -> float | None:
        """Return how much of a counter (see `curve`) was spent when an evaluation first met a target."""
        points = zip(*self.curve(metric, over), strict=True)
        return next((at for at, reached in points if reaches(metric, reached, value)), None)      # NaN reaches nothing

    def _derived_summary(self) -> Row:
        """Return what can be said of a run without a summary.

        Sums of the last rows stand in for totals; `failures` and `refused` are counted.
        """
        counters = ("client_updates", "client_steps", "bytes_up", "bytes_down")
        summary: Row = {"strategy": name_of(self.config.get("strategy")), "task": name_of(self.config.get("task")),
                        "seed": self.config.get("seed"), "stop_reason": UNFINISHED,
                        "time_s": max((finite(row.get("time_s")) or 0.0 for row in self.metrics), default=0.0),
                        "versions": max((int(finite(row.get("version")) or 0) for row in self.metrics), default=0)}
        for key in counters:
            summary[key] = int(max((finite(row.get(key)) or 0 for row in self.metrics), default=0))
        for metric in ("loss", "accuracy"):
            values = self.curve(metric)[1]
            summary[f"final_{metric}"] = values[-1] if values else None
        summary["best_accuracy"] = best_of("accuracy", self.curve("accuracy")[1])
        target = target_of(self.config)
        summary["time_to_target_s"] = next((row.get("time_s") for row in self.rows("evaluate") if target and all(
            reaches(metric, _measured(row, metric), value) for metric, value in target.items())), None)
        summary["failures"] = len(self.rows("failure"))
        summary["refused"] = len(self.rows("refused"))
        return summary


def name_of(spec: object) -> str | None:
    """Return the registered name in a setting that is written as `name` or `{name: ..., ...}`."""
    name = spec.get("name") if isinstance(spec, dict) else spec
    return None if name is None else str(name)


def target_of(config: Row) -> dict[str, float]:
    """Return the demanded target of an experiment, metric -> value; empty when none was set."""
    stop = config.get("stop")
    target = stop.get("target") if isinstance(stop, dict) else None
    if not isinstance(target, dict):
        return {}
    return {str(metric): float(value) for metric, value in target.items() if finite(value) is not None}


def _measured(row: Row, metric: str) -> float:
    value = number(row.get(metric))     # the recorder writes NaN and infinities as null
    return math.nan if value is None else value


def _position(row: Row, over: str) -> float | None:
    if over != "bytes":
        return finite(row.get(over))
    up, down = finite(row.get("bytes_up")), finite(row.get("bytes_down"))
    return None if up is None or down is None else up + down


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedRun(path, _first_line(error)) from error


def _json_of(path: Path) -> Any:
    try:
        return json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        raise DamagedRun(path, f"it is not JSON ({error})") from error


def _json_lines(path: Path) -> list[Row]:
    """Return the objects of a JSON-lines file; half a line at the very end is what a killed run leaves: dropped."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    lines = _text_with_cut_end(path).split("\n")
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if count == len(lines):
                break
            raise DamagedRun(path, f"line {count} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DamagedRun(path, f"line {count} is not an object")
        rows.append(row)
    return rows


def _text_with_cut_end(path: Path) -> str:
    """Return a file's text; a character cut in two at the end (a killed run) is dropped with its line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedRun(path, _first_line(error)) from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if b"\n" in raw[error.start:]:
            raise DamagedRun(path, _first_line(error)) from error
        return raw[:error.start].decode("utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
