"""The run folder while a run is going on: metrics and timeline, one JSON object per line."""
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

METRICS_FILE, TIMELINE_FILE, SUMMARY_FILE = "metrics.jsonl", "timeline.jsonl", "summary.json"
CLIENTS_FILE, CONFIG_FILE, MODEL_FILE, REPORT_FILE = "clients.json", "config.yaml", "model.safetensors", "report.html"
CHECKPOINTS_FOLDER = "checkpoints"

encode = json.JSONEncoder(allow_nan=False).encode

logger = logging.getLogger("fedcore")

Row = dict[str, Any]
Listener = Callable[[Row], None]


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: tensors and arrays as lists, NaN and infinities as null."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):    # torch's and NumPy's, without importing either: reports are drawn without them
        return plain(value.tolist())
    return value


def json_line(row: Row) -> str:
    """Return a row as one line of valid JSON."""
    try:
        return encode(row)
    except (ValueError, TypeError):    # rare; looking at every value beforehand would cost more than writing it
        return encode(plain(row))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that a reader, or a crash, sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Recorder:
    """Writes what happens, and tells listeners (a progress bar, TensorBoard) about each metrics row; from any thread.

    Args:
        folder: where the two files go; None keeps nothing on disk.
        listeners: called with every metrics row.

    Attributes:
        task_listeners: called with every row of the timeline.
    """

    def __init__(self, folder: Path | None = None, listeners: tuple[Listener, ...] = ()):
        self.folder, self._listeners = folder, listeners
        self.task_listeners: list[Listener] = []
        self._files: dict[str, IO[str]] = {}
        self._lock = threading.RLock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, TIMELINE_FILE):
                self._files[name] = open(folder / name, "a", encoding="utf-8")  # noqa: SIM115 (open for the run)

    def metric(self, time_s: float, event: str, **figures: Any) -> None:
        """Write one row of metrics."""
        row: Row = {"time_s": time_s, "event": event, **figures}
        with self._lock:
            self._write(METRICS_FILE, row)
            for listener in self._listeners:
                listener(row)

    def task(self, row: Row) -> None:
        """Write one row of the timeline: a client task that ended."""
        self._write(TIMELINE_FILE, row)
        for listener in self.task_listeners:
            listener(row)

    def _write(self, name: str, row: Row) -> None:
        with self._lock:
            if file := self._files.get(name):
                file.write(json_line(row) + "\n")

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        with self._lock:
            for file in self._files.values():
                file.flush()

    def close(self) -> None:
        """Finish the files."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files = {}

    def state_dict(self) -> dict[str, int]:
        """Return the length of each file in bytes; what comes after is written again by a run that resumes here."""
        self.flush()
        for file in self._files.values():
            os.fsync(file.fileno())    # the checkpoint that holds the lengths must not outlive the rows
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut the files back to where they were."""
        for name, file in self._files.items():
            file.flush()
            length, found = state.get(name, 0), os.fstat(file.fileno()).st_size
            if found < length:
                logger.warning("%s is shorter than it was: rows before this moment are missing.", file.name)
            file.truncate(min(length, found))
            file.seek(0, os.SEEK_END)
