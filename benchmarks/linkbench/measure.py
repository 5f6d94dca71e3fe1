"""What is measured: round trips, throughput beside the bare stream, memory of the server, idle clients."""
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from flwr.app import ConfigRecord, Message, RecordDict

from fedcore.events import EventStrategy
from fedcore.hub import Hub
from fedcore.options import RunOptions, StopRule
from fedcore.registry import build
from fedcore.rounds import FlowerRounds
from fedcore.session import Session
from fedcore.strategies.fedcompass import FedCompass
from fedcore.strategy import HubStrategy
from fedcore.tasks import Reply
from fedcore.tls import Credentials
from fedcore.transport.frames import CHUNK_BYTES
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.settings import LinkSettings
from fedcore.vectors import Model
from linkbench import raw
from linkbench.clients import layout_of, vector

MEGABYTE = 10**6
Figures = dict[str, Any]


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return statistics.median(values)


@contextmanager
def clients(grid: GrpcGrid, count: int, tls: Path | None) -> Iterator[None]:
    """Have so many clients, in a process of their own."""
    command = [sys.executable, "-m", "linkbench.clients", grid.address, str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command + ([] if tls is None else [str(tls)]), env=environment)
    try:
        while len(grid.get_node_ids()) < count:
            if process.poll() is not None:
                raise SystemExit("the clients could not be started")
            time.sleep(0.05)
        yield
    finally:
        grid.close()
        process.wait(30)


def request(node: int, action: str, content: RecordDict) -> Message:
    """Return a message to a client."""
    return Message(content, node, f"train.{action}", ttl=3600.0)


def round_trips(grid: GrpcGrid, count: int) -> Figures:
    """Return the round trip of a task that does nothing, milliseconds."""
    node, times = grid.get_node_ids()[0], []
    for index in range(count + 50):
        started = time.perf_counter()
        (reply,) = grid.send_and_receive([request(node, "noop", RecordDict({"config": ConfigRecord({"i": index})}))])
        assert not reply.has_error()
        times.append(1000 * (time.perf_counter() - started))
    times = sorted(times[50:])
    return {"p50_ms": median(times), "p99_ms": times[int(0.99 * len(times))]}


def throughput(grid: GrpcGrid, num_bytes: int, nodes: Sequence[int], repetitions: int, credentials: Credentials | None
               ) -> list[Figures]:
    """Return megabytes per second down and up, beside the bare stream's, from interleaved repetitions."""
    chunks = num_bytes // CHUNK_BYTES
    size = chunks * CHUNK_BYTES // 4
    total = 4 * size * len(nodes) / MEGABYTE
    server, address = raw.serve(credentials)
    found: dict[tuple[str, str], list[float]] = {}
    model = vector(size)
    raw.payload(chunks)
    for repetition in range(repetitions + 1):
        for direction in ("down", "up"):
            content = RecordDict({"arrays": model}) if direction == "down" else \
                RecordDict({"config": ConfigRecord({"size": size})})
            started = time.perf_counter()
            replies = grid.send_and_receive([request(node, direction, content) for node in nodes])
            seconds = time.perf_counter() - started
            assert len(replies) == len(nodes) and not any(reply.has_error() for reply in replies)
            del replies
            bare = ConfigRecord({"address": address, "chunks": chunks, "up": direction == "up"})
            answers = grid.send_and_receive([request(node, "raw", RecordDict({"config": bare})) for node in nodes])
            raw_s = max(answer.content["metrics"]["seconds"] for answer in answers)
            if repetition:    # the first one warms up
                found.setdefault((direction, "ours"), []).append(total / seconds)
                found.setdefault((direction, "raw"), []).append(total / raw_s)
    rows = []
    for direction in ("down", "up"):
        ours, bare_rates = found[direction, "ours"], found[direction, "raw"]
        rows.append({"direction": direction, "MB": num_bytes // MEGABYTE, "clients": len(nodes), "ours": median(ours),
                     "raw": median(bare_rates),
                     "share": median([one / other for one, other in zip(ours, bare_rates, strict=True)])})
    return rows


class PeakRss:
    """The most memory that the process held while this watched, bytes."""

    def __init__(self) -> None:
        self.peak, self._over = 0, threading.Event()
        self._process = psutil.Process()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._over.set()
        return self.peak


def watch_buffered(strategy: EventStrategy) -> list[int]:
    """Have a strategy counted after every reply; returns where the most updates that it held back is kept."""
    most, on_reply = [0], strategy.on_reply

    def counted(hub: Hub, reply: Reply) -> None:
        on_reply(hub, reply)
        if isinstance(strategy, FedCompass):
            most[0] = max(most[0], len(strategy.late) + sum(map(len, strategy.buffers.values())))

    strategy.on_reply = counted  # type: ignore[method-assign]
    return most


def memory(strategy: str, num_clients: int, num_bytes: int, updates: int, max_uploads: int) -> Figures:
    """Return the server's peak memory beyond what it holds without a model, in models.

    Flower's own strategies hold every reply, admitted or not: their allowance is one model for each client, and four.
    """
    grid = GrpcGrid(settings=LinkSettings(max_uploads=max_uploads))
    built = build("strategies", strategy, "strategy")    # what it imports is no model
    chosen = built if isinstance(built, HubStrategy) else FlowerRounds(built)
    buffered = watch_buffered(chosen) if isinstance(chosen, EventStrategy) else [num_clients - max_uploads]
    with clients(grid, num_clients, None):
        before = psutil.Process().memory_info().rss
        watch = PeakRss()
        # The strategy must not be handed a model that this function goes on holding.
        run = Session(Hub(grid, Model(vector(num_bytes // 4, 0.0).model.params, {}, layout_of(num_bytes // 4)),
                          RunOptions(expected=num_clients, stop=StopRule(client_updates=updates))),
                      chosen)
        chosen.drive(run)
        seen = {"strategy": name_of(strategy), "clients": num_clients, "models": (watch.stop() - before) / num_bytes,
                "max_uploads": max_uploads, "buffered": buffered[0], "allowed": 4 + max_uploads + buffered[0],
                "versions": run.hub.version}
    return seen


def name_of(spec: Any) -> str:
    """Return what a strategy is called."""
    return str(spec["name"] if isinstance(spec, dict) else spec)


def idle(num_clients: int, seconds: float) -> Figures:
    """Return what clients that wait for work cost the server."""
    grid = GrpcGrid()
    before = psutil.Process().memory_info().rss
    with clients(grid, num_clients, None):
        time.sleep(2.0)
        started, cpu = time.perf_counter(), cpu_s()
        time.sleep(seconds)
        share = (cpu_s() - cpu) / (time.perf_counter() - started)
        used = psutil.Process().memory_info().rss - before
    return {"clients": num_clients, "MiB": used / 2**20, "cpu_percent": 100 * share}


def cpu_s() -> float:
    """Return the CPU time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
