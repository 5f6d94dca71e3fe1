"""A federation on separate machines, from the command line: what works, what is refused, what survives."""
import contextlib
import json
import signal
import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from safetensors.torch import load_file

import fedcore
from fedcore.authority import Authority, init_ca

EXPERIMENT = {"task": "digits", "strategy": "fedavg", "clients": {"count": 2}, "stop": {"rounds": 5},
              "train": {"lr": 0.1, "local_steps": 5}, "checkpoint": {"every_s": 0.1}}
ECONTROL = {"name": "econtrol", "compressor": {"name": "top_k", "fraction": 0.1},
            "downlink": {"name": "top_k", "fraction": 0.2}}
# Slow enough that a signal comes in the middle.
LONG = {**EXPERIMENT, "stop": {"rounds": 100_000}}


def same_model(first, second):
    left, right = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.fixture
def tls(machines):
    """Certificates for a server and two nodes, made with the commands."""
    assert machines.run("certs", "init", "--ca", "ca")[0] == 0
    assert machines.run("certs", "server", "--ca", "ca", "--out", "tls/server")[0] == 0
    for index in range(2):
        name = f"site-{index}"
        assert machines.run("certs", "node", "--name", name, "--ca", "ca", "--out", f"tls/{name}")[0] == 0
    return machines.folder / "tls"


# ---- what works ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", ECONTROL], ids=["fedavg", "econtrol"])
def test_the_model_has_the_bits_of_the_simulation_over_mutual_tls(machines, tls, tmp_path, strategy):
    machines.write({**EXPERIMENT, "strategy": strategy})
    server = machines.server("--tls", tls / "server")
    clients = [machines.client(index, "--tls", tls / f"site-{index}") for index in range(2)]
    assert machines.wait(server) == 0 and machines.wait_all(clients) == [0, 0]
    simulated = fedcore.simulate({**EXPERIMENT, "strategy": strategy}, out=tmp_path / "simulated")
    assert same_model(tmp_path / "run", simulated.folder)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("bytes_up", "client_updates", "client_steps", "versions", "final_accuracy"):
        assert found[name] == simulated.summary[name], name
    assert found["engine"] == "grpc" and "Ended: the run is over" in machines.said(clients[0])
    names = [client["name"] for client in json.loads((tmp_path / "run" / "clients.json").read_text())]
    assert names == ["site-0", "site-1"] and (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_data_stay_where_they_are(machines, tmp_path):
    """The server has no data at all; each client reads a file of its own."""
    header = ("longitude,latitude,housing_median_age,total_rooms,total_bedrooms,population,households,median_income,"
              "median_house_value,ocean_proximity")
    for index in range(2):
        rows = [f"-122.{row},37.{row},{row % 50},{row * 9},{row},{row * 3},{row},{1 + row % 7},{100000 + row},INLAND"
                for row in range(10 + index, 80)]
        (tmp_path / f"records-{index}.csv").write_text("\n".join([header, *rows]) + "\n")
    machines.write({**EXPERIMENT, "task": "housing", "evaluate": {"where": "clients"}})
    server = machines.server()
    clients = [machines.client(index, "--node-config", f"site=records-{index}.csv") for index in range(2)]
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final_loss"] > 0


@pytest.mark.slow
def test_status_shows_who_is_there_and_what_each_does(machines):
    machines.write({**LONG, "train": {"local_steps": 200}})
    server, _ = machines.server(), machines.clients(2)
    machines.wait_for(server, "2 of 2 are here")
    status, said = machines.run("status", "--server", machines.address, "--insecure")
    assert status == 0 and "site-0" in said and "site-1" in said and "up for" in said
    status, said = machines.run("status", "--server", machines.address, "--insecure", "--json")
    assert [node["partition"] for node in json.loads(said)["nodes"]] == [0, 1]


# ---- what survives ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_status_0_and_resume_goes_on_to_the_same_bits(machines, tmp_path):
    settings = {**EXPERIMENT, "stop": {"rounds": 400}, "train": {"lr": 0.1, "local_steps": 10}}
    machines.write(settings)
    server, clients = machines.server(), machines.clients(2)
    machines.wait_for(server, "% t")    # it trains
    machines.send(server, signal.SIGTERM)
    assert machines.wait(server) == 0 and "fedcore server --resume run" in machines.said(server)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stop_reason"] == "interrupted" and 0 < summary["versions"] < 400
    again = machines.server("--resume", "run")
    assert machines.wait(again) == 0 and machines.wait_all(clients) == [0, 0]
    assert same_model(tmp_path / "run", fedcore.simulate(settings, out=tmp_path / "simulated").folder)


@pytest.mark.slow
def test_a_client_ends_after_its_task_when_asked_and_may_come_back(machines):
    machines.write({**EXPERIMENT, "stop": {"rounds": 400}, "train": {"lr": 0.1, "local_steps": 10}})
    server, clients = machines.server(), machines.clients(2)
    machines.wait_for(clients[0], "train: ")
    machines.send(clients[0], signal.SIGTERM)
    assert machines.wait(clients[0]) == 0 and "Ending after the present task" in machines.said(clients[0])
    back = machines.client(0)
    assert machines.wait(server) == 0 and machines.wait_all([clients[1], back]) == [0, 0]


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_short_falls_back_to_the_one_before(machines, tmp_path):
    machines.write(LONG)
    server, _ = machines.server(), machines.clients(2)
    checkpoints = tmp_path / "run" / "checkpoints"
    machines.wait_for(server, "% t")
    while len(list(checkpoints.glob("*.safetensors"))) < 2:
        pass
    machines.send(server, signal.SIGKILL)
    machines.wait(server)
    newest = max(checkpoints.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    again = machines.server("--resume", "run", "--set", "stop.rounds=1")
    assert machines.wait(again) == 0 and "Using the checkpoint before it" in machines.said(again)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (("server", "experiment.yaml"), "Give --tls DIR"),
    (("server", "experiment.yaml", "--listen", "0.0.0.0:9400", "--insecure"), "give --insecure twice"),
    (("server", "experiment.yaml", "--listen", "nowhere", "--insecure"), "--listen='nowhere', but it must be"),
    (("server", "experiment.yaml", "--tls", "tls", "--insecure"), "exclude each other"),
    (("server", "experiment.yaml", "--tls", "absent"), "absent"),
    (("server", "absent.yaml", "--insecure"), "absent.yaml"),
    (("server", "--resume", "absent", "--insecure"), "absent is not a run folder"),
    (("server",), "name an experiment file"),
    (("client", "experiment.yaml", "--server", "127.0.0.1:1"), "Give --tls DIR"),
    (("client", "experiment.yaml", "--server", "127.0.0.1:1", "--insecure"), "Give --name"),
    (("client", "experiment.yaml", "--server", "127.0.0.1:1", "--insecure", "--name", "A B"), "1 to 63"),
    (("client", "experiment.yaml", "--server", "127.0.0.1:1", "--insecure", "--name", "a", "--node-config", "x"),
     "--node-config='x', but it must be of the form key=value"),
    (("status", "--server", "127.0.0.1:1", "--insecure"), "127.0.0.1:1 does not answer"),
])
def test_a_mistake_gets_a_message_and_no_traceback(machines, words, said):
    machines.write(EXPERIMENT)
    status, text = machines.run(*words)
    assert status in (1, 2) and said in text and "Traceback" not in text, text


def test_a_port_in_use_is_said_and_nothing_is_left_behind(machines, tmp_path):
    machines.write(EXPERIMENT)
    with socket.socket() as other:
        other.bind(("127.0.0.1", machines.port))
        other.listen()
        status, said = machines.run("server", "experiment.yaml", "--out", "run", "--listen", machines.address,
                                    "--insecure")
    assert status == 2 and "the port is in use" in said and not (tmp_path / "run").exists()


def test_a_run_is_continued_on_the_engine_that_it_began_on(machines, tmp_path):
    machines.write(EXPERIMENT)
    assert machines.run("simulate", "experiment.yaml", "--out", "run")[0] == 0
    status, said = machines.run("server", "--resume", "run", "--listen", machines.address, "--insecure")
    assert status == 2 and "was written by fedcore simulate" in said


@pytest.mark.slow
def test_strangers_are_turned_away_with_a_reason_on_both_sides(machines, tls):
    machines.write(LONG)
    server = machines.server("--tls", tls / "server")
    machines.wait_for(server, "listening")
    for command in (("certs", "init", "--ca", "other"),
                    ("certs", "node", "--name", "site-9", "--ca", "other", "--out", "tls/site-9")):
        assert machines.run(*command)[0] == 0
    stranger = machines.client(0, "--tls", tls / "site-9")
    machines.wait_for(stranger, "Not connected")
    machines.run("certs", "node", "--name", "site-8", "--ca", "ca", "--out", "tls/site-8")
    assert machines.run("certs", "revoke", "site-8", "--ca", "ca", "--tls", "tls/server")[0] == 0
    revoked = machines.client(0, "--tls", tls / "site-8")
    assert machines.wait(revoked) == 1 and "revoked" in machines.said(revoked)
    machines.wait_for(server, "site-8")
    plain = machines.client(0)
    machines.wait_for(plain, "Not connected")
    assert machines.nursery.ended(server) is None


@pytest.mark.slow
def test_revocation_cuts_a_living_connection(machines, tls):
    machines.write(LONG)
    server = machines.server("--tls", tls / "server")
    clients = [machines.client(index, "--tls", tls / f"site-{index}") for index in range(2)]
    machines.wait_for(server, "% t")
    assert machines.run("certs", "revoke", "site-1", "--ca", "ca", "--tls", "tls/server")[0] == 0
    assert machines.wait(clients[1], 30) == 1 and "revoked" in machines.said(clients[1])
    assert machines.nursery.ended(server) is None


def shake_hands(port, tls, node):
    """Come with a node's certificate, whatever it is worth, and leave once the server has judged it."""
    context = ssl.create_default_context(cafile=tls / "server" / "ca.crt")
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(tls / node / "node.crt", tls / node / "node.key")
    while True:
        with contextlib.suppress(ConnectionRefusedError):    # a moment after it said where, the server listens there
            raw = socket.create_connection(("127.0.0.1", port))
            break
    with raw, pytest.raises(OSError):
        connection = context.wrap_socket(raw)
        while connection.recv(1000):
            pass
        raise ConnectionResetError


def issue_until(end, ca, name, out, monkeypatch):
    """Issue a node's certificate that ends at a moment that no option could choose."""
    authority = Authority(ca)
    with monkeypatch.context() as patch:
        patch.setattr("fedcore.authority.now_utc", lambda: end - timedelta(days=1))
        authority.issue_node(name, out, days=1)


@pytest.mark.slow
def test_a_handshake_that_fails_is_explained_by_the_server_and_by_the_client(machines, tls, tmp_path, monkeypatch):
    issue_until(datetime.now(UTC) - timedelta(days=1), tmp_path / "ca", "old", tls / "old", monkeypatch)
    init_ca(tmp_path / "other")
    Authority(tmp_path / "other").issue_node("stranger", tls / "stranger")
    machines.write(LONG)
    server = machines.fresh("server", "experiment.yaml", "--out", "run", "--listen", machines.address, "--tls",
                            tls / "server")
    machines.wait_for(server, "the run begins when")
    shake_hands(machines.port, tls, "old")
    machines.wait_for(server, "127.0.0.1: its certificate has expired: give it a new one")
    shake_hands(machines.port, tls, "stranger")
    machines.wait_for(server, "127.0.0.1: its certificate was not issued by this federation's CA")
    with socket.create_connection(("127.0.0.1", machines.port)) as garbage:
        garbage.sendall(bytes(range(256)))
        machines.wait_for(server, "127.0.0.1: it does not speak TLS")
    plain = machines.client(0)
    machines.wait_for(server, "which needs --tls here, or no client at all (for the 2th time)")
    machines.wait_for(plain, "it wants TLS")
    foreign = machines.client(1, "--tls", tls / "stranger")
    machines.wait_for(foreign, "the server's certificate was not issued by the CA whose ca.crt is in --tls")
    machines.wait_for(server, "it may not accept this server's certificate")
    machines.send(server, signal.SIGTERM)
    assert machines.wait(server) in (0, 130)
    said = machines.said(server)
    assert "handshaker.cc" not in said and "ssl_transport" not in said, "gRPC's own lines are not for the terminal"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reasons = [row["reason"] for row in rows if row["event"] == "incident" and row["node"] == "127.0.0.1"]
    assert any("expired" in reason for reason in reasons) and any("--insecure" in reason for reason in reasons)


@pytest.mark.slow
def test_a_connection_ends_when_its_certificate_does(machines, tls, tmp_path, monkeypatch):
    machines.write(LONG)
    server = machines.server("--tls", tls / "server")
    lasting = machines.client(0, "--tls", tls / "site-0")
    issue_until(datetime.now(UTC) + timedelta(seconds=8), tmp_path / "ca", "brief", tls / "brief", monkeypatch)
    brief = machines.client(1, "--tls", tls / "brief")
    machines.wait_for(server, "2 of 2 are here")
    assert machines.wait(brief, 30) == 1 and "the certificate of node brief expired on" in machines.said(brief)
    machines.wait_for(server, "brief: its certificate is not accepted any more: the certificate of node brief expired")
    assert machines.nursery.ended(server) is None and machines.nursery.ended(lasting) is None
