"""A small private certificate authority: what `fedcore certs` signs with.

The authority's folder holds `ca.key`, with which anybody could admit whom they like; it belongs on a machine that is
neither server nor client. `issued.txt` there says who was given which certificate, `revoked.txt` which of them no
longer count. Nothing is ever overwritten. What the certificates mean is in `tls.py`.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.certs import (
    CERTIFICATE_DAYS,
    PRIVATE,
    PUBLIC,
    cert_pem,
    check_absent,
    check_days,
    check_name,
    key_pem,
    new_key,
    now_utc,
    subject,
    write_new,
)
from fedcore.errors import BadCertificate, BadInput, BadTls, InvalidSetting
from fedcore.tls import (
    CA_CERT,
    CA_KEY,
    REVOKED,
    USAGES,
    Role,
    cert_file,
    check_key_mode,
    check_validity,
    common_name,
    identity_in,
    key_file,
    node_host,
    read_certificate,
    read_key,
    read_revoked,
    role_uri,
)

ISSUED = "issued.txt"
CA_DAYS = 3650
# A new certificate is valid at once on a machine whose clock is a little behind.
BACKDATED = timedelta(minutes=10)
SERVER_NAME = "server"


@dataclass(frozen=True)
class Issued:
    """One line of the authority's book."""

    serial: int
    role: str
    name: str
    not_after: datetime

    def line(self) -> str:
        """Return it as it stands in the book."""
        return f"{self.serial:x} {self.role} {self.name} {self.not_after:%Y-%m-%dT%H:%M:%SZ}\n"

    @classmethod
    def of_line(cls, line: str) -> "Issued":
        """Read a line of the book.

        Raises:
            ValueError: it is none.
        """
        serial, role, name, end = line.split()
        return cls(int(serial, 16), role, name, datetime.strptime(end, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC))


def init_ca(folder: Path, name: str = "fedcore CA", days: int = CA_DAYS) -> x509.Certificate:
    """Make a certificate authority in a new folder.

    Raises:
        BadInput: the folder has one already, or cannot be written to.
    """
    check_days(days)
    key, now = new_key(), now_utc()
    builder = x509.CertificateBuilder(
        issuer_name=subject(name), subject_name=subject(name), public_key=key.public_key(),
        serial_number=x509.random_serial_number(), not_valid_before=now - BACKDATED,
        not_valid_after=now + timedelta(days=days),
    )
    # path_length 0: whoever it certifies cannot certify others.
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    write_new(folder, {
        CA_KEY: (key_pem(key), PRIVATE), CA_CERT: (cert_pem(certificate), PUBLIC), ISSUED: (b"", PRIVATE),
        REVOKED: (b"", PUBLIC),
    })
    return certificate


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )


class Authority:
    """A certificate authority, opened from its folder.

    Raises:
        BadTls: the folder holds none, or one that cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        advice = "Make an authority with `fedcore certs init --ca DIR`."
        for name in (CA_CERT, CA_KEY):
            if not (self.folder / name).is_file():
                raise BadTls(self.folder, f"it has no {name}, so it is not a CA's folder", advice)
        check_key_mode(self.folder / CA_KEY)
        try:
            self.certificate = read_certificate((self.folder / CA_CERT).read_bytes())
            key = read_key(self.folder / CA_KEY, (self.folder / CA_KEY).read_bytes())
        except BadCertificate as error:
            raise BadTls(self.folder / CA_CERT, error.reason, advice) from error
        except OSError as error:
            raise BadTls(self.folder, f"it cannot be read: {error.strerror}", "Only its owner can use it.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self.certificate.public_key():
            raise BadTls(self.folder / CA_KEY, f"it does not belong to {CA_CERT}", advice)
        check_validity(self.folder / CA_CERT, self.certificate, now_utc())
        self._key = key

    def issue_server(self, hosts: Sequence[x509.GeneralName], out: Path, name: str = SERVER_NAME,
                     days: int = CERTIFICATE_DAYS) -> x509.Certificate:
        """Make a server's TLS folder: key, certificate, the CA's certificate, and what has been revoked so far."""
        key = new_key()
        files = {key_file("server"): (key_pem(key), PRIVATE), REVOKED: (self._revoked_text().encode(), PUBLIC)}
        return self._hand_out(out, self._sign("server", check_name(name), key.public_key(), hosts, days), files)

    def issue_node(self, name: str, out: Path, days: int = CERTIFICATE_DAYS, renew: bool = False) -> x509.Certificate:
        """Make a node's TLS folder: key, certificate and the CA's certificate."""
        key = new_key()
        certificate = self._sign_node(name, key.public_key(), days, renew)
        return self._hand_out(out, certificate, {key_file("node"): (key_pem(key), PRIVATE)})

    def sign_node(self, request: x509.CertificateSigningRequest, out: Path, days: int = CERTIFICATE_DAYS,
                  renew: bool = False) -> x509.Certificate:
        """Certify a node's request; of what it says, only name and public key count."""
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey), "read_request checks it"
        return self._hand_out(out, self._sign_node(common_name(request.subject), public, days, renew), {})

    def _hand_out(self, out: Path, certificate: x509.Certificate, files: Mapping[str, tuple[bytes, int]]
                  ) -> x509.Certificate:
        """Write a certificate down in the book, then into a folder: what exists can always be revoked by name."""
        identity = identity_in(certificate)
        files = {**files, cert_file(identity.role): (cert_pem(certificate), PUBLIC),
                 CA_CERT: (cert_pem(self.certificate), PUBLIC)}
        if (out / CA_KEY).exists():
            raise BadInput(f"{out} holds a CA's key ({CA_KEY}), and server and clients refuse such a folder. "
                           "Choose another --out.")
        check_absent(out, files)
        entry = Issued(identity.serial, identity.role, identity.name, identity.not_after)
        append_lines(self.folder / ISSUED, entry.line())
        write_new(out, files)
        return certificate

    def _sign_node(self, name: str, public: ec.EllipticCurvePublicKey, days: int, renew: bool) -> x509.Certificate:
        check_name(name)
        revoked, now = self.revoked(), now_utc()
        valid = [entry for entry in self.issued() if (entry.role, entry.name) == ("node", name)
                 and entry.serial not in revoked and entry.not_after > now]
        if valid and not renew:
            raise BadInput(
                f"Node {name} already has a certificate, valid until {valid[-1].not_after:%Y-%m-%d}. Two sites of one "
                "name could act for each other: choose another name, or add --renew to give the same site a new "
                "certificate. The old one stays valid until it expires or is revoked."
            )
        return self._sign("node", name, public, [x509.DNSName(node_host(name))], days)

    def _sign(self, role: Role, name: str, public: ec.EllipticCurvePublicKey, hosts: Sequence[x509.GeneralName],
              days: int) -> x509.Certificate:
        now = now_utc()
        end = now + timedelta(days=check_days(days))
        if end > self.certificate.not_valid_after_utc:
            left = max((self.certificate.not_valid_after_utc - now).days, 0)
            raise InvalidSetting("--days", days, f"at most {left}", "The CA itself is valid no longer.")
        ca_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = x509.CertificateBuilder(
            issuer_name=self.certificate.subject, subject_name=subject(name), public_key=public,
            serial_number=x509.random_serial_number(), not_valid_before=now - BACKDATED, not_valid_after=end,
        )
        names = [x509.UniformResourceIdentifier(role_uri(role, name)), *hosts]
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage(USAGES[role]), False),
            (x509.SubjectAlternativeName(names), False),
            (x509.SubjectKeyIdentifier.from_public_key(public), False),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), False),
        ):
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())

    # ---- the authority's book ----------------------------------------------------------------------------------------

    def issued(self) -> list[Issued]:
        """Return what was issued, oldest first."""
        path = self.folder / ISSUED
        try:
            return [Issued.of_line(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise BadTls(path, "a line is not of the form `serial role name end`", "Restore it from a copy.") from error

    def _revoked_text(self) -> str:
        path = self.folder / REVOKED
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def revoked(self) -> dict[int, str]:
        """Return the serial numbers that were revoked, with what was noted."""
        try:
            return read_revoked(self._revoked_text())
        except BadCertificate as error:
            raise BadTls(self.folder / REVOKED, error.reason, "Correct that line.") from error

    def revoke(self, name: str, tls: Path | None = None, serial: int | None = None) -> list[Issued]:
        """Revoke a node's certificates, in the authority's list and in a server's.

        Args:
            tls: the folder of a server that is to refuse them from now on; it gets the whole list.
            serial: only this one, e.g. the one before a renewal.

        Returns:
            What was newly revoked; nothing when it had been revoked before.

        Raises:
            BadInput: nobody of that name has a certificate.
        """
        known = [entry for entry in self.issued() if entry.name == name and serial in (None, entry.serial)]
        if not known:
            names = sorted({entry.name for entry in self.issued()})
            raise BadInput(f"{self.folder} has issued no such certificate to {name!r}. "
                           f"It has issued to: {', '.join(names) or 'nobody yet'}.")
        before, now = self.revoked(), now_utc()
        fresh = [entry for entry in known if entry.serial not in before]
        lines = "".join(f"{entry.serial:x}  # {entry.role} {entry.name}, {now:%Y-%m-%dT%H:%M:%SZ}\n" for entry in fresh)
        append_lines(self.folder / REVOKED, lines)
        if tls is not None:
            self._update(Path(tls))
        return fresh

    def _update(self, tls: Path) -> None:
        """Let a server's list hold every line of ours."""
        if not (tls / cert_file("server")).is_file():
            raise BadTls(tls, f"it has no {cert_file('server')}, so it is not a server's folder",
                         "The list is updated in the CA's folder; name the folder that the server's --tls names.")
        path = tls / REVOKED
        try:
            theirs = read_revoked(path.read_text(encoding="utf-8")) if path.exists() else {}
        except BadCertificate as error:
            raise BadTls(path, error.reason, "Correct that line.") from error
        missing = [line for line in self._revoked_text().splitlines(keepends=True)
                   if read_revoked(line).keys() - theirs.keys()]
        append_lines(path, "".join(missing))


def append_lines(path: Path, text: str) -> None:
    """Add lines to a file in one write, so that whoever reads it meanwhile sees whole lines."""
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        with open(path, "a", encoding="utf-8") as file:
            file.write(("\n" if before and not before.endswith("\n") else "") + text)
    except OSError as error:
        raise BadInput(f"{path} cannot be written to: {error.strerror}.") from error
