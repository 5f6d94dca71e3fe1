"""TLS handshakes that fail, in words: gRPC's core keeps them to itself, and to the other end it says even less.

A handshake that fails never becomes a call, so no code of ours hears of it on the server. The core writes a line on
stderr that names no peer; its trace of handshakes also says who it was. `Overheard` reads that trace.
"""
import logging
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

logger = logging.getLogger("fedcore")

TRACE = "handshaker"
SET_PIPE_SIZE, PIPE_BYTES = 1031, 1 << 20    # F_SETPIPE_SZ of Linux
# Whoever hangs up once has perhaps only looked whether the port is open.
HANG_UPS_UNSAID = 1
MOST_HOSTS = 10_000

# What gRPC and BoringSSL say, and what it means for the server about a client.
ABOUT_CLIENTS = (
    ("certificate has expired", "its certificate has expired: give it a new one (`fedcore certs node`)"),
    ("not yet valid", "its certificate is not valid yet: one of the two clocks is wrong (`fedcore doctor` compares "
                      "them)"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate was not issued by this federation's CA: give it one that was "
                                  "(`fedcore certs node`), or send it to its own server"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "it showed no certificate: it must come with --tls and a node's folder"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: it may be a client with --insecure, which needs --tls here, or no "
                             "client at all"),
    ("HTTP_REQUEST", "it does not speak TLS but HTTP: no client does that"),
    ("Socket closed", "it hung up in the middle of the TLS handshake: it may not accept this server's certificate "
                      "(compare ca.crt on both sides, `fedcore doctor` there says more), or only looks at the port"),
    ("ALERT", "it does not accept this server's certificate: compare ca.crt on both sides, and its clock"),
    ("BAD_PACKET_LENGTH", "it does not accept this server's certificate: compare ca.crt on both sides, and its clock"),
    ("UNSUPPORTED_PROTOCOL", "it speaks an old version of TLS"),
    ("imeout", "it did not complete the TLS handshake in time"),
    ("imed out", "it did not complete the TLS handshake in time"),
)
# The same for the client about its server.
ABOUT_SERVERS = (
    ("certificate has expired", "the server's certificate has expired: its operator must issue a new one"),
    ("not yet valid", "the server's certificate is not valid yet: one of the two clocks is wrong"),
    ("Hostname Verification", "the server's certificate is for another host name than the one dialled"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate was not issued by the CA whose ca.crt is in --tls"),
    ("WRONG_VERSION_NUMBER", "whoever listens there does not speak TLS"),
    ("Socket closed", "the server closed the connection before a word was said: it wants TLS, or does not accept this "
                      "certificate (its log says which)"),
)


def about_client(error: str) -> str:
    """Return what the server's operator should know of a handshake that failed."""
    return _meaning(error, ABOUT_CLIENTS) or f"the TLS handshake failed: {error[:200]}"


def about_server(error: str) -> str:
    """Return what the client's operator should know of a connection that failed; other errors as they are."""
    meaning = _meaning(error, ABOUT_SERVERS)
    return error if meaning is None else f"{meaning}; `fedcore doctor` looks at every link ({error[:300]})"


def _meaning(error: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((meaning for sign, meaning in table if sign in error), None)


LOGGED = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\] (.*)")
CONTINUED = (b"=== Source Location Trace", b"src/core/", b" shutdown=", b"\n")
PEER = re.compile(rb"endpoint_peer_address=(?:ipv4:|ipv6:)?([^,}]*)")
ERROR = re.compile(rb"error=(?!OK)(.*?)(?: shutdown=|$)")


class TraceReader:
    """Finds failed handshakes among the lines that gRPC's core writes.

    Args:
        tell: told the peer's address, empty where it is unknown, and what the core says.
    """

    def __init__(self, tell: Callable[[str, str], None]):
        self._tell = tell
        self._traced = self._ours = False
        self._error = ""

    def feed(self, line: bytes) -> bytes:
        """Take a line with its end; returns what is left of it for stderr: nothing, or the line."""
        found = LOGGED.match(line)
        if found is None:
            if not (self._ours and line.startswith(CONTINUED)) and b"grpc.internal." not in line:
                self._ours = False
                return line
            self._look_for_peer(line)
            return b""
        source, text = found.groups()
        self._ours = source in (b"handshaker.cc", b"channel_trace.h") or text.startswith(b"gRPC Tracers: ")
        if self._ours:
            self._traced = True
            if source == b"handshaker.cc" and (error := ERROR.search(text)):
                self._error = error[1].decode(errors="replace")
            self._look_for_peer(text)
            return b""
        if source.startswith(b"ssl_transport_security") and b"Handshake failed" in text:
            if not self._traced:    # else the trace, which names the peer, tells it again
                self._tell("", text.decode(errors="replace"))
            return b""
        return line

    def _look_for_peer(self, text: bytes) -> None:
        if self._error and (peer := PEER.search(text)):
            error, self._error = self._error, ""
            self._tell(peer[1].decode(errors="replace").replace("%5B", "[").replace("%5D", "]"), error)


class Overheard:
    """While this is open, handshakes that fail in this process are told; other things on stderr pass.

    Open it before gRPC is imported: only then does the core say who it was that failed. What it writes goes through a
    pipe, which never makes it wait; Python's own stderr does not.

    Attributes:
        tell: told who it was (a host, or words), and in words what went wrong; in a thread of its own.
    """

    def __init__(self) -> None:
        self.tell: Callable[[str, str], None] = lambda who, reason: logger.warning("%s: %s", who, reason)
        self._reader = TraceReader(self._on_failure)
        self._hang_ups: Counter[str] = Counter()

    def __enter__(self) -> Self:
        sys.stderr.flush()
        self._real = os.dup(2)
        source, target = os.pipe()
        _enlarge(target)
        os.set_blocking(target, False)    # a full pipe loses lines: the core must never wait for Python
        os.dup2(target, 2)
        os.close(target)
        self._python = sys.stderr
        self._ours = sys.stderr = os.fdopen(os.dup(self._real), "w", buffering=1, encoding=sys.stderr.encoding,
                                            errors="backslashreplace")
        self._thread = threading.Thread(target=self._listen, args=(source,), name="handshakes", daemon=True)
        self._thread.start()
        _import_talkative_grpc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if sys.stderr is self._ours:
            sys.stderr = self._python
        os.dup2(self._real, 2)    # the pipe's last writer is gone, and the thread ends
        self._thread.join(1.0)
        self._ours.close()

    def _listen(self, source: int) -> None:
        rest = b""
        while data := os.read(source, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            if kept := b"".join(self._reader.feed(line + b"\n") for line in lines):
                os.write(self._real, kept)
        if rest:
            os.write(self._real, rest)
        os.close(source)
        os.close(self._real)

    def _on_failure(self, peer: str, error: str) -> None:
        host = peer.rpartition(":")[0] or peer or "somebody"
        if "Socket closed" in error:
            if len(self._hang_ups) >= MOST_HOSTS:
                self._hang_ups.clear()
            self._hang_ups[host] += 1
            if self._hang_ups[host] <= HANG_UPS_UNSAID:
                return
        self.tell(host, about_client(error))


def _import_talkative_grpc() -> None:
    """Import gRPC with its trace of handshakes; it looks at the environment only then, and children need not."""
    before = {name: os.environ.get(name) for name in ("GRPC_TRACE", "GRPC_VERBOSITY")}
    os.environ["GRPC_TRACE"] = f"{before['GRPC_TRACE']},{TRACE}" if before["GRPC_TRACE"] else TRACE
    os.environ.pop("GRPC_VERBOSITY", None)    # Flower sets it so that nothing at all is said
    import grpc  # noqa: F401

    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _enlarge(pipe: int) -> None:
    import fcntl

    try:
        fcntl.fcntl(pipe, SET_PIPE_SIZE, PIPE_BYTES)
    except OSError:
        pass    # a smaller one does, too
