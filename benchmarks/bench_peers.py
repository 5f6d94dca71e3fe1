"""Peers: how many a simulation handles per second, and how fast two processes exchange a large vector.

    python benchmarks/bench_peers.py [--quick | --full] [--megabytes 400] [--repeats 3]

The exchange is over loopback, between two processes, both ways at once and one way; beside it, in the same run, a bare
TCP connection that copies the same bytes, in clear and with Python's TLS, bare grpc.aio streams whose chunks are ready
and thrown away where they arrive, and torch.distributed with gloo. Figures are medians, in seconds, after one exchange
to warm up. `--quick` takes a minute: fewer steps, 100 MB, once.
"""
import argparse
import asyncio
import multiprocessing
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import torch
import torch.distributed
from grpc import aio

from fedcore.authority import Authority, init_ca
from fedcore.config import Experiment
from fedcore.peers.envelope import Envelope, payload_bytes
from fedcore.registry import build
from fedcore.simulations.peers import PeerSimulation
from fedcore.tls import Credentials, identity_of, load_credentials, node_host, server_options
from fedcore.transport.dial import open_channel
from fedcore.transport.loop import submit
from fedcore.transport.peer_link import PEER_CHUNK_BYTES
from fedcore.transport.peer_roster import Roster
from fedcore.transport.peer_wire import PeerWire
from fedcore.transport.wire import KEEPALIVE

PATIENCE_S = 120.0
STRATEGIES = ("noloco", "diloco", "gossip_sgd")
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


def exchange_over_peers(rank: int, where: Any, size: int, repeats: int, both: bool) -> list[float]:
    """Exchange vectors by a peer's wire; one way, rank 0 sends."""
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

        async def exchange(number: int, data: dict[str, torch.Tensor], sends: bool, hears: bool) -> None:
            envelope = Envelope("bench", 0, "message", "b", number, rank, data, {}, payload_bytes(data))
            delivered = wire.post(1 - rank, envelope) if sends else None
            if hears:
                await came.get()
            if delivered is not None:
                await delivered

        for index in range(-1, repeats):
            # A short message each way first, so that both begin together.
            await exchange(2 * index + 2, {"vector": vector[:16]}, True, True)
            started = time.perf_counter()
            await exchange(2 * index + 3, {"vector": vector}, both or rank == 0, both or rank == 1)
            seconds.append(time.perf_counter() - started)
        await wire.drain(5.0)
        await asyncio.sleep(0.5)
        await wire.close()
        return seconds[1:]

    return submit(run()).result(PATIENCE_S)


def open_tcp(rank: int, port: int) -> socket.socket:
    """Return one end of a bare connection."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            return server.accept()[0]
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.05)


def secured(rank: int, link: socket.socket, folder: str) -> socket.socket:
    """Return a connection with mutual TLS, by Python's own."""
    own = Path(folder) / f"node-{rank}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if rank == 0 else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
    context.load_verify_locations(own / "ca.crt")
    context.load_cert_chain(own / "node.crt", own / "node.key")
    return context.wrap_socket(link, server_side=rank == 0)


def exchange_over_tcp(rank: int, where: Any, size: int, repeats: int, both: bool) -> list[float]:
    """Exchange as many bytes over bare connections, one for each way; one way, rank 0 sends."""
    folder, ports = where
    links = [open_tcp(rank, port) for port in ports]    # a TLS connection is not for two threads at once
    if folder:
        links = [secured(rank, link, folder) for link in links]
    outgoing, incoming = links if rank == 0 else links[::-1]
    # Real numbers: memory that nobody has written to is one page of zeros, which never leaves the processor's cache.
    data = memoryview(torch.rand(size // 4).numpy()).cast("B")
    memory, seconds = memoryview(bytearray(size)), []

    def send() -> None:
        for start in range(0, size, CHUNK):
            outgoing.sendall(data[start:start + CHUNK])

    for _ in range(1 + repeats):
        outgoing.sendall(b"g")
        assert incoming.recv(1) == b"g"
        started = time.perf_counter()
        sender = threading.Thread(target=send)
        if both or rank == 0:
            sender.start()
        got = 0 if both or rank == 1 else size
        while got < size:
            got += incoming.recv_into(memory[got:], min(CHUNK, size - got))
        if both or rank == 0:
            sender.join()
        seconds.append(time.perf_counter() - started)
    time.sleep(0.2)
    for link in links:
        link.close()
    return seconds[1:]


def exchange_over_grpc(rank: int, where: Any, size: int, repeats: int, both: bool) -> list[float]:
    """Exchange chunks that are ready over a grpc.aio stream for each way, and throw them away."""
    folder, ports = where
    credentials = load_credentials(Path(folder) / f"node-{rank}", "node") if folder else None
    data = torch.rand(size // 4).numpy().tobytes()
    chunks = [data[start:start + PEER_CHUNK_BYTES] for start in range(0, size, PEER_CHUNK_BYTES)]

    async def run() -> list[float]:
        came: asyncio.Queue[int] = asyncio.Queue()

        async def take(_: Any, context: Any) -> None:
            total = 0
            while isinstance(chunk := await context.read(), bytes):
                total += len(chunk)
                if len(chunk) == 1 or total == size:    # a word, or the last of it
                    came.put_nowait(total)
                    await context.write(b"y")
                    total = 0

        server = aio.server(options=KEEPALIVE)
        handler = grpc.stream_stream_rpc_method_handler(take)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Take": handler}),))
        address = f"127.0.0.1:{ports[rank]}"
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, server_options(credentials))
        await server.start()
        channel = open_channel(f"127.0.0.1:{ports[1 - rank]}", credentials, node_host(f"node-{1 - rank}"))
        call: Any = channel.stream_stream("/bare/Take")(wait_for_ready=True)

        async def say(pieces: list[bytes]) -> None:
            for piece in pieces:
                await call.write(piece)
            await call.read()

        seconds = []
        for _ in range(1 + repeats):
            await asyncio.gather(say([b"g"]), came.get())
            started = time.perf_counter()
            await asyncio.gather(*([say(chunks)] if both or rank == 0 else []), *([came.get()] if both or rank else []))
            seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0.5)
        await channel.close()
        await server.stop(0.2)
        return seconds[1:]

    return submit(run()).result(PATIENCE_S)


def exchange_over_gloo(rank: int, where: Any, size: int, repeats: int, both: bool) -> list[float]:
    """Exchange vectors by torch.distributed."""
    _, ports = where
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{ports[0]}", rank=rank, world_size=2)
    vector, other, seconds = torch.rand(size // 4), torch.empty(size // 4), []
    for _ in range(1 + repeats):
        torch.distributed.barrier()
        started = time.perf_counter()
        works = [torch.distributed.isend(vector, 1 - rank)] if both or rank == 0 else []
        works += [torch.distributed.irecv(other, 1 - rank)] if both or rank == 1 else []
        for work in works:
            assert work is not None
            work.wait()
        seconds.append(time.perf_counter() - started)
    torch.distributed.destroy_process_group()
    return seconds[1:]


def _work(results: Any, rank: int, plan: list[tuple[Callable[..., list[float]], Any, bool]], *args: int) -> None:
    torch.set_num_threads(1)
    for function, where, both in plan:
        results.put((rank, function(rank, where, *args, both)))


# What is measured: label, function, both ways, mutual TLS. A line is compared with the bare TCP before it.
EXCHANGES = (
    ("both ways, bare TCP", exchange_over_tcp, True, False),
    ("both ways, peers in clear", exchange_over_peers, True, False),
    ("both ways, bare grpc.aio", exchange_over_grpc, True, False),
    ("both ways, torch.distributed with gloo", exchange_over_gloo, True, False),
    ("both ways, bare TCP with TLS", exchange_over_tcp, True, True),
    ("both ways, peers with mutual TLS", exchange_over_peers, True, True),
    ("both ways, bare grpc.aio with mutual TLS", exchange_over_grpc, True, True),
    ("one way, bare TCP", exchange_over_tcp, False, False),
    ("one way, peers in clear", exchange_over_peers, False, False),
    ("one way, bare grpc.aio", exchange_over_grpc, False, False),
    ("one way, torch.distributed with gloo", exchange_over_gloo, False, False),
    ("one way, bare TCP with TLS", exchange_over_tcp, False, True),
    ("one way, peers with mutual TLS", exchange_over_peers, False, True),
    ("one way, bare grpc.aio with mutual TLS", exchange_over_grpc, False, True),
)


def bench_exchange(megabytes: int, repeats: int) -> None:
    """Print the medians, over the repetitions, of the slower end's time."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        init_ca(Path(folder) / "ca")
        for index in range(2):
            Authority(Path(folder) / "ca").issue_node(f"node-{index}", Path(folder) / f"node-{index}")
        plan = [(function, (folder if secure else "", [free_port(), free_port()]), both)
                for _, function, both, secure in EXCHANGES]
        ends = [context.Process(target=_work, args=(results, rank, plan, megabytes * 1_000_000, repeats))
                for rank in range(2)]
        for end in ends:
            end.start()
        bare, found = 0.0, {0: deque[list[float]](), 1: deque[list[float]]()}
        for label, function, _, _ in EXCHANGES:
            while not (found[0] and found[1]):
                rank, seconds = results.get(timeout=PATIENCE_S)
                found[rank].append(seconds)
            median = statistics.median(max(pair) for pair in zip(found[0].popleft(), found[1].popleft(), strict=True))
            bare = median if function is exchange_over_tcp else bare
            print(f"{megabytes} MB {label}: {median:.2f} s, {bare / median:.2f} of bare TCP", flush=True)
        for end in ends:
            end.join()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="a minute")
    length.add_argument("--full", action="store_true", help="as many steps as the promises name")
    parser.add_argument("--megabytes", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", choices=["virtual", "exchange"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    many, few = (100, 10) if options.full else (5, 1) if options.quick else (15, 2)
    runs = [(name, 64, many) for name in STRATEGIES] + [(name, 1024, many) for name in STRATEGIES]
    runs += [(name, 8192, few) for name in STRATEGIES[:1 if options.quick else None]]
    for name, count, rounds in runs if options.only != "exchange" else []:
        seconds = simulate(name, count, rounds)
        print(f"{name}, {count} virtual peers x {rounds} outer steps: {seconds:.1f} s, "
              f"{count * rounds / seconds:.0f} peers x steps per second", flush=True)
    if options.only != "virtual":
        bench_exchange(options.megabytes or (100 if options.quick else 400),
                       options.repeats or (1 if options.quick else 3))


if __name__ == "__main__":
    main()
