"""What a client has done: its replies, and its state after each, for as long as anybody may ask for them again.

After each task one file is written, whole or not at all: the task's id, the reply and the state afterwards. So the
work of a task takes effect once, whatever happens in between, and a client can go back with a server that was restored
to an earlier moment.
"""
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Error, RecordDict

from fedcore.checkpoint import load_tree, save_tree
from fedcore.errors import MalformedFrame, UnusableCheckpoint
from fedcore.transport.history import TaskId
from fedcore.transport.records import Content

logger = logging.getLogger("fedcore")

ENTRY = re.compile(r"entry-(\d+)-([0-9a-z]+-\d+)\.safetensors")
# Runs whose journals stay on disk, this one included.
KEPT_RUNS = 3

Lineage = Sequence[tuple[str, int | None]]


class ClientMark(NamedTuple):
    """A checkpoint of the server, as this client is told of it: see `history.Mark`."""

    word: str
    number: int
    pending: frozenset[str]


@dataclass(eq=False)
class Entry:
    """A finished task.

    Attributes:
        index: counts the tasks of this client.
        taken: the server has used the reply.
        path: the file that holds reply and state; None: they are in `memory`.
    """

    index: int
    id: TaskId
    path: Path | None
    memory: dict[str, Any] | None = field(repr=False, default=None)
    taken: bool = False

    def load(self) -> dict[str, Any]:
        """Return the reply, its facts, and the state afterwards."""
        if self.memory is not None:
            return self.memory
        assert self.path is not None
        return load_tree(self.path)


def position(task: TaskId, lineage: Lineage) -> int | None:
    """Return which of the server's starts a task belongs to, None when the server has forgotten it."""
    for index, (word, last) in enumerate(lineage):
        if task.word == word:
            return index if last is None or task.number <= last else None
    return None


def needed(entries: Sequence[Entry], marks: Sequence[ClientMark], lineage: Lineage) -> set[int]:
    """Return the indices of the entries that must be kept.

    The newest (it holds the present state), those whose replies the server has not used, those whose replies a server
    restored to one of the marks would ask for, and the last one before each mark: the state to go back to.
    """
    kept = {entry.index for entry in entries[-1:]} | {entry.index for entry in entries if not entry.taken}
    for mark in marks:
        kept |= {entry.index for entry in entries if str(entry.id) in mark.pending}
        start = next((index for index, (word, _) in enumerate(lineage) if word == mark.word), len(lineage))
        inside = [entry for entry in entries if _is_before(entry.id, mark, start, lineage)]
        kept |= {entry.index for entry in inside[-1:]}
    return kept


def _is_before(task: TaskId, mark: ClientMark, start: int, lineage: Lineage) -> bool:
    found = position(task, lineage)
    if found is None:
        return False
    return found < start or (found == start and task.number <= mark.number)


class Journal:
    """The finished tasks of one run.

    Args:
        folder: where the files are; None keeps everything in memory.
        run: names the run; another one starts with an empty state.
    """

    def __init__(self, folder: Path | None, run: str):
        self.folder = None if folder is None else folder / run
        self.entries: list[Entry] = []
        self.marks: list[ClientMark] = []
        self.lineage: list[tuple[str, int | None]] = []
        self.state = RecordDict()
        self.run = run
        if self.folder is not None:
            assert folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.touch()    # the newest runs are kept
            _forget_old_runs(folder)
            self._read()

    def _read(self) -> None:
        """Find the present state: that of the newest file which can be read."""
        assert self.folder is not None
        self.entries = [Entry(index, task, path) for index, task, path in _files(self.folder)]
        while self.entries:
            newest = self.entries[-1]
            assert newest.path is not None
            try:
                self.state = newest.load()["after"]
                return
            except UnusableCheckpoint as error:
                logger.error("%s Its task is forgotten.", error)
                newest.path.unlink(missing_ok=True)
                self.entries.pop()

    @property
    def tasks(self) -> list[str]:
        """Ids of all tasks whose replies are here."""
        return [str(entry.id) for entry in self.entries]

    @property
    def untaken(self) -> list[str]:
        """Ids of the tasks whose replies the server has not used, as far as is known."""
        return [str(entry.id) for entry in self.entries if not entry.taken]

    def set_wanted(self, names: Iterable[str]) -> None:
        """Note that the server asks for replies that it had used before it was restored."""
        wanted = set(names)
        for entry in self.entries:
            entry.taken = entry.taken and str(entry.id) not in wanted

    def find(self, name: str) -> Entry | None:
        """Return a finished task by its id."""
        return next((entry for entry in self.entries if str(entry.id) == name), None)

    def add(self, task: TaskId, reply: Content, facts: dict[str, Any], after: RecordDict) -> Entry:
        """Note a finished task, on disk before this returns.

        Raises:
            UnusableCheckpoint: it cannot be written.
        """
        index = self.entries[-1].index + 1 if self.entries else 0
        body = [reply.code, reply.reason] if isinstance(reply, Error) else reply
        tree = {"reply": body, "facts": facts, "after": after}
        path = None
        if self.folder is not None:
            path = self.folder / f"entry-{index:08d}-{task}.safetensors"
            save_tree(path, tree)
        entry = Entry(index, task, path, tree if path is None else None)
        self.entries.append(entry)
        self.state = after
        return entry

    def set_taken(self, names: Iterable[str]) -> None:
        """Note that the server has used replies, and forget what nobody will ask for."""
        gone = set(names)
        for entry in self.entries:
            entry.taken = entry.taken or str(entry.id) in gone
        self.prune()

    def set_marks(self, body: Any) -> None:
        """Note which checkpoints the server may be restored to, and forget what nobody will ask for.

        Raises:
            MalformedFrame: they are none.
        """
        try:
            self.marks = [ClientMark(str(word), int(number), frozenset(pending)) for word, number, pending in body]
        except (TypeError, ValueError) as error:
            raise MalformedFrame("the server's marks cannot be read") from error
        self.prune()

    def prune(self) -> None:
        """Forget the tasks that nobody will ask for."""
        kept = needed(self.entries, self.marks, self.lineage)
        for entry in self.entries:
            if entry.index not in kept and entry.path is not None:
                entry.path.unlink(missing_ok=True)
        self.entries = [entry for entry in self.entries if entry.index in kept]

    def follow(self, lineage: Any) -> list[str]:
        """Go back to the state before the first task that the server has forgotten; returns those undone.

        Raises:
            MalformedFrame: the lineage cannot be read.
        """
        try:
            self.lineage = [(str(word), None if last is None else int(last)) for word, last in lineage]
        except (TypeError, ValueError) as error:
            raise MalformedFrame("the server's history cannot be read") from error
        first = next((place for place, entry in enumerate(self.entries)
                      if position(entry.id, self.lineage) is None), len(self.entries))
        undone, self.entries = self.entries[first:], self.entries[:first]
        if not undone:
            return []
        if self.entries:
            self.state = self.entries[-1].load()["after"]
        else:
            if undone[0].index > 0 and self.state:
                logger.error("The server was restored to a moment that this client remembers no state of: "
                             "it goes on with an empty one.")
            self.state = RecordDict()
        for entry in reversed(undone):    # the newest first: a journal without a gap, whenever this is broken off
            if entry.path is not None:
                entry.path.unlink(missing_ok=True)
        return [str(entry.id) for entry in undone]


def reply_of(tree: dict[str, Any]) -> tuple[Content, dict[str, Any]]:
    """Return a stored reply and its facts."""
    body = tree["reply"]
    return (body if isinstance(body, RecordDict) else Error(*body)), tree["facts"]


def _files(folder: Path) -> list[tuple[int, TaskId, Path]]:
    found = [(int(match[1]), TaskId.of(match[2]), path) for path in folder.iterdir()
             if (match := ENTRY.fullmatch(path.name)) is not None]
    return sorted(found, key=lambda entry: entry[0])


def stored_tasks(folder: Path | None) -> list[str]:
    """Return the finished tasks that earlier processes of a client left, of whichever run."""
    if folder is None or not folder.is_dir():
        return []
    return [str(task) for run in sorted(folder.iterdir()) if run.is_dir() for _, task, _ in _files(run)]


def _forget_old_runs(folder: Path) -> None:
    runs = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in runs[:-KEPT_RUNS]:
        shutil.rmtree(path, ignore_errors=True)
