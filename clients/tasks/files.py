"""Reading local data files, with errors that say what to do."""
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedcore.errors import BadInput, MissingData


class UnreadableData(BadInput):
    """A data file is there, but does not hold what its task needs."""


def existing(path: Path | None, task: str, advice: str) -> Path:
    """Return a task's file or folder.

    Raises:
        MissingData: no path was given, or nothing is there.
    """
    if path is None:
        raise MissingData(f"The task {task} needs a local file: set task.path. {advice}")
    path = Path(path).expanduser()
    if not path.exists():
        raise MissingData(f"task.path={str(path)!r}, but there is no such file. {advice}")
    return path


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return named arrays of an `.npz` archive; nothing in it is ever executed.

    Raises:
        UnreadableData: it is no such archive, is damaged, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise UnreadableData(
                    f"{path} has no array {missing[0]!r}; it has: {', '.join(archive) or 'none'}. "
                    f"Needed: {', '.join(names)}."
                )
            return [archive[name] for name in names]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UnreadableData(f"{path} is no readable .npz archive: {error}.") from error


def read_text(path: Path) -> str:
    """Return a text file.

    Raises:
        UnreadableData: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableData(f"{path} is no readable text: {error}.") from error
