"""How fast the gRPC link is, beside a bare grpc.aio stream of the same chunks and the same TLS, and what it costs.

    python benchmarks/bench_link.py [--quick] [--only latency,throughput,stock,memory,idle] [--json FILE]

Server and clients are two processes on loopback; what each figure means is in docs/benchmarks.md.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent)]

from linkbench import stock  # noqa: E402
from linkbench.measure import MEGABYTE, Figures, clients, idle, memory, round_trips, throughput  # noqa: E402

from fedcore.authority import Authority, init_ca  # noqa: E402
from fedcore.certs import host_names  # noqa: E402
from fedcore.tls import Credentials, load_credentials  # noqa: E402
from fedcore.transport.grid import GrpcGrid  # noqa: E402

PARTS = ("latency", "throughput", "stock", "memory", "idle")
MANY = 8
# (MB of the model, clients, repetitions)
FULL = ((100, 1, 9), (100, MANY, 7), (400, 1, 7), (1000, 1, 7))
QUICK = ((100, 1, 5), (100, MANY, 2), (400, 1, 3))
STRATEGIES: tuple[Any, ...] = ("fedasync", {"name": "fedbuff", "buffer_size": 4}, "fedcompass",
                               {"name": "fedavg", "fraction_evaluate": 0.0})


def say(text: str) -> None:
    """Report progress, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


@contextmanager
def certificates() -> Iterator[Path]:
    """Have a server's and nodes' TLS folders for a while."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init_ca(folder / "ca")
        authority = Authority(folder / "ca")
        authority.issue_server(host_names("localhost,127.0.0.1"), folder / "server")
        for index in range(MANY):
            authority.issue_node(f"node-{index}", folder / f"node-{index}")
        yield folder


def link(secure: Path | None, plan: tuple[tuple[int, int, int], ...], trips: int, parts: set[str]) -> Figures:
    """Measure round trips and throughput."""
    credentials: Credentials | None = None if secure is None else load_credentials(secure / "server", "server")
    found: Figures = {"throughput": []}
    for count in sorted({count for _, count, _ in plan}):
        grid = GrpcGrid(credentials=credentials)
        with clients(grid, count, secure):
            if count == 1 and "latency" in parts:
                found["latency"] = round_trips(grid, trips)
            for megabytes, wanted, repetitions in plan:
                if wanted == count and "throughput" in parts:
                    say(f"{megabytes} MB, {count} clients, {'clear' if secure is None else 'mutual TLS'}")
                    found["throughput"] += throughput(grid, megabytes * MEGABYTE, grid.get_node_ids(), repetitions,
                                                      credentials)
    return found


def in_own_process(function: str, **arguments: Any) -> Figures:
    """Measure something in a process that has done nothing else."""
    command = [sys.executable, __file__, "--child", json.dumps({"function": function, **arguments})]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def report(found: Figures) -> None:
    """Print the tables."""
    for kind, figures in found["link"].items():
        if "latency" in figures:
            print(f"round trip of a task that does nothing, {kind}: p50 {figures['latency']['p50_ms']:.2f} ms, "
                  f"p99 {figures['latency']['p99_ms']:.2f} ms")
        for row in figures["throughput"]:
            print(f"{row['MB']:5} MB, {row['clients']} clients, {row['direction']:4}, {kind}: {row['ours']:6.0f} MB/s, "
                  f"bare grpc.aio {row['raw']:6.0f} MB/s, share {row['share']:.2f}")
    for row in found["stock"]:
        print(f"Flower's own SuperLink and SuperNode, clear: round trip p50 {row['p50_ms']:.0f} ms, p99 "
              f"{row['p99_ms']:.0f} ms; {row['MB']} MB down {row['down']:.0f} MB/s, up {row['up']:.0f} MB/s")
    for row in found["memory"]:
        print(f"server's peak memory, {row['strategy']}, {row['clients']} clients: {row['models']:.1f} models, "
              f"allowed {row['allowed']} ({row['max_uploads']} uploads admitted, {row['buffered']} updates held back)")
    for row in found["idle"]:
        print(f"{row['clients']} idle clients: {row['MiB']:.0f} MiB, {row['cpu_percent']:.1f} % of a CPU")


def main() -> None:
    """Measure everything, or what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no 1 GB model, fewer idle clients")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--json", type=Path, help="write the figures to a file, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        arguments = json.loads(options.child)
        print(json.dumps({"memory": memory, "idle": idle}[arguments.pop("function")](**arguments)))
        return
    parts = set(options.only.split(","))
    found: Figures = {"link": {}, "stock": [], "memory": [], "idle": []}
    plan, trips = (QUICK, 500) if options.quick else (FULL, 3000)
    if parts & {"latency", "throughput"}:
        with certificates() as folder:
            for kind, secure in (("clear", None), ("mutual TLS", folder)):
                found["link"][kind] = link(secure, plan, trips, parts)
    if "stock" in parts:
        say("Flower's own SuperLink and SuperNode")
        found["stock"].append(stock.measure(5, 100, 1) if options.quick else stock.measure(21, 100, 3))
    if "memory" in parts:
        for strategy, count in product(STRATEGIES, (4,) if options.quick else (4, 16)):
            say(f"memory of the server with {strategy} and {count} clients")
            found["memory"].append(in_own_process("memory", strategy=strategy, num_clients=count,
                                                  num_bytes=100 * MEGABYTE, updates=40, max_uploads=4))
    if "idle" in parts:
        say("idle clients")
        found["idle"].append(in_own_process("idle", num_clients=200 if options.quick else 1000,
                                            seconds=10.0 if options.quick else 30.0))
    report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
