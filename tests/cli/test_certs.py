"""`fedcore certs` as a user types it."""
import re

import pytest

from fedcore.tls import load_credentials


@pytest.fixture
def authority(fedcore):
    assert fedcore("certs", "init", "--ca", "ca").exit_code == 0
    return fedcore


def test_a_federation_is_set_up_with_the_commands_of_the_help(authority, tmp_path):
    fedcore = authority
    for words in (
        ("server", "--ca", "ca", "--names", "fl.example.org,10.0.0.5", "--out", "server-tls"),
        ("request", "--name", "site-3", "--out", "tls"),
        ("node", "tls/site-3.csr", "--ca", "ca", "--out", "sent"),
        ("node", "--name", "site-4", "--ca", "ca", "--out", "site-4"),
    ):
        result = fedcore("certs", *words)
        assert result.exit_code == 0, result.output
    for path in (tmp_path / "sent").iterdir():
        path.rename(tmp_path / "tls" / path.name)
    assert load_credentials(tmp_path / "server-tls", "server").name == "server"
    assert load_credentials(tmp_path / "tls", "node").name == "site-3"
    assert load_credentials(tmp_path / "site-4", "node").name == "site-4"


def test_node_and_authority_see_the_same_key(authority):
    texts = [authority("certs", "request", "--name", "site-3", "--out", "tls").stdout,
             authority("certs", "show", "tls/site-3.csr").stdout,
             authority("certs", "node", "tls/site-3.csr", "--ca", "ca", "--out", "sent").stdout]
    keys = {re.search(r"^key +([0-9a-f]{64})$", text, re.MULTILINE)[1] for text in texts}
    assert len(keys) == 1


def test_show_says_who_until_when_and_which_modes(authority):
    authority("certs", "server", "--ca", "ca", "--names", "fl.example.org", "--out", "tls")
    result = authority("certs", "show", "tls")
    assert result.exit_code == 0
    for words in ("server server", "fl.example.org, localhost, server.fedcore", "issued by", "days)", "fingerprint",
                  "server.key  mode 0600", "revoked.txt  0 revoked"):
        assert words in result.stdout, words


def test_show_names_what_is_wrong_and_fails(authority, tmp_path):
    authority("certs", "node", "--name", "site-1", "--ca", "ca", "--out", "tls", "--days", "10")
    (tmp_path / "tls" / "node.key").chmod(0o644)
    authority("certs", "init", "--ca", "other")
    (tmp_path / "tls" / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    result = authority("certs", "show", "tls")
    assert result.exit_code == 1
    assert re.search("node.crt expires in (9|10) days", result.stdout)
    for words in ("node.crt was not signed by the CA", "its mode is 0644", "chmod 600"):
        assert words in result.stdout, words


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_show_of_something_else_is_bad_input(authority, tmp_path, content):
    if content is not None:
        (tmp_path / "absent.crt").write_text(content)
    result = authority("certs", "show", "absent.crt")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: absent.crt ")


def test_revoke_tells_the_server_and_says_what_it_did(authority, tmp_path):
    authority("certs", "server", "--ca", "ca", "--out", "server-tls")
    authority("certs", "node", "--name", "site-1", "--ca", "ca", "--out", "site-1")
    without = authority("certs", "revoke", "site-1", "--ca", "ca")
    assert without.exit_code == 0 and "revoked: node site-1" in without.stdout
    assert "until then the server does not know" in without.stdout
    again = authority("certs", "revoke", "site-1", "--ca", "ca", "--tls", "server-tls")
    assert "site-1 was revoked before." in again.stdout and "is up to date" in again.stdout
    assert "# node site-1" in (tmp_path / "server-tls" / "revoked.txt").read_text()


@pytest.mark.parametrize("words, status, said", [
    (("node", "--ca", "ca", "--out", "x"), 2, "give the node's request, or --name"),
    (("node", "absent.csr", "--ca", "ca", "--out", "x"), 2, "absent.csr cannot be used"),
    (("node", "--name", "Site 3", "--ca", "ca", "--out", "x"), 2, "must be 1 to 63 of a-z, 0-9 and -"),
    (("node", "--name", "a", "--ca", "absent", "--out", "x"), 2, "it is not a CA's folder"),
    (("server", "--ca", "ca", "--names", "http://a", "--out", "x"), 2, "without https:// and without a port"),
    (("revoke", "nobody", "--ca", "ca"), 2, "It has issued to: nobody yet."),
    (("revoke", "nobody", "--ca", "ca", "--serial", "xyz"), 2, "a number in hex"),
    (("init", "--ca", "ca"), 2, "never overwritten"),
])
def test_mistakes_are_answered_with_advice(authority, words, status, said):
    result = authority("certs", *words)
    assert result.exit_code == status
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", ["init", "server", "request", "node", "show", "revoke"])
def test_every_help_has_an_example_and_explains_every_argument(fedcore, command):
    text = fedcore("certs", command, "--help").stdout
    assert f"fedcore certs {command}" in text
    assert "Example" in text
