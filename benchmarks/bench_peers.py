"""Peers: how many a simulation handles per second, and how fast two processes exchange a large vector.

    python benchmarks/bench_peers.py [--full] [--megabytes 400] [--repeats 3]

The exchange goes both ways at once, over loopback, between two processes; beside it, in the same run, a bare TCP
connection that copies the same bytes, and torch.distributed with gloo. Figures are medians, in seconds.
"""
import argparse
import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from fedcore.authority import Authority, init_ca
from fedcore.config import Experiment
from fedcore.peers.envelope import Envelope, payload_bytes
from fedcore.registry import build
from fedcore.simulations.peers import PeerSimulation
from fedcore.tls import Credentials, identity_of, load_credentials
from fedcore.transport.loop import submit
from fedcore.transport.peer_roster import Roster
from fedcore.transport.peer_wire import PeerWire

PATIENCE_S = 120.0
CHUNK = 1 << 20


def free_port() -> int:
    """Return a port that nobody listens on at present."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


# ---- simulation ---------------------------------------------------------------------------------------------------


def simulate(name: str, count: int, rounds: int) -> float:
    """Return the seconds of a run without arithmetic."""
    settings: dict[str, Any] = {
        "task": {"name": "simulated", "num_params": 1000}, "strategy": name, "clients": {"count": count},
        "train": {"local_steps": 1}, "stop": {"rounds": rounds}, "evaluate": {"where": "none"},
        "simulation": {"devices": {"seconds_per_step": {"name": "lognormal", "mean": 0.1, "relative_std": 0.5}},
                       "network": {"latency_s": 0.05, "uplink_mbps": 10}},
    }
    with tempfile.TemporaryDirectory() as folder:
        simulation = PeerSimulation(Experiment(**settings), build("strategies", name), Path(folder))
        started = time.perf_counter()
        simulation.play()
        seconds = time.perf_counter() - started
        simulation.recorder.close()
    return seconds


# ---- exchange -----------------------------------------------------------------------------------------------------


def exchange_over_peers(rank: int, where: Any, size: int, repeats: int) -> list[float]:
    """Exchange vectors by a peer's wire."""
    folder, ports = where
    credentials: Credentials | None = load_credentials(Path(folder) / f"node-{rank}", "node") if folder else None
    prints = [identity_of((Path(folder) / f"node-{index}" / "node.crt").read_bytes()).fingerprint if folder else ""
              for index in range(2)]
    roster = Roster.of({"run": "bench", "peers": [
        {"name": f"node-{index}", "address": f"127.0.0.1:{ports[index]}", "fingerprint": prints[index]}
        for index in range(2)]})
    vector = torch.rand(size // 4)

    async def run() -> list[float]:
        came: asyncio.Queue[int] = asyncio.Queue()
        wire = PeerWire(roster, rank, credentials, lambda envelope: came.put_nowait(envelope.round),
                        lambda who, reason: print(who, reason), size)
        await wire.start()
        seconds = []
        for index in range(-1, repeats):
            data = {"vector": vector[:16] if index < 0 else vector}
            started = time.perf_counter()
            delivered = wire.post(1 - rank, Envelope("bench", 0, "message", "b", index + 1, rank, data, {},
                                                     payload_bytes(data)))
            await came.get()
            await delivered
            seconds.append(time.perf_counter() - started)
        await wire.drain(5.0)
        await asyncio.sleep(0.5)
        await wire.close()
        return seconds[1:]

    return submit(run()).result(PATIENCE_S)


def exchange_over_tcp(rank: int, port: int, size: int, repeats: int) -> list[float]:
    """Exchange as many bytes over a bare connection."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            link, _ = server.accept()
    else:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                link = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < until
                time.sleep(0.05)
    data, memory, seconds = memoryview(bytes(size)), memoryview(bytearray(size)), []
    for _ in range(repeats):
        link.sendall(b"go")
        assert link.recv(2, socket.MSG_WAITALL) == b"go"
        started = time.perf_counter()
        sender = threading.Thread(target=link.sendall, args=(data,))
        sender.start()
        got = 0
        while got < size:
            got += link.recv_into(memory[got:], min(CHUNK, size - got))
        sender.join()
        seconds.append(time.perf_counter() - started)
    link.close()
    return seconds


def exchange_over_gloo(rank: int, port: int, size: int, repeats: int) -> list[float]:
    """Exchange vectors by torch.distributed."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    vector, other, seconds = torch.rand(size // 4), torch.empty(size // 4), []
    for _ in range(repeats):
        torch.distributed.barrier()
        started = time.perf_counter()
        sent = torch.distributed.isend(vector, 1 - rank)
        received = torch.distributed.irecv(other, 1 - rank)
        assert sent is not None and received is not None
        sent.wait()
        received.wait()
        seconds.append(time.perf_counter() - started)
    torch.distributed.destroy_process_group()
    return seconds


def _work(results: Any, function: Callable[..., list[float]], rank: int, *args: Any) -> None:
    torch.set_num_threads(1)
    results.put((rank, function(rank, *args)))


def in_two_processes(function: Callable[..., list[float]], *args: Any) -> float:
    """Return the median over the repetitions of the slower end's time."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ends = [context.Process(target=_work, args=(results, function, rank, *args)) for rank in range(2)]
    for end in ends:
        end.start()
    found = [results.get(timeout=PATIENCE_S)[1] for _ in ends]
    for end in ends:
        end.join()
    return statistics.median(max(pair) for pair in zip(*found, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="as many steps as the promises name")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    many, few = (100, 10) if options.full else (15, 2)
    for name, count, rounds in (("noloco", 64, 100), ("noloco", 1024, many), ("diloco", 1024, many),
                                ("noloco", 8192, few)):
        seconds = simulate(name, count, rounds)
        print(f"{name}, {count} virtual peers x {rounds} outer steps: {seconds:.1f} s, "
              f"{count * rounds / seconds:.0f} peers x steps per second", flush=True)
    size = options.megabytes * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        init_ca(Path(folder) / "ca")
        for index in range(2):
            Authority(Path(folder) / "ca").issue_node(f"node-{index}", Path(folder) / f"node-{index}")
        bare = in_two_processes(exchange_over_tcp, free_port(), size, options.repeats)
        print(f"{options.megabytes} MB both ways at once, bare TCP: {bare:.2f} s", flush=True)
        for label, function, where in (
            ("peers in clear", exchange_over_peers, ("", [free_port(), free_port()])),
            ("peers with mutual TLS", exchange_over_peers, (folder, [free_port(), free_port()])),
            ("torch.distributed, gloo", exchange_over_gloo, free_port()),
        ):
            seconds = in_two_processes(function, where, size, options.repeats)
            print(f"{options.megabytes} MB both ways at once, {label}: {seconds:.2f} s, "
                  f"{bare / seconds:.2f} of bare TCP", flush=True)


if __name__ == "__main__":
    main()
