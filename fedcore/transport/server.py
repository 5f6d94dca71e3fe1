"""The server's side of the link, which lives in the loop's thread, and the ways into it and out of it."""
import asyncio
import logging
import resource
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, TypeVar

from grpc import aio

from fedcore import __version__
from fedcore.clock import Event, WallClock
from fedcore.errors import CannotListen
from fedcore.tls import Credentials, expired
from fedcore.tls import server_options as tls_server_options
from fedcore.transport.board import Board, Incident
from fedcore.transport.history import History
from fedcore.transport.loop import link_loop, return_large_arrays, submit
from fedcore.transport.members import Member
from fedcore.transport.pool import ALIGNMENT, BufferPool
from fedcore.transport.service import LinkService, Refuse
from fedcore.transport.settings import LinkSettings
from fedcore.transport.wire import host_of, is_loopback, node_id_of, pack, server_options

logger = logging.getLogger("fedcore")

T = TypeVar("T")
# What the last messages may take to reach the clients, seconds.
CLOSING_S = 10.0
# Files that a process needs beside its connections.
OTHER_FILES = 256
# Idle memory that is kept for the next uploads, whatever the model's size.
IDLE_BYTES_LEAST = 16 << 20


class Server:
    """Owns gRPC's server, and what it stands on."""

    def __init__(self, listen: str, credentials: Credentials | None, settings: LinkSettings,
                 run_config: dict[str, Any], refuse: Refuse, on_incident: Incident, kept_checkpoints: int,
                 insecure_anywhere: bool):
        host = host_of(listen)
        if not host or not listen.rpartition(":")[2].isdecimal():
            raise CannotListen(f"{listen!r} is not HOST:PORT, such as 0.0.0.0:9200.")
        if credentials is None and not is_loopback(host) and not insecure_anywhere:
            raise CannotListen(
                f"In clear, anybody who reaches {listen} could take part, read the model and pose as any client. "
                "Use TLS (fedcore certs), or listen on 127.0.0.1."
            )
        self.settings = settings
        self._refuse: Refuse = lambda identity: expired(identity) or refuse(identity)
        self._clock = WallClock()
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.board = Board(settings, History(kept_checkpoints), lambda: self._clock.now, self.events.put, on_incident)
        self.pool = BufferPool(IDLE_BYTES_LEAST)
        self.board.on_memory = self._limit_idle_memory
        self.service = LinkService(self.board, settings, self.pool, credentials is not None, self._refuse, run_config,
                                   self.snapshot)
        self.started = self.closed = False
        self._loop = link_loop()
        return_large_arrays()
        self._grpc, port = submit(self._bind(listen, credentials)).result()
        self.address = f"{host}:{port}"
        self._checking: asyncio.Task[None] | None = None

    @property
    def now(self) -> float:
        """Seconds since the server was made."""
        return self._clock.now

    # ---- from other threads -----------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Hand something that happened to whoever waits."""
        self.events.put(event)

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the link's thread, without waiting."""
        if not self.closed:
            self._loop.call_soon_threadsafe(function, *args)

    def ask(self, function: Callable[[], T]) -> T:
        """Call a function in the link's thread, and wait for what it returns."""
        async def asked() -> T:
            return function()

        return submit(asked()).result()

    def member(self, node_id: int) -> Member:
        """Return a client; of one that is gone, an empty shell."""
        found = self.board.members.get(node_id)
        return found or Member("", node_id, -1, {}, None)

    # ---- life -------------------------------------------------------------------------------------------------------

    async def _bind(self, listen: str, credentials: Credentials | None) -> tuple[aio.Server, int]:
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * self.settings.max_nodes + OTHER_FILES
        if files < wanted:
            files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        server = aio.server(options=server_options(max(16, min(wanted, files) - OTHER_FILES)))
        server.add_generic_rpc_handlers((self.service.handlers(),))
        try:
            if credentials is None:
                port = server.add_insecure_port(listen)
            else:
                port = server.add_secure_port(listen, tls_server_options(credentials))
        except RuntimeError as error:
            raise CannotListen(f"Cannot listen on {listen}: the port is in use, or the address is not this machine's. "
                               "Another server may still be running.") from error
        return server, port

    def start(self) -> None:
        """Let clients in."""
        if not self.started and not self.closed:
            self.started = True
            submit(self._start()).result()

    async def _start(self) -> None:
        self.board.begin()
        await self._grpc.start()
        self._checking = asyncio.create_task(self._check_identities())

    def close(self, reason: str, final: bool) -> None:
        """Tell the clients, and stop."""
        if self.closed:
            return
        self.closed = True
        submit(self._close(reason, final)).result()

    async def _close(self, reason: str, final: bool) -> None:
        self.service.ending = {"reason": reason, "final": final}
        if self._checking is not None:
            self._checking.cancel()
        for member in self.board.members.values():
            if member.connected:
                member.outbox.put_nowait(_bye(reason, final))    # it hangs up when it has heard this
        awaited = {member.name for member in self.board.members.values() if not member.connected} if final else set()
        until, patient_until = self.now + CLOSING_S, self.now + self.settings.linger_s
        while (any(member.connected for member in self.board.members.values()) and self.now < until) or (
                awaited - self.service.dismissed and self.now < patient_until):
            await asyncio.sleep(0.01)
        await self._grpc.stop(0.5)

    # ---- in the link's thread ---------------------------------------------------------------------------------------

    async def _check_identities(self) -> None:
        while True:
            await asyncio.sleep(self.settings.check_s)
            for member in list(self.board.members.values()):
                if member.identity is not None and (reason := self._refuse(member.identity)) is not None:
                    self.board.on_incident(member.name, f"its certificate is not accepted any more: {reason}")
                    self.expel(member.name, f"the server does not accept your certificate any more: {reason}")

    def expel(self, name: str, reason: str) -> None:
        """End a client's connection and call it gone."""
        if (member := self.board.members.get(node_id_of(name))) is not None:
            member.hang_up({"kind": "refused", "reason": reason, "retry": False})
            member.session = None
            self.service.relay.cut(member.node_id)
            self.board.retire(member, reason)

    def taken(self, names: Iterable[str]) -> None:
        """Note that the strategy has replies, and let others upload."""
        for name in names:
            self.board.credits.release(name)
        self.board.taken(names)
        self._limit_idle_memory()

    def _limit_idle_memory(self) -> None:
        """Keep as much idle memory as further uploads may take: what is in use otherwise is not kept twice."""
        each = self.board.largest_request + ALIGNMENT
        self.pool.limit(max(IDLE_BYTES_LEAST, self.board.credits.free * each))

    def state_dict(self) -> tuple[int, dict[str, Any]]:
        """Return a new mark and what a checkpoint holds of the link."""
        mark = self.board.mark()
        return mark, self.board.state_dict()

    def set_saved(self, mark: int) -> None:
        """Note that a checkpoint is on disk."""
        self.board.history.set_saved(mark)
        self.board.tell_marks()

    def snapshot(self) -> dict[str, Any]:
        """Return what there is to see."""
        now = self.now
        nodes = []
        for member in list(self.board.members.values()):
            doing, since, action = member.doing()
            nodes.append({
                "name": member.name, "node_id": member.node_id, "partition": member.partition,
                "connected": member.connected, "connected_s" if member.connected else "away_s": now - member.since,
                "doing": doing, "doing_s": now - since, "action": action, "tasks": len(member.jobs),
                "version": member.version, "address": member.address,
                "bytes_up": member.up.total, "bytes_down": member.down.total,
                "up_bytes_per_s": member.up.rate(now), "down_bytes_per_s": member.down.rate(now),
                "heard_s": now - member.heard_at,
                "certificate_until": None if member.identity is None else member.identity.not_after.isoformat(),
            })
        return {
            "nodes": sorted(nodes, key=lambda node: node["partition"]), "uptime_s": now, "version": __version__,
            "uploads_admitted": self.board.credits.admitted, "uploads_waiting": self.board.credits.waiting,
            "tasks": len(self.board.jobs), "run": self.board.history.run, "address": self.address,
            "relayed_bytes": self.service.relay.bytes, "tunnels": self.service.relay.count,
            **self.board.counts,
        }


def _bye(reason: str, final: bool) -> bytes:


    return pack({"kind": "bye", "reason": reason, "final": final})


