"""Why a client cannot reach its server: the links of the chain, one after the other, and which of them is broken.

From the node's own files to the server's answer: the TLS folder, the server's name, its port, its certificate, whether
it accepts ours, the clocks, the versions. What comes after a broken link is not tried where it cannot work.
"""
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import grpc
from cryptography import x509
from rich.text import Text

from fedcore import __version__
from fedcore.deploy import Address, ask_status
from fedcore.errors import BadCertificate, BadTls, LinkRefused, MalformedFrame, shown
from fedcore.runs import finite
from fedcore.tasks import printable
from fedcore.terminal import make_console
from fedcore.tls import (
    CA_CERT,
    WARN_BEFORE,
    Credentials,
    cert_file,
    common_name,
    fingerprint_of,
    identity_in,
    issued_by,
    key_file,
    load_credentials,
    read_certificate,
)
from fedcore.transport.wire import PROTOCOL

State = Literal["ok", "warning", "broken"]

TIMEOUT_S = 5.0
SKEW_WARNING_S = 30.0
# What a gRPC client says first, and the frame that a gRPC server answers with: its settings.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
FRAME_HEAD_BYTES, SETTINGS_FRAME = 9, 4
# What OpenSSL calls the answer of somebody who does not speak TLS at all.
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")


@dataclass(frozen=True)
class Finding:
    """What was found out about one link of the chain.

    Attributes:
        advice: what to do about it, where something is wrong.
    """

    link: str
    state: State
    text: str
    advice: str = ""


def diagnose(server: Address, folder: Path | None, now: datetime | None = None) -> Iterator[Finding]:
    """Yield what is found, link by link; it ends at the first one that nothing can work beyond.

    Args:
        folder: the node's TLS folder; None for a server that speaks in clear.
        now: the time to check certificates against; None: the clock's.
    """
    now = now or datetime.now(UTC)
    credentials: Credentials | None = None
    if folder is not None:
        found = check_files(folder, now)
        yield found
        if found.state != "broken":
            credentials = load_credentials(folder, "node", now)
    addresses, found = find_addresses(server)
    yield found
    if not addresses:
        return
    reachable, found = find_open(server, addresses)
    yield found
    if reachable is None:
        return
    if folder is not None:
        presented, found = fetch_certificate(server, reachable, credentials, folder)
        yield found
        if presented is None:
            return
        if credentials is None:
            yield Finding("certificate", "warning", f"the server's is {presented.subject.rfc4514_string()}",
                          "Without a usable TLS folder here, whether it is the right one cannot be said.")
            return
        found = judge_certificate(server, presented, credentials, now)
        yield found
        if found.state == "broken":
            return
        found = check_acceptance(server, reachable, folder)
        yield found
        if found.state == "broken":
            return
    yield from check_answer(server, credentials)


# ---- this machine -----------------------------------------------------------------------------------------------


def check_files(folder: Path, now: datetime) -> Finding:
    """Say whether a node's TLS folder can be used."""
    try:
        credentials = load_credentials(folder, "node", now)
    except BadTls as error:
        return Finding("tls folder", "broken", f"{error.path}: {error.reason}", error.advice)
    left = credentials.not_after - now
    text = f"{folder} speaks for node {credentials.name} until {credentials.not_after:%Y-%m-%d}"
    if left <= WARN_BEFORE:
        return Finding("tls folder", "warning", f"{text}: {left.days} days are left",
                       "Issue a new certificate with `fedcore certs node --renew`.")
    return Finding("tls folder", "ok", text)


# ---- the network ------------------------------------------------------------------------------------------------


def find_addresses(server: Address) -> tuple[list[str], Finding]:
    """Return the addresses of a server's name."""
    host = server.host.strip("[]")
    try:
        entries = socket.getaddrinfo(host, server.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "it is no host name"
        return [], Finding("name", "broken", f"{shown(host)} has no address: {str(reason).rstrip('.').lower()}",
                           "Check the spelling, this machine's DNS, or add a line to /etc/hosts.")
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    if addresses == [host]:
        return addresses, Finding("name", "ok", f"{host} is an address, nothing to look up")
    return addresses, Finding("name", "ok", f"{host} is {', '.join(addresses)}")


def find_open(server: Address, addresses: list[str]) -> tuple[str | None, Finding]:
    """Return the first address at which something accepts connections."""
    reasons: list[tuple[str, str, str]] = []
    for address in addresses:
        try:
            with socket.create_connection((address, server.port), TIMEOUT_S):
                pass
        except TimeoutError:
            reasons.append((address, f"no answer within {TIMEOUT_S:g} s",
                            f"A firewall drops the connection: let TCP port {server.port} through, on the server and "
                            "between the two."))
        except ConnectionRefusedError:
            reasons.append((address, "refused", "Nothing listens there: start `fedcore server`, check its port, and "
                            "let it --listen on 0.0.0.0 or its own address, not on 127.0.0.1."))
        except OSError as error:
            reasons.append((address, (error.strerror or str(error)).lower(),
                            "There is no way to that address: check routes and VPN."))
        else:
            missed = f" ({', '.join(f'{where}: {reason}' for where, reason, _ in reasons)})" if reasons else ""
            return address, Finding("port", "warning" if reasons else "ok",
                                    f"{server.port} is open at {address}{missed}",
                                    "The name has addresses where nobody listens." if reasons else "")
    words = "; ".join(f"{where}: {reason}" for where, reason, _ in reasons)
    return None, Finding("port", "broken", f"{server.port} cannot be reached, {words}", reasons[0][2])


# ---- TLS --------------------------------------------------------------------------------------------------------


def _connect(server: Address, address: str, folder: Path | None) -> ssl.SSLSocket:
    """Return a TLS connection on which nothing has been checked yet: the caller wants to say what is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if folder is not None:
        context.load_cert_chain(folder / cert_file("node"), folder / key_file("node"))
    raw = socket.create_connection((address, server.port), TIMEOUT_S)
    try:
        return context.wrap_socket(raw, server_hostname=server.host.strip("[]"))
    except BaseException:
        raw.close()
        raise


def fetch_certificate(
    server: Address, address: str, credentials: Credentials | None, folder: Path
) -> tuple[x509.Certificate | None, Finding]:
    """Return the certificate that a server shows."""
    try:
        with _connect(server, address, folder if credentials else None) as connection:
            der = connection.getpeercert(binary_form=True)
            version = connection.version()
    except ssl.SSLError as error:
        if (error.reason or "") in NOT_TLS:
            return None, Finding("tls", "broken", "whoever listens there does not speak TLS",
                                 "It is another program, or a server started with --insecure: see `fedcore server`.")
        return None, Finding("tls", "broken", f"no connection came about: {_words(error)}",
                             "Check that `fedcore server` listens there, and no proxy stands between.")
    except OSError as error:
        return None, Finding("tls", "broken", f"the connection broke off: {error.strerror or error}",
                             "Check that `fedcore server` listens there, and no proxy stands between.")
    if der is None:
        return None, Finding("tls", "broken", "the server shows no certificate", "It is no fedcore server.")
    return x509.load_der_x509_certificate(der), Finding("tls", "ok", f"the server speaks {version}")


def _words(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def judge_certificate(server: Address, presented: x509.Certificate, credentials: Credentials, now: datetime) -> Finding:
    """Say whether a server's certificate is one that a client accepts."""
    ca = read_certificate(credentials.ca)
    if not issued_by(presented, ca):
        return Finding(
            "certificate", "broken",
            f"the server's was signed by {shown(common_name(presented.issuer))}, not by the CA in our {CA_CERT} "
            f"({common_name(ca.subject)}, SHA-256 {fingerprint_of(ca)[:16]}...)",
            "This is another federation's server, or one of the two has an old ca.crt: compare `fedcore certs show` "
            "at both ends.",
        )
    try:
        identity = identity_in(presented)
    except BadCertificate as error:
        return Finding("certificate", "broken", f"the server's cannot be used: {error.reason}",
                       "Issue one with `fedcore certs server`.")
    if identity.role != "server":
        return Finding("certificate", "broken", f"whoever listens there is {identity}, not a server",
                       "Ask who runs it: a node must not stand in for the server.")
    start, end = presented.not_valid_before_utc, presented.not_valid_after_utc
    if now > end:
        return Finding("certificate", "broken", f"the server's expired on {end:%Y-%m-%d %H:%M} UTC",
                       "Issue a new one with `fedcore certs server`, or set this machine's clock.")
    if now < start:
        return Finding("certificate", "broken", f"the server's is valid only from {start:%Y-%m-%d %H:%M} UTC",
                       f"Set this machine's clock: it says {now:%Y-%m-%d %H:%M} UTC.")
    names = host_names_in(presented)
    if not matches(server.host, names):
        return Finding("certificate", "broken", f"the server's is for {', '.join(names)}, not for {server.host}",
                       f"Dial one of these, or issue one with `fedcore certs server --names {server.host},...`.")
    if end - now <= WARN_BEFORE:
        return Finding("certificate", "warning", f"the server's expires in {(end - now).days} days",
                       "Issue a new one with `fedcore certs server`.")
    return Finding("certificate", "ok", f"the server's is for {server.host}, from our CA, until {end:%Y-%m-%d}")


def host_names_in(certificate: x509.Certificate) -> list[str]:
    """Return the host names and addresses in a certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def matches(host: str, names: list[str]) -> bool:
    """Say whether one of a certificate's names is the host that is dialled."""
    host = host.strip("[]").lower()
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        pass    # a name
    return host in names


def check_acceptance(server: Address, address: str, folder: Path) -> Finding:
    """Say whether the server accepts our certificate: in TLS 1.3 that shows only after the handshake."""
    advice = ("The server's ca.crt is another one, or its clock says that our certificate has expired: see its log, "
              "and compare `fedcore certs show` at both ends.")
    try:
        with _connect(server, address, folder) as connection:
            protocol = connection.selected_alpn_protocol()
            connection.sendall(HTTP2_PREFACE)
            answer = b""
            while len(answer) < FRAME_HEAD_BYTES and (came := connection.recv(FRAME_HEAD_BYTES)):
                answer += came
    except ssl.SSLError as error:
        return Finding("acceptance", "broken", f"the server refuses our certificate: {_words(error)}", advice)
    except OSError as error:
        return Finding("acceptance", "broken", f"the server hangs up on us: {error.strerror or error}", advice)
    if not answer:
        return Finding("acceptance", "broken", "the server hangs up on us, which it does when it cannot accept our "
                       "certificate", advice)
    if protocol != "h2" or len(answer) < FRAME_HEAD_BYTES or answer[3] != SETTINGS_FRAME:
        return Finding("acceptance", "broken", "whoever listens there is no gRPC server",
                       "Another program has the port, or a proxy stands between that cannot pass HTTP/2.")
    return Finding("acceptance", "ok", "the server accepts our certificate")


# ---- the server's answer ----------------------------------------------------------------------------------------


def check_answer(server: Address, credentials: Credentials | None) -> Iterator[Finding]:
    """Ask the server for its clock and its version."""
    asked_at = time.time()
    try:
        answer = ask_status(str(server), credentials)
    except LinkRefused as error:
        cause = error.__cause__
        if isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.PERMISSION_DENIED:
            yield Finding("admission", "broken", f"the server turns us away: {cause.details()}",
                          "Whoever runs the CA can say why, and issue another certificate.")
        else:
            yield Finding("service", "broken", str(error), "Another gRPC program has the port, or the server is "
                          "overloaded: see its log." if credentials else "The server speaks TLS: give --tls.")
        return
    except MalformedFrame as error:
        yield Finding("service", "broken", f"the answer is none of fedcore's: {error}",
                      "Another gRPC program has the port, or a fedcore of another time.")
        return
    yield Finding("admission", "ok", "the server answers us")
    midway = (asked_at + time.time()) / 2
    if (clock_s := finite(answer.get("clock_s"))) is not None:
        yield judge_clock(clock_s - midway)
    yield judge_version(answer.get("protocol"), str(answer.get("version")))


def judge_clock(ahead_s: float) -> Finding:
    """Say whether two clocks agree.

    Args:
        ahead_s: the server's time minus ours, seconds.
    """
    if abs(ahead_s) <= SKEW_WARNING_S:
        return Finding("clock", "ok", f"the server's is {abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}")
    return Finding("clock", "warning", f"the server's is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}",
                   "Certificates will be refused too early or too late: let both machines set their clocks by NTP.")


def judge_version(protocol: object, version: str) -> Finding:
    """Say whether two fedcores understand each other."""
    if protocol != PROTOCOL:
        return Finding("version", "broken", f"the server's link speaks version {protocol}, ours {PROTOCOL}",
                       f"Install the same fedcore at both ends: there {version}, here {__version__}.")
    if version != __version__:
        return Finding("version", "warning", f"the server runs fedcore {version}, we {__version__}",
                       "They understand each other; results are the same bits only with the same version.")
    return Finding("version", "ok", f"both run fedcore {version}")


# ---- on a terminal ----------------------------------------------------------------------------------------------

MARKS: dict[State, tuple[str, str]] = {"ok": ("ok", "green"), "warning": ("warning", "yellow"),
                                       "broken": ("BROKEN", "bold red")}
LINK_WIDTH = len("certificate")     # the longest


def show_diagnosis(server: Address, folder: Path | None) -> bool:
    """Print what is found, line by line as it is found; returns whether nothing is broken."""
    console, found = make_console(), []
    for finding in diagnose(server, folder):
        word, style = MARKS[finding.state]
        found.append(finding.state)
        console.print(Text.assemble((f"{word:8}", style), f"{finding.link:{LINK_WIDTH}}  {printable(finding.text)}"),
                      soft_wrap=True)
        if finding.advice:
            console.print(f"{'':8}{'':{LINK_WIDTH}}  {printable(finding.advice)}", markup=False, soft_wrap=True)
    if "broken" in found:
        return False
    console.print(f"\nThis node can reach {server}" + (", with warnings." if "warning" in found else "."), markup=False)
    return True
