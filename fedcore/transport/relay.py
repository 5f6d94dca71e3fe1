"""The server's part in relaying: connects a call of one peer with a call of another, and passes bytes on unread.

One call, `Relay`, has three uses, and its first message says which. A peer that nobody can dial keeps one open to
hear of callers (`accept`). A peer that wants to reach it opens another (`dial`); the first one hears of it and opens
one more (`answer`), and whatever comes on either of the two goes out on the other until one ends. With certificates,
what peers say to each other is encrypted between them: the server has no key to it.
"""
import asyncio
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from fedcore.errors import MalformedFrame, shown
from fedcore.transport.members import Member
from fedcore.transport.wire import pack, text_of, unpack

if TYPE_CHECKING:
    from fedcore.transport.service import Context, LinkService

FIRST_WORD_S = 10.0    # within which a caller must say what it wants
PAIR_S = 5.0           # within which a peer must take a call
# Peers that are connected ask each other every 20 s whether they live: what is silent for longer is dead.
IDLE_S = 60.0
MOST_UNHEARD = 256     # calls that one peer has not heard of yet


@dataclass(eq=False)
class Tunnel:
    """Two calls that belong together.

    Attributes:
        caller, target: node ids.
        answered: becomes the target's call.
        over: it is to end: either side has, or may not any more.
        ended: nothing passes any more.
        writing: what is on its way out, by call.
        moved_at: when something last passed, of the loop's clock.
    """

    caller: int
    target: int
    answered: "asyncio.Future[Context]"
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    writing: dict["Context", asyncio.Task[None]] = field(default_factory=dict)
    moved_at: float = 0.0


class Relay:
    """Who may reach whom through the server, and what passes.

    At most one message of each direction of a tunnel is in memory: no more is read before it has gone out.

    Attributes:
        bytes: passed on so far.
    """

    def __init__(self, service: "LinkService", most_tunnels: int):
        self._service, self._most = service, most_tunnels
        self._members: frozenset[int] = frozenset()
        self._acceptors: dict[int, asyncio.Queue[bytes | None]] = {}    # by node id
        self._tunnels: dict[tuple[int, int], Tunnel] = {}               # by caller and target
        self._unanswered: dict[str, Tunnel] = {}
        self._news = asyncio.Event()                                    # somebody accepts calls from now on
        self.bytes = 0

    @property
    def count(self) -> int:
        """How many tunnels there are."""
        return len(self._tunnels)

    def set_members(self, node_ids: Collection[int]) -> None:
        """Relay between these nodes from now on, and between no others."""
        gone, self._members = self._members - frozenset(node_ids), frozenset(node_ids)
        for node_id in gone:
            self.cut(node_id)

    def cut(self, node_id: int) -> None:
        """End whatever a node has here."""
        for pair, tunnel in self._tunnels.items():
            if node_id in pair:
                tunnel.over.set()
        if (acceptor := self._acceptors.pop(node_id, None)) is not None:
            _replace(acceptor)

    # ---- calls ------------------------------------------------------------------------------------------------------

    async def call(self, _: Any, context: "Context") -> None:
        """Do what a call is for."""
        try:
            async with asyncio.timeout(FIRST_WORD_S):
                envelope = unpack(await context.read())
        except (MalformedFrame, TimeoutError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error) or "nothing was said")
            return
        member = await self._service.member_of(envelope, context)
        if member.node_id not in self._members:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the server relays nothing for you")
        uses = {"accept": self._accept, "dial": self._dial, "answer": self._answer}
        kind = envelope.facts.get("kind")
        if kind not in uses:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"nobody relays {shown(kind)}")
        await uses[str(kind)](member, envelope.facts, context)

    async def _accept(self, member: Member, _: Mapping[str, Any], context: "Context") -> None:
        """Tell a node who calls it, for as long as it listens."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MOST_UNHEARD)
        before, self._acceptors[member.node_id] = self._acceptors.get(member.node_id), queue
        if before is not None:
            _replace(before)
        self._news.set()
        self._news = asyncio.Event()
        try:
            while (message := await queue.get()) is not None:
                await context.write(message)
        finally:
            if self._acceptors.get(member.node_id) is queue:
                del self._acceptors[member.node_id]

    async def _dial(self, member: Member, facts: Mapping[str, Any], context: "Context") -> None:
        """Connect a node with another one, and pass on what they say."""
        rank = facts.get("to")
        target = next((other.node_id for other in self._service.board.members.values()
                       if other.node_id in self._members and other.partition == rank and other is not member), None)
        if target is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no peer {shown(rank)} takes part")
            return
        pair, name = (member.node_id, target), secrets.token_hex(16)
        if (before := self._tunnels.pop(pair, None)) is not None:
            before.over.set()    # whoever calls again has given up what was before
        if len(self._tunnels) >= self._most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the server relays {self._most} calls already")
        tunnel = Tunnel(*pair, asyncio.get_running_loop().create_future())
        self._tunnels[pair] = self._unanswered[name] = tunnel
        try:
            async with asyncio.timeout(PAIR_S):
                (await self._acceptor(target)).put_nowait(pack({"kind": "open", "id": name}))
                answer = await tunnel.answered
            await self._carry(tunnel, context, answer)
            tunnel.ended.set()
            await _written(tunnel, context)
        except (TimeoutError, asyncio.QueueFull):
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"peer {rank} does not take calls at present")
        finally:
            tunnel.over.set()
            tunnel.ended.set()
            self._unanswered.pop(name, None)
            if self._tunnels.get(pair) is tunnel:
                del self._tunnels[pair]

    async def _acceptor(self, node_id: int) -> "asyncio.Queue[bytes | None]":
        while (found := self._acceptors.get(node_id)) is None:
            await self._news.wait()
        return found

    async def _answer(self, member: Member, facts: Mapping[str, Any], context: "Context") -> None:
        """Take a call that a node was told of."""
        try:
            tunnel = self._unanswered.get(text_of(facts, "id"))
        except MalformedFrame:
            tunnel = None
        if tunnel is None or tunnel.target != member.node_id or tunnel.answered.done():
            await context.abort(grpc.StatusCode.NOT_FOUND, "nobody waits for this answer")
            return
        tunnel.answered.set_result(context)
        try:
            await tunnel.ended.wait()
            await _written(tunnel, context)
        finally:
            tunnel.over.set()

    # ---- what passes ------------------------------------------------------------------------------------------------

    async def _carry(self, tunnel: Tunnel, first: "Context", second: "Context") -> None:
        """Pass on what comes, both ways, until one side ends, nothing passes for long, or one may not any more."""
        loop = asyncio.get_running_loop()
        tunnel.moved_at = loop.time()
        tasks = {loop.create_task(self._pass(tunnel, first, second)),
                 loop.create_task(self._pass(tunnel, second, first)), loop.create_task(_wait(tunnel.over))}
        try:
            while loop.time() - tunnel.moved_at < IDLE_S:
                done, _ = await asyncio.wait(tasks, timeout=IDLE_S / 4, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(self, tunnel: Tunnel, source: "Context", sink: "Context") -> None:
        while isinstance(data := await source.read(), bytes):
            self.bytes += len(data)
            writing = tunnel.writing[sink] = asyncio.get_running_loop().create_task(sink.write(data))
            # Its error may come when nobody waits for it any more, and is no news then.
            writing.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(writing)
            tunnel.moved_at = asyncio.get_running_loop().time()


async def _written(tunnel: Tunnel, call: "Context") -> None:
    """Wait until nothing is on its way out on a call: gRPC cannot tell a peer of a call's end before that."""
    if (writing := tunnel.writing.get(call)) is not None:
        await asyncio.wait({writing})


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _replace(acceptor: "asyncio.Queue[bytes | None]") -> None:
    """Have a call that tells of callers end: what it has not told yet will be asked for again."""
    while not acceptor.empty():
        acceptor.get_nowait()
    acceptor.put_nowait(None)
