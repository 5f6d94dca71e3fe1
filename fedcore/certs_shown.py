"""What `fedcore certs` prints: certificates, requests and keys, and what is wrong with them."""
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from rich.console import Console

from fedcore.authority import Issued
from fedcore.certs import REQUEST_SUFFIX, key_fingerprint, now_utc, read_request
from fedcore.errors import BadCertificate, BadInput, BadTls, InvalidSetting
from fedcore.terminal import make_console
from fedcore.tls import (
    CA_CERT,
    CA_KEY,
    REVOKED,
    ROLES,
    WARN_BEFORE,
    cert_file,
    check_key_mode,
    common_name,
    fingerprint_of,
    identity_in,
    issued_by,
    key_file,
    read_certificate,
    read_key,
    read_revoked,
)

Rows = list[tuple[str, str]]
CERTIFICATES = (CA_CERT, *(cert_file(role) for role in ROLES))
KEYS = (CA_KEY, *(key_file(role) for role in ROLES))


def parse_serial(text: str | None) -> int | None:
    """Return a serial number given in hex.

    Raises:
        InvalidSetting: it is none.
    """
    if text is None:
        return None
    try:
        return int(text, 16)
    except ValueError as error:
        raise InvalidSetting("--serial", text, "a number in hex", "`fedcore certs show` prints it.") from error


def print_rows(console: Console, rows: Rows, indent: str = "") -> None:
    """Print pairs of texts below each other; fingerprints stay in one piece, to be compared and copied."""
    width = max(len(title) for title, _ in rows)
    for title, value in rows:
        console.print(f"{indent}{title:{width}}  {value}", markup=False, soft_wrap=True)


def show_files(folder: Path, certificate: x509.Certificate, advice: str) -> None:
    """Print what was made."""
    console = make_console()
    console.print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", markup=False,
                  soft_wrap=True)
    print_rows(console, certificate_rows(certificate))
    console.print(f"\n{advice}", markup=False, soft_wrap=True)


def show_request(folder: Path, name: str, request: x509.CertificateSigningRequest) -> None:
    """Print what was made, and what to do with it."""
    console = make_console()
    file = folder / f"{name}{REQUEST_SUFFIX}"
    console.print(f"wrote {folder}: {key_file('node')}, {file.name}", markup=False, soft_wrap=True)
    print_rows(console, request_rows(request))
    console.print(f"\nSend {file} to whoever runs the CA. It is no secret; {key_file('node')} is, and stays here.\n"
                  f"They run: fedcore certs node {file.name} --ca DIR --out DIR", markup=False, soft_wrap=True)


def show_revoked(name: str, fresh: Sequence[Issued], ca: Path, tls: Path | None) -> None:
    """Print what was revoked, and what is left to do."""
    console = make_console()
    for entry in fresh:
        console.print(f"revoked: {entry.role} {entry.name}, serial {entry.serial:x}, valid until "
                      f"{entry.not_after:%Y-%m-%d}", markup=False, soft_wrap=True)
    if not fresh:
        console.print(f"{name} was revoked before.", markup=False)
    if tls is None:
        console.print(f"Copy {ca / REVOKED} into the server's TLS folder, or repeat with --tls: until then the server "
                      "does not know.", markup=False, soft_wrap=True)
    else:
        console.print(f"{tls / REVOKED} is up to date.", markup=False, soft_wrap=True)


# ---- show -----------------------------------------------------------------------------------------------------------


def show_path(path: Path) -> bool:
    """Print what a folder or file holds; returns whether all is well.

    Raises:
        BadInput: there is nothing of the kind.
    """
    console = make_console()
    if path.is_dir():
        return _show_folder(console, path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist. Name a TLS folder, a CA's folder, or a .crt or .csr file.")
    if path.suffix == REQUEST_SUFFIX:
        print_rows(console, request_rows(read_request(path)))
        return True
    certificate = _read(path)
    print_rows(console, certificate_rows(certificate))
    return _print_problems(console, list(validity_problems(path.name, certificate)))


def _show_folder(console: Console, folder: Path) -> bool:
    found = {name: _read(folder / name) for name in CERTIFICATES if (folder / name).is_file()}
    keys = [name for name in KEYS if (folder / name).is_file()]
    requests = sorted(folder.glob(f"*{REQUEST_SUFFIX}"))
    if not (found or keys or requests):
        raise BadInput(f"{folder} holds no certificate, key or request. `fedcore certs --help` says how to make them.")
    for name, certificate in found.items():
        console.print(f"[bold]{name}[/]")
        print_rows(console, certificate_rows(certificate), "  ")
    for path in requests:
        console.print(path.name, style="bold", markup=False)
        print_rows(console, request_rows(read_request(path)), "  ")
    for name in keys:
        console.print(f"[bold]{name}[/]  mode {(folder / name).stat().st_mode & 0o777:04o}")
    problems = list(_folder_problems(folder, found, keys))
    if (folder / REVOKED).is_file():
        try:
            revoked = read_revoked((folder / REVOKED).read_text(encoding="utf-8", errors="replace"))
            console.print(f"[bold]{REVOKED}[/]  {len(revoked)} revoked")
        except BadCertificate as error:
            problems.append(f"{REVOKED}: {error.reason}")
    return _print_problems(console, problems)


def _folder_problems(folder: Path, found: dict[str, x509.Certificate], keys: Sequence[str]) -> Iterator[str]:
    ca = found.get(CA_CERT)
    for name, certificate in found.items():
        yield from validity_problems(name, certificate)
        if name == CA_CERT:
            continue
        if ca is None:
            yield f"{CA_CERT} is missing beside {name}"
        elif not issued_by(certificate, ca):
            yield f"{name} was not signed by the CA of {CA_CERT}"
    for name in keys:
        certificate_name = name.removesuffix(".key") + ".crt"
        try:
            check_key_mode(folder / name)
            key = read_key(folder / name, (folder / name).read_bytes())
        except BadTls as error:
            yield f"{name}: {error.reason}. {error.advice}"
            continue
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
            continue
        certified = found.get(certificate_name)
        if certified is not None and key.public_key() != certified.public_key():
            yield f"{name} does not belong to {certificate_name}"
    if CA_KEY in keys and len(found) > 1:
        yield f"{CA_KEY} lies beside {', '.join(name for name in found if name != CA_CERT)}: keep the CA's folder apart"


def validity_problems(name: str, certificate: x509.Certificate, now: datetime | None = None) -> Iterator[str]:
    """Yield what is wrong with a certificate's time, or soon will be."""
    now = now or now_utc()
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        yield f"{name} expired on {end:%Y-%m-%d %H:%M} UTC"
    elif end - now <= WARN_BEFORE:
        yield f"{name} expires in {(end - now).days} days"
    if now < start:
        yield f"{name} is valid only from {start:%Y-%m-%d %H:%M} UTC"


def certificate_rows(certificate: x509.Certificate) -> Rows:
    """Return what a certificate says, as pairs of texts."""
    end = certificate.not_valid_after_utc
    left = (end - now_utc()) // timedelta(days=1)
    rows = [("for", whose(certificate)), ("issued by", common_name(certificate.issuer)),
            ("valid until", f"{end:%Y-%m-%d %H:%M} UTC ({left} days)"), ("serial", f"{certificate.serial_number:x}"),
            ("fingerprint", fingerprint_of(certificate)), ("key", key_fingerprint(certificate.public_key()))]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return rows
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return [*rows[:1], ("names", ", ".join(hosts)), *rows[1:]]


def whose(certificate: x509.Certificate) -> str:
    """Return who a certificate speaks for, in words."""
    try:
        if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return f"the CA {common_name(certificate.subject)}"
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        pass    # then it is none
    try:
        return str(identity_in(certificate))
    except BadCertificate as error:
        return f"nobody that fedcore knows: {error.reason}"


def request_rows(request: x509.CertificateSigningRequest) -> Rows:
    """Return what a request says, as pairs of texts."""
    return [("request of node", common_name(request.subject)), ("key", key_fingerprint(request.public_key()))]


def _read(path: Path) -> x509.Certificate:
    try:
        return read_certificate(path.read_bytes())
    except BadCertificate as error:
        raise BadTls(path, error.reason, "Name a .crt or .csr file, or a folder.") from error
    except OSError as error:
        raise BadTls(path, f"it cannot be read: {error.strerror}", "Check its mode and owner.") from error


def _print_problems(console: Console, problems: Sequence[str]) -> bool:
    for problem in problems:
        console.print(f"Problem: {problem}", style="yellow", markup=False, soft_wrap=True)
    return not problems
