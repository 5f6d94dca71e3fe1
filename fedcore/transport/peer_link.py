"""One peer's connection to another: messages in order, acknowledged, sent again after a broken connection."""
import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from fedcore.errors import BadCertificate, LinkRefused, MalformedFrame, TooSlow
from fedcore.peers.envelope import Envelope
from fedcore.peers.ticks import exponential
from fedcore.tasks import printable
from fedcore.tls import Credentials, identity_of, node_host
from fedcore.transport.dial import open_channel, why
from fedcore.transport.frames import Framed
from fedcore.transport.peer_messages import frame
from fedcore.transport.peer_roster import Entry
from fedcore.transport.proof import check_proof
from fedcore.transport.side_door import MOST_FAILURES, SideDial
from fedcore.transport.side_streams import SIDE_BYTES
from fedcore.transport.streams import Pace, write_body
from fedcore.transport.wire import INLINE_BYTES, PROTOCOL, pack, unpack

logger = logging.getLogger("fedcore")

# Fewer, larger chunks than on the link to a server, where many clients share the server's memory.
PEER_CHUNK_BYTES = 2 << 20
SERVICE, TALK = "fedcore.Peers", "Talk"
WELCOME_S = 10.0
FIRST_WAIT_S, MOST_WAIT_S = 0.05, 5.0
PATIENT = 7    # attempts after which the wait is at its longest
# Messages that may wait for a peer that does not take them; beyond that the newest are not delivered.
MOST_QUEUED = 256

Waiting = tuple[int, Framed, "asyncio.Future[bool]"]


class PeerLink:
    """Sends what one peer has for another. A message counts as delivered once the other end acknowledges it.

    Args:
        hello: what this peer says of itself.
        to: the peer that it talks to.
        threads: for what blocks.
        on_incident: told who answers in its place.
    """

    def __init__(
        self, hello: dict[str, Any], to: Entry, credentials: Credentials | None, pace: Pace, seed: int,
        threads: ThreadPoolExecutor, on_incident: Callable[[str, str], None],
    ):
        self._hello, self._to, self._credentials, self._pace, self._seed = hello, to, credentials, pace, seed
        self._threads, self._on_incident = threads, on_incident
        self._side: SideDial | None = None
        self._beside: set[int] = set()              # numbers of what was sent on it and not acknowledged
        self._side_failures = 0                     # connections in a row that ended with such
        self._queue: deque[Waiting] = deque()       # not acknowledged, oldest first
        self._sent = 0                              # of the queue, how many were sent on this connection
        self._number = 0
        self._attempts = 0
        self._wake, self._called = asyncio.Event(), asyncio.Event()
        self.refused: str | None = None
        self.silent_since: float | None = asyncio.get_running_loop().time()    # None while it is connected
        self._task = asyncio.get_running_loop().create_task(self._keep_talking())
        self._task.add_done_callback(self._ended)

    def post(self, envelope: Envelope) -> "asyncio.Future[bool]":
        """Send an envelope; the future becomes True when it has been delivered, False when it never will be."""
        delivered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if len(self._queue) >= MOST_QUEUED:
            delivered.set_result(False)
            return delivered
        self._queue.append((self._number, frame(envelope), delivered))
        self._number += 1
        self._wake.set()
        return delivered

    @property
    def is_idle(self) -> bool:
        """Whether everything was delivered."""
        return not self._queue

    async def close(self) -> None:
        """End the connection; what was not delivered is not."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._give_up()

    def call_again(self) -> None:
        """Connect at once, and call the other end silent from now on only."""
        self._attempts = 0
        if self.silent_since is not None:
            self.silent_since = asyncio.get_running_loop().time()
        self._called.set()

    def forget(self) -> None:
        """Drop what was not delivered: the other end is another process by now, or none."""
        self._give_up()
        self._sent = 0
        self._beside.clear()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Whatever it was that ended the talking: nobody must wait for it for ever."""
        if self.silent_since is None:
            self.silent_since = task.get_loop().time()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Talking to peer %s ended with %r", self._to.name, error)

    def _give_up(self) -> None:
        for _, _, delivered in self._queue:
            if not delivered.done():
                delivered.set_result(False)
        self._queue.clear()

    async def _keep_talking(self) -> None:
        """Connect, talk, and connect again when that ends, waiting longer each time, with jitter."""
        while True:
            try:
                await self._talk()
            except LinkRefused as error:
                # Whoever answers there may be somebody else, or be set right: this peer goes on asking, now and then.
                if self.refused != str(error):
                    logger.error("Peer %s refuses this peer: %s", self._to.name, error)
                self.refused, self._attempts = str(error), max(self._attempts, PATIENT)
            except BadCertificate as error:
                if self.refused != str(error):
                    self._on_incident(self._to.name, str(error))
                self.refused, self._attempts = str(error), max(self._attempts, PATIENT)
            except (ConnectionError, MalformedFrame, TooSlow) as error:
                logger.debug("Talking to peer %s: %s", self._to.name, error)
            if self.silent_since is None:
                self.silent_since = asyncio.get_running_loop().time()
            longest = min(MOST_WAIT_S, FIRST_WAIT_S * 2**min(self._attempts, 16))
            self._attempts += 1
            # Between half of it and all of it, so that peers that lost each other do not all come at once.
            share = min(1.0, exponential(1.0, self._seed, "back-off", self._to.name, self._attempts))
            self._called.clear()
            try:
                async with asyncio.timeout(longest * (0.5 + 0.5 * share)):
                    await self._called.wait()
            except TimeoutError:
                continue

    async def _talk(self) -> None:
        host = node_host(self._to.name) if self._credentials is not None else None
        channel = open_channel(self._to.address, self._credentials, host)
        call = channel.stream_stream(f"/{SERVICE}/{TALK}")()
        try:
            answer = await self._introduce(call)
            self._attempts = self._sent = 0
            self.silent_since = self.refused = None
            self._open_side(answer.get("side"))
            hearing = asyncio.get_running_loop().create_task(self._hear(call))
            try:
                await self._say(call, hearing)
            finally:
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)
        except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
            raise ConnectionError(why(error)) from error
        finally:
            self._close_side()
            call.cancel()
            await channel.close()

    async def _introduce(self, call: Any) -> dict[str, Any]:
        """Say who this is; returns the other end's welcome.

        Raises:
            LinkRefused: it turns this peer away.
            BadCertificate: it is not the peer that is expected.
        """
        nonce = secrets.token_hex(16)
        async with asyncio.timeout(WELCOME_S):
            await call.write(pack({**self._hello, "nonce": nonce}))
            answer = unpack(await call.read()).facts
        if answer.get("kind") == "refused":
            raise LinkRefused(printable(str(answer.get("reason"))))
        if answer.get("kind") != "welcome":
            raise MalformedFrame("it does not speak this protocol")
        if self._credentials is not None:
            own = identity_of(self._credentials.cert).fingerprint
            check_proof(answer.get("proof"), self._to.fingerprint, self._hello["run"], nonce, own)
        return answer

    def _open_side(self, offered: Any) -> None:
        """Begin to open a stream for large bodies, where the other end offers one."""
        if not isinstance(offered, Mapping) or self._side_failures >= MOST_FAILURES:
            return
        port, ticket = offered.get("port"), offered.get("ticket")
        if type(port) is not int or not 0 < port < 1 << 16 or not isinstance(ticket, str):
            raise MalformedFrame("it offers a side stream that nobody could open")
        self._side = SideDial(self._to, port, ticket, self._credentials, self._pace, self._threads)

    def _close_side(self) -> None:
        if self._side is not None:
            self._side.close()
        self._side_failures += bool(self._beside)
        self._side, self._beside = None, set()

    async def _say(self, call: Any, hearing: "asyncio.Task[None]") -> None:
        while not hearing.done():
            while self._sent < len(self._queue):
                number, framed, _ = self._queue[self._sent]
                self._sent += 1
                await self._send(call, number, framed)
            self._wake.clear()
            waking = asyncio.get_running_loop().create_task(self._wake.wait())
            try:
                await asyncio.wait({waking, hearing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waking.cancel()
        await hearing

    async def _send(self, call: Any, number: int, framed: Framed) -> None:
        inline = framed.size <= INLINE_BYTES
        side = self._side.stream if self._side is not None and framed.size >= SIDE_BYTES else None
        first = framed if inline else Framed(framed.head, (), 0)
        await call.write(pack({"n": number, "inline": inline, "side": side is not None}, first))
        if side is not None:
            self._beside.add(number)
            await asyncio.get_running_loop().run_in_executor(self._threads, side.send, framed)
        elif not inline:
            await write_body(call.write, framed, self._pace, 0, self._credentials is None,
                             chunk_bytes=PEER_CHUNK_BYTES)

    async def _hear(self, call: Any) -> None:
        """Take acknowledgements, which come in the order of sending."""
        while True:
            answer = unpack(await call.read()).facts
            if answer.get("kind") == "refused":
                raise LinkRefused(printable(str(answer.get("reason"))))
            if not self._sent or answer.get("n") != self._queue[0][0]:
                raise MalformedFrame("it acknowledges what it was not sent")
            number, _, delivered = self._queue.popleft()
            self._sent -= 1
            if number in self._beside:
                self._beside.remove(number)
                self._side_failures = 0
            if not delivered.done():
                delivered.set_result(True)


def hello_of(run: str, rank: int, name: str, alike: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a peer says when it connects.

    Args:
        alike: what must be the same at all peers.
    """
    return {"protocol": PROTOCOL, "run": run, "rank": rank, "name": name, "alike": dict(alike or {})}
