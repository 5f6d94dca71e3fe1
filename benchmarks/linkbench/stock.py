"""The same measurements on Flower's own SuperLink and SuperNode: round trips, and a model down and up."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
APP = Path(__file__).parent / "stock_app"
PATIENCE_S = 60.0


def free_port() -> int:
    """Return a port that nobody listens on at present."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


@contextmanager
def running(command: list[object], environment: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen]:
    """Run a process with all that it starts, and end them all."""
    with open(cwd / f"{Path(str(command[0])).name}.log", "w") as output:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=output, stderr=output,
                                   cwd=cwd, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


def wait_until_up(port: int) -> None:
    """Wait until a SuperLink answers."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > until:
                raise SystemExit("the SuperLink could not be started") from None
            time.sleep(0.2)


def measure(trips: int, megabytes: int, repetitions: int) -> dict[str, Any]:
    """Return the figures of one SuperLink with one SuperNode, in clear.

    Args:
        trips: round trips of a task that does nothing.
        megabytes: of the model that is sent down, and then up.
    """
    with tempfile.TemporaryDirectory(prefix="fedcore-stock-") as name, ExitStack() as stack:
        folder, port = Path(name), free_port()
        home, app, found = folder / "flwr", folder / "app", folder / "figures.json"
        home.mkdir()
        shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
        environment = {
            **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        stack.enter_context(running(
            [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port,
             "--disable-runtime-dependency-installation"], environment, folder))
        wait_until_up(port)
        stack.enter_context(running(
            [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", free_port(),
             "--node-config", "partition-id=0"], environment, folder))
        settings = f"trips={trips} megabytes={megabytes} repetitions={repetitions} out='{found}'"
        run = subprocess.run([BIN / "flwr", "run", app, "bench", "--stream", "--run-config", settings],
                             env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if not found.is_file():
            raise SystemExit(f"Flower's run gave no figures:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return json.loads(found.read_text())
