"""A server that introduces four peers to each other: five processes, mutual TLS, one command.

    python examples/peers_on_loopback/hosted.py [FOLDER]

Makes a certificate authority and a certificate for the server and for each peer; starts `fedcore server`, which never
sees more than the peers' mean, and `fedcore client` four times; then simulates the same file, and says whether the
models are the same.
"""
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fedcore
from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names
from fedcore.runs import Run

NAMES = ("amber", "birch", "cedar", "dune")
EXPERIMENT = Path(__file__).parent / "experiment.yaml"


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at present."""
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(holder.getsockname()[1]) for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def start(*words: object) -> subprocess.Popen[bytes]:
    """Start a command of fedcore's."""
    return subprocess.Popen([sys.executable, "-m", "fedcore", *map(str, words)])


def main(folder: Path) -> None:
    """Run server and peers, and the simulation beside them."""
    init_ca(folder / "ca")
    authority = Authority(folder / "ca")
    authority.issue_server(host_names("localhost,127.0.0.1"), folder / "tls" / "server")
    meeting_point, *ports = free_ports(1 + len(NAMES))
    started = [start("server", EXPERIMENT, "--listen", f"127.0.0.1:{meeting_point}", "--tls", folder / "tls" / "server",
                     "--out", folder / "hosted")]
    for rank, (name, port) in enumerate(zip(NAMES, ports, strict=True)):
        authority.issue_node(name, folder / "tls" / name)
        started.append(start(
            "client", EXPERIMENT, "--server", f"127.0.0.1:{meeting_point}", "--tls", folder / "tls" / name,
            "--state", folder / "state" / name, "--node-config", f"partition-id={rank}",
            "--peer-listen", f"127.0.0.1:{port}"))
    if any([process.wait() for process in started]):
        sys.exit("a process failed")
    hosted, simulated = Run(folder / "hosted"), fedcore.simulate(EXPERIMENT, out=folder / "simulated")
    same = all(torch.equal(hosted.model()[name], values) for name, values in simulated.model().items())
    print(f"hosted: accuracy {hosted.summary['final_accuracy']:.3f} of the mean of the peers' models")
    print(f"the mean of the hosted peers' models is {'the same' if same else 'another'} as in virtual time"
          f"{', bit for bit' if same else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="fedcore-hosted-")))
