"""TLS folders: what is accepted, and what is refused with which words."""
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization

from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names, new_key
from fedcore.errors import BadCertificate, BadTls
from fedcore.tls import RevocationList, expiry_warning, identity_of, load_credentials

NOW = datetime.now(UTC)


def test_good_folders_load_and_say_who_they_are(pki):
    server, alice = load_credentials(pki / "server", "server"), load_credentials(pki / "alice", "node")
    assert (server.role, server.name, alice.role, alice.name) == ("server", "server", "node", "alice")
    identity = identity_of(alice.cert)
    assert (identity.role, identity.name, identity.not_after) == ("node", "alice", alice.not_after)
    assert identity != identity_of(server.cert)


def test_credentials_do_not_print_their_key(pki):
    credentials = load_credentials(pki / "alice", "node")
    assert "PRIVATE" not in repr(credentials) and "alice" in repr(credentials)


@pytest.mark.parametrize("file", ["ca.crt", "node.crt", "node.key"])
def test_a_missing_file_is_named(pki, file):
    (pki / "alice" / file).unlink()
    with pytest.raises(BadTls, match=file):
        load_credentials(pki / "alice", "node")


@pytest.mark.parametrize("file", ["ca.crt", "node.crt", "node.key"])
def test_a_damaged_file_is_named(pki, file):
    (pki / "alice" / file).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    with pytest.raises(BadTls, match=f"{file} cannot be used: it is not a"):
        load_credentials(pki / "alice", "node")


def test_a_missing_folder_is_named(pki):
    with pytest.raises(BadTls, match="there is no such folder. Make it with `fedcore certs node`"):
        load_credentials(pki / "nobody", "node")


@pytest.mark.parametrize("folder, role", [("server", "server"), ("alice", "node")])
def test_a_folder_with_the_cas_key_is_refused(pki, folder, role):
    shutil.copy(pki / "ca" / "ca.key", pki / folder)
    with pytest.raises(BadTls, match="CA's key"):
        load_credentials(pki / folder, role)


def test_another_nodes_key_is_refused(pki):
    shutil.copy(pki / "bob" / "node.key", pki / "alice" / "node.key")
    with pytest.raises(BadTls, match="node.key cannot be used: it does not belong to node.crt"):
        load_credentials(pki / "alice", "node")


def test_an_encrypted_key_is_refused(pki):
    secret = new_key().private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                     serialization.BestAvailableEncryption(b"secret"))
    (pki / "alice" / "node.key").write_bytes(secret)
    with pytest.raises(BadTls, match="encrypted"):
        load_credentials(pki / "alice", "node")


def test_another_cas_certificate_is_refused(pki):
    init_ca(pki / "other", "fedcore CA")    # of the same name
    shutil.copy(pki / "other" / "ca.crt", pki / "alice" / "ca.crt")
    with pytest.raises(BadTls, match="not signed by the CA of ca.crt"):
        load_credentials(pki / "alice", "node")


def test_a_folder_of_the_other_role_is_refused(pki):
    with pytest.raises(BadTls, match="it is a node's folder, and has no server.crt"):
        load_credentials(pki / "alice", "server")


def test_a_nodes_certificate_under_the_servers_name_is_refused(pki):
    for end in ("crt", "key"):
        (pki / "alice" / f"node.{end}").rename(pki / "alice" / f"server.{end}")
    with pytest.raises(BadTls, match="certificate of a node, but a server's is needed"):
        load_credentials(pki / "alice", "server")


@pytest.mark.parametrize("mode, allowed", [(0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o660, False)])
def test_a_key_that_others_can_read_is_refused(pki, mode, allowed):
    (pki / "alice" / "node.key").chmod(mode)
    if allowed:
        load_credentials(pki / "alice", "node")
    else:
        with pytest.raises(BadTls, match=f"its mode is {mode:04o}.*chmod 600"):
            load_credentials(pki / "alice", "node")


def test_an_expired_certificate_is_refused_with_the_day(pki):
    with pytest.raises(BadTls, match=r"node.crt cannot be used: it expired on \d{4}-\d\d-\d\d"):
        load_credentials(pki / "alice", "node", NOW + timedelta(days=366))


def test_an_expired_ca_is_refused(pki):
    with pytest.raises(BadTls, match="ca.crt cannot be used: it expired"):
        load_credentials(pki / "alice", "node", NOW + timedelta(days=3651))


def test_a_clock_that_is_far_behind_is_named(pki):
    with pytest.raises(BadTls, match="Set this machine's clock"):
        load_credentials(pki / "alice", "node", NOW - timedelta(days=2))


def test_the_last_thirty_days_bring_a_warning(pki, caplog):
    end = load_credentials(pki / "alice", "node").not_after
    assert expiry_warning("node alice", end, end - timedelta(days=31)) is None
    assert not caplog.records
    load_credentials(pki / "alice", "node", end - timedelta(days=29))
    assert "node alice expires in 29 days" in caplog.text


def test_an_identity_needs_one_of_our_certificates(pki):
    for text in (b"", b"nonsense", (pki / "ca" / "ca.crt").read_bytes()):
        with pytest.raises(BadCertificate):
            identity_of(text)


# ---- revocation ---------------------------------------------------------------------------------------------------


def test_a_revocation_counts_at_once_and_for_that_node_only(pki):
    revoked = RevocationList(pki / "server")
    alice, bob = (identity_of((pki / name / "node.crt").read_bytes()) for name in ("alice", "bob"))
    assert revoked.reason(alice) is None
    Authority(pki / "ca").revoke("alice", pki / "server")
    assert "certificate of node alice was revoked" in revoked.reason(alice)
    assert revoked.reason(bob) is None


def test_a_new_servers_folder_knows_who_was_revoked_before(pki):
    authority = Authority(pki / "ca")
    authority.revoke("alice")
    authority.issue_server(host_names(""), pki / "second")
    alice = identity_of((pki / "alice" / "node.crt").read_bytes())
    assert RevocationList(pki / "server").reason(alice) is None
    assert RevocationList(pki / "second").reason(alice)


def test_a_list_that_is_damaged_or_gone_stays_in_force_as_it_was(pki, caplog):
    Authority(pki / "ca").revoke("alice", pki / "server")
    revoked = RevocationList(pki / "server")
    alice = identity_of((pki / "alice" / "node.crt").read_bytes())
    (pki / "server" / "revoked.txt").write_text("not a number\n")
    assert revoked.reason(alice) and "stays in force" in caplog.text
    (pki / "server" / "revoked.txt").unlink()
    assert revoked.reason(alice)


def test_a_damaged_list_at_the_start_is_an_error(pki):
    (pki / "server" / "revoked.txt").write_text("12ab  # fine\nzz\n")
    with pytest.raises(BadTls, match="line 2"):
        RevocationList(pki / "server")


def test_without_a_list_nobody_is_revoked(pki):
    assert RevocationList(pki / "alice").reason(identity_of((pki / "bob" / "node.crt").read_bytes())) is None
