"""Who opens side streams, and who lets them in; see `side_streams.py` for what travels on them."""
import asyncio
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fedcore.errors import BadCertificate
from fedcore.tasks import printable
from fedcore.tls import Credentials
from fedcore.transport.peer_roster import Entry
from fedcore.transport.side_streams import SideStream, answer, check_pinned, dial, new_ticket
from fedcore.transport.streams import Pace
from fedcore.transport.wire import host_of

logger = logging.getLogger("fedcore")

# Callers of whom nothing is known yet, at one time; others wait to be accepted.
STRANGERS = 4
# After so many broken transfers in a row to one peer, something on the way does not like side streams.
MOST_FAILURES = 3


def pool_for(peers: int) -> ThreadPoolExecutor:
    """Return threads enough that no transfer ever waits for another to end: two such waits could be for each other."""
    return ThreadPoolExecutor(STRANGERS + 3 * peers, "fedcore-side")


class Expected:
    """A side stream that one caller may open.

    Attributes:
        ticket: with which it does.
        stream: there once it has.
    """

    def __init__(self, fingerprint: str):
        self.ticket, self.fingerprint = new_ticket(), fingerprint
        self.stream: asyncio.Future[SideStream] = asyncio.get_running_loop().create_future()

    def close(self) -> None:
        """End it, if it was opened; it cannot be any more."""
        if not self.stream.cancel() and not self.stream.cancelled():
            self.stream.result().close()


class SideDoor:
    """Listens for the side streams of those who were told that they may open one.

    Args:
        host: at which the peer listens.
        port: of this machine; 0: any free one.
        on_incident: told who came with another's ticket, and why it was not let in.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(
        self, host: str, port: int, credentials: Credentials | None, pace: Pace, threads: ThreadPoolExecutor,
        on_incident: Callable[[str, str], None],
    ):
        self._credentials, self._pace, self._threads, self._on_incident = credentials, pace, threads, on_incident
        host = host.strip("[]")
        self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._expected: dict[str, Expected] = {}
        self._admitting: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(STRANGERS)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    def expect(self, fingerprint: str) -> Expected:
        """Let one caller in, whose certificate is this one."""
        expected = Expected(fingerprint)
        self._expected[expected.ticket] = expected
        expected.stream.add_done_callback(lambda _: self._expected.pop(expected.ticket, None))
        return expected

    async def close(self) -> None:
        """Listen no more."""
        tasks = [self._accepting, *self._admitting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                link, where = await loop.sock_accept(self._listener)
            except OSError as error:    # the caller has left again, or there are no descriptors left for now
                logger.debug("A side stream was not accepted: %s", error)
                self._room.release()
                await asyncio.sleep(0.1)
                continue
            task = loop.create_task(self._admit(link, printable(str(where[0]))))
            self._admitting.add(task)
            task.add_done_callback(self._admitted)

    def _admitted(self, task: "asyncio.Task[None]") -> None:
        self._admitting.discard(task)
        self._room.release()

    async def _admit(self, link: socket.socket, caller: str) -> None:
        opening = self._threads.submit(answer, link, self._credentials)
        try:
            link, ticket = await asyncio.wrap_future(opening)
        except OSError as error:
            logger.debug("%s opened no side stream: %s", caller, error)
            return
        except asyncio.CancelledError:
            opening.add_done_callback(_hang_up)
            raise
        expected = self._expected.get(ticket)
        if expected is None or expected.stream.done():
            # Perhaps the gRPC stream on which it was given ended meanwhile: that is nobody's fault.
            logger.debug("%s has no ticket for a side stream, or one that is used up.", caller)
            link.close()
            return
        try:
            if self._credentials is not None:
                check_pinned(link, expected.fingerprint)
            link.send(b"!")
        except (BadCertificate, OSError) as error:
            self._on_incident(caller, str(error))
            link.close()
            return
        expected.stream.set_result(SideStream(link, self._pace, self._credentials is None))


class SideDial:
    """A side stream to another peer, which is being opened; until it is, bodies travel on the gRPC stream.

    Args:
        port: where the other listens for it.
        ticket: which the other gave for it.
    """

    def __init__(
        self, to: Entry, port: int, ticket: str, credentials: Credentials | None, pace: Pace,
        threads: ThreadPoolExecutor,
    ):
        self._name = to.name
        address = (host_of(to.address).strip("[]"), port)
        self._opening = threads.submit(dial, address, ticket, credentials, to.name, to.fingerprint, pace)
        self._opening.add_done_callback(self._note)

    @property
    def stream(self) -> SideStream | None:
        """The stream, None as long as there is none."""
        done = self._opening.done() and not self._opening.cancelled() and self._opening.exception() is None
        return self._opening.result() if done else None

    def close(self) -> None:
        """End it, even where it is still being opened."""
        self._opening.cancel()
        self._opening.add_done_callback(_close)

    def _note(self, opening: "Future[SideStream]") -> None:
        error = None if opening.cancelled() else opening.exception()
        if isinstance(error, BadCertificate):
            logger.error("Peer %s was sent nothing on a stream of its own: %s", self._name, error)
        elif error is not None:
            logger.debug("No side stream to peer %s: %s", self._name, error)


def _hang_up(opening: "Future[tuple[socket.socket, str]]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()


def _close(opening: "Future[SideStream]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
