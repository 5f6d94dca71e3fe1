"""Seeded sequences of cuts, crashes and restarts: what the server has used and what clients have done always agree."""
import random
import time
from pathlib import Path
from typing import Any

import pytest

from fedcore.checkpoint import load_tree, save_tree
from fedcore.transport import agent, workbench
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.settings import LinkSettings
from fedcore.transport.streams import Pace
from tests.fedcore.transport.kit import PATIENCE_S, Client, Proxy, Work, ask, crash, seen, wait_for

CLIENTS, TASKS = 2, 10
SEEDS = range(3)    # thirty passed when this was written
SETTINGS = LinkSettings(grace_s=60.0, resume_grace_s=60.0, linger_s=0.0, pace=Pace(grace_s=5.0))


class Run:
    """A server that gives every client one task after the other, with a proxy before it and clients behind that."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.grid = GrpcGrid(settings=SETTINGS)
        self.grid.start()
        self.address, self.proxy = self.grid.address, Proxy(self.grid.address)
        self.used: dict[int, list[int]] = {}      # by node: the numbers whose replies the server has used
        self.awaited: dict[int, int] = {}
        self.next_number, self.checkpoints = 0, 0
        self.works = [Work() for _ in range(CLIENTS)]
        self.clients = [self._client(index) for index in range(CLIENTS)]
        wait_for(lambda: len(self.grid.get_node_ids()) == CLIENTS, "all clients connecting")
        for node in self.grid.get_node_ids():
            self.used[node] = []
            self._ask(node)
        self._save()

    def _client(self, index: int) -> Client:
        return Client(self.works[index](), self.proxy.address, index, state=self.folder / f"client{index}", drain_s=0.0)

    def _ask(self, node: int) -> None:
        self.awaited[node] = self.next_number
        assert None not in self.grid.push_messages([ask(node, self.next_number, self.draw.choice([0, 10, 600_000]))])
        self.next_number += 1

    def play(self) -> None:
        """Use replies until enough have come, and let bad things happen in between."""
        until = time.monotonic() + 4 * PATIENCE_S
        while min(map(len, self.used.values())) < TASKS:
            assert time.monotonic() < until, f"the run hangs: {self.grid.snapshot()}"
            event = self.grid.next_event(self.grid.now + self.draw.choice([0.0, 0.02, 0.2]))
            if event.kind == "reply":
                self._use(event.message)
            self._mishap()

    def _use(self, reply: Any) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error():
            assert reply.error.code == 8, "only a client that was killed may lose a task"
        else:
            assert seen(reply) == [*self.used[node], self.awaited[node]], "state and history have parted"
            self.used[node].append(self.awaited[node])
        self._ask(node)

    def _mishap(self) -> None:
        dice = self.draw.random()
        if dice < 0.10:
            self._save()
        elif dice < 0.16:
            self.proxy.cut()
        elif dice < 0.20:
            self.proxy.cut_after = self.draw.choice([None, 500_000, 3_000_000])
        elif dice < 0.24:
            self._restore()
        elif dice < 0.28:
            self._kill_client(self.draw.randrange(CLIENTS))

    def _save(self) -> None:
        state = {"grid": self.grid.state_dict(), "used": self.used, "awaited": self.awaited, "next": self.next_number}
        if self.draw.random() < 0.9:    # else it dies before the file is there
            save_tree(self.folder / "checkpoint", state)
            if self.draw.random() < 0.9:    # or before it can say so
                self.grid.saved()

    def _restore(self) -> None:
        crash(self.grid)
        self.grid = GrpcGrid(self.address, settings=SETTINGS)
        if (self.folder / "checkpoint").exists():
            state = load_tree(self.folder / "checkpoint")
            self.grid.load_state_dict(state["grid"])
            self.used, self.awaited, self.next_number = state["used"], state["awaited"], state["next"]
        self.grid.start()

    def _kill_client(self, index: int) -> None:
        self.proxy.refusing = True
        self.proxy.cut()
        self.clients[index].stop()
        self.clients[index] = self._client(index)
        self.proxy.refusing = False

    def close(self) -> None:
        for client in self.clients:    # one may be on its way back to the server
            client.stop()
        self.grid.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_dies_and_is_cut_no_update_is_lost_or_used_twice(seed, tmp_path, monkeypatch):
    for module in (agent, workbench):    # clients that are cut off ten times in a row should not wait for half a minute
        monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.4)
    run = Run(tmp_path, seed)
    run.play()
    run.close()
    assert all(len(set(numbers)) == len(numbers) >= TASKS for numbers in run.used.values())
