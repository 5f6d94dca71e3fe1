"""What certificates are made of: names, lifetimes, keys, signing requests, and files that are never overwritten.

`authority.py` signs; what the certificates mean is in `tls.py`.
"""
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from fedcore.errors import BadInput, BadTls, InvalidSetting, shown
from fedcore.tls import NAME, NAME_RULE, NODE_DOMAIN, SERVER_HOST, common_name, key_file

REQUEST_SUFFIX = ".csr"
CERTIFICATE_DAYS, MAX_DAYS = 365, 36_500
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOST_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
PRIVATE, PUBLIC, FOLDER_MODE = 0o600, 0o644, 0o700


def now_utc() -> datetime:
    """Return the time, in whole seconds, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


# ---- what is asked for ----------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """Return a name that a node or a server may have.

    Raises:
        InvalidSetting: it is not one.
    """
    if NAME.fullmatch(name) is None:
        raise InvalidSetting("--name", name, NAME_RULE, "For example site-3.")
    return name


def check_days(days: int) -> int:
    """Return a lifetime in days; raise `InvalidSetting` when it is out of range."""
    if not 1 <= days <= MAX_DAYS:
        raise InvalidSetting("--days", days, f"between 1 and {MAX_DAYS}", f"A year is usual: {CERTIFICATE_DAYS}.")
    return days


def host_names(text: str) -> list[x509.GeneralName]:
    """Return the names that a server's certificate is to carry, loopback and `server.fedcore` included.

    Args:
        text: host names and IP addresses, separated by commas.

    Raises:
        InvalidSetting: one of them is no name, or one that only a node may have.
    """
    names: list[x509.GeneralName] = []
    for word in [*(word.strip().lower() for word in text.split(",") if word.strip()), *LOOPBACK, SERVER_HOST]:
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(word.strip("[]")))
        except ValueError:
            name = x509.DNSName(_check_host(word))
        if name not in names:
            names.append(name)
    return names


def _check_host(host: str) -> str:
    labels = host.split(".")
    if len(host) > 253 or not all(HOST_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise InvalidSetting("--names", host, "host names and IP addresses, separated by commas",
                             "For example --names fl.example.org,10.0.0.5; without https:// and without a port.")
    if host == NODE_DOMAIN or host.endswith(f".{NODE_DOMAIN}"):
        raise InvalidSetting("--names", host, f"names outside {NODE_DOMAIN}", "Those are the nodes' own.")
    return host


# ---- writing --------------------------------------------------------------------------------------------------------


def check_absent(folder: Path, names: Iterable[str]) -> None:
    """Raise `BadInput` when one of the files exists."""
    for name in names:
        if (folder / name).exists():
            raise BadInput(f"{folder / name} exists and is never overwritten. "
                           "Choose another folder, or move it away first.")


def write_new(folder: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Write files that must not exist yet, each with its mode.

    Raises:
        BadInput: one of them exists (then none is written), or the folder cannot be written to.
    """
    check_absent(folder, files)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        for name, (content, mode) in files.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)     # whatever the umask
                file.write(content)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written to: {error.strerror}.") from error


def cert_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, in clear."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a new private key, on the curve P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def subject(name: str) -> x509.Name:
    """Return the name of whoever a certificate is for."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


# ---- requests -------------------------------------------------------------------------------------------------------


def make_request(name: str, out: Path) -> x509.CertificateSigningRequest:
    """Make a node's key, which never leaves the node, and the request that the authority signs."""
    key = new_key()
    request = x509.CertificateSigningRequestBuilder(subject(check_name(name))).sign(key, hashes.SHA256())
    write_new(out, {key_file("node"): (key_pem(key), PRIVATE),
                    f"{name}{REQUEST_SUFFIX}": (request.public_bytes(serialization.Encoding.PEM), PUBLIC)})
    return request


def read_request(path: Path) -> x509.CertificateSigningRequest:
    """Return a signing request, checked.

    Raises:
        BadTls: it is none, was tampered with, or has another kind of key.
    """
    advice = "Make one on the node: fedcore certs request --name NAME --out DIR."
    try:
        request = x509.load_pem_x509_csr(Path(path).read_bytes())
        public = request.public_key()
        signed = request.is_signature_valid
    except OSError as error:
        raise BadTls(path, f"it cannot be read: {error.strerror}", advice) from error
    except (ValueError, TypeError, InvalidSignature) as error:
        raise BadTls(path, "it is not a signing request in PEM format", advice) from error
    if not signed:
        raise BadTls(path, "its signature is wrong, so it was changed on the way", advice)
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise BadTls(path, "its key is not on the curve P-256", advice)
    name = common_name(request.subject)
    if NAME.fullmatch(name) is None:
        raise BadTls(path, f"it is for {shown(name)}, but a node's name must be {NAME_RULE}", advice)
    return request


def key_fingerprint(public: CertificatePublicKeyTypes) -> str:
    """Return the SHA-256 of a public key, hex, to compare by telephone: the node's and the authority's must agree."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()
