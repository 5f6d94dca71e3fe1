"""What the authority issues, and what it refuses to."""
import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcore.authority import Authority, init_ca
from fedcore.certs import check_name, host_names, key_fingerprint, make_request, read_request, subject
from fedcore.errors import BadInput, BadTls, InvalidSetting
from fedcore.tls import identity_in, identity_of, load_credentials, read_certificate

NAMES = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)


def names_in(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


@given(name=NAMES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_allowed_name_comes_back_from_its_certificate(pki, name):
    request = x509.CertificateSigningRequestBuilder(subject(name)).sign(
        ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()
    )
    authority = Authority(pki / "ca")
    certificate = authority.sign_node(request, pki / "signed" / str(len(authority.issued())), renew=True)
    assert (identity_in(certificate).role, identity_in(certificate).name) == ("node", name)
    assert names_in(certificate).get_values_for_type(x509.DNSName) == [f"{name}.node.fedcore"]


@given(name=st.text(max_size=80) | st.text("abz019-", max_size=66))
def test_any_other_name_is_refused(name):
    allowed = 0 < len(name) <= 63 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    if allowed:
        assert check_name(name) == name
    else:
        with pytest.raises(InvalidSetting, match="1 to 63 of a-z, 0-9 and -"):
            check_name(name)


@pytest.mark.parametrize("names", ["https://a.org", "a.org:443", "a b", "-a", "a..b", "*.a.org", "münchen.de", "1.2.3",
                                   "a.node.fedcore", "node.fedcore", "x" * 64])
def test_server_names_that_are_no_host_names_are_refused(names):
    with pytest.raises(InvalidSetting, match="--names="):
        host_names(names)


def test_a_server_is_reached_by_its_names_and_on_loopback(pki):
    certificate = Authority(pki / "ca").issue_server(host_names("FL.example.org, 10.0.0.5,[fe80::1]"), pki / "new")
    names = names_in(certificate)
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost", "server.fedcore"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.5", "fe80::1", "127.0.0.1", "::1"]


def test_what_a_request_says_besides_name_and_key_does_not_count(pki):
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = x509.CertificateSigningRequestBuilder(subject("mallory")).add_extension(
        x509.SubjectAlternativeName([x509.DNSName("fl.example.org"),
                                     x509.UniformResourceIdentifier("fedcore://server/server")]), critical=False
    ).add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True).sign(key, hashes.SHA256())
    certificate = Authority(pki / "ca").sign_node(greedy, pki / "mallory")
    assert names_in(certificate).get_values_for_type(x509.DNSName) == ["mallory.node.fedcore"]
    assert identity_in(certificate).role == "node"
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_a_node_keeps_its_key_and_gets_the_rest(pki):
    request = make_request("carol", pki / "carol")
    certificate = Authority(pki / "ca").sign_node(read_request(pki / "carol" / "carol.csr"), pki / "sent")
    assert sorted(path.name for path in (pki / "sent").iterdir()) == ["ca.crt", "node.crt"]
    assert key_fingerprint(certificate.public_key()) == key_fingerprint(request.public_key())
    for path in (pki / "sent").iterdir():
        path.rename(pki / "carol" / path.name)
    assert load_credentials(pki / "carol", "node").name == "carol"


def test_requests_that_cannot_be_signed_are_refused(pki):
    def refused(content: bytes, match: str) -> None:
        (pki / "bad.csr").write_bytes(content)
        with pytest.raises(BadTls, match=match):
            read_request(pki / "bad.csr")

    def request(name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
        made = x509.CertificateSigningRequestBuilder(subject(name)).sign(key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    refused(b"nonsense", "not a signing request")
    refused(request("site", rsa.generate_private_key(65537, 2048)), "P-256")
    refused(request("site", ec.generate_private_key(ec.SECP384R1())), "P-256")
    refused(request("Site 3", ec.generate_private_key(ec.SECP256R1())), "'Site 3'")
    good = x509.load_pem_x509_csr(request("site-1", ec.generate_private_key(ec.SECP256R1())))
    changed = good.public_bytes(serialization.Encoding.DER).replace(b"site-1", b"site-2")
    refused(x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM), "changed on the way")
    with pytest.raises(BadTls, match="cannot be read"):
        read_request(pki / "absent.csr")


def test_files_have_the_modes_they_need_whatever_the_umask(pki):
    modes = {f"{path.parent.name}/{path.name}": stat.S_IMODE(path.stat().st_mode) for path in pki.glob("*/*")}
    for name in ("ca/ca.key", "server/server.key", "alice/node.key"):
        assert modes[name] == 0o600
    for name in ("ca/ca.crt", "server/server.crt", "server/revoked.txt", "alice/node.crt"):
        assert modes[name] == 0o644
    for folder in ("ca", "server", "alice"):
        assert stat.S_IMODE((pki / folder).stat().st_mode) == 0o700


def test_nothing_is_ever_overwritten(pki):
    before = {path: path.read_bytes() for path in pki.glob("*/*") if path.name != "issued.txt"}
    authority = Authority(pki / "ca")
    for act in (
        lambda: init_ca(pki / "ca"),
        lambda: authority.issue_server(host_names(""), pki / "server"),
        lambda: authority.issue_node("carol", pki / "alice"),
        lambda: make_request("carol", pki / "alice"),
    ):
        with pytest.raises(BadInput, match="never overwritten"):
            act()
    assert {path: path.read_bytes() for path in before} == before
    assert "carol" not in (pki / "ca" / "issued.txt").read_text()


def test_a_tls_folder_is_never_made_beside_the_cas_key(pki):
    with pytest.raises(BadInput, match="CA's key"):
        Authority(pki / "ca").issue_node("carol", pki / "ca")


def test_one_name_is_for_one_site_unless_renewed(pki):
    authority = Authority(pki / "ca")
    with pytest.raises(BadInput, match="alice already has a certificate.*--renew"):
        authority.issue_node("alice", pki / "again")
    authority.issue_node("alice", pki / "again", renew=True)
    first, second = (identity_of((pki / name / "node.crt").read_bytes()) for name in ("alice", "again"))
    assert first.serial != second.serial
    assert [entry.serial for entry in authority.revoke("alice", serial=first.serial)] == [first.serial]
    assert authority.revoked().keys() == {first.serial}


def test_whoever_was_revoked_can_be_certified_anew(pki):
    authority = Authority(pki / "ca")
    authority.revoke("alice")
    assert load_credentials(pki / "alice", "node")      # the old files stay what they were
    assert identity_in(authority.issue_node("alice", pki / "again")).name == "alice"


def test_revoking_twice_changes_nothing_and_a_stranger_cannot_be_revoked(pki):
    authority = Authority(pki / "ca")
    assert len(authority.revoke("bob", pki / "server")) == 1
    before = (pki / "server" / "revoked.txt").read_text()
    assert authority.revoke("bob", pki / "server") == []
    assert (pki / "server" / "revoked.txt").read_text() == before
    with pytest.raises(BadInput, match="'bobby'. It has issued to: alice, bob, server"):
        authority.revoke("bobby")


def test_a_servers_list_catches_up_and_keeps_its_own_lines(pki):
    authority = Authority(pki / "ca")
    authority.revoke("alice")
    (pki / "server" / "revoked.txt").write_text("abc  # by hand, without a newline")
    authority.revoke("bob", pki / "server")
    lines = (pki / "server" / "revoked.txt").read_text().splitlines()
    assert [line.partition("# ")[2].split(",")[0] for line in lines] == ["by hand", "node alice", "node bob"]


def test_only_a_servers_folder_can_be_told(pki):
    with pytest.raises(BadTls, match="not a server's folder"):
        Authority(pki / "ca").revoke("bob", pki / "alice")


@pytest.mark.parametrize("days, allowed", [(0, "between 1 and"), (10**9, "between 1 and"), (4000, "at most 36")])
def test_lifetimes_have_limits(pki, days, allowed):
    with pytest.raises(InvalidSetting, match=f"--days={days}, but it must be {allowed}"):
        Authority(pki / "ca").issue_node("carol", pki / "carol", days)


def test_a_certificate_lives_as_long_as_asked(pki):
    certificate = Authority(pki / "ca").issue_node("carol", pki / "carol", 30)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(days=30, minutes=10)


def test_a_folder_that_is_no_authority_is_refused(pki):
    with pytest.raises(BadTls, match="has no ca.key, so it is not a CA's folder"):
        Authority(pki / "alice")
    (pki / "ca" / "ca.key").chmod(0o644)
    with pytest.raises(BadTls, match="chmod 600"):
        Authority(pki / "ca")


def test_a_ca_key_of_another_ca_is_refused(pki):
    init_ca(pki / "other")
    (pki / "other" / "ca.crt").write_bytes((pki / "ca" / "ca.crt").read_bytes())
    with pytest.raises(BadTls, match="ca.key cannot be used: it does not belong to ca.crt"):
        Authority(pki / "other")


def test_a_ca_cannot_make_another_ca(pki):
    ca = read_certificate((pki / "ca" / "ca.crt").read_bytes())
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
