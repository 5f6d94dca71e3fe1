"""Who is who on the link: TLS folders, identities in certificates, revocation.

A federation has a private certificate authority (CA) of its own. Who a certificate speaks for is in its names, which
only the CA can write: a URI `fedcore://server/NAME` or `fedcore://node/NAME`. A server's certificate also carries the
host names at which it is reached, a node's only `NAME.node.fedcore`, so that no node can pass for the server: its
certificate never matches the host name that a client dials. `certs.py` issues what this file reads.
"""
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.errors import BadCertificate, BadTls, shown

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger("fedcore")

Role = Literal["server", "node"]
ROLES: tuple[Role, ...] = ("server", "node")
CA_CERT, CA_KEY, REVOKED = "ca.crt", "ca.key", "revoked.txt"
SERVER_HOST = "server.fedcore"      # in every server's certificate: a client that dials an address may ask for it
NODE_DOMAIN = "node.fedcore"
NAME_RULE = "1 to 63 of a-z, 0-9 and -"
NAME = re.compile(r"[a-z0-9-]{1,63}")
WARN_BEFORE = timedelta(days=30)
# A key may be read by its owner and, where a service's group needs it, by that group.
TOO_OPEN = 0o027
USAGES = {"server": (ExtendedKeyUsageOID.SERVER_AUTH,),
          "node": (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)}


def cert_file(role: Role) -> str:
    """Return the name of a role's certificate file."""
    return f"{role}.crt"


def key_file(role: Role) -> str:
    """Return the name of a role's key file."""
    return f"{role}.key"


def node_host(name: str) -> str:
    """Return the host name that a node's certificate carries; whoever dials a peer asks for it."""
    return f"{name}.{NODE_DOMAIN}"


def role_uri(role: Role, name: str) -> str:
    """Return the URI in a certificate that says who it speaks for."""
    return f"fedcore://{role}/{name}"


# ---- who a certificate speaks for ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Who a certificate speaks for.

    Attributes:
        fingerprint: SHA-256 of the certificate, lower-case hex.
    """

    role: Role
    name: str
    serial: int
    fingerprint: str
    not_after: datetime

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


def read_certificate(pem: bytes) -> x509.Certificate:
    """Return a certificate.

    Raises:
        BadCertificate: it cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise BadCertificate("it is not a certificate in PEM format") from error


def identity_of(cert_pem: bytes) -> Identity:
    """Return who a certificate speaks for. Whether the CA signed it is checked by TLS, before anybody asks this.

    Raises:
        BadCertificate: it cannot be read, or is not of the kind that `fedcore certs` issues.
    """
    return identity_in(read_certificate(cert_pem))


def identity_in(certificate: x509.Certificate) -> Identity:
    """Return who a certificate speaks for; see `identity_of`."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise BadCertificate("it does not say in its names who it speaks for") from error
    ours = [uri for uri in uris if uri.startswith("fedcore://")]
    if len(ours) != 1:
        raise BadCertificate(f"it must carry one fedcore:// name, not {len(ours)}")
    role, _, name = ours[0].removeprefix("fedcore://").partition("/")
    if role not in ROLES or NAME.fullmatch(name) is None:
        raise BadCertificate(f"its name {shown(ours[0])} is neither a server's nor a node's")
    if set(uses) != set(USAGES[role]):
        raise BadCertificate(f"its extended key usage is not that of a {role}")
    hosts = names.get_values_for_type(x509.DNSName)
    if role == "node" and (hosts != [node_host(name)] or names.get_values_for_type(x509.IPAddress)):
        raise BadCertificate(f"a node's only host name is {node_host(name)}")
    return Identity(role, name, certificate.serial_number, fingerprint_of(certificate),
                    certificate.not_valid_after_utc)


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate, lower-case hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def common_name(subject: x509.Name) -> str:
    """Return a name's common name, empty when it has none."""
    found = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def expired(identity: Identity, now: datetime | None = None) -> str | None:
    """Return why an identity counts no longer though it was accepted once, None when it still does."""
    if (now or datetime.now(UTC)) <= identity.not_after:
        return None
    return (f"the certificate of {identity} expired on {identity.not_after:%Y-%m-%d %H:%M} UTC; issue a new one with "
            f"`fedcore certs {identity.role}`")


# ---- a TLS folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credentials:
    """What one end of the link proves itself with, as PEM; checked."""

    role: Role
    name: str
    ca: bytes = field(repr=False)
    cert: bytes = field(repr=False)
    key: bytes = field(repr=False)
    not_after: datetime


def load_credentials(folder: Path, role: Role, now: datetime | None = None) -> Credentials:
    """Return the credentials in a TLS folder, and warn when they soon expire.

    Args:
        role: what they are to be used as.
        now: the time to check against; None: the clock's.

    Raises:
        BadTls: files are missing or unreadable, do not belong together, are of the other role, or are not valid now.
    """
    folder, now = Path(folder), now or datetime.now(UTC)
    _check_folder(folder, role)
    ca_pem, cert_pem, key_pem = (_read(folder / name) for name in (CA_CERT, cert_file(role), key_file(role)))
    ca = _certificate(folder / CA_CERT, ca_pem)
    certificate = _certificate(folder / cert_file(role), cert_pem)
    check_key_mode(folder / key_file(role))
    key = read_key(folder / key_file(role), key_pem)
    if key.public_key() != certificate.public_key():
        raise BadTls(folder / key_file(role), f"it does not belong to {cert_file(role)}",
                     "Copy both files from the same `fedcore certs` command again.")
    try:
        identity = identity_in(certificate)
    except BadCertificate as error:
        raise BadTls(folder / cert_file(role), error.reason, f"Issue one with `fedcore certs {role}`.") from error
    if identity.role != role:
        raise BadTls(folder / cert_file(role), f"it is the certificate of a {identity.role}, but a {role}'s is needed",
                     f"Issue one with `fedcore certs {role}`.")
    if not issued_by(certificate, ca):
        raise BadTls(folder / cert_file(role), f"it was not signed by the CA of {CA_CERT}",
                     f"Copy {CA_CERT} from the CA that issued it, or have it issued again.")
    for path, found in ((folder / CA_CERT, ca), (folder / cert_file(role), certificate)):
        check_validity(path, found, now)
    not_after = min(identity.not_after, ca.not_valid_after_utc)
    if (warning := expiry_warning(str(identity), not_after, now)) is not None:
        logger.warning("%s", warning)
    return Credentials(role, identity.name, ca_pem, cert_pem, key_pem, not_after)


def _check_folder(folder: Path, role: Role) -> None:
    if not folder.is_dir():
        raise BadTls(folder, "there is no such folder", f"Make it with `fedcore certs {role}`.")
    if (folder / CA_KEY).exists():
        raise BadTls(folder, f"it holds the CA's key ({CA_KEY}), with which anybody who breaks in here could admit "
                     "whom they like", "Keep the CA's folder apart, on a machine that is neither server nor client.")
    if not (folder / cert_file(role)).exists():
        other = next((name for name in ROLES if name != role and (folder / cert_file(name)).exists()), None)
        found = f"it is a {other}'s folder, and has no {cert_file(role)}" if other else f"it has no {cert_file(role)}"
        raise BadTls(folder, found, f"Make one with `fedcore certs {role}`.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadTls(path, "it is missing", "Copy the whole folder that `fedcore certs` made.") from error
    except OSError as error:
        raise BadTls(path, f"it cannot be read: {error.strerror}",
                     "The user that runs fedcore must own it, or belong to its group.") from error


def _certificate(path: Path, pem: bytes) -> x509.Certificate:
    try:
        return read_certificate(pem)
    except BadCertificate as error:
        raise BadTls(path, error.reason, "Copy it again from where it was issued.") from error


def read_key(path: Path, pem: bytes) -> PrivateKeyTypes:
    """Return the private key in a file.

    Raises:
        BadTls: it is none, or is encrypted.
    """
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise BadTls(path, "it is encrypted", "A server that restarts by itself cannot ask for a password; store the "
                     "key in clear, readable by its owner only.") from error
    except ValueError as error:
        raise BadTls(path, "it is not a private key in PEM format", "Copy it again from where it was made.") from error


def check_key_mode(path: Path) -> None:
    """Raise `BadTls` when others than a key's owner and group can read it, or others than its owner change it."""
    mode = path.stat().st_mode & 0o777
    if mode & TOO_OPEN:
        raise BadTls(path, f"its mode is {mode:04o}, so others can read or change the key", f"Run: chmod 600 {path}")


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Say whether a CA signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def check_validity(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    """Raise `BadTls` outside a certificate's time."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise BadTls(path, f"it expired on {end:%Y-%m-%d %H:%M} UTC", "Issue a new one with `fedcore certs`.")
    if now < start:
        raise BadTls(path, f"it is valid only from {start:%Y-%m-%d %H:%M} UTC, and here it is {now:%Y-%m-%d %H:%M} UTC",
                     "Set this machine's clock.")


def expiry_warning(whose: str, not_after: datetime, now: datetime) -> str | None:
    """Return a warning in the last 30 days of a certificate, else None."""
    left = not_after - now
    if left > WARN_BEFORE:
        return None
    return (f"The certificate of {whose} expires in {max(left.days, 0)} days, on {not_after:%Y-%m-%d %H:%M} UTC. "
            "Issue a new one with `fedcore certs` before that day.")


# ---- revocation ---------------------------------------------------------------------------------------------------


def read_revoked(text: str) -> dict[int, str]:
    """Return the serial numbers in a revocation list, each with what its comment says.

    Raises:
        BadCertificate: a line holds no serial number.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        serial, _, comment = line.partition("#")
        if not serial.strip():
            continue
        try:
            found[int(serial.strip(), 16)] = comment.strip()
        except ValueError as error:
            raise BadCertificate(f"line {number} holds no serial number in hex: {shown(line)}") from error
    return found


class RevocationList:
    """The certificates that no longer count, from `revoked.txt` of a TLS folder; read again when it changes.

    While the server runs, a list that is gone or damaged leaves the last good one in force.

    Raises:
        BadTls: the file is there at the start, but cannot be read.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / REVOKED
        self._stamp: tuple[int, ...] | None = None
        self._serials: dict[int, str] = {}
        try:
            self._refresh()
        except (OSError, BadCertificate) as error:
            raise BadTls(self.path, str(error), "Write it again with `fedcore certs revoke`.") from error

    def reason(self, identity: Identity) -> str | None:
        """Return why an identity is refused, None when it is not."""
        try:
            self._refresh()
        except (OSError, BadCertificate) as error:
            logger.error("%s cannot be used (%s); the list read before stays in force.", self.path, error)
        if identity.serial not in self._serials:
            return None
        comment = self._serials[identity.serial]
        return f"the certificate of {identity} was revoked" + (f" ({comment})" if comment else "")

    def _refresh(self) -> None:
        if not self.path.exists():
            if self._stamp is not None:
                logger.error("%s is gone; the list read before stays in force.", self.path)
                self._stamp = None
            return
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._stamp = stamp     # a damaged list is complained of once, not at every question
            self._serials = read_revoked(self.path.read_text(encoding="utf-8", errors="replace"))


# ---- for gRPC -----------------------------------------------------------------------------------------------------


def server_options(credentials: Credentials) -> "grpc.ServerCredentials":
    """Return what a server listens with: only clients with a certificate of the CA get in."""
    import grpc

    return grpc.ssl_server_credentials(
        [(credentials.key, credentials.cert)], root_certificates=credentials.ca, require_client_auth=True
    )


def channel_credentials(credentials: Credentials) -> "grpc.ChannelCredentials":
    """Return what a client dials with: it trusts the CA only, and shows its own certificate."""
    import grpc

    return grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.cert)
