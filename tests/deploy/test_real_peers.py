"""`fedcore peer`, each a process: one is killed and comes back, and strangers get nowhere."""
import json
import signal
import time

import pytest
import torch
import yaml
from machines import Machines
from safetensors.torch import load_file

from fedcore.authority import Authority
from fedcore.simulations.run import simulate
from fedcore.tls import identity_of, load_credentials
from fedcore.transport.loop import submit
from fedcore.transport.peer_link import hello_of
from fedcore.transport.peer_messages import frame
from fedcore.transport.peer_roster import Roster
from fedcore.transport.wire import pack
from tests.fedcore.transport.kit import Pki
from tests.fedcore.transport.test_peer_wire import PATIENCE_S, call, envelope, free_ports

COUNT = 4


def experiment(rounds, count=COUNT, **settings):
    return {"task": {"name": "logistic", "dimension": 8, "examples": 200, "l2": 0.1}, "clients": {"count": count},
            "strategy": {"name": "noloco", "inner_steps": 20}, "train": {"lr": 0.05, "batch_size": 20},
            "stop": {"rounds": rounds}, "evaluate": {"where": "none"}, "seed": 3, "peers": {"lost_after_s": 1.5},
            **settings}


def write_roster(folder, pki, run="run", name="roster.yaml", ports=None, count=COUNT):
    ports = ports or free_ports(count)
    rows = [{"name": f"node-{index}", "address": f"127.0.0.1:{port}",
             "fingerprint": identity_of(pki.node(index).cert).fingerprint} for index, port in enumerate(ports)]
    (folder / name).write_text(yaml.safe_dump({"run": run, "peers": rows}))
    return ports


def start(machines: Machines, index, out, *more, roster="roster.yaml", tls=None):
    return machines.start("peer", "experiment.yaml", "--roster", roster, "--name", f"node-{index}", "--tls",
                          tls or f"pki/node-{index}", "--out", out, *more)


def model(folder):
    return torch.cat([values.reshape(-1) for values in load_file(folder / "model.safetensors").values()])


def rows(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for_step(folder, step):
    until = time.monotonic() + 60
    while not any(row["event"] == "step" and row["step"] >= step for row in rows(folder)):
        assert time.monotonic() < until, f"{folder} never came to step {step}"
        time.sleep(0.05)


@pytest.mark.slow
def test_others_finish_when_a_process_is_killed_and_it_rejoins_and_converges_with_them(machines, tmp_path):
    pki = Pki(tmp_path / "pki", nodes=COUNT)
    write_roster(tmp_path, pki)
    schedule = {"name": "cosine", "total_steps": 20 * 150}    # one that falls, or they would keep their distance
    machines.write(experiment(150, train={"lr": 0.05, "batch_size": 20, "schedule": schedule}))
    peers = [start(machines, index, f"run-{index}") for index in range(COUNT)]
    wait_for_step(tmp_path / "run-3", 5)
    machines.send(peers[3], signal.SIGKILL)
    machines.wait(peers[3])
    machines.wait_for(peers[0], "lost: peer node-3")
    again = start(machines, 3, "again-3", "--rejoin")
    assert machines.wait_all([*peers[:3], again]) == [0] * 4, machines.said(again)
    assert "rejoined: from node-" in machines.said(again)
    # Those who lived saw it go and come, at the same steps, and nobody stopped early.
    changes = [[(row["step"], row["members"]) for row in rows(tmp_path / f"run-{index}") if row["event"] == "members"]
               for index in range(3)]
    assert changes[0] == changes[1] == changes[2]
    assert [members for _, members in changes[0]] == [[0, 1, 2], [0, 1, 2, 3]]
    folders = [tmp_path / f"run-{index}" for index in range(3)] + [tmp_path / "again-3"]
    assert all(json.loads((folder / "summary.json").read_text())["steps"] == 150 for folder in folders)
    assert not (tmp_path / "run-3" / "summary.json").exists()
    models = torch.stack([model(folder) for folder in folders])
    assert (models - models.mean(0)).norm(dim=1).max() < 0.1 * models.mean(0).norm()


@pytest.mark.slow
def test_strangers_are_refused_and_named_and_nothing_that_they_sent_is_used(machines, tmp_path):
    pki = Pki(tmp_path / "pki", nodes=3)
    ports = write_roster(tmp_path, pki, count=2)
    write_roster(tmp_path, pki, run="another", name="another.yaml", ports=ports, count=2)
    machines.write(experiment(10, 2))
    victim = start(machines, 0, "run-0")
    # Another run, as a whole process that says so when it is turned away.
    stranger = start(machines, 1, "stranger", roster="another.yaml")
    machines.wait_for(victim, "you belong to the run 'another'")
    machines.wait_for(stranger, "Peer node-0 refuses this peer")
    machines.send(stranger, signal.SIGKILL)
    machines.wait(stranger)
    # A certificate of the right name and authority that is not the pinned one; then another peer's.
    Authority(tmp_path / "pki" / "ca").issue_node("node-1", tmp_path / "renewed", renew=True)
    write_roster(tmp_path, pki, name="roster.yaml", ports=ports, count=2)
    stranger = start(machines, 1, "stranger-2", tls="renewed")
    machines.wait_for(victim, "is not the one that the roster pins for node-1")
    machines.send(stranger, signal.SIGKILL)
    machines.wait(stranger)
    # The right peer's own certificate, and a stream that is not what it says, or no message of ours at all.
    roster, own = Roster.of(tmp_path / "roster.yaml"), load_credentials(tmp_path / "pki" / "node-1", "node")
    hello = pack(hello_of("run", 1, "node-1"))
    poison = {"run": "run", "data": {"slow": torch.full((8,), 1e6)}}

    async def speak():
        return [await call(roster, own, hello, message) for message in (
            b"garbage", pack({"n": 0, "inline": True}, frame(envelope(**poison)))[:-8],
            pack({"n": 0, "inline": True}, frame(envelope(**poison, source=0))))]

    for answers in submit(speak()).result(PATIENCE_S):
        assert answers[0]["kind"] == "welcome" and isinstance(answers[1], Exception)
    incidents = [row for row in rows(tmp_path / "run-0") if row["event"] == "incident"]
    assert [row["who"] for row in incidents[-3:]] == ["node-1"] * 3
    partner = start(machines, 1, "run-1")
    assert machines.wait_all([victim, partner]) == [0, 0], machines.said(victim)
    virtual = simulate(tmp_path / "experiment.yaml", out=tmp_path / "virtual").model()
    mean = torch.cat([values.reshape(-1) for values in virtual.values()])
    assert torch.equal((model(tmp_path / "run-0").double() + model(tmp_path / "run-1").double()).div(2).float(), mean)


