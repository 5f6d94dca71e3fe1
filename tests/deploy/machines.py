"""Commands as real processes in a folder, forked from one process that has imported everything."""
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from campaign import Nursery


class Machines:
    """Processes in one folder; whatever still runs in the end is killed."""

    def __init__(self, nursery: Nursery, folder: Path):
        self.nursery, self.folder = nursery, folder
        self.logs: dict[int, Path] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def write(self, experiment: dict) -> None:
        """Write the experiment file that everybody reads."""
        (self.folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))

    def start(self, *words: object) -> int:
        """Start a command; returns its process."""
        log = self.folder / f"log-{len(self.logs)}.txt"
        pid = self.nursery.start([str(word) for word in words], log, self.folder)
        self.logs[pid] = log
        return pid

    def fresh(self, *words: object) -> int:
        """Start a command as a shell does, which takes seconds: in a process that has imported nothing yet."""
        log = self.folder / f"log-{len(self.logs)}.txt"
        pid = self.nursery.spawn([str(word) for word in words], log, self.folder)
        self.logs[pid] = log
        return pid

    def server(self, *more: object) -> int:
        """Start a server in clear, unless told otherwise."""
        how = () if "--tls" in more else ("--insecure",)
        what = () if "--resume" in more else ("experiment.yaml", "--out", "run")
        return self.start("server", *what, "--listen", self.address, *how, *more)

    def client(self, index: int, *more: object) -> int:
        """Start the client of a partition."""
        how = () if "--tls" in more else ("--insecure", "--name", f"site-{index}")
        return self.start("client", "experiment.yaml", "--server", self.address, "--state", f"state-{index}",
                          "--node-config", f"partition-id={index}", *how, *more)

    def clients(self, count: int) -> list[int]:
        """Start clients in clear."""
        return [self.client(index) for index in range(count)]

    def run(self, *words: object) -> tuple[int, str]:
        """Run a command to its end; returns its status and what it said."""
        pid = self.start(*words)
        return self.wait(pid), self.said(pid)

    def said(self, pid: int) -> str:
        """Return what a process has said so far, on one line."""
        log = self.logs[pid]
        return " ".join(log.read_text().split()) if log.is_file() else ""

    def wait(self, pid: int, timeout_s: float = 90.0) -> int:
        """Wait for a process to end; returns its status."""
        until = time.monotonic() + timeout_s
        while (status := self.nursery.ended(pid)) is None:
            assert time.monotonic() < until, f"it still runs after {timeout_s} s, and said: {self.said(pid)}"
            time.sleep(0.02)
        return status

    def wait_all(self, pids: Sequence[int]) -> list[int]:
        """Wait for processes; returns their statuses."""
        return [self.wait(pid) for pid in pids]

    def wait_for(self, pid: int, words: str, timeout_s: float = 60.0) -> None:
        """Wait until a process has said something."""
        until = time.monotonic() + timeout_s
        while words not in self.said(pid):
            assert time.monotonic() < until, f"it never said {words!r}, but: {self.said(pid)}"
            assert self.nursery.ended(pid) is None or words in self.said(pid), f"it ended: {self.said(pid)}"
            time.sleep(0.02)

    def send(self, pid: int, number: int) -> None:
        """Send a signal."""
        os.kill(pid, number)

    def close(self) -> None:
        """Kill what still runs."""
        for pid in self.logs:
            if self.nursery.ended(pid) is None:
                os.kill(pid, signal.SIGKILL)
