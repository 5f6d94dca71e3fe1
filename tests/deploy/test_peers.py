"""`fedcore server` hosts peers, each a process: the bits of a simulation, and a peer that is killed and comes back."""

import pytest
import torch
from machines import Machines

from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names
from fedcore.runs import Run
from fedcore.simulations.run import simulate
from tests.fedcore.transport.test_peer_wire import free_ports

COUNT = 3


def experiment(**settings):
    return {"task": "digits", "strategy": {"name": "noloco", "inner_steps": 2}, "clients": {"count": COUNT},
            "train": {"lr": 0.1, "batch_size": 16}, "stop": {"rounds": 9}, "peers": {"segment": 4, "lost_after_s": 1.5},
            "seed": 5, **settings}


def certify(folder):
    """Issue certificates for the server and for every peer."""
    init_ca(folder / "ca")
    authority = Authority(folder / "ca")
    authority.issue_server(host_names("localhost,127.0.0.1"), folder / "server")
    for index in range(COUNT):
        authority.issue_node(f"site-{index}", folder / f"site-{index}")


def peers(machines: Machines, ports, *more):
    return [machines.client(index, *more, "--peer-listen", f"127.0.0.1:{port}") for index, port in enumerate(ports)]


@pytest.mark.slow
def test_three_peers_with_certificates_end_with_the_bits_of_a_simulation(machines, tmp_path):
    machines.write(experiment())
    certify(tmp_path)
    server = machines.server("--tls", "server")
    clients = [machines.client(index, "--tls", f"site-{index}", "--peer-listen", f"127.0.0.1:{port}")
               for index, port in enumerate(free_ports(COUNT))]
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0] * COUNT
    real, virtual = Run(tmp_path / "run"), simulate(tmp_path / "experiment.yaml", out=tmp_path / "virtual")
    assert all(torch.equal(values, virtual.model()[name]) for name, values in real.model().items())
    for name in ("final_accuracy", "versions", "rounds", "gradients", "exchanges", "client_updates"):
        assert real.summary[name] == virtual.summary[name], name
    assert real.summary["consensus_distance"] == pytest.approx(virtual.summary["consensus_distance"])
    assert [row["version"] for row in real.rows("evaluate")] == [0, 4, 8, 9]
    assert (tmp_path / "run" / "report.html").is_file()
