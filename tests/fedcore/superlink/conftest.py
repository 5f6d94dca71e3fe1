"""A real SuperLink with two SuperNodes on loopback."""
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[3]


class Federation:
    """A SuperLink, its SuperNodes, and what runs an app there.

    Args:
        port: where the SuperLink is controlled and where nodes come to.
        folder: of logs, and of the processes.
    """

    def __init__(self, port: int, environment: dict[str, str], folder: Path, stack: ExitStack):
        self.port, self.environment, self.folder, self._stack = port, environment, folder, stack
        self._nodes: dict[int, subprocess.Popen] = {}

    def start_node(self, partition: int) -> None:
        """Start a SuperNode that remembers nothing, in place of an earlier one that holds the same data."""
        earlier = self._nodes.get(partition)
        if earlier is not None:
            earlier.terminate()
            earlier.wait(timeout=30)
        log = self.folder / f"supernode-{partition}{'' if earlier is None else '-again'}.log"
        self._nodes[partition] = self._stack.enter_context(running(
            [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", free_port(),
             "--node-config", f"partition-id={partition} peer-listen='127.0.0.1:{free_port()}'"],
            self.environment, log, self.folder,
        ))

    def said(self, partition: int) -> str:
        """Return what the first SuperNode with these data has logged."""
        return (self.folder / f"supernode-{partition}.log").read_text()

    def start(self, app: Path, *words: str) -> subprocess.Popen:
        """Start an app; `communicate` waits for its end."""
        return subprocess.Popen([BIN / "flwr", "run", str(app), "test", "--stream", *words], env=self.environment,
                                cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, app: Path, *words: str) -> str:
        """Run an app to its end; returns what it said."""
        return self.start(app, *words).communicate(timeout=500)[0]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[object], environment: dict[str, str], log: Path, cwd: Path) -> Iterator[subprocess.Popen]:
    """Run a process with all that it starts, and end them all."""
    with open(log, "w") as output:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=output, stderr=output,
                                   cwd=cwd, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):    # it may have ended, with all that it started
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


def is_up(port: int) -> bool:
    """Say whether a SuperLink answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Iterator[Federation]:
    """Start a SuperLink and two SuperNodes."""
    folder = tmp_path_factory.mktemp("superlink")
    port, home = free_port(), folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    with ExitStack() as stack:
        link = stack.enter_context(running(
            [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port,
             "--disable-runtime-dependency-installation"],
            environment, folder / "superlink.log", folder,
        ))
        deadline = time.monotonic() + 60
        while not is_up(port):
            assert link.poll() is None and time.monotonic() < deadline, (folder / "superlink.log").read_text()
            time.sleep(0.2)
        found = Federation(port, environment, folder, stack)
        for partition in range(2):
            found.start_node(partition)
        yield found
