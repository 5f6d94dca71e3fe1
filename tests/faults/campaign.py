"""Seeded bad nights: a federation of real processes, in which things break at random moments, and what must hold after.

    python tests/faults/campaign.py --scenarios 100 --times 3
"""
import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from proxy import Proxy  # noqa: E402 (a neighbour, wherever this is run from)

CLIENTS = 3
UPDATES = 60            # of the run that keeps count
ROUNDS = 120            # of the runs whose bits are compared
LONGEST_S = 120.0       # a run that takes longer hangs
FAULTS = ("kill_server", "kill_client", "stop_server", "stop_client", "cut", "cut_mid_transfer", "slow_link",
          "partition", "terminate_server", "jump_clock", "repeat_replies")
TRAIN = {"lr": 0.1, "batch_size": 8, "local_steps": 3, "optimizer": "sgd"}


def experiment(kind: str, seed: int) -> dict[str, Any]:
    """Return one of the three federations: `ledger` (asynchronous, counts), `fedavg`, `econtrol` (client state)."""
    common = {"clients": {"count": CLIENTS}, "seed": seed, "checkpoint": {"every_s": 0.1, "keep": 2}, "train": TRAIN}
    if kind == "ledger":
        return {**common, "task": {"name": "ledger:CountingTask", "work_s": 0.03, "ballast": 20_000},
                "strategy": "ledger:Ledger", "stop": {"client_updates": UPDATES}, "evaluate": {"where": "none"},
                "train": {**TRAIN, "dtype": "float64"}}
    strategy = {"fedavg": "fedavg", "econtrol": {"name": "econtrol", "compressor": {"name": "top_k", "fraction": 0.1}}}
    return {**common, "task": "digits", "strategy": strategy[kind], "stop": {"rounds": ROUNDS}}


class Nursery:
    """Makes `fedcore` processes (see nursery.py).

    Args:
        within: a command that runs another one somewhere else, such as in a network namespace.
    """

    def __init__(self, within: Sequence[str] = ()) -> None:
        root = str(HERE.parents[1])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(HERE)]), "OMP_NUM_THREADS": "1",
               "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        self._process = subprocess.Popen([*within, sys.executable, str(HERE / "nursery.py")], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, env=env, text=True)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nursery died")
        return json.loads(answer)

    def start(self, arguments: list[str], log: Path, folder: Path, jump_s: float = 0.0, repeats: bool = False) -> int:
        """Start a command; returns the process's number."""
        return int(self._ask({"start": arguments, "log": str(log), "folder": str(folder), "jump_s": jump_s,
                              "repeats": repeats})["pid"])

    def spawn(self, arguments: list[str], log: Path, folder: Path) -> int:
        """Start a command in a process that is not forked from one of ours; returns its number."""
        return int(self._ask({"spawn": arguments, "log": str(log), "folder": str(folder)})["pid"])

    def ended(self, pid: int) -> int | None:
        """Return how a process ended, None while it runs."""
        return self._ask({"ended": pid})["status"]

    def close(self) -> None:
        """Let no more be made."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def quiet_port() -> int:
    """Return a free port below those that the system gives to whoever asks for any, proxies and other tests included.

    The server comes back to it again and again, and must find it free.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Federation:
    """A server and its clients, each client behind a network of its own."""

    def __init__(self, nursery: Nursery, folder: Path, settings: dict[str, Any]):
        self.nursery, self.folder = nursery, folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experiment.yaml").write_text(yaml.safe_dump(settings))
        shutil.copy(HERE / "ledger.py", folder)
        self.port = quiet_port()
        self.proxies = [Proxy(self.port) for _ in range(CLIENTS)]
        self.server: int | None = None
        self.clients: list[int | None] = [None] * CLIENTS
        self.run = folder / "run"

    @contextmanager
    def up(self) -> Iterator["Federation"]:
        """Start everybody; whatever still runs in the end is killed."""
        with ExitStack() as stack:
            for proxy in self.proxies:
                stack.enter_context(proxy)
            stack.callback(self.kill_all)
            self.start_server()
            for index in range(CLIENTS):
                self.start_client(index)
            yield self

    def start_server(self, jump_s: float = 0.0) -> None:
        """Start the server, or resume its run where it has begun."""
        # A run that has no checkpoint yet has lost nothing; it begins again in a folder of its own.
        begun = self.run.is_dir() and any((self.run / "checkpoints").glob("*.safetensors"))
        what = ["--resume", str(self.run)] if begun else ["experiment.yaml", "--out", str(self.run)]
        if not begun:
            shutil.rmtree(self.run, ignore_errors=True)
        self.server = self.nursery.start(["server", *what, "--listen", f"127.0.0.1:{self.port}", "--insecure"],
                                         self.folder / "server.log", self.folder, jump_s)

    def start_client(self, index: int, jump_s: float = 0.0, repeats: bool = False) -> None:
        """Start a client, which may find the state that it left."""
        self.clients[index] = self.nursery.start(
            ["client", "experiment.yaml", "--server", f"127.0.0.1:{self.proxies[index].port}", "--insecure", "--name",
             f"site-{index}", "--node-config", f"partition-id={index}", "--state", f"state-{index}"],
            self.folder / f"client-{index}.log", self.folder, jump_s, repeats)

    def send(self, pid: int | None, number: int) -> None:
        """Send a signal to a process that may have ended."""
        if pid is not None and self.nursery.ended(pid) is None:
            os.kill(pid, number)

    def kill_all(self) -> None:
        """End everybody."""
        for pid in [self.server, *self.clients]:
            self.send(pid, signal.SIGKILL)

    def versions(self) -> int:
        """Return how many rows the run has written so far."""
        file = self.run / "metrics.jsonl"
        return file.read_text().count('"update"') if file.is_file() else 0

    def wait(self, pid: int | None, timeout_s: float = LONGEST_S) -> int:
        """Wait for a process to end; returns its status."""
        until = time.monotonic() + timeout_s
        assert pid is not None
        while (status := self.nursery.ended(pid)) is None:
            if time.monotonic() > until:
                raise AssertionError(f"a process still runs after {timeout_s:g} s; see the logs in {self.folder}")
            time.sleep(0.02)
        return status


class Night:
    """What goes wrong in one scenario, and when; everything follows from the seed."""

    def __init__(self, federation: Federation, seed: int):
        self.federation, self.random = federation, random.Random(seed)
        self.said: list[str] = []

    def go(self) -> None:
        """Let things break, and mend them."""
        for number in range(self.random.randint(1, 4)):
            self._pause(self.random.uniform(0.0, 0.6) if number else 0.0)    # a night without a fault shows nothing
            if self.federation.nursery.ended(self.federation.server or 0) is not None:
                return    # the run was over before anything else could happen
            fault = self.random.choice(FAULTS)
            victim = self.random.randrange(CLIENTS)
            self.said.append(f"{fault} {victim}")
            getattr(self, fault)(victim)

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def kill_server(self, _: int) -> None:
        self.federation.send(self.federation.server, signal.SIGKILL)
        self._restart_server()

    def terminate_server(self, _: int) -> None:
        self.federation.send(self.federation.server, signal.SIGTERM)
        status = self.federation.wait(self.federation.server, 60)
        # Before it listens to signals it ends as every process does.
        assert status in (0, 130, -signal.SIGTERM), f"SIGTERM ended the server with {status} after {self.said}"
        self._restart_server()

    def _restart_server(self, jump_s: float = 0.0) -> None:
        status = self.federation.wait(self.federation.server, 60)
        self._pause(self.random.uniform(0.0, 0.5))
        summary = self.federation.run / "summary.json"
        over = status == 0 and summary.is_file() and json.loads(summary.read_text())["stop_reason"] != "interrupted"
        if not over:
            self.federation.start_server(jump_s)

    def kill_client(self, victim: int) -> None:
        self.federation.send(self.federation.clients[victim], signal.SIGKILL)
        self._restart_client(victim)

    def _restart_client(self, victim: int, jump_s: float = 0.0, repeats: bool = False) -> None:
        self._pause(self.random.uniform(0.0, 0.5))
        if self.federation.wait(self.federation.clients[victim], 60) != 0:
            self.federation.start_client(victim, jump_s, repeats)

    def stop_server(self, _: int) -> None:
        self._hold(self.federation.server)

    def stop_client(self, victim: int) -> None:
        self._hold(self.federation.clients[victim])

    def _hold(self, pid: int | None) -> None:
        self.federation.send(pid, signal.SIGSTOP)
        self._pause(self.random.uniform(0.1, 1.0))
        self.federation.send(pid, signal.SIGCONT)

    def cut(self, victim: int) -> None:
        self.federation.proxies[victim].cut()

    def cut_mid_transfer(self, victim: int) -> None:
        self.federation.proxies[victim].cut_after = self.random.randrange(1, 300_000)

    def slow_link(self, victim: int) -> None:
        proxy = self.federation.proxies[victim]
        proxy.bytes_per_s, proxy.delay_s = 2e6, 0.005
        self._pause(self.random.uniform(0.2, 1.0))
        proxy.bytes_per_s, proxy.delay_s = None, 0.0

    def partition(self, victim: int) -> None:
        proxy = self.federation.proxies[victim]
        proxy.open = False
        proxy.cut()
        self._pause(self.random.uniform(0.1, 1.5))
        proxy.open = True

    def jump_clock(self, victim: int) -> None:
        """Restart a process whose wall clock is a day off, or an hour back."""
        jump_s = self.random.choice((86_400.0, -3600.0))
        if self.random.random() < 0.5:
            self.federation.send(self.federation.server, signal.SIGKILL)
            self._restart_server(jump_s)
        else:
            self.federation.send(self.federation.clients[victim], signal.SIGKILL)
            self._restart_client(victim, jump_s)

    def repeat_replies(self, victim: int) -> None:
        """Restart a client as one whose replies are overtaken, come twice, and come again long after."""
        self.federation.send(self.federation.clients[victim], signal.SIGKILL)
        self._restart_client(victim, repeats=True)


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return a run's rows; a line that is not JSON is an error."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def check_common(run: Path) -> dict[str, Any]:
    """Check what holds for every run; returns its summary."""
    summary = json.loads((run / "summary.json").read_text())
    updates = [row for row in rows_of(run) if row["event"] == "update"]
    assert [row["version"] for row in updates] == list(range(1, summary["versions"] + 1)), "versions have gaps"
    done = [row["task"] for row in rows_of(run, "timeline.jsonl") if row["outcome"] == "ok"]
    assert len(done) == len(set(done)), "a task was applied twice"
    assert not [row for row in rows_of(run) if row["event"] == "incident"], "a client of ours misbehaved"
    return summary


def check_ledger(run: Path) -> None:
    """No update lost, none applied twice: every client's counts follow each other, and the model is their sum."""
    summary = check_common(run)
    assert summary["stop_reason"] == "client_updates" and summary["client_updates"] == UPDATES
    counts: dict[int, list[int]] = defaultdict(list)
    for row in rows_of(run):
        if row["event"] == "update":
            counts[row["nodes"][0]].append(row["count"])
    for client, found in sorted(counts.items()):
        assert found == list(range(1, len(found) + 1)), f"the counts of client {client} do not follow: {found}"
    from safetensors.torch import load_file

    places = load_file(run / "model.safetensors")["places"].tolist()
    assert places == [float(len(counts[client])) for client in range(CLIENTS)], f"{places} is not the sum of updates"


def check_bits(run: Path, expected: Path) -> None:
    """The model has the bits of a run in which nothing went wrong."""
    summary = check_common(run)
    assert summary["stop_reason"] == "rounds" and summary["versions"] == ROUNDS
    from safetensors.torch import load_file

    found, wanted = (load_file(folder / "model.safetensors") for folder in (run, expected))
    different = [name for name in wanted if not found[name].equal(wanted[name])]
    assert not different, f"{', '.join(different)} differ from a run in which nothing went wrong"


def reference(folder: Path, kind: str, seed: int) -> Path:
    """Run the same experiment in virtual time, where nothing goes wrong; returns its folder."""
    import fedcore

    out = folder / f"expected-{kind}-{seed}"
    if not (out / "summary.json").is_file():
        fedcore.simulate(experiment(kind, seed), out=out)
    return out


def scenario(nursery: Nursery, folder: Path, seed: int, say: Callable[[str], None] = lambda text: None) -> None:
    """Play one bad night and check what must hold after it."""
    kind = ("ledger", "fedavg", "econtrol")[seed % 3]
    federation = Federation(nursery, folder / f"night-{seed}", experiment(kind, seed % 2))
    with federation.up():
        until = time.monotonic() + LONGEST_S
        moment = random.Random(seed).randrange(0, ROUNDS // 6)
        while federation.versions() < moment and nursery.ended(federation.server or 0) is None:
            assert time.monotonic() < until, f"the run does not begin; see the logs in {federation.folder}"
            time.sleep(0.01)
        night = Night(federation, seed)
        night.go()
        status = federation.wait(federation.server)
        say(f"{kind}: {', '.join(night.said)}")
        assert night.said, "the run was over before anything happened: nothing was shown"
        assert status == 0, f"the server ended with {status} after {night.said}; see {federation.folder}/server.log"
        if kind == "ledger":
            check_ledger(federation.run)
        else:
            check_bits(federation.run, reference(folder, kind, seed % 2))
        for pid in federation.clients:
            # One that was away when the run ended waits for the server to come back, until it is asked to end.
            federation.send(pid, signal.SIGTERM)
            assert federation.wait(pid, 60) in (0, -signal.SIGTERM), f"a client failed; see {federation.folder}"
    shutil.rmtree(federation.folder)


def main() -> None:
    """Play many nights, several times over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="seeds of scenarios to play")
    chosen = parser.parse_args()
    nursery = Nursery()
    folder = Path(tempfile.mkdtemp(prefix="fedcore-faults-"))
    seeds = chosen.only or range(chosen.first, chosen.first + chosen.scenarios)
    failed = 0
    for turn in range(chosen.times):
        for seed in seeds:
            said: list[str] = []
            try:
                scenario(nursery, folder, seed, said.append)
                word = "ok"
            except AssertionError as error:
                word, failed = f"FAILED: {error}", failed + 1
            print(f"{turn + 1}.{seed:03d} {word:8s} {' '.join(said)}", flush=True)
    nursery.close()
    print(f"{chosen.times * len(seeds) - failed} passed, {failed} failed" + (f"; see {folder}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
