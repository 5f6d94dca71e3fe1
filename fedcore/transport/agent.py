"""The client's side of the link: keeps the user's ClientApp in its process, and works through what the server asks."""
import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from fedcore import __version__
from fedcore.errors import InvalidSetting, LinkRefused, MalformedFrame, RunOver, UnusableCheckpoint
from fedcore.flower import adopt_identity
from fedcore.tasks import printable
from fedcore.tls import Credentials
from fedcore.transport.dial import Link
from fedcore.transport.loop import submit
from fedcore.transport.settings import Limits
from fedcore.transport.streams import Pace
from fedcore.transport.wire import NAME, PROTOCOL, Envelope
from fedcore.transport.workbench import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Workbench

logger = logging.getLogger("fedcore")

# A connection that held so long was a good one: the next attempt need not wait.
GOOD_S = 1.0
# How long a client that leaves waits for the server to hear its goodbye, seconds.
GOODBYE_S = 5.0


class ClientAgent:
    """Connects to a server and does its tasks until the run is over.

    Args:
        app: what does the work; it runs in one thread of its own, the same for all tasks.
        server: `HOST:PORT`.
        name: of this client, a-z, 0-9 and -; with TLS that of its certificate.
        credentials: a node's, for mutual TLS; None: in clear.
        node_config: what the app finds in `context.node_config`, such as `{"partition-id": 0, "num-partitions": 2}`.
        run_config: entries of `context.run_config` that replace the server's.
        state: the folder for what must survive a restart of this process; None keeps it in memory.
        limits: what the operator lets the server ask for.
        server_name: that the server's certificate must carry, where it is not the host of `server`.
        give_up_s: how long the server may be out of reach; None: forever.
        drain_s: how long `stop` waits for the task under way.
        on_status: told in words what the agent does (`connected`, `training`, ...).
    """

    def __init__(
        self, app: ClientApp, server: str, name: str, *, credentials: Credentials | None = None,
        node_config: Mapping[str, Any] | None = None, run_config: Mapping[str, Any] | None = None,
        state: Path | None = None, limits: Limits | None = None, pace: Pace | None = None,
        server_name: str | None = None, give_up_s: float | None = None, drain_s: float = 60.0,
        on_status: Callable[[str], None] = lambda _: None,
    ):
        adopt_identity()
        if NAME.fullmatch(name) is None:
            raise InvalidSetting("name", name, "1 to 63 of a-z, 0-9 and -")
        self.app, self.server, self.name, self.credentials = app, server, name, credentials
        self.node_config, self.run_config = dict(node_config or {}), dict(run_config or {})
        self.state_folder, self.limits, self.pace = state, limits or Limits(), pace or Pace()
        self.server_name, self.give_up_s, self.drain_s, self.on_status = server_name, give_up_s, drain_s, on_status
        self.instance = secrets.token_hex(8)
        self.end_reason = "it was stopped"
        self._link: Link | None = None
        self._opening = False    # a connection is being made, and the server may know of it first
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_early = False

    # ---- life -------------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Work until the run is over or `stop` is called; returns why it ended.

        Raises:
            LinkRefused: the server turned this client away for good.
            ConnectionError: the server was out of reach for `give_up_s`.
            UnusableCheckpoint: what was done cannot be written down.
        """
        return submit(self.serve()).result()

    def stop(self, reason: str = "it was stopped") -> None:
        """End after the task under way, once its reply is with the server; from any thread or signal handler."""
        self.end_reason = reason
        self._stop_early = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def serve(self) -> str:
        """Work until the run is over or `stop` is called; returns why it ended. See `run`."""
        self._loop = asyncio.get_running_loop()
        self._stopping, self._over = asyncio.Event(), asyncio.Event()
        if self._stop_early:
            self._stopping.set()
        self._bench = bench = Workbench(self.app, self.node_config, self.run_config, self.state_folder, self.limits,
                                        self.on_status)
        try:
            await bench.introduce()
            async with asyncio.TaskGroup() as group:
                parts = (self._stay_connected, bench.do_work, bench.send_replies)
                tasks = [group.create_task(part()) for part in parts]
                group.create_task(self._end(tasks))
        except* (LinkRefused, ConnectionError, UnusableCheckpoint) as errors:
            raise errors.exceptions[0] from None
        finally:
            if self._link is not None:
                await self._link.close()
            bench.close()
        return self.end_reason

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for the end, and bring it about."""
        ends = [asyncio.ensure_future(event.wait()) for event in (self._stopping, self._over)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        if not self._over.is_set():
            await self._leave()
        for task in tasks:
            task.cancel()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(self.drain_s):
                await self._bench.drain()
        except TimeoutError:
            logger.warning("The task under way, or its reply, took longer than %g s; it is left.", self.drain_s)
        until = time.monotonic() + GOODBYE_S
        while self._opening and time.monotonic() < until:
            await asyncio.sleep(0.01)    # the server may have let this client in, and would wait for it for long
        if self._link is not None:
            try:
                self._over.set()
                await self._link.tell({"kind": "bye"})
                until = time.monotonic() + GOODBYE_S
                while self._link is not None and time.monotonic() < until:    # the server hangs up when it has heard it
                    await asyncio.sleep(0.01)
            except ConnectionError:
                logger.info("The server could not be told that this client stops.")

    # ---- the connection ---------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        pause, lost_at = SHORTEST_PAUSE_S, time.monotonic()
        while not self._over.is_set():
            self._opening = True
            try:
                link = await Link.open(self.server, self.credentials, self.server_name, self._hello(),
                                       self._bench.introduction, self.pace)
            except RunOver as error:
                self.end_reason = str(error)
                self._over.set()
                return
            except (ConnectionError, MalformedFrame, OSError) as error:
                reason, self._opening = str(error), False
            else:
                connected_at = time.monotonic()
                reason = await self._talk(link)
                lost_at = time.monotonic()
                if lost_at - connected_at > GOOD_S:
                    pause = SHORTEST_PAUSE_S
            if self._over.is_set():
                return
            if self.give_up_s is not None and time.monotonic() - lost_at > self.give_up_s:
                raise ConnectionError(f"{self.server} was out of reach for {self.give_up_s:g} s: {reason}")
            # Many clients that lost one server should not come back all at once.
            wait = pause * random.uniform(0.5, 1.5)
            logger.warning("Not connected to %s: %s. Trying again in %.1f s.", self.server, reason, wait)
            self.on_status("disconnected")
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _hello(self) -> dict[str, Any]:
        return {"kind": "hello", "protocol": PROTOCOL, "version": __version__, "name": self.name,
                "instance": self.instance, "config": self.node_config, "holds": self._bench.holds()}

    async def _talk(self, link: Link) -> str:
        """Listen to the server until the connection ends; returns why it did."""
        try:
            await self._bench.settle(link.welcome)
        except MalformedFrame as error:
            self._opening = False
            await link.close()
            return str(error)
        self._link, self._opening = link, False
        self._bench.attach(link)
        logger.info("Connected to %s as %s, partition %s.", self.server, self.name, link.welcome.get("partition"))
        self.on_status("connected")
        beating = asyncio.create_task(self._beat(link))
        reason = "the connection was lost"
        try:
            silence_s = 3 * float(link.welcome["heartbeat_s"])
            async with asyncio.timeout(silence_s) as limit:
                while (envelope := await link.read()) is not None:
                    limit.reschedule(asyncio.get_running_loop().time() + silence_s)
                    reason = await self._hear(link, envelope) or reason
                    if envelope.facts.get("kind") == "bye":
                        break    # that we hang up tells the server that it was heard
        except TimeoutError:
            reason = f"nothing was heard of the server for {silence_s:g} s"
        except (MalformedFrame, ConnectionError) as error:
            reason = str(error)
        finally:
            beating.cancel()
            self._bench.detach()
            self._link = None
            await link.close()
        return reason

    async def _beat(self, link: Link) -> None:
        while True:
            await asyncio.sleep(float(link.welcome["heartbeat_s"]))
            try:
                await link.tell({"kind": "beat"})
            except ConnectionError:
                return

    async def _hear(self, link: Link, envelope: Envelope) -> str | None:
        """Take note of a server's message; returns why the connection will end, if it says so."""
        facts, kind = envelope.facts, str(envelope.facts.get("kind"))
        if kind == "work":
            self._bench.accept(envelope)
        elif kind == "ping":
            await link.tell({"kind": "pong"})
        elif kind == "refused":
            raise LinkRefused(printable(str(facts.get("reason"))))
        elif kind == "bye":
            reason = printable(str(facts.get("reason")))
            if facts.get("final"):
                self.end_reason = reason
                self._over.set()
            return reason
        else:
            await self._bench.hear(kind, facts)
        return None
