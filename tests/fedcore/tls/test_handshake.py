"""Who gets through a real TLS handshake, and who does not."""
import asyncio
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from fedcore import authority as authority_module
from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names, now_utc
from fedcore.tls import Credentials, channel_credentials, identity_of, load_credentials, node_host, server_options

METHOD = "/fedcore.test/Who"


class WhoIsThere(grpc.GenericRpcHandler):
    """Answers every call with the name in the caller's certificate."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            (pem,) = context.auth_context()["x509_pem_cert"]
            return str(identity_of(pem)).encode()

        return grpc.unary_unary_rpc_method_handler(answer)


def call(
    listen: grpc.ServerCredentials, dial: grpc.ChannelCredentials | None, dialled_as: str | None = None,
) -> str | None:
    """Return what a server answered to a client over loopback, None when no connection came about."""
    async def both() -> str | None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((WhoIsThere(),))
        address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', listen)}"
        await server.start()
        options = [("grpc.ssl_target_name_override", dialled_as)] if dialled_as else []
        channel = grpc.aio.insecure_channel(address) if dial is None else \
            grpc.aio.secure_channel(address, dial, options)
        async with channel:
            try:
                return (await channel.unary_unary(METHOD)(b"", timeout=20)).decode()
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE, error
                return None
            finally:
                await server.stop(None)

    return asyncio.run(both())


@pytest.fixture
def server(pki) -> Credentials:
    return load_credentials(pki / "server", "server")


@pytest.fixture
def alice(pki) -> Credentials:
    return load_credentials(pki / "alice", "node")


@pytest.fixture
def strangers(tmp_path) -> Path:
    """Make the server and a node of another federation, whose CA has the same name."""
    init_ca(tmp_path / "strangers" / "ca")
    authority = Authority(tmp_path / "strangers" / "ca")
    authority.issue_server(host_names("fl.example.org"), tmp_path / "strangers" / "server")
    authority.issue_node("alice", tmp_path / "strangers" / "alice")
    return tmp_path / "strangers"


def test_a_node_gets_in_and_the_server_knows_which(server, alice):
    assert call(server_options(server), channel_credentials(alice)) == "node alice"


def test_the_server_answers_to_its_host_name_and_no_other(server, alice):
    assert call(server_options(server), channel_credentials(alice), "fl.example.org") == "node alice"
    assert call(server_options(server), channel_credentials(alice), "server.fedcore") == "node alice"
    assert call(server_options(server), channel_credentials(alice), "other.example.org") is None


@pytest.mark.parametrize("name", ["localhost", "server", "mallory"])
def test_a_nodes_certificate_cannot_act_as_the_server(pki, alice, name):
    Authority(pki / "ca").issue_node(name, pki / "named")
    listening = server_options(load_credentials(pki / "named", "node"))
    for dialled_as in ("localhost", "127.0.0.1", "fl.example.org", "server.fedcore"):
        assert call(listening, channel_credentials(alice), dialled_as) is None


def test_a_node_can_be_reached_by_peers_under_its_own_name_only(pki, alice):
    bob = load_credentials(pki / "bob", "node")
    assert call(server_options(bob), channel_credentials(alice), node_host("bob")) == "node alice"
    assert call(server_options(bob), channel_credentials(alice), node_host("carol")) is None


def test_a_node_of_another_ca_is_refused(server, strangers):
    assert call(server_options(server), channel_credentials(load_credentials(strangers / "alice", "node"))) is None


def test_a_server_of_another_ca_is_refused(alice, strangers):
    listening = server_options(load_credentials(strangers / "server", "server"))
    assert call(listening, channel_credentials(alice)) is None


def test_a_client_without_certificate_is_refused(server, alice):
    assert call(server_options(server), grpc.ssl_channel_credentials(alice.ca)) is None


def test_a_client_in_plain_text_is_refused(server):
    assert call(server_options(server), None) is None


def test_expired_certificates_are_refused_at_either_end(tmp_path, monkeypatch):
    before = now_utc() - timedelta(days=100)
    monkeypatch.setattr(authority_module, "now_utc", lambda: before)
    init_ca(tmp_path / "ca")
    authority = Authority(tmp_path / "ca")
    folders = {}
    for days in (99, 200):
        authority.issue_server(host_names(""), tmp_path / f"server-{days}", days=days)
        authority.issue_node(f"node-{days}", tmp_path / f"node-{days}", days)
        folders[days] = (load_credentials(tmp_path / f"server-{days}", "server", before),
                         load_credentials(tmp_path / f"node-{days}", "node", before))
    (old_server, old_node), (server, node) = folders[99], folders[200]
    assert call(server_options(server), channel_credentials(node)) == "node node-200"
    assert call(server_options(server), channel_credentials(old_node)) is None
    assert call(server_options(old_server), channel_credentials(node)) is None
