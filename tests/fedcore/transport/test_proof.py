"""A peer proves that it holds the certificate that the roster pins, whatever kind of key that has."""
import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from fedcore.errors import BadCertificate
from fedcore.tls import Credentials, fingerprint_of
from fedcore.transport.proof import NOT_PINNED, check_proof, prove

KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


def credentials(key):
    """Return credentials with a key of some kind, and their fingerprint."""
    name, now = x509.Name([]), datetime.now(UTC)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1)).sign(key, digest)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Credentials("node", "node-1", pem, pem, private, now), fingerprint_of(certificate)


@pytest.mark.parametrize("kind", KEYS)
def test_a_proof_holds_for_what_it_was_made_for_and_nothing_else(kind):
    own, fingerprint = credentials(KEYS[kind]())
    proof = prove(own, "run", "nonce", "caller")
    check_proof(proof, fingerprint, "run", "nonce", "caller")
    for said in (("run", "nonce", "another"), ("run", "earlier", "caller"), ("run", "noncecaller", ""), ()):
        with pytest.raises(BadCertificate, match="does not hold the key"):
            check_proof(proof, fingerprint, *said)


def test_anothers_certificate_and_anothers_key_prove_nothing():
    (own, fingerprint), (other, other_print) = (credentials(KEYS["P-256"]()) for _ in range(2))
    with pytest.raises(BadCertificate, match=NOT_PINNED):
        check_proof(prove(other, "run"), fingerprint, "run")
    stolen = dataclasses.replace(other, cert=own.cert)
    with pytest.raises(BadCertificate, match="does not hold the key"):
        check_proof(prove(stolen, "run"), fingerprint, "run")


@pytest.mark.parametrize("proof", [None, {}, "x", {"cert": 3}, {"cert": "x", "signature": "y"}, []])
def test_what_is_no_proof_is_refused(proof):
    with pytest.raises(BadCertificate):
        check_proof(proof, "0" * 64)


@pytest.mark.parametrize("signature", [None, "zz", "", "00", 7])
def test_a_signature_that_is_none_is_refused(signature):
    own, fingerprint = credentials(KEYS["P-256"]())
    with pytest.raises(BadCertificate):
        check_proof({**prove(own), "signature": signature}, fingerprint)
