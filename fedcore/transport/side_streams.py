"""Large bodies between peers beside gRPC: a TCP or TLS connection for each way, on which nothing else travels.

gRPC takes nothing but `bytes` and copies them at both ends; a socket takes a vector's memory as it lies there. What
comes when is settled on the gRPC stream, so bodies follow one another here without a word between them. In clear, each
ends with a checksum. A port that cannot be reached costs nothing: bodies then travel on the gRPC stream.
"""
import hmac
import os
import secrets
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from fedcore.errors import BadCertificate, MalformedFrame, StreamCut
from fedcore.tls import Credentials, fingerprint_of, node_host
from fedcore.transport.frames import CHECKSUM_BYTES, CHUNK_BYTES, Framed, checksum
from fedcore.transport.streams import Pace

# Smaller bodies gain nothing.
SIDE_BYTES = 1 << 20
# TLS writes all of a piece or times out: a thin link must be able to take one in the time that `Pace` gives it.
TLS_PIECE_BYTES = 64 << 10
TICKET_BYTES = 32
# How long a caller may take to say who it is, and how long it waits for its turn to.
ANSWER_S, OPENING_S = 3.0, 10.0
SPREAD = 0x9E3779B97F4A7C15    # odd, so that multiplying by it loses nothing modulo 2**64


class SideStream:
    """One end of a connection on which bodies travel one way; its methods block, each in a thread of its own.

    Args:
        link: connected; this object closes it.
        checked: whether a checksum follows each body.
    """

    def __init__(self, link: socket.socket, pace: Pace, checked: bool):
        self._link, self._pace, self._checked = link, pace, checked
        self._using = threading.Lock()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, framed: Framed) -> None:
        """Send a body.

        Raises:
            ConnectionError: the connection ended.
            TooSlow: the other end does not take it.
        """
        with self._used(broken=ConnectionError):
            self._send(framed, _Clock(self._link, self._pace))

    def _send(self, framed: Framed, clock: "_Clock") -> None:
        total = 0
        for block in framed.blocks():
            if self._checked:
                total = _added(total, block)
            self._push(block, clock)
        if self._checked:
            self._push(memoryview(total.to_bytes(CHECKSUM_BYTES, "little")), clock)

    def receive(self, body: np.ndarray) -> None:
        """Fill a body, shape (size,), uint8.

        Raises:
            StreamCut: the connection ended.
            TooSlow: the other end does not send it.
            MalformedFrame: it was damaged on the way.
        """
        with self._used(broken=StreamCut):
            self._receive(body.data, _Clock(self._link, self._pace))

    def _receive(self, memory: memoryview, clock: "_Clock") -> None:
        total = 0
        for start in range(0, len(memory), CHUNK_BYTES):
            block = memory[start:start + CHUNK_BYTES]
            self._pull(block, clock)
            if self._checked:
                total = _added(total, block)
        if self._checked:
            claimed = memoryview(bytearray(CHECKSUM_BYTES))
            self._pull(claimed, clock)
            if int.from_bytes(claimed, "little") != total:
                raise MalformedFrame(f"a body of {len(memory)} bytes was damaged on the way")

    @contextmanager
    def _used(self, broken: type[Exception]) -> Iterator[None]:
        """Hold the connection, and call what ends it by its name."""
        with self._using:
            try:
                yield
            except TimeoutError as error:
                raise self._pace.too_slow() from error
            except OSError as error:
                raise broken(str(error)) from error

    def close(self) -> None:
        """End the connection; a thread that is using it fails."""
        with suppress(OSError):
            # Not the TLS object's own: that would first make it a connection in clear, which a thread may still use.
            socket.socket.shutdown(self._link, socket.SHUT_RDWR)
        with self._using:    # else its number might belong to another connection by the time the thread uses it
            self._link.close()

    def _push(self, data: memoryview, clock: "_Clock") -> None:
        step = TLS_PIECE_BYTES if isinstance(self._link, ssl.SSLSocket) else CHUNK_BYTES
        while len(data):
            sent = self._link.send(data[:step])
            clock.passed(sent)
            data = data[sent:]

    def _pull(self, into: memoryview, clock: "_Clock") -> None:
        while len(into):
            came = self._link.recv_into(into)
            if came == 0:
                raise StreamCut("the connection ended in the middle of a body")
            clock.passed(came)
            into = into[came:]


class _Clock:
    """Breaks a transfer off when it makes less progress than `pace` wants, by the connection's timeout."""

    def __init__(self, link: socket.socket, pace: Pace):
        self._link, self._pace, self._enough = link, pace, pace.min_bytes_per_s * pace.grace_s
        self._renew()

    def _renew(self) -> None:
        self._bytes, self._until = 0, time.monotonic() + self._pace.grace_s
        self._link.settimeout(self._pace.grace_s)

    def passed(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if self._bytes >= self._enough:
            self._renew()
        else:
            self._link.settimeout(max(0.001, self._until - time.monotonic()))


def _added(total: int, block: memoryview) -> int:
    """Return a body's checksum so far, one more block added: it notices blocks that changed places."""
    return (total * SPREAD + checksum(block)) % 2**64


# ---- opening ------------------------------------------------------------------------------------------------------


def new_ticket() -> str:
    """Return what whoever was told it may open a side stream with, hex."""
    return secrets.token_hex(TICKET_BYTES // 2)


def dial(
    address: tuple[str, int], ticket: str, credentials: Credentials | None, name: str, fingerprint: str, pace: Pace
) -> SideStream:
    """Open a side stream to a peer.

    Args:
        name: of the peer's certificate.
        fingerprint: of that certificate, lower-case hex; no other is talked to.

    Raises:
        OSError: it cannot be reached, or does not want this stream.
        BadCertificate: somebody else answers.
    """
    link = socket.create_connection(address, ANSWER_S)
    link.settimeout(OPENING_S)
    try:
        if credentials is not None:
            link = _context(credentials, server=False).wrap_socket(link, server_hostname=node_host(name))
            check_pinned(link, fingerprint)
        link.sendall(ticket.encode())
        if link.recv(1) != b"!":
            raise ConnectionRefusedError("the peer does not want this stream")
    except BaseException:
        link.close()
        raise
    return SideStream(link, pace, credentials is None)


def answer(link: socket.socket, credentials: Credentials | None) -> tuple[socket.socket, str]:
    """Return a caller's connection, with mutual TLS where credentials are given, and its ticket.

    Raises:
        OSError: it is none of the federation's, or says nothing.
    """
    link.settimeout(ANSWER_S)
    try:
        if credentials is not None:
            link = _context(credentials, server=True).wrap_socket(link, server_side=True)
        said = b""
        while len(said) < TICKET_BYTES:
            if not (more := link.recv(TICKET_BYTES - len(said))):
                raise ConnectionResetError("it left")
            said += more
    except BaseException:
        link.close()
        raise
    return link, said.decode("ascii", "replace")


def check_pinned(link: socket.socket, fingerprint: str) -> None:
    """Raise `BadCertificate` where the other end of a TLS connection has not the certificate that is expected."""
    from cryptography import x509

    assert isinstance(link, ssl.SSLSocket)
    shown = link.getpeercert(binary_form=True)
    if shown is None or not hmac.compare_digest(fingerprint_of(x509.load_der_x509_certificate(shown)), fingerprint):
        raise BadCertificate("it is not the one that the roster pins")


def _context(credentials: Credentials, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.ca.decode("ascii"))
    if server:
        context.num_tickets = 0    # nobody resumes, and whoever only sends would never read them
    with _as_file(credentials.cert + b"\n" + credentials.key) as path:
        context.load_cert_chain(path)
    return context


@contextmanager
def _as_file(content: bytes) -> Iterator[Path]:
    """Lend a file with a secret in it to what reads nothing but files; on Linux it is never on a disk."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "secret"
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
            yield path
        return
    with open(os.memfd_create("fedcore-key"), "wb") as file:
        file.write(content)
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}")
