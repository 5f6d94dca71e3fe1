"""`fedcore server` hosts peers, each a process: the bits of a simulation, and a peer that is killed and comes back."""
import json
import signal
import time

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


def versions(tmp_path):
    """Return the versions that the server has published so far, and who took part in each."""
    file = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
    return [(row["version"], row["nodes"]) for row in rows if row["event"] == "update"]


def wait_until(machines, server, condition, timeout_s=60.0):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, machines.said(server)
        time.sleep(0.05)


@pytest.mark.slow
def test_three_peers_end_with_the_bits_of_a_simulation_though_the_server_was_killed(machines, tmp_path):
    machines.write(experiment(stop={"rounds": 50}, checkpoint={"every_s": 0}))
    certify(tmp_path)
    server = machines.server("--tls", "server")
    clients = [machines.client(index, "--tls", f"site-{index}", "--peer-listen", f"127.0.0.1:{port}")
               for index, port in enumerate(free_ports(COUNT))]
    wait_until(machines, server, lambda: len(versions(tmp_path)) >= 3)
    machines.send(server, signal.SIGKILL)
    machines.wait(server)
    assert versions(tmp_path)[-1][0] < 50
    server = machines.server("--tls", "server", "--resume", "run")
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0] * COUNT
    real, virtual = Run(tmp_path / "run"), simulate(tmp_path / "experiment.yaml", out=tmp_path / "virtual")
    assert all(torch.equal(values, virtual.model()[name]) for name, values in real.model().items())
    for name in ("final_accuracy", "versions", "rounds", "gradients", "exchanges", "client_updates"):
        assert real.summary[name] == virtual.summary[name], name
    assert real.summary["consensus_distance"] == pytest.approx(virtual.summary["consensus_distance"])
    assert [row["version"] for row in real.rows("evaluate")] == [0, *range(4, 50, 4), 50]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_peer_that_is_killed_is_left_out_and_comes_back_with_the_next_segment(machines, tmp_path):
    everybody = list(range(COUNT))
    machines.write(experiment(strategy={"name": "co2", "inner_steps": 5}, stop={"rounds": 100_000},
                              peers={"segment": 20, "lost_after_s": 1.0}, evaluate={"every": 20}))
    server, ports = machines.server(), free_ports(COUNT)
    clients = peers(machines, ports)
    wait_until(machines, server, lambda: len(versions(tmp_path)) >= 2)
    machines.send(clients[2], signal.SIGKILL)
    machines.wait(clients[2])
    wait_until(machines, server, lambda: versions(tmp_path)[-1][1] == [0, 1])
    clients[2] = machines.client(2, "--peer-listen", f"127.0.0.1:{ports[2]}")
    wait_until(machines, server, lambda: [nodes for _, nodes in versions(tmp_path)][-2:] == [everybody] * 2)
    # The server is stopped, too, and goes on where it was; so do the peers.
    machines.send(server, signal.SIGTERM)
    assert machines.wait(server) == 0, machines.said(server)
    before = versions(tmp_path)[-1][0]
    server = machines.server("--resume", "run", "--set", f"stop.rounds={before + 50}")
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0] * COUNT
    found, run = versions(tmp_path), Run(tmp_path / "run")
    assert found[0][1] == found[-1][1] == everybody and found[-1][0] == before + 50
    assert [version for version, _ in found] == sorted({version for version, _ in found})
    assert [row for row in run.rows("rejoined") if row["node"] == 2]
    last = run.rows("evaluate")[-1]
    assert last["accuracy"] > 0.85 and last["peer_loss_max"] < 1.0


@pytest.mark.slow
def test_peers_that_nobody_can_dial_go_on_though_the_server_that_relays_was_killed(machines, tmp_path):
    machines.write(experiment(stop={"rounds": 24}, checkpoint={"every_s": 0},
                              peers={"segment": 4, "lost_after_s": 1.0, "relay": True}))
    certify(tmp_path)
    server = machines.server("--tls", "server")
    clients = [machines.client(index, "--tls", f"site-{index}") for index in range(COUNT)]
    wait_until(machines, server, lambda: len(versions(tmp_path)) >= 3)
    machines.send(server, signal.SIGKILL)
    machines.wait(server)
    before = versions(tmp_path)[-1][0]
    server = machines.server("--tls", "server", "--resume", "run")
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0] * COUNT
    run = Run(tmp_path / "run")
    assert before < 24 and versions(tmp_path)[-1] == (24, list(range(COUNT)))
    assert run.summary["relayed_bytes"] > run.summary["peer_bytes"] > 0
