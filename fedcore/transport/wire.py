"""The link's protocol: its methods, its messages, and the options both ends give to gRPC.

One call, `Control`, lives as long as a client is connected; work is announced on it, and small messages travel on it
whole. Large ones have a call of their own each: `Fetch` brings a request to the client, `Send` a reply to the server.
Between peers that cannot dial each other, `Relay` passes on bytes as they come (`relay.py`).
All messages are bytes: a JSON object, and behind it, where there is one, a small framed message.
"""
import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedcore.errors import MalformedFrame, StreamCut
from fedcore.seeds import derive_seed
from fedcore.transport.frames import CHUNK_BYTES, MAX_HEAD_BYTES, Framed
from fedcore.transport.pool import ALIGNMENT
from fedcore.transport.records import Content, Plan, parse

PROTOCOL = 1
SERVICE = "fedcore.Link"
# Messages up to this size need no call of their own.
INLINE_BYTES = 64 << 10
# The largest message of all is one with a head as long as allowed.
MAX_MESSAGE_BYTES = MAX_HEAD_BYTES + CHUNK_BYTES
NAME = re.compile(r"[a-z0-9-]{1,63}")
LENGTH = 4    # bytes of a length

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)


def server_options(max_connections: int) -> list[tuple[str, Any]]:
    """Return what the server tells gRPC; strangers who connect and do not speak are dropped after a while."""
    return [
        *KEEPALIVE,
        ("grpc.so_reuseport", 0),    # else a second server could listen on the same port, and get half the clients
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 60_000),
        ("grpc.max_concurrent_streams", 16),
        ("grpc.max_metadata_size", 8 << 10),
    ]


def channel_options(server_name: str | None = None) -> list[tuple[str, Any]]:
    """Return what a client tells gRPC."""
    named = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    # A channel of its own: channels to one address would share a connection.
    return [*KEEPALIVE, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), *named]


def method(name: str) -> str:
    """Return the path of one of the service's methods."""
    return f"/{SERVICE}/{name}"


class Envelope(NamedTuple):
    """A message as it came: what it says, and the small framed message behind it, if there is one."""

    facts: dict[str, Any]
    head: bytes
    body: memoryview

    def content(self) -> tuple[dict[str, Any], Content]:
        """Return the facts in the framed message's head, and its content."""
        plan = Plan.of(self.head)
        if plan.size != len(self.body):
            raise MalformedFrame(f"a message's head says {plan.size} bytes, but {len(self.body)} came")
        memory = np.empty(plan.size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        body = memory[start:start + plan.size]
        body[:] = np.frombuffer(self.body, np.uint8)
        return plan.facts, plan.build(body)


def pack(facts: Mapping[str, Any], framed: Framed | None = None) -> bytes:
    """Return a message as bytes."""
    text = Framed.of(_dumps(facts), ()).head
    parts = [len(text).to_bytes(LENGTH, "little"), text]
    if framed is not None:
        parts += [len(framed.head).to_bytes(LENGTH, "little"), framed.head, framed.joined()]
    return b"".join(parts)


def _dumps(facts: Mapping[str, Any]) -> bytes:


    return json.dumps(facts, separators=(",", ":")).encode()


def unpack(message: object) -> Envelope:
    """Read a message.

    Raises:
        MalformedFrame: nobody of ours wrote it, or the stream is over.
    """
    if not isinstance(message, bytes):
        raise StreamCut("the stream ended where a message was expected")
    text, rest = _cut(memoryview(message))
    head, body = _cut(rest) if len(rest) else (rest, rest)
    return Envelope(parse(text), bytes(head), body)


def _cut(data: memoryview) -> tuple[memoryview, memoryview]:
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    if len(data) < LENGTH or len(data) < end:
        raise MalformedFrame("a message is shorter than it says")
    return data[LENGTH:end], data[end:]


def text_of(facts: Mapping[str, Any], name: str, longest: int = 200) -> str:
    """Return a text that a message must have.

    Raises:
        MalformedFrame: it has none, or a very long one.
    """
    value = facts.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise MalformedFrame(f"a message has no proper {name!r}")
    return value


def node_id_of(name: str) -> int:
    """Return a node's number: the same wherever and whenever a node of that name connects, 63 bits, not 0 or 1."""
    return derive_seed(0, "node", name) | 2


def is_loopback(host: str) -> bool:
    """Say whether a host to listen on, or the address of a caller, is this machine itself."""
    host = host.strip("[]").removeprefix("::ffff:")
    if host in ("localhost", ""):
        return host == "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """Return the host in HOST:PORT."""
    return address.rpartition(":")[0]
