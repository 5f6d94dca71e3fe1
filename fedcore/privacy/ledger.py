"""What was spent, written down before anything is sent.

A ledger is a file of one JSON object per release. An entry is on the disk, synchronised, before its release leaves the
process: whoever is killed in between has spent less than the ledger shows, never more.
"""
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcore.errors import UnreadableLedger

LEDGER_FILE = "privacy.jsonl"


class Ledger:
    """A file of entries.

    Args:
        path: the file; None keeps the entries in memory only.
        durable: whether to wait for the disk at every entry; not needed where a lost entry's release is lost, too.

    Raises:
        UnreadableLedger: the file cannot be read or written, or an entry in it is none.
    """

    def __init__(self, path: Path | None = None, durable: bool = True):
        self.path, self.durable = path, durable
        self.entries: list[dict[str, Any]] = [] if path is None else self._read(path)

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        try:
            text = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UnreadableLedger(f"The ledger {path} cannot be read: {error.strerror}.") from error
        lines = text.split(b"\n")
        if lines[-1]:
            # A line without its end was being written when the process died: its release was never sent.
            os.truncate(path, len(text) - len(lines[-1]))
        entries = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UnreadableLedger(
                    f"Line {number} of the ledger {path} is not JSON, so what was spent is unknown. Restore the file "
                    "from a copy; without one the records' budget has to count as spent."
                ) from error
            if not isinstance(entry, dict):
                raise UnreadableLedger(f"Line {number} of the ledger {path} is no entry.")
            entries.append(entry)
        return entries

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry; when this returns it is on the disk."""
        self.entries.append(dict(entry))
        if self.path is None:
            return
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                if self.durable:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UnreadableLedger(f"The ledger {self.path} cannot be written: {error.strerror}.") from error

    def cut(self, count: int) -> None:
        """Keep the first `count` entries only: a simulation repeats the later ones to the bit."""
        if count == len(self.entries):
            return
        self.entries = self.entries[:count]
        if self.path is not None:
            self.path.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in self.entries))
