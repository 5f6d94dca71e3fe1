"""A client forgets what nobody will ask for, and nothing else, whatever checkpoint the server is restored to."""
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from fedcore.errors import MalformedFrame
from fedcore.transport.history import History, TaskId
from fedcore.transport.journal import Journal, reply_of, stored_tasks

NODE = 7


def note(tasks: list[str]) -> RecordDict:
    return RecordDict({"done": ConfigRecord({"tasks": list(tasks)})})


def done(journal: Journal) -> list[str]:
    return list(journal.state["done"]["tasks"]) if "done" in journal.state else []


@dataclass
class World:
    """A server and one client, without a network: what each must remember of what has happened."""

    history: History = field(default_factory=lambda: History(kept=2))
    journal: Journal = field(default_factory=lambda: Journal(None, "run"))
    pending: list[str] = field(default_factory=list)     # asked and not used, in order
    used: list[str] = field(default_factory=list)        # whose replies are in the server's state
    queue: list[TaskId] = field(default_factory=list)    # at the client, not done
    checkpoints: list[tuple] = field(default_factory=list)
    newest: tuple | None = None

    def __post_init__(self) -> None:
        self.journal.follow(self.history.told())

    def ask(self) -> None:
        task = self.history.next_id()
        self.pending.append(str(task))
        self.queue.append(task)

    def work(self) -> None:
        if self.queue:
            task = self.queue.pop(0)
            self.journal.add(task, note([str(task)]), {}, note([*done(self.journal), str(task)]))

    def use(self) -> None:
        ready = [name for name in self.pending if self.journal.find(name) is not None]
        if ready:
            self.pending.remove(ready[0])
            self.used.append(ready[0])
            self.journal.set_taken([ready[0]])

    def take_checkpoint(self) -> None:
        mark = self.history.add_mark({NODE: self.pending})
        self.newest = (mark.index, self.history.state_dict(), list(self.pending), list(self.used))
        self.tell_marks()

    def save(self) -> None:
        if self.newest is not None:
            self.history.set_saved(self.newest[0])
            self.checkpoints = [*self.checkpoints, self.newest][-2:]
            self.newest = None
            self.tell_marks()

    def restore(self, which: int) -> None:
        if not self.checkpoints:
            return
        place = max(0, len(self.checkpoints) - 1 - which)
        _, state, pending, used = self.checkpoints[place]
        self.checkpoints, self.newest = self.checkpoints[:place + 1], None
        before = done(self.journal)
        self.history = History(kept=2)
        self.history.load_state_dict(state)
        self.pending, self.used = list(pending), list(used)
        self.journal.follow(self.history.told())
        self.journal.set_taken([name for name in self.journal.untaken if name not in self.pending])
        self.tell_marks()
        self.queue = [task for task in self.queue if str(task) in self.pending]
        self.check_after_restore(before)

    def tell_marks(self) -> None:
        self.journal.set_marks([mark.body(NODE) for mark in self.history.marks])

    def check_after_restore(self, before: list[str]) -> None:
        known = {*self.used, *self.pending}
        assert done(self.journal) == [name for name in before if name in known], "the state went back with the server"
        for name in self.pending:
            if name in before:
                assert self.journal.find(name) is not None, "a reply that is asked for again is there"

    def check(self) -> None:
        assert len(set(done(self.journal))) == len(done(self.journal)), "no task was done twice"
        assert len(set(self.used)) == len(self.used), "no reply was used twice"
        assert set(self.used) <= set(done(self.journal)), "what the server uses the client has done"


steps = st.lists(st.one_of(st.sampled_from(["ask", "work", "use", "take_checkpoint", "save"]), st.integers(0, 1)),
                 max_size=60)


@given(steps=steps)
@example(steps=["ask", "work", "use", "take_checkpoint", "save", "ask", "work", "use", 0, "ask", "work"])
@example(steps=["ask", "take_checkpoint", "work", "use", "save", 0, "use", "ask", "take_checkpoint", "save", "work", 1])
def test_client_and_server_agree_after_any_sequence_of_checkpoints_and_restores(steps):
    world = World()
    for step in steps:
        world.restore(step) if isinstance(step, int) else getattr(world, step)()
        world.check()


@given(rounds=st.integers(1, 30), every=st.integers(1, 7))
def test_however_long_the_run_a_client_keeps_a_handful_of_tasks(rounds, every):
    world = World()
    for index in range(rounds):
        for step in ("ask", "work", "use"):
            getattr(world, step)()
        if index % every == 0:
            world.take_checkpoint()
            world.save()
    assert len(world.journal.entries) <= 4


def test_a_restored_client_process_finds_its_state_and_its_replies(tmp_path):
    journal, history = Journal(tmp_path, "run"), History(kept=2)
    journal.follow(history.told())
    first, second = history.next_id(), history.next_id()
    journal.add(first, note(["reply"]), {"compute_s": 2.0}, note(["one"]))
    journal.add(second, Error(2, "it raised"), {}, note(["one", "two"]))
    again = Journal(tmp_path, "run")
    assert done(again) == ["one", "two"]
    assert again.untaken == stored_tasks(tmp_path) == [str(first), str(second)]
    content, facts = reply_of(again.find(str(first)).load())
    assert content == note(["reply"]) and facts == {"compute_s": 2.0}
    failure, _ = reply_of(again.find(str(second)).load())
    assert (failure.code, failure.reason) == (2, "it raised")


def test_what_is_forgotten_is_gone_from_disk(tmp_path):
    journal, history = Journal(tmp_path, "run"), History(kept=2)
    journal.follow(history.told())
    tasks = [history.next_id() for _ in range(3)]
    for task in tasks:
        journal.add(task, note([]), {}, note([str(task)]))
    journal.set_taken([str(task) for task in tasks])
    assert stored_tasks(tmp_path) == [str(tasks[-1])]
    journal.follow([["another", None]])
    assert stored_tasks(tmp_path) == [] and done(journal) == []


def test_a_damaged_newest_file_costs_its_task_only(tmp_path):
    journal, history = Journal(tmp_path, "run"), History(kept=2)
    journal.follow(history.told())
    first, second = history.next_id(), history.next_id()
    journal.add(first, note([]), {}, note(["one"]))
    path = journal.add(second, note([]), {}, note(["one", "two"])).path
    path.write_bytes(path.read_bytes()[:-10])
    again = Journal(tmp_path, "run")
    assert done(again) == ["one"] and again.untaken == [str(first)]


def test_another_run_starts_with_an_empty_state_and_old_runs_make_room(tmp_path):
    for index in range(6):
        journal, history = Journal(tmp_path, f"run{index}"), History(kept=2)
        assert done(journal) == []
        journal.follow(history.told())
        journal.add(history.next_id(), note([]), {}, note(["one"]))
    assert len(list(tmp_path.iterdir())) <= 3
    assert (Path(tmp_path) / "run5").is_dir()


@pytest.mark.parametrize("text", ["", "x", "x-", "-1", "a-b", "../../etc-1", "a-1.5", "a" * 80 + "-1", "ä-1"])
def test_an_id_that_nobody_gave_is_refused(text):
    with pytest.raises(MalformedFrame):
        TaskId.of(text)
