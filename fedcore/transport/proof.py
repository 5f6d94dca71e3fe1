"""Proof, over a connection that TLS made, that whoever answered holds the very certificate that is expected.

gRPC checks a server's certificate against the authority and its name, and shows it to nobody: a second certificate of
the same name would pass. So whoever answers signs what the caller says, and with it who the caller is: an answer to one
caller is of no use to another, which keeps anybody from standing in between.
"""
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from fedcore.errors import BadCertificate
from fedcore.tls import Credentials, fingerprint_of, read_certificate

PURPOSE = "fedcore: a peer answers"
NOT_PINNED = "the certificate of whoever answers there is not the one that is expected"


def prove(credentials: Credentials, *said: str) -> dict[str, str]:
    """Return the proof that these are one's own credentials.

    Args:
        said: what the proof is bound to; the same on both sides.
    """
    key: Any = serialization.load_pem_private_key(credentials.key, password=None)
    return {"cert": credentials.cert.decode("ascii"), "signature": key.sign(_signed(said), *_scheme(key)).hex()}


def check_proof(proof: object, fingerprint: str, *said: str) -> None:
    """Check that a proof was made with the certificate of this fingerprint (SHA-256, lower-case hex).

    Raises:
        BadCertificate: it was not.
    """
    found = proof if isinstance(proof, Mapping) else {}
    certificate = read_certificate(str(found.get("cert")).encode())
    if not hmac.compare_digest(fingerprint_of(certificate), fingerprint):
        raise BadCertificate(NOT_PINNED)
    key: Any = certificate.public_key()
    try:
        key.verify(bytes.fromhex(str(found.get("signature"))), _signed(said), *_scheme(key))
    except (InvalidSignature, ValueError) as error:
        raise BadCertificate("whoever answers there does not hold the key of its certificate") from error


def _signed(said: tuple[str, ...]) -> bytes:
    return json.dumps([PURPOSE, *said]).encode()


def _scheme(key: object) -> tuple[Any, ...]:
    """Return how a key of this kind signs."""
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return (ec.ECDSA(hashes.SHA256()),)
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        digest = padding.PSS.DIGEST_LENGTH
        return (padding.PSS(padding.MGF1(hashes.SHA256()), digest), hashes.SHA256())
    return ()
