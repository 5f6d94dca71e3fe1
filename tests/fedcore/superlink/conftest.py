"""A real SuperLink with two SuperNodes on loopback."""
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[3]
FlwrRun = Callable[..., subprocess.CompletedProcess[str]]


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
def flwr_run(tmp_path_factory) -> Iterator[FlwrRun]:
    """Start the SuperLink and the SuperNodes; yields what runs an app there and waits for its end."""
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
        for partition in range(2):
            stack.enter_context(running(
                [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", free_port(),
                 "--node-config", f"partition-id={partition} peer-listen='127.0.0.1:{free_port()}'"],
                environment, folder / f"supernode-{partition}.log", folder,
            ))

        def run(app: Path, *words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([BIN / "flwr", "run", str(app), "test", "--stream", *words], env=environment,
                                  cwd=folder, capture_output=True, text=True, timeout=500, check=False)

        yield run
