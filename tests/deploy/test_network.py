"""A server and clients in network namespaces of their own, joined by a bad network."""
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import Nursery
from machines import Machines
from safetensors.torch import load_file

import fedcore

EXPERIMENT = {"task": "digits", "strategy": "fedavg", "clients": {"count": 2}, "stop": {"rounds": 30},
              "train": {"lr": 0.1, "local_steps": 20}, "checkpoint": {"every_s": 1}}
BAD = ("delay", "40ms", "10ms", "loss", "2%")


def ip(*words: str, tool: str = "ip") -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, *words], capture_output=True, text=True, check=False)


class Network:
    """Two namespaces and the link between them."""

    def __init__(self, number: int):
        self.names = (f"fedcore-a{number}", f"fedcore-b{number}")
        self.devices = (f"fca{number}", f"fcb{number}")
        self.hosts = ("10.201.7.1", "10.201.7.2")

    def make(self) -> str:
        """Make everything; returns what went wrong."""
        for name in self.names:
            if (done := ip("netns", "add", name)).returncode:
                return done.stderr
        ends = ("type", "veth", "peer", "name", self.devices[1], "netns", self.names[1])
        if (done := ip("link", "add", self.devices[0], "netns", self.names[0], *ends)).returncode:
            return done.stderr
        for name, device, host in zip(self.names, self.devices, self.hosts, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
        return ""

    def spoil(self) -> str:
        """Add latency and loss both ways; returns what went wrong."""
        for name, device in zip(self.names, self.devices, strict=True):
            done = ip("netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "netem", *BAD)
            if done.returncode:
                return done.stderr
        return ""

    def set(self, state: str) -> None:
        """Cut the cable (`down`) or mend it (`up`)."""
        ip("-n", self.names[0], "link", "set", self.devices[0], state)

    def remove(self) -> None:
        for name in self.names:
            ip("netns", "del", name)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = Network(os.getpid() % 100_000)
    try:
        if problem := made.make():
            pytest.skip(f"network namespaces are not allowed here: {problem.strip()}")
        yield made
    finally:
        made.remove()


@pytest.fixture
def bad_network(network) -> Network:
    if problem := network.spoil():
        pytest.skip(f"this kernel cannot delay and lose packets (netem): {problem.strip()}")
    return network


@pytest.fixture
def sides(network, tmp_path) -> Iterator[tuple[Machines, Machines]]:
    """Where the server is, and where the clients are."""
    nurseries = [Nursery(["ip", "netns", "exec", name]) for name in network.names]
    made = []
    for nursery, name in zip(nurseries, ("server", "clients"), strict=True):
        folder = tmp_path / name
        folder.mkdir()
        made.append(Machines(nursery, folder))
        made[-1].write(EXPERIMENT)
        made[-1].address = f"{network.hosts[0]}:9400"
    yield made[0], made[1]
    for machines, nursery in zip(made, nurseries, strict=True):
        machines.close()
        nursery.close()


def finish(sides: tuple[Machines, Machines], network: Network, away_s: float, folder: Path) -> None:
    """Train over the network, which is cut in the middle, and compare with a run in which nothing happened."""
    there, here = sides
    server, clients = there.server("--insecure"), here.clients(2)
    there.wait_for(server, "% t")
    network.set("down")
    time.sleep(away_s)
    network.set("up")
    assert there.wait(server, 200) == 0, there.said(server)
    assert here.wait_all(clients) == [0, 0]
    expected = load_file(fedcore.simulate(EXPERIMENT, out=folder / "expected").folder / "model.safetensors")
    found = load_file(there.folder / "run" / "model.safetensors")
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
def test_a_cable_that_is_pulled_for_a_while_costs_time_and_nothing_else(sides, network, tmp_path):
    finish(sides, network, 3.0, tmp_path)


@pytest.mark.slow
def test_latency_and_loss_cost_time_and_nothing_else(bad_network, sides, tmp_path):
    finish(sides, bad_network, 1.0, tmp_path)
