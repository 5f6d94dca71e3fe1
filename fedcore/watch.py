"""Who is connected to a server and what each does, in words: for the terminal, and for `fedcore status`."""
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcore.peers.segments import TRAIN as TRAIN_PEER
from fedcore.report.scales import count, data_size, seconds
from fedcore.tasks import printable
from fedcore.terminal import plain_spaces, table

LOOK_EVERY_S = 0.5
# Who is waited for is said again after so long without anything else to say.
SAY_AGAIN_S = 60.0
MOST_NAMED = 6
Snapshot = Mapping[str, Any]


def doing_words(node: Snapshot) -> str:
    """Return what a node does, in a few words."""
    if not node["connected"]:
        return f"away for {seconds(node['away_s'])}"
    if node["doing"] == "idle":
        return "idle"
    action = {"train": "training", TRAIN_PEER: "training", "evaluate": "evaluating"}.get(node["action"], node["action"])
    words = {"waiting": "is sent its work", "working": action, "uploading": "sends its answer",
             "arrived": "waits for the server"}
    return f"{words.get(node['doing'], node['doing'])} for {seconds(node['doing_s'])}"


def remarks(snapshot: Snapshot, expected: int) -> list[str]:
    """Return who is here, and whom the run waits for."""
    nodes = snapshot["nodes"]
    here = [node for node in nodes if node["connected"]]
    lines = [f"{count(len(here))} of {count(expected)} clients are connected"]
    busy = sorted((node for node in nodes if node["doing"] != "idle" or not node["connected"]),
                  key=lambda node: -node["doing_s"])
    lines += [f"  {node['name']}: {doing_words(node)}" for node in busy[:MOST_NAMED]]
    if len(busy) > MOST_NAMED:
        lines.append(f"  and {len(busy) - MOST_NAMED} more")
    return [printable(plain_spaces(line)) for line in lines]


def status_table(snapshot: Snapshot) -> Table:
    """Return one row for each client."""
    rows = []
    for node in snapshot["nodes"]:
        rate = f"{data_size(node['up_bytes_per_s'])}/s up, {data_size(node['down_bytes_per_s'])}/s down"
        rows.append([printable(plain_spaces(text)) for text in (
            node["name"], str(node["partition"]), seconds(node["connected_s"]) if node["connected"] else "no",
            doing_words(node), data_size(node["bytes_up"]), data_size(node["bytes_down"]), rate, node["version"],
        )])
    columns = ("client", "partition", "connected", "now", "up", "down", "rate", "fedcore")
    return table(None, columns, rows, right=(1, 2, 4, 5))


class Watch:
    """Prints, while its context is open, who comes and goes, and who is waited for when nothing else happens.

    Args:
        console: where to; a terminal with a live bar shows the same there.
        look: returns a snapshot of the link.
        expected: how many clients belong to the run.
    """

    def __init__(self, console: Console, look: Callable[[], Snapshot], expected: int):
        self.console, self.look, self.expected = console, look, expected
        self._connected: dict[str, bool] = {}
        self._said_at = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedcore-watch", daemon=True)

    def heard(self, _: object = None) -> None:
        """Take note that something else was said just now."""
        self._said_at = time.monotonic()

    def lines(self) -> list[str]:
        """Return who is here, and whom the run waits for."""
        return remarks(self.look(), self.expected)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            snapshot = self.look()
            now = {node["name"]: node["connected"] for node in snapshot["nodes"]}
            for name in [name for name in {**self._connected, **now}
                         if now.get(name, False) != self._connected.get(name, False)]:
                here = sum(now.values())
                word = "connected" if now.get(name) else "disconnected"
                self._say(f"{name} {word} ({here} of {self.expected} are here)")
            self._connected = now
            if time.monotonic() - self._said_at >= SAY_AGAIN_S and not self.console.is_terminal:
                for line in remarks(snapshot, self.expected):
                    self._say(line)

    def _say(self, line: str) -> None:
        self.console.print(Text(printable(line)), soft_wrap=True)
        self.heard()
