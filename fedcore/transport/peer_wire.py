"""Messages between real peers over gRPC: a stream from each to each, mutual TLS, certificates pinned in the roster."""
import asyncio
import hmac
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import grpc
import numpy as np
from grpc import aio
from torch import Tensor

from fedcore.errors import BadCertificate, CannotListen, MalformedFrame, StreamCut, TooSlow, shown
from fedcore.peers.all_reduce import copy_of
from fedcore.peers.envelope import Envelope
from fedcore.peers.packing import Packed
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Reduced
from fedcore.peers.segments import RELAYED
from fedcore.tasks import printable
from fedcore.tls import Credentials, identity_of
from fedcore.tls import server_options as tls_server_options
from fedcore.transport.frames import Assembler
from fedcore.transport.peer_link import SERVICE, TALK, WELCOME_S, PeerLink, hello_of
from fedcore.transport.peer_messages import Arriving
from fedcore.transport.peer_roster import Roster
from fedcore.transport.pool import BufferPool
from fedcore.transport.proof import prove
from fedcore.transport.side_door import Expected, SideDoor, pool_for
from fedcore.transport.streams import Pace, read_body
from fedcore.transport.wire import PROTOCOL, host_of, pack, server_options, unpack

logger = logging.getLogger("fedcore")

IDLE_BYTES = 1 << 30
# A message may be so many times as large as this peer's own model.
MOST_MODELS = 8
LEAST_LIMIT = 1 << 24
# What a peer sends for its strategy: a lost one needs none of it, and nobody must wait until it has it.
WORK = ("exchange", "message", "meeting", "ring")


def largest_message(model_bytes: int) -> int:
    """Return how many bytes a message may have, given this peer's own model."""
    return max(LEAST_LIMIT, MOST_MODELS * model_bytes)


class Refusal(Exception):
    """Why a caller is turned away."""


class NotYet(Exception):
    """Why a caller is to come again: it is in a later segment of this run."""


def comes_later(theirs: object, ours: str) -> bool:
    """Say whether a caller's `RUN/NUMBER` is a later segment of the same run."""
    (run, _, number), (our_run, _, our_number) = str(theirs).rpartition("/"), ours.rpartition("/")
    return run == our_run != "" and number.isdecimal() and our_number.isdecimal() and int(number) > int(our_number)


class PeerWire:
    """Carries a peer's messages to the others of its roster, and theirs to it.

    Args:
        rank: this peer's place in the roster.
        credentials: None talks in clear.
        deliver: takes what comes; returns why it was not used, if it was not.
        on_incident: told who did what it should not have.
        model_bytes: of this peer's model; messages may be several times as large, and no larger.
        alike: settings that must be the same at all peers; who names others is refused.
    """

    def __init__(
        self, roster: Roster, rank: int, credentials: Credentials | None, deliver: Callable[[Envelope], str | None],
        on_incident: Callable[[str, str], None], model_bytes: int, pace: Pace | None = None,
        alike: Mapping[str, Any] | None = None,
    ):
        self._roster, self._rank, self._credentials = roster, rank, credentials
        self._deliver, self._on_incident = deliver, on_incident
        self._most_bytes, self._alike = largest_message(model_bytes), dict(alike or {})
        self._pace, self._pool = pace or Pace(), BufferPool(IDLE_BYTES)
        self._links: dict[int, PeerLink] = {}
        self._forgotten: set[int] = set()
        self._server: aio.Server | None = None
        self._door: SideDoor | None = None
        self._threads = pool_for(len(roster.ranks))
        self.port = 0    # where it listens
        self.donor: int | None = None    # from whom this peer has its state, where it came later

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self, listen: str | None = None, side_port: int = 0) -> None:
        """Listen, and begin to connect to the others.

        Args:
            listen: HOST:PORT, where that is not the roster's address.
            side_port: on which large vectors come; 0: any free one.

        Raises:
            CannotListen: a port is in use, or the address is not this machine's.
        """
        own = self._roster.peers[self._rank]
        address = listen or own.address
        server = aio.server(options=server_options(max(16, 4 * len(self._roster.peers))))
        handler = grpc.stream_stream_rpc_method_handler(self._talk)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {TALK: handler}),))
        try:
            if self._credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, tls_server_options(self._credentials))
        except RuntimeError as error:
            raise CannotListen(f"Cannot listen on {address}: the port is in use, or the address is not this machine's. "
                               "Another peer may still be running.") from error
        await server.start()
        self._server = server
        try:
            self._open_door(own.address, host_of(address), side_port)
        except CannotListen:
            await self.close()
            raise
        hello = hello_of(self._roster.run, self._rank, own.name, self._alike)
        for rank in self._roster.ranks:
            if rank != self._rank:
                entry = self._roster.peers[rank]
                self._links[rank] = PeerLink(hello, entry, self._credentials, self._pace, self._rank, self._threads,
                                             self._on_incident)

    def _open_door(self, reached_at: str, host: str, port: int) -> None:
        """Listen for side streams too; where that does not work, all travels on gRPC's.

        Raises:
            CannotListen: it does not work on the port that was asked for.
        """
        if reached_at == RELAYED:
            return    # whoever is let through to this peer is let through to one port
        try:
            self._door = SideDoor(host, port, self._credentials, self._pace, self._threads, self._on_incident)
        except OSError as error:
            if port:
                raise CannotListen(f"Cannot listen on port {port} of {host} for large vectors: {error.strerror}. Name "
                                   "another, or none: then any free one is taken.") from error
            logger.debug("There will be no side streams to this peer: %s", error)

    def silent_for(self, rank: int) -> float:
        """Return for how long a peer could not be reached, seconds."""
        since = self._links[rank].silent_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since

    def refusal(self, rank: int) -> str | None:
        """Return why a peer will not talk to this one, or this one with it; None where nothing stands in the way."""
        return self._links[rank].refused

    async def drain(self, within_s: float, lost: Collection[int] = ()) -> None:
        """Wait until everything was delivered, but to those who are lost, or for so many seconds."""
        until = asyncio.get_running_loop().time() + within_s
        links = [link for rank, link in self._links.items() if rank not in lost]
        while any(not link.is_idle for link in links) and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)

    def call_again(self, rank: int) -> None:
        """Connect at once to a peer that was away and has spoken; it counts as reached until then."""
        self._forgotten.discard(rank)
        self._links[rank].call_again()

    def forget(self, rank: int) -> None:
        """Drop what was not delivered to a peer that is lost, and what its work would bring there from now on."""
        self._forgotten.add(rank)
        if rank in self._links:
            self._links[rank].forget()

    async def close(self) -> None:
        """End all connections."""
        for link in self._links.values():
            await link.close()
        if self._door is not None:
            await self._door.close()
        if self._server is not None:
            await self._server.stop(0.2)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- as the peer sees it ----------------------------------------------------------------------------------------

    def post(self, to: int, envelope: Envelope) -> "asyncio.Future[bool]":
        """Send an envelope; the future becomes True when it has been delivered, False when it never will be."""
        if to in self._forgotten and envelope.kind in WORK:
            never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            never.set_result(False)
            return never
        return self._links[to].post(envelope)

    def all_reduce(
        self, peer: Peer, vector: Tensor | Packed, tag: str, round: int, weight: float, began: float
    ) -> "asyncio.Future[Reduced]":
        """Begin a mean over all members, of messages around a ring."""
        return peer.means.start(vector, tag, round, weight)

    def observe(self, peer: Peer, tag: str, round: int) -> "asyncio.Future[Reduced]":
        """Wait for a reduction's result, which whoever gave this newcomer its state passes on."""
        assert self.donor is not None, "only a newcomer observes"
        return asyncio.get_running_loop().create_task(copy_of(peer, self.donor, tag, round))

    def state_dict(self, rank: int) -> dict[str, Any]:
        """Return nothing: what was not acknowledged is sent again by whoever starts again."""
        return {}

    def load_state_dict(self, rank: int, state: Mapping[str, Any]) -> None:
        """Nothing was remembered."""

    # ---- what others send -------------------------------------------------------------------------------------------

    async def _talk(self, _: Any, context: Any) -> None:
        """Take another peer's messages for as long as it is connected."""
        caller, side = printable(context.peer()), None
        try:
            async with asyncio.timeout(WELCOME_S):
                hello = unpack(await context.read()).facts
            rank = self._admit(hello, context)
            caller = self._roster.peers[rank].name
            self._compare(hello.get("alike"))
            if rank in self._links:    # whoever dials can be dialled
                self._links[rank].call_again()
            if self._door is not None:
                side = self._door.expect(self._roster.peers[rank].fingerprint)
            await context.write(pack(self._welcome(rank, hello, side)))
            while isinstance(message := await context.read(), bytes):
                number, envelope = await self._receive(message, context, side)
                if envelope.source != rank or envelope.run != self._roster.run:
                    raise MalformedFrame(f"it sent a message of peer {envelope.source} in run {shown(envelope.run)}")
                self._hand_over(envelope)
                await context.write(pack({"n": number}))
        except StreamCut:
            return    # the connection ended; whoever was at the other end comes again
        except Refusal as error:
            self._on_incident(caller, str(error))
            await context.write(pack({"kind": "refused", "reason": str(error)}))
        except NotYet as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except (MalformedFrame, TooSlow, TimeoutError) as error:
            reason = str(error) or f"it said nothing for {WELCOME_S:g} s"
            self._on_incident(caller, reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        finally:
            if side is not None:
                side.close()

    def _hand_over(self, envelope: Envelope) -> None:
        try:
            self._deliver(envelope)
        except (KeyError, TypeError, ValueError) as error:
            logger.debug("A message could not be read", exc_info=True)
            raise MalformedFrame(
                f"a message of kind {shown(envelope.kind)} does not say what one must: {shown(repr(error))}") from error

    def _welcome(self, rank: int, hello: Mapping[str, Any], side: Expected | None) -> dict[str, Any]:
        """Return what a peer that is let in is told: who this is, and where it may send large bodies."""
        welcome: dict[str, Any] = {"kind": "welcome"}
        if self._credentials is not None:
            theirs = self._roster.peers[rank].fingerprint
            welcome["proof"] = prove(self._credentials, self._roster.run, str(hello.get("nonce")), theirs)
        if self._door is not None and side is not None:
            welcome["side"] = {"port": self._door.port, "ticket": side.ticket}
        return welcome

    def _admit(self, hello: Mapping[str, Any], context: Any) -> int:
        """Return the rank of a caller that is who it says.

        Raises:
            Refusal: it is not, or does not belong to this run.
        """
        rank, name = hello.get("rank"), hello.get("name")
        if hello.get("protocol") != PROTOCOL:
            raise Refusal(f"you speak version {shown(hello.get('protocol'))} of the protocol, not {PROTOCOL}")
        if comes_later(hello.get("run"), self._roster.run):
            raise NotYet(f"this peer is still in {self._roster.run}")
        if hello.get("run") != self._roster.run:
            raise Refusal(f"you belong to the run {shown(hello.get('run'))}, and this is {self._roster.run}")
        if type(rank) is not int or rank not in self._roster.ranks or rank == self._rank:
            raise Refusal(f"you say that your rank is {shown(rank)}")
        entry = self._roster.peers[rank]
        if name != entry.name:
            raise Refusal(f"you call yourself {shown(name)}, but peer {rank} is {entry.name}")
        if self._credentials is not None:
            certificates = context.auth_context().get("x509_pem_cert", [])
            try:
                identity = identity_of(certificates[0] if certificates else b"")
            except BadCertificate as error:
                raise Refusal(f"your certificate cannot be used: {error}") from error
            if identity.role != "node" or identity.name != entry.name or not hmac.compare_digest(
                    identity.fingerprint, entry.fingerprint):
                raise Refusal(f"your certificate ({identity}) is not the one that the roster pins for {entry.name}")
        return rank

    def _compare(self, theirs: object) -> None:
        """Refuse a caller that would wait for what nobody here does, or send what nobody here can use."""
        if not isinstance(theirs, Mapping) or not theirs:
            return    # it names nothing
        for name, ours in self._alike.items():
            if theirs.get(name) != ours:
                raise Refusal(f"you have {name}={shown(theirs.get(name))}, and this peer has {shown(ours)}: give all "
                              "peers the same experiment")

    async def _receive(self, message: bytes, context: Any, side: Expected | None) -> tuple[int, Envelope]:
        """Return the number of a message, and what it holds, once all of it has come.

        Raises:
            MalformedFrame: it is too large, or none of ours.
        """
        packed = unpack(message)
        number = packed.facts.get("n")
        if type(number) is not int:
            raise MalformedFrame("a message has no number")
        arriving = Arriving(packed.head)
        if arriving.size > self._most_bytes:
            raise MalformedFrame(f"a message of {arriving.size} bytes came, but {self._most_bytes} are allowed")
        body = self._pool.take(arriving.size)
        if packed.facts.get("inline"):
            if len(packed.body) != arriving.size:
                raise MalformedFrame(f"{len(packed.body)} bytes came where {arriving.size} were announced")
            body[:] = np.frombuffer(packed.body, np.uint8)
        elif packed.facts.get("side"):
            if side is None or not side.stream.done():
                raise MalformedFrame("it speaks of a side stream that it has not opened")
            await asyncio.get_running_loop().run_in_executor(self._threads, side.stream.result().receive, body)
        else:
            await read_body(context.read, Assembler(body, checked=self._credentials is None), self._pace)
        return number, arriving.build(body)
