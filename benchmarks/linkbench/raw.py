"""The yardstick: a payload over grpc.aio, cut into chunks of the same size beforehand, thrown away where it arrives."""
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio

from fedcore.tls import Credentials, server_options
from fedcore.transport.dial import open_channel
from fedcore.transport.frames import CHUNK_BYTES
from fedcore.transport.loop import submit
from fedcore.transport.wire import KEEPALIVE

CHUNKS: list[bytes] = []


def payload(chunks: int) -> list[bytes]:
    """Return so many chunks, each with memory of its own: a payload is not in the processor's cache."""
    while len(CHUNKS) < chunks:
        CHUNKS.append(bytes([1 + len(CHUNKS) % 255]) * CHUNK_BYTES)
    return CHUNKS[:chunks]


async def _down(request: bytes, context: Any) -> None:
    for chunk in payload(int(request)):
        await context.write(chunk)


async def _up(requests: AsyncIterator[bytes], context: Any) -> bytes:
    total = 0
    while (chunk := await context.read()) is not aio.EOF:
        total += len(chunk)
    return str(total).encode()


def serve(credentials: Credentials | None) -> tuple[aio.Server, str]:
    """Start a server on the link's loop; returns it and its address."""
    async def start() -> tuple[aio.Server, int]:
        server = aio.server(options=KEEPALIVE)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw", {
            "Down": grpc.unary_stream_rpc_method_handler(_down), "Up": grpc.stream_unary_rpc_method_handler(_up),
        }),))
        port = server.add_insecure_port("127.0.0.1:0") if credentials is None else \
            server.add_secure_port("127.0.0.1:0", server_options(credentials))
        await server.start()
        return server, port

    server, port = submit(start()).result()
    return server, f"127.0.0.1:{port}"


def transfer(address: str, credentials: Credentials | None, chunks: int, up: bool) -> float:
    """Move chunks over a connection that is open already; returns the seconds."""
    ready = payload(chunks) if up else []

    async def move() -> float:
        channel = open_channel(address, credentials)
        await channel.channel_ready()
        started = time.perf_counter()
        if up:
            call = channel.stream_unary("/raw/Up")()
            for chunk in ready:
                await call.write(chunk)
            await call.done_writing()
            assert int(await call) == chunks * CHUNK_BYTES
        else:
            received = 0
            stream = channel.unary_stream("/raw/Down")(str(chunks).encode())
            while (chunk := await stream.read()) is not aio.EOF:
                received += len(chunk)
            assert received == chunks * CHUNK_BYTES
        seconds = time.perf_counter() - started
        await channel.close()
        return seconds

    return submit(move()).result()
