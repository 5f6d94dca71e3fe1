"""A node's ends of what its server relays: to this machine they are TCP connections on loopback.

Whoever wants to reach a peer that has no address dials a listener here, and the bytes go to the server in a call; the
peer's own end brings them to where that peer listens on its own loopback. `PeerWire` knows nothing of it, and its TLS
reaches from peer to peer.
"""
import asyncio
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, Self

import grpc

from fedcore.errors import BadInput, MalformedFrame
from fedcore.peers.segments import RELAYED, Segment
from fedcore.transport.dial import Link, why
from fedcore.transport.wire import method, pack, text_of, unpack

logger = logging.getLogger("fedcore")

# The connection of the client in whose thread an app runs, where it has one now.
LINK: ContextVar[Callable[[], Link | None] | None] = ContextVar("fedcore-link", default=None)

PIECE_BYTES = 256 << 10    # passed on at once
AGAIN_S = 0.2              # after which a node that lost its server looks for it again
LOOPBACK = "127.0.0.1"


class RelayEnds:
    """What one peer needs in one segment to reach those who have no address, and to be reached without one.

    Args:
        link: returns the connection to the server, None while there is none.
    """

    def __init__(self, link: Callable[[], Link | None]):
        self._link = link
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, segment: Segment, rank: int, link: Callable[[], Link | None] | None) -> tuple[Self, Segment]:
        """Return the ends, and the segment with addresses that this peer can dial.

        Raises:
            BadInput: the grid does not relay.
        """
        if link is None:
            if RELAYED in segment.addresses:
                raise BadInput("Only `fedcore server` relays between peers, and this node belongs to another grid.")
            link = _nowhere
        ends = cls(link)
        addresses = [await ends._listen(member) if address == RELAYED and member != rank else address
                     for member, address in zip(segment.members, segment.addresses, strict=True)]
        return ends, replace(segment, addresses=tuple(addresses))

    def accept(self, port: int) -> None:
        """Bring calls for this peer to where it listens on loopback."""
        self._keep(self._accept(port))

    async def close(self) -> None:
        """End everything."""
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- to others --------------------------------------------------------------------------------------------------

    async def _listen(self, rank: int) -> str:
        server = await asyncio.start_server(partial(self._dialled, rank), LOOPBACK, 0, limit=PIECE_BYTES)
        self._servers.append(server)
        return f"{LOOPBACK}:{server.sockets[0].getsockname()[1]}"

    def _dialled(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._keep(self._couple({"kind": "dial", "to": rank}, reader, writer))

    # ---- from others ------------------------------------------------------------------------------------------------

    async def _accept(self, port: int) -> None:
        """Hear of callers, for ever; where the server is away, as soon as it is back."""
        while True:
            if (link := self._link()) is not None:
                try:
                    await self._hear(link, port)
                except (grpc.RpcError, asyncio.InvalidStateError, MalformedFrame) as error:
                    logger.debug("The server does not relay to this peer: %s", why(error))
            await asyncio.sleep(AGAIN_S)

    async def _hear(self, link: Link, port: int) -> None:
        channel = link.another()
        call = channel.stream_stream(method("Relay"))()
        try:
            await call.write(pack({"kind": "accept", "session": link.session}))
            while isinstance(message := await call.read(), bytes):
                name = text_of(unpack(message).facts, "id")
                self._keep(self._answer(name, port))
        finally:
            call.cancel()
            await channel.close()

    async def _answer(self, name: str, port: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=PIECE_BYTES)
        except OSError:
            return    # it listens no more
        await self._couple({"kind": "answer", "id": name}, reader, writer)

    # ---- both -------------------------------------------------------------------------------------------------------

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _couple(
        self, hello: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Pass on what a connection and a call of the server's say to each other, until one of them ends."""
        link = self._link()
        if link is None:
            writer.close()
            return
        channel = link.another()
        call = channel.stream_stream(method("Relay"))()
        sending: asyncio.Task[None] | None = None
        try:
            await call.write(pack({**hello, "session": link.session}))
            sending = asyncio.get_running_loop().create_task(_send(reader, call))
            while isinstance(message := await call.read(), bytes):
                writer.write(message)
                await writer.drain()
        except (grpc.RpcError, asyncio.InvalidStateError, OSError) as error:
            logger.debug("What the server relays was broken off: %s", why(error))
        finally:
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            writer.close()
            call.cancel()
            await channel.close()


async def _send(reader: asyncio.StreamReader, call: Any) -> None:
    try:
        while data := await reader.read(PIECE_BYTES):
            await call.write(data)
    except OSError:
        pass    # cut on this machine: the other end must hear that nothing more comes
    await call.done_writing()


def _nowhere() -> None:
    return None
