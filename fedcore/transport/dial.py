"""One connection of a client to its server."""
import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import grpc
from grpc import aio

from fedcore.errors import LinkRefused, MalformedFrame, RunOver, StreamCut, TaskLost, TooSlow
from fedcore.tasks import printable
from fedcore.tls import Credentials, channel_credentials, expired, identity_of
from fedcore.transport.frames import Assembler, Framed
from fedcore.transport.handshakes import about_server
from fedcore.transport.pool import ALIGNMENT, BufferPool
from fedcore.transport.records import Plan
from fedcore.transport.streams import Pace, read_body, write_body
from fedcore.transport.wire import Envelope, channel_options, method, pack, unpack

logger = logging.getLogger("fedcore")

WELCOME_S = 30.0
CLOSED = "the connection was closed"


@dataclass(eq=False)
class Download:
    """A request as far as it has come."""

    head: bytes
    assembler: Assembler
    plan: Plan


def open_channel(address: str, credentials: Credentials | None, server_name: str | None = None) -> aio.Channel:
    """Return a channel to a server, with mutual TLS where credentials are given.

    Args:
        server_name: that the server's certificate must carry, where it is not the host in the address.
    """
    if credentials is None:
        return aio.insecure_channel(address, options=channel_options())
    return aio.secure_channel(address, channel_credentials(credentials), options=channel_options(server_name))


class Call:
    """A call whose channel may be closed while somebody reads or writes: that is a connection that was lost.

    gRPC says that the task which reads was cancelled, and whoever believes it ends without a word; and whoever writes
    before the call has reached the server waits for ever.
    """

    def __init__(self, call: Any):
        self._call = call
        self._reached = False
        self.cancel = call.cancel

    async def read(self) -> Any:
        """Return the next message, or gRPC's mark that there is none.

        Raises:
            ConnectionError, grpc.RpcError, asyncio.InvalidStateError: the connection ended.
        """
        return await self._unless_closed(self._call.read())

    async def write(self, message: bytes) -> None:
        """Send a message. Raises what `read` does."""
        if self._reached:
            await self._unless_closed(self._call.write(message))
        else:
            await self._unless_closed(self._first(message))
            self._reached = True

    async def _first(self, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        over, writing = asyncio.Event(), loop.create_task(self._call.write(message))
        self._call.add_done_callback(lambda _: over.set())
        ending = loop.create_task(over.wait())
        try:
            await asyncio.wait({writing, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ConnectionError(CLOSED)
            await writing
        finally:
            for task in (writing, ending):
                task.cancel()

    @staticmethod
    async def _unless_closed(step: Awaitable[Any]) -> Any:
        try:
            return await step
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ConnectionError(CLOSED) from error


class Link:
    """A connection that the server has accepted.

    Attributes:
        welcome: what the server said first.
        another: returns a further channel to the same server.
    """

    def __init__(self, channel: aio.Channel, call: Any, welcome: Mapping[str, Any], pace: Pace, checked: bool):
        self.channel, self._call, self.welcome, self._pace, self._checked = channel, Call(call), welcome, pace, checked
        self.session = str(welcome["session"])
        self._writing = asyncio.Lock()
        self.bytes_up = self.bytes_down = 0
        self.another: Callable[[], aio.Channel] = lambda: channel

    @classmethod
    async def open(
        cls, address: str, credentials: Credentials | None, server_name: str | None, hello: Mapping[str, Any],
        introduction: Framed | None, pace: Pace,
    ) -> Self:
        """Connect and say who this is.

        Raises:
            LinkRefused: the server turned this client away for good.
            RunOver: there is nothing left to do.
            ConnectionError: it is not reachable, or wants this client to come again later.
            MalformedFrame: it is no fedcore server.
        """
        channel = open_channel(address, credentials, server_name)
        call = channel.stream_stream(method("Control"))()
        try:
            async with asyncio.timeout(WELCOME_S):
                await call.write(pack(hello, introduction))
                answer = unpack(await call.read())
            kind = answer.facts.get("kind")
            if kind == "refused":
                reason = printable(str(answer.facts.get("reason")))
                raise (ConnectionError if answer.facts.get("retry") else LinkRefused)(reason)
            if kind == "bye":
                reason = printable(str(answer.facts.get("reason")))
                raise (RunOver if answer.facts.get("final") else ConnectionError)(reason)
            if kind != "welcome":
                raise MalformedFrame("the server does not speak this protocol")
            link = cls(channel, call, answer.facts, pace, credentials is None)
            link.another = partial(open_channel, address, credentials, server_name)
            return link
        except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
            own = None if credentials is None else expired(identity_of(credentials.cert))
            reason = own or about_server(await why_ended(call, error))
            await _hang_up(call, channel)
            raise ConnectionError(reason) from error
        except BaseException:
            await _hang_up(call, channel)
            raise

    async def read(self) -> Envelope | None:
        """Return the server's next message; None when the connection is over."""
        try:
            message = await self._call.read()
        except (grpc.RpcError, ConnectionError):
            return None
        return unpack(message) if isinstance(message, bytes) else None

    async def tell(self, facts: Mapping[str, Any], framed: Framed | None = None) -> None:
        """Say something to the server.

        Raises:
            ConnectionError: it does not hear.
        """
        try:
            async with self._writing:
                await self._call.write(pack(facts, framed))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise ConnectionError(why(error)) from error

    async def close(self) -> None:
        """End the connection."""
        await _hang_up(self._call, self.channel)

    async def fetch(self, name: str, partial: Download | None, pool: BufferPool, accept: Callable[[Plan], None]
                    ) -> Download:
        """Bring a request, from where an earlier attempt ended; what came of it stays in `partial`.

        Args:
            accept: raises what it likes when the request is too large.

        Raises:
            TaskLost: the server has no such request any more.
            ConnectionError, TooSlow, MalformedFrame: it was broken off.
        """
        start = partial.assembler.received if partial is not None else 0
        head = Framed(partial.head, (), 0) if partial is not None else None
        asked = pack({"session": self.session, "id": name, "start": start}, head)
        call = _begin(lambda: self.channel.unary_stream(method("Fetch"))(asked))
        found = partial
        try:
            async with asyncio.timeout(self._pace.grace_s):
                first = unpack(await call.read())
            if partial is None or partial.head != first.head or first.facts.get("start") != start:
                plan = Plan.of(first.head)
                accept(plan)
                pool.expect(plan.size + ALIGNMENT)    # the next request will be as large
                found = Download(first.head, Assembler(pool.take(plan.size), checked=self._checked), plan)
            assert found is not None
            try:
                await read_body(call.read, found.assembler, self._pace, self._count_down)
            except (MalformedFrame, StreamCut, TooSlow, grpc.RpcError, ConnectionError) as error:
                if found.assembler.missing:
                    raise Broken(found, str(error)) from error
                raise
            return found
        except grpc.RpcError as error:
            raise _failure(error) from error
        except (TimeoutError, asyncio.InvalidStateError) as error:
            raise ConnectionError("the server did not answer") from error
        finally:
            call.cancel()

    def _count_down(self, came: int) -> None:
        self.bytes_down += came

    def _count_up(self, went: int) -> None:
        self.bytes_up += went

    async def send(self, name: str, framed: Framed) -> None:
        """Bring a reply to the server, from where an earlier attempt ended, once it has room for it.

        Raises:
            TaskLost: the server does not want it any more.
            ConnectionError, TooSlow, MalformedFrame: it was broken off.
        """
        call = _begin(self.channel.stream_stream(method("Send")))
        try:
            await call.write(pack({"session": self.session, "id": name}, Framed(framed.head, (), 0)))
            answer = unpack(await call.read())
            while answer.facts.get("kind") == "wait":
                logger.debug("The server has no room for the reply yet (%s ahead).", answer.facts.get("ahead"))
                answer = unpack(await call.read())
            kind, start = answer.facts.get("kind"), answer.facts.get("start")
            if kind == "unwanted":
                raise TaskLost("the server does not wait for this reply any more")
            if kind == "done":
                return    # it was refused; the server has noted why
            if kind != "go" or type(start) is not int or not 0 <= start <= framed.size:
                raise MalformedFrame("the server's answer to an upload cannot be understood")
            await write_body(call.write, framed, self._pace, start, self._checked, self._count_up)
            if unpack(await call.read()).facts.get("kind") != "done":
                raise MalformedFrame("the server did not confirm an upload")
        except grpc.RpcError as error:
            raise _failure(error) from error
        except asyncio.InvalidStateError as error:
            raise ConnectionError("the connection ended") from error
        finally:
            call.cancel()


class Broken(ConnectionError):
    """A download that was broken off; `download` holds what came."""

    def __init__(self, download: Download, reason: str):
        super().__init__(reason)
        self.download = download


def _begin(call: Callable[[], Any]) -> Call:
    """Begin a call on a channel that may have been closed a moment ago.

    Raises:
        ConnectionError: it has.
    """
    try:
        return Call(call())
    except aio.UsageError as error:
        raise ConnectionError(CLOSED) from error


async def _hang_up(call: Any, channel: aio.Channel) -> None:
    # Closing the channel alone leaves the call open: the server would not notice before the next heartbeat.
    call.cancel()
    await channel.close()


def _failure(error: grpc.RpcError) -> Exception:
    if getattr(error, "code", lambda: None)() is grpc.StatusCode.NOT_FOUND:
        return TaskLost(why(error))
    return ConnectionError(why(error))


def why(error: BaseException) -> str:
    """Return what gRPC says of a failure, on one line."""
    details = error.details() if isinstance(error, aio.AioRpcError) else None
    return " ".join(printable(str(details or error or type(error).__name__)).split())


async def why_ended(call: Any, error: BaseException) -> str:
    """Return why a call is over."""
    if isinstance(error, TimeoutError):
        return f"the server did not answer within {WELCOME_S:g} s"
    if isinstance(error, aio.AioRpcError) or not call.done():
        return why(error)
    return " ".join(printable(str(await call.details())).split())

