"""The server's calls: a client's control stream, requests down, replies up, peers' words, a look at the state."""
import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from flwr.app import RecordDict
from grpc import aio

from fedcore import __version__
from fedcore.errors import BadCertificate, MalformedFrame, StreamCut, TooSlow, shown
from fedcore.tasks import printable
from fedcore.tls import Identity, identity_of
from fedcore.transport.board import UNREADABLE, Board, Refusal, read_ids
from fedcore.transport.frames import CHUNK_BYTES, Framed
from fedcore.transport.members import Job, Member, new_partial
from fedcore.transport.pool import BufferPool
from fedcore.transport.records import Content, Plan
from fedcore.transport.relay import Relay
from fedcore.transport.settings import LinkSettings
from fedcore.transport.streams import read_body, write_body
from fedcore.transport.wire import NAME, PROTOCOL, SERVICE, Envelope, is_loopback, pack, text_of, unpack

logger = logging.getLogger("fedcore")

HELLO_S = 10.0     # within which a caller must say who it is
PING_S = 3.0       # within which a client that is said to be alive must show it
MAX_INTRODUCTION_BYTES = 1 << 20
WHOLE_CHUNKS = 16               # downloads at one time that go in chunks of the usual size
LEAST_CHUNK_BYTES = 256 << 10
OUT_OF_TURN = "a call came that belongs to no connected client"
Context: TypeAlias = "aio.ServicerContext[Any, Any]"
Refuse = Callable[[Identity], str | None]


class LinkService:
    """What callers find behind the port.

    Args:
        secure: callers are who their certificates say; otherwise who they say they are.
        refuse: says why a certificate is not accepted any more, None when it is.
        status: returns what `fedcore status` shows.
    """

    def __init__(self, board: Board, settings: LinkSettings, pool: BufferPool, secure: bool, refuse: Refuse,
                 run_config: dict[str, Any], status: Callable[[], dict[str, Any]]):
        self.board, self.settings, self.pool, self.secure = board, settings, pool, secure
        self.refuse, self.run_config, self.status = refuse, run_config, status
        self.relay = Relay(self, settings.max_tunnels)
        self.ending: dict[str, Any] | None = None    # what whoever comes now is told
        self.dismissed: set[str] = set()             # who has come since, and was told

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what gRPC calls."""
        return grpc.method_handlers_generic_handler(SERVICE, {
            "Control": grpc.stream_stream_rpc_method_handler(self.control),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch),
            "Relay": grpc.stream_stream_rpc_method_handler(self.relay.call),
            "Send": grpc.stream_stream_rpc_method_handler(self.send),
            "Status": grpc.unary_unary_rpc_method_handler(self.show),
        })

    # ---- who is calling ---------------------------------------------------------------------------------------------

    def identify(self, context: Context) -> Identity | None:
        """Return who calls, by certificate; None in clear.

        Raises:
            Refusal: the certificate is none of a node, or not accepted any more.
        """
        if not self.secure:
            return None
        certificates = context.auth_context().get("x509_pem_cert", [])
        try:
            identity = identity_of(certificates[0] if certificates else b"")
        except BadCertificate as error:
            raise Refusal(f"your certificate cannot be used: {error}", retry=False) from error
        if identity.role != "node":
            raise Refusal(f"your certificate is a {identity.role}'s, and clients need a node's", retry=False)
        if (reason := self.refuse(identity)) is not None:
            raise Refusal(f"the server does not accept your certificate: {reason}", retry=False)
        return identity

    async def member_of(self, envelope: Envelope, context: Context) -> Member:
        """Return the client that a call belongs to."""
        caller = printable(context.peer())
        try:
            identity = self.identify(context)
            session = text_of(envelope.facts, "session")
            for member in self.board.members.values():
                if member.session == session and (identity is None or identity.name == member.name):
                    return member
        except (Refusal, MalformedFrame) as error:
            self.board.incident(caller, str(error))
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, OUT_OF_TURN)
        raise AssertionError("abort raises")

    @asynccontextmanager
    async def _alone(self, member: Member, kind: str, context: Context) -> AsyncIterator[None]:
        """Let a client make one call of a kind at a time."""
        if kind in member.busy:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"one {kind} at a time")
        member.busy.add(kind)
        try:
            yield
        finally:
            member.busy.discard(kind)

    # ---- the control stream -----------------------------------------------------------------------------------------

    async def control(self, _: Any, context: Context) -> None:
        """Talk to a client for as long as it is connected."""
        caller = printable(context.peer())
        try:
            identity = self.identify(context)
            async with asyncio.timeout(HELLO_S):
                hello = unpack(await context.read())
            caller = self._name(hello, identity, caller)
            if self.ending is not None:
                await context.write(pack({"kind": "bye", **self.ending}))
                self.dismissed.add(caller)
                return
            member = await self._let_in(caller, identity, hello)
        except StreamCut:
            return    # it came and went without a word
        except (Refusal, MalformedFrame, TimeoutError) as error:
            reason = str(error) or f"it said nothing for {HELLO_S:g} s"
            self.board.incident(caller, reason)
            retry = isinstance(error, Refusal) and error.retry
            await context.write(pack({"kind": "refused", "reason": reason, "retry": retry}))
            return
        member.address = printable(context.peer())
        session, outbox = member.session, member.outbox
        talking = asyncio.create_task(self._talk(member, outbox, context))
        listening = asyncio.create_task(self._listen(member, session, context))
        try:
            await asyncio.wait({talking, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            talking.cancel()
            listening.cancel()
            await asyncio.gather(talking, listening, return_exceptions=True)
            self.board.lose(member, session)

    def _name(self, hello: Envelope, identity: Identity | None, caller: str) -> str:
        claimed = text_of(hello.facts, "name")
        if NAME.fullmatch(claimed) is None:
            raise Refusal(f"the name {shown(claimed)} is not 1 to 63 of a-z, 0-9 and -", retry=False)
        if identity is not None and identity.name != claimed:
            raise Refusal(f"your certificate is {identity.name}'s, but you call yourself {claimed}", retry=False)
        if hello.facts.get("protocol") != PROTOCOL:
            theirs = shown(hello.facts.get("protocol"))
            raise Refusal(f"you speak version {theirs} of the protocol, and this server (fedcore {__version__}) "
                          f"version {PROTOCOL}: install the same fedcore on both", retry=False)
        return claimed

    async def _let_in(self, name: str, identity: Identity | None, hello: Envelope) -> Member:
        holds = read_ids(hello.facts.get("holds"))
        if len(hello.head) + len(hello.body) > MAX_INTRODUCTION_BYTES:
            raise Refusal(f"what it says of itself takes more than {MAX_INTRODUCTION_BYTES} bytes", retry=False)
        introduction = hello.content()[1] if hello.head else None
        if introduction is not None and not isinstance(introduction, RecordDict):
            raise MalformedFrame("a client introduces itself with an error")
        await self._replace(name, text_of(hello.facts, "instance"))
        member = self.board.admit(name, identity, hello.facts, introduction)
        member.tell({**self.board.welcome(member, holds), "run_config": self.run_config, "version": __version__})
        self.board.resume_jobs(member, holds)
        return member

    async def _replace(self, name: str, instance: str) -> None:
        """Make room for a client that comes again; one of the same name that is alive stays.

        Raises:
            Refusal: another process of that name is alive.
        """
        others = [member for member in self.board.members.values() if member.name == name and member.connected]
        for member in others:
            session, asked_at = member.session, self.board.now()
            if member.instance != instance:
                member.tell({"kind": "ping"})
                until = asked_at + PING_S
                while member.session == session and member.heard_at <= asked_at and self.board.now() < until:
                    await asyncio.sleep(PING_S / 100)
                if member.session == session and member.heard_at > asked_at:
                    raise Refusal(f"another process that is {name} is connected from {member.address}, and alive",
                                  retry=True)
            if member.session == session:
                member.hang_up()
                self.board.lose(member, session)

    @staticmethod
    async def _talk(member: Member, outbox: asyncio.Queue[bytes | None], context: Context) -> None:
        while (message := await outbox.get()) is not None:
            await context.write(message)

    async def _listen(self, member: Member, session: str | None, context: Context) -> None:
        try:
            async with asyncio.timeout(self.settings.silence_s) as limit:
                while isinstance(message := await context.read(), bytes):
                    limit.reschedule(asyncio.get_running_loop().time() + self.settings.silence_s)
                    member.heard_at = self.board.now()
                    # One that has been replaced by a newer connection is not heard any more.
                    if member.session != session or not self._hear(member, unpack(message)):
                        return
        except TimeoutError:
            logger.warning("Nothing was heard of client %s for %g s.", member.name, self.settings.silence_s)
        except MalformedFrame as error:
            self.board.incident(member.name, str(error))

    def _hear(self, member: Member, envelope: Envelope) -> bool:
        """Take note of a client's message; returns whether it stays."""
        kind = envelope.facts.get("kind")
        if kind == "beat":
            member.tell({"kind": "beat"})
        elif kind == "got":
            if (job := member.jobs.get(text_of(envelope.facts, "id"))) is not None:
                self.board.delivered(job)
        elif kind == "reply":
            self._take_inline(member, envelope)
        elif kind == "bye":
            self.board.retire(member, "it said goodbye")
            return False
        elif kind != "pong":
            raise MalformedFrame(f"a message of kind {shown(kind)} came")
        return True

    def _take_inline(self, member: Member, envelope: Envelope) -> None:
        job = self._open_job(member, text_of(envelope.facts, "id"))
        if job is None:
            return
        try:
            facts, content = envelope.content()
        except MalformedFrame as error:
            self._cannot_read(member, job, str(error))
            return
        member.up.add(len(envelope.body), self.board.now())
        self.board.arrive(job, content, facts)

    def _open_job(self, member: Member, name: str) -> Job | None:
        """Return the job that a reply belongs to; None for one that nobody waits for."""
        job = member.jobs.get(name)
        if job is None:
            self.board.counts["replays"] += 1
            if name in self.board.jobs:
                self.board.incident(member.name, "it answered a task of another client")
            member.tell({"kind": "taken", "ids": [name]})    # it need not keep it
            return None
        return job if job.is_open else None

    def _cannot_read(self, member: Member, job: Job, reason: str) -> None:
        self.board.incident(member.name, reason)
        self.board.fail(job, UNREADABLE, f"its reply cannot be read: {reason}")

    # ---- large messages ---------------------------------------------------------------------------------------------

    async def fetch(self, request: bytes, context: Context) -> None:
        """Send a client one of its requests, from the byte on that it asks for."""
        envelope = await self._read(request, context)
        member = await self.member_of(envelope, context)
        async with self._alone(member, "fetch", context):
            job = member.jobs.get(str(envelope.facts.get("id")))
            framed = None if job is None or not job.is_open else job.framed
            if job is None or framed is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, "the server has no such request any more")
                return
            start = envelope.facts.get("start")
            if envelope.head != framed.head or type(start) is not int or not 0 <= start <= framed.size:
                start = 0
            await context.write(pack({"start": start}, Framed(framed.head, (), 0)))
            try:
                await write_body(context.write, framed, self.settings.pace, start, not self.secure,
                                 lambda sent: member.down.add(sent, self.board.now()), self._chunk_bytes())
            except TooSlow as error:
                self.board.incident(member.name, f"it took a request too slowly: {error}")
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))

    def _chunk_bytes(self) -> int:
        """Return how much to hand to gRPC at once: less with many downloads, which together take no more memory."""
        downloads = sum("fetch" in member.busy for member in self.board.members.values())
        return max(LEAST_CHUNK_BYTES, CHUNK_BYTES * WHOLE_CHUNKS // max(WHOLE_CHUNKS, downloads))

    async def _read(self, message: object, context: Context) -> Envelope:
        try:
            return unpack(message)
        except MalformedFrame as error:
            if not isinstance(error, StreamCut):    # a connection that was cut is nobody's fault
                self.board.incident(printable(context.peer()), str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    async def send(self, _: Any, context: Context) -> None:
        """Take a client's reply, when there is room for it."""
        try:
            async with asyncio.timeout(HELLO_S):
                envelope = await self._read(await context.read(), context)
        except TimeoutError:
            self.board.incident(printable(context.peer()), f"it said nothing for {HELLO_S:g} s")
            return
        member = await self.member_of(envelope, context)
        async with self._alone(member, "send", context):
            job = self._open_job(member, str(envelope.facts.get("id")))
            if job is None:
                await context.write(pack({"kind": "unwanted"}))
                return
            try:
                plan = Plan.of(envelope.head)
                if plan.size > self.board.reply_limit():
                    raise MalformedFrame(f"it takes {plan.size} bytes, but {self.board.reply_limit()} are allowed")
                content = await self._receive(member, job, plan, envelope.head, context)
                if content is not None:
                    self.board.arrive(job, content, plan.facts)
                    del content    # the strategy's now: kept here until the client has heard, it would count twice
            except StreamCut as error:
                logger.info("A reply of client %s was cut off, and will be continued: %s.", member.name, error)
                return
            except MalformedFrame as error:
                self._cannot_read(member, job, str(error))
            except ConnectionResetError:
                return    # it will go on where it ended
            await context.write(pack({"kind": "done"}))

    async def _receive(self, member: Member, job: Job, plan: Plan, head: bytes, context: Context) -> Content | None:
        """Return a reply once it is complete; None when it is not wanted any more."""
        credits = self.board.credits
        if job.partial is None and not credits.has_room(plan.size):
            await context.write(pack({"kind": "wait", "ahead": credits.waiting}))
        await credits.acquire(job.name, plan.size)
        keep: bool | None = False
        try:
            if not job.is_open:
                return None
            if job.partial is None or job.partial.head != head:
                job.partial = new_partial(head, self.pool.take(plan.size), checked=not self.secure)
            assembler = job.partial.assembler
            job.enter("uploading", self.board.now())
            await context.write(pack({"kind": "go", "start": assembler.received}))
            keep = True
            await read_body(context.read, assembler, self.settings.pace,
                            lambda came: member.up.add(came, self.board.now()))
            keep = False
            content = plan.build(assembler.body)
            job.partial = None
            keep = None
            return content
        except TooSlow as error:
            keep = False
            self.board.incident(member.name, f"it sent a reply too slowly: {error}")
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
            raise
        finally:
            self._settle(job, keep)

    def _settle(self, job: Job, keep: bool | None) -> None:
        """Keep a broken-off upload for a second attempt, or forget it; None: it is complete."""
        if keep is None:
            return
        if keep and job.is_open:
            job.enter("working", self.board.now())
            self.board.credits.park(job.name)
        else:
            job.partial = None
            self.board.credits.release(job.name)

    async def show(self, request: bytes, context: Context) -> bytes:
        """Return the state of the run, as far as the caller may see it."""
        await self._read(request, context)
        try:
            identity = self.identify(context)
        except Refusal as error:
            self.board.incident(printable(context.peer()), error.reason)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.reason)
            raise
        state = {**self.status(), "protocol": PROTOCOL, "clock_s": time.time()}
        if identity is not None and identity.name not in self.settings.observers:
            state["nodes"] = [node for node in state["nodes"] if node["name"] == identity.name]
        elif identity is None and not is_loopback(context.peer().removeprefix("ipv4:").removeprefix("ipv6:")
                                                  .replace("%5B", "[").replace("%5D", "]").rpartition(":")[0]):
            state["nodes"] = []
        return pack(state)
