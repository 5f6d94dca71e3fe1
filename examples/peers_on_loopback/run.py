"""Four real peers on this machine: four processes, mutual TLS, one command.

    python examples/peers_on_loopback/run.py [FOLDER]

Makes a certificate authority, a certificate for each peer and the roster that pins them; starts `fedcore peer` four
times; then simulates the same file, and says whether the models are the same.
"""
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import fedcore
from fedcore.authority import Authority, init_ca
from fedcore.tls import identity_of

NAMES = ("amber", "birch", "cedar", "dune")
EXPERIMENT = Path(__file__).parent / "experiment.yaml"


def free_port() -> int:
    """Return a port that nobody listens on at present."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


def make_roster(folder: Path) -> Path:
    """Issue certificates, and write who is reached where and by which certificate it is known."""
    init_ca(folder / "ca")
    authority = Authority(folder / "ca")
    rows = []
    for name in NAMES:
        authority.issue_node(name, folder / "tls" / name)
        fingerprint = identity_of((folder / "tls" / name / "node.crt").read_bytes()).fingerprint
        rows.append({"name": name, "address": f"127.0.0.1:{free_port()}", "fingerprint": fingerprint})
    path = folder / "roster.yaml"
    path.write_text(yaml.safe_dump({"run": "loopback", "peers": rows}, sort_keys=False), encoding="utf-8")
    return path


def main(folder: Path) -> None:
    """Run the peers, and the simulation beside them."""
    roster = make_roster(folder)
    started = [subprocess.Popen([
        sys.executable, "-m", "fedcore", "peer", str(EXPERIMENT), "--roster", str(roster), "--name", name,
        "--tls", str(folder / "tls" / name), "--out", str(folder / name),
    ]) for name in NAMES]
    if any([process.wait() for process in started]):
        sys.exit("a peer failed")
    real = [load_file(folder / name / "model.safetensors") for name in NAMES]
    run = fedcore.simulate(EXPERIMENT, out=folder / "simulated")
    mean = {name: sum(model[name].double() for model in real) / len(real) for name in real[0]}
    same = all(torch.equal(mean[name].float(), values) for name, values in run.model().items())
    print(f"virtual time: accuracy {run.summary['final_accuracy']:.3f} of the mean of the peers' models")
    print(f"the mean of the real peers' models is {'the same, bit for bit' if same else 'another'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="fedcore-peers-")))
