"""Which tasks belong to a run's history, and which checkpoints it may be continued from: what clients need to know.

A server that is restored to a checkpoint has forgotten all tasks that came after it, and may give them numbers that
were used before. So a task's id is the number behind a word that is drawn anew at every start. The words, each with its
last number that counts, are the run's lineage: a client that meets a task of its own beyond it goes back to the
state before that task.

A mark says that a checkpoint was taken of all tasks up to a number, and names those of them whose replies were not yet
part of it: the server, restored to it, will ask for those replies again. From the marks alone a client knows what it
may forget.
"""
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fedcore.errors import MalformedFrame


class TaskId(NamedTuple):
    """A task's id in its two parts."""

    word: str
    number: int

    @classmethod
    def of(cls, text: str) -> "TaskId":
        """Read an id.

        Raises:
            MalformedFrame: it is none.
        """
        word, _, number = text.partition("-")
        if not (word.isalnum() and number.isdecimal() and len(text) < 64 and text.isascii()):
            raise MalformedFrame("a task's id came that nobody has given")
        return cls(word, int(number))

    def __str__(self) -> str:
        return f"{self.word}-{self.number}"


@dataclass(frozen=True)
class Mark:
    """A checkpoint, as far as clients are concerned.

    Attributes:
        index: counts the checkpoints of a run.
        word, number: the last task it knows of.
        pending: tasks by node whose replies are not part of it.
        saved: it is on disk.
    """

    index: int
    word: str
    number: int
    pending: Mapping[int, tuple[str, ...]]
    saved: bool = False

    def body(self, node_id: int) -> list[Any]:
        """Return what a node is told of it."""
        return [self.word, self.number, list(self.pending.get(node_id, ()))]


@dataclass
class History:
    """The server's side: hands out ids and marks.

    Attributes:
        run: names the run; the same after a restart.
        lineage: words of earlier starts with their last number that counts.
        kept: how many checkpoints stay on disk.
    """

    kept: int
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    word: str = field(default_factory=lambda: secrets.token_hex(4))
    lineage: list[tuple[str, int]] = field(default_factory=list)
    next_number: int = 0
    next_mark: int = 0
    marks: list[Mark] = field(default_factory=list)
    saving: set[int] = field(default_factory=set)

    def next_id(self) -> TaskId:
        """Return an id that no task has had."""
        self.next_number += 1
        return TaskId(self.word, self.next_number - 1)

    def add_mark(self, pending: Mapping[int, Iterable[str]]) -> Mark:
        """Note that a checkpoint is taken of everything up to now.

        One that was taken before and is neither saved nor being saved never will be: this one takes its place.
        """
        mark = Mark(self.next_mark, self.word, self.next_number - 1,
                    {node: tuple(names) for node, names in pending.items()})
        self.next_mark += 1
        self.marks = [old for old in self.marks if old.saved or old.index in self.saving] + [mark]
        return mark

    def set_saved(self, index: int) -> None:
        """Note that a checkpoint is on disk, and those beyond `kept` are not any more."""
        self.saving.discard(index)
        self.marks = [replace(mark, saved=True) if mark.index == index else mark for mark in self.marks]
        saved = [mark.index for mark in self.marks if mark.saved]
        gone = set(saved[:-self.kept])
        self.marks = [mark for mark in self.marks if mark.index not in gone]

    def set_unsaved(self, index: int) -> None:
        """Note that a checkpoint could not be written."""
        self.saving.discard(index)

    def told(self) -> list[list[Any]]:
        """Return the lineage as clients are told it; the present word has no last number."""
        return [[word, number] for word, number in self.lineage] + [[self.word, None]]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        marks = [[mark.index, mark.word, mark.number, {str(node): list(names) for node, names in mark.pending.items()},
                  mark.saved] for mark in self.marks]
        return {"run": self.run, "lineage": [*map(list, self.lineage), [self.word, self.next_number - 1]],
                "next_number": self.next_number, "next_mark": self.next_mark, "marks": marks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run; the marks are those that existed when the checkpoint was taken, and itself."""
        self.run, self.next_number, self.next_mark = state["run"], state["next_number"], state["next_mark"]
        self.lineage = [(word, number) for word, number in state["lineage"] if number >= 0]
        marks = [Mark(index, word, number, {int(node): tuple(names) for node, names in pending.items()}, saved)
                 for index, word, number, pending, saved in state["marks"]]
        # The newest is the one that this was read from, and so it is on disk.
        self.marks = [*marks[:-1], *(replace(mark, saved=True) for mark in marks[-1:])]
