"""Which link of the chain is broken: each is broken once, on loopback, and must be found."""
import socket
import ssl
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore import doctor
from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names
from fedcore.cli import app
from fedcore.deploy import Address
from fedcore.doctor import diagnose, judge_certificate, judge_clock, judge_version
from fedcore.tls import RevocationList, load_credentials, read_certificate
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.wire import PROTOCOL

CHAIN = ["tls folder", "name", "port", "tls", "certificate", "acceptance", "admission", "clock", "version"]


@contextmanager
def serving(credentials, **options):
    """Run a fedcore server on loopback; yields its address."""
    grid = GrpcGrid("127.0.0.1:0", credentials, run_config={"seed": 0}, **options)
    grid.start()
    try:
        yield Address.of("--server", grid.address)
    finally:
        grid.close()


@contextmanager
def listening(answer=lambda connection: None, context=None):
    """Listen with something that is no fedcore; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                    if context is not None:
                        connection = context.wrap_socket(connection, server_side=True)
                    with connection:
                        answer(connection)
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield Address("127.0.0.1", listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def broken(findings):
    """Return the first broken link, its text and its advice."""
    return next((found.link, found.text, found.advice) for found in findings if found.state == "broken")


@pytest.fixture
def server(pki):
    return load_credentials(pki / "server", "server")


def test_where_all_is_well_every_link_is_named_and_fine(pki, server):
    with serving(server) as address:
        findings = list(diagnose(address, pki / "alice"))
    assert [(found.link, found.state) for found in findings] == [(link, "ok") for link in CHAIN]


def test_in_clear_there_is_less_to_check(pki):
    with serving(None) as address:
        findings = list(diagnose(address, None))
    assert {found.state for found in findings} == {"ok"}
    assert [found.link for found in findings] == ["name", "port", "admission", "clock", "version"]


def test_a_folder_that_cannot_be_used_does_not_end_the_diagnosis(pki, server):
    (pki / "alice" / "node.key").chmod(0o644)
    with serving(server) as address:
        findings = list(diagnose(address, pki / "alice"))
    link, text, advice = broken(findings)
    assert link == "tls folder" and "0644" in text and "chmod 600" in advice
    assert [found.link for found in findings] == CHAIN[:5]


def test_a_name_without_address(pki):
    link, text, advice = broken(diagnose(Address("no-such-host.invalid", 9400), pki / "alice"))
    assert link == "name" and "no-such-host.invalid" in text and "/etc/hosts" in advice


def test_a_port_where_nobody_listens(pki):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    link, text, advice = broken(diagnose(Address("127.0.0.1", port), pki / "alice"))
    assert link == "port" and "refused" in text and "fedcore server" in advice


def test_a_server_in_clear_is_told_from_one_with_tls(pki, server):
    with serving(None) as address:
        link, text, advice = broken(diagnose(address, pki / "alice"))
    assert (link, text) == ("tls", "whoever listens there does not speak TLS") and "--insecure" in advice
    with serving(server) as address:
        link, _, advice = broken(diagnose(address, None))
    assert link == "service" and "--tls" in advice


def test_the_server_of_another_ca(pki):
    init_ca(pki / "other", "Hospitals South")
    Authority(pki / "other").issue_server(host_names(""), pki / "stranger")
    with serving(load_credentials(pki / "stranger", "server")) as address:
        link, text, advice = broken(diagnose(address, pki / "alice"))
    assert link == "certificate" and "'Hospitals South'" in text and "certs show" in advice


def test_a_node_that_stands_in_for_the_server(pki):
    with serving(load_credentials(pki / "bob", "node")) as address:
        link, text, _ = broken(diagnose(address, pki / "alice"))
    assert (link, text) == ("certificate", "whoever listens there is node bob, not a server")


def test_a_server_that_does_not_know_our_ca(pki, server):
    init_ca(pki / "other")
    changed = replace(server, ca=(pki / "other" / "ca.crt").read_bytes())
    with serving(changed) as address:
        link, text, advice = broken(diagnose(address, pki / "alice"))
    assert link == "acceptance" and "certificate" in text and "ca.crt" in advice


def test_a_node_that_was_revoked(pki, server):
    Authority(pki / "ca").revoke("alice", pki / "server")
    with serving(server, refuse=RevocationList(pki / "server").reason) as address:
        link, text, _ = broken(diagnose(address, pki / "alice"))
        assert link == "admission" and "certificate of node alice was revoked" in text
        assert {found.state for found in diagnose(address, pki / "bob")} == {"ok"}


def test_somebody_else_has_the_port(pki, monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)
    with listening(lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n")) as address:
        assert broken(diagnose(address, pki / "alice"))[0] == "tls"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server" / "server.crt", pki / "server" / "server.key")
    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), context) as address:
        link, text, _ = broken(diagnose(address, pki / "alice"))
    # Which of the two is noticed first depends on how fast the stranger hangs up after its answer.
    assert link == "acceptance" and text.startswith(("whoever listens there is no gRPC", "the server hangs up on us"))


def test_somebody_who_says_nothing_does_not_hold_the_doctor_up(pki, monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.3)
    silent = threading.Event()
    with listening(lambda connection: silent.wait(20)) as address:
        link, text, _ = broken(diagnose(address, pki / "alice"))
        silent.set()
    assert link == "tls" and "timed out" in text


# ---- judgements that need another time or another name -----------------------------------------------------------


@pytest.fixture
def presented(pki):
    return read_certificate((pki / "server" / "server.crt").read_bytes())


@pytest.fixture
def alice(pki):
    return load_credentials(pki / "alice", "node")


@pytest.mark.parametrize("host, state", [
    ("fl.example.org", "ok"), ("FL.example.org", "ok"), ("127.0.0.1", "ok"), ("[::1]", "ok"), ("[0:0::1]", "ok"),
    ("other.example.org", "broken"), ("10.0.0.5", "broken"), ("example.org", "broken"),
])
def test_the_name_that_is_dialled_must_be_in_the_certificate(presented, alice, host, state):
    found = judge_certificate(Address(host, 9400), presented, alice, datetime.now(UTC))
    assert found.state == state
    if state == "broken":
        assert "fl.example.org, localhost" in found.text and f"--names {host}" in found.advice


@pytest.mark.parametrize("days, state, words", [
    (0, "ok", "until"), (340, "warning", "expires in"), (366, "broken", "expired on"),
    (-1, "broken", "valid only from"),
])
def test_the_servers_certificate_has_its_time(presented, alice, days, state, words):
    found = judge_certificate(Address("localhost", 1), presented, alice, datetime.now(UTC) + timedelta(days=days))
    assert found.state == state and words in found.text


@pytest.mark.parametrize("ahead_s, state, words", [
    (0.2, "ok", "0.2 s ahead"), (-12.0, "ok", "12.0 s behind"), (400.0, "warning", "400 s ahead"),
])
def test_clocks_are_compared(ahead_s, state, words):
    found = judge_clock(ahead_s)
    assert found.state == state and words in found.text


@pytest.mark.parametrize("protocol, version, state", [
    (PROTOCOL, doctor.__version__, "ok"), (PROTOCOL, "99.0", "warning"), (PROTOCOL + 1, "99.0", "broken"),
    (None, "0.0.1", "broken"),
])
def test_versions_are_compared(protocol, version, state):
    assert judge_version(protocol, version).state == state


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


def test_the_command_prints_every_link_and_what_to_do(pki: Path, server):
    with serving(server) as address:
        fine = run("--server", address, "--tls", pki / "alice")
        (pki / "alice" / "node.crt").unlink()
        sick = run("--server", address, "--tls", pki / "alice")
    assert fine.exit_code == 0
    assert fine.stdout.count("ok      ") == len(CHAIN) and f"This node can reach {address}." in fine.stdout
    assert sick.exit_code == 1
    assert "BROKEN  tls folder" in sick.stdout and "fedcore certs node" in sick.stdout


@pytest.mark.parametrize("words", [
    ("--server", "no-port", "--insecure"), ("--server", "a:1"), ("--server", "a:1", "--tls", "x", "--insecure"), (),
])
def test_bad_input_is_status_2(words):
    assert run(*words).exit_code == 2
