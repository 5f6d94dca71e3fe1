"""A client's tasks: announced, done one after another, written down, and their replies sent."""
import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, RecordDict
from flwr.clientapp import ClientApp

from fedcore.errors import MalformedFrame, TaskLost, TooSlow, UnusableCheckpoint
from fedcore.flower import RUN_ID
from fedcore.tasks import printable
from fedcore.transport.dial import Broken, Download, Link
from fedcore.transport.frames import Framed
from fedcore.transport.history import TaskId
from fedcore.transport.journal import Entry, Journal, position, reply_of, stored_tasks
from fedcore.transport.pool import BufferPool
from fedcore.transport.records import Plan, encode
from fedcore.transport.relay_ends import LINK
from fedcore.transport.settings import Limits
from fedcore.transport.wire import INLINE_BYTES, Envelope, text_of
from fedcore.transport.work import APP_RAISED, CRASHED, NOT_ALLOWED, Outcome, introduce, request_message, run_app

logger = logging.getLogger("fedcore")

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
IDLE_BYTES = 64 << 20


@dataclass(eq=False)
class Assignment:
    """A task that the server announced.

    Attributes:
        inline: the content, where it came with the announcement.
        heard_at, ready_at: when it was announced, and when its content was here; of the monotonic clock.
    """

    id: TaskId
    facts: dict[str, Any]
    inline: Envelope | None
    heard_at: float
    ready_at: float = 0.0
    partial: Download | None = None
    dropped: bool = False

    @property
    def name(self) -> str:
        return str(self.id)


class Workbench:
    """What a client works on. It outlives connections: `attach` gives it one, `detach` takes it away.

    The app runs in one thread of its own, the same for all tasks; the journal is touched in another.
    """

    def __init__(self, app: ClientApp, node_config: Mapping[str, Any], run_config: Mapping[str, Any],
                 state_folder: Path | None, limits: Limits, on_status: Callable[[str], None]):
        self.app, self.limits, self.on_status = app, limits, on_status
        self.node_config, self.run_config, self.state_folder = dict(node_config), dict(run_config), state_folder
        self.introduction: Framed | None = None
        self.journal: Journal | None = None
        self._pool = BufferPool(IDLE_BYTES)
        self._app_thread = ThreadPoolExecutor(1, "fedcore-app", LINK.set, (lambda: self._link,))
        self._disk_thread = ThreadPoolExecutor(1, "fedcore-disk")
        self._queue: dict[str, Assignment] = {}      # announced and not begun, in order
        self._running: Assignment | None = None
        self._unsent: dict[str, Framed | None] = {}  # replies to be sent, in order; None: still on disk
        self._server_config: dict[str, Any] = {}
        self._node_id = 0
        self._link: Link | None = None
        self._linked, self._work, self._outgoing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False

    def close(self) -> None:
        """End the threads; the app's is left alone where it is at work."""
        self._app_thread.shutdown(wait=False, cancel_futures=True)
        self._disk_thread.shutdown(wait=True)

    async def introduce(self) -> None:
        """Ask the app what it says of itself."""
        context = Context(RUN_ID, 0, dict(self.node_config), RecordDict(), dict(self.run_config))
        found = await self._in_app_thread(introduce, self.app, context)
        self.introduction = None if found is None else encode(found)

    async def _in_app_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._app_thread, function, *args)

    async def _on_disk(self, function: Callable[..., Any], *args: Any) -> Any:
        """Touch the journal, which belongs to one thread where it has files."""
        return await asyncio.get_running_loop().run_in_executor(self._disk_thread, function, *args)

    # ---- the connection ---------------------------------------------------------------------------------------------

    def attach(self, link: Link) -> None:
        """Use a connection from now on."""
        self._link = link
        self._linked.set()

    def detach(self) -> None:
        """Do without a connection."""
        self._linked.clear()
        self._link = None

    def holds(self) -> list[str]:
        """Return the tasks that this client has, finished or not."""
        # Those that were taken, too: a server that was restored to an earlier moment may ask for them again.
        finished = self.journal.tasks if self.journal is not None else stored_tasks(self.state_folder)
        begun = [self._running] if self._running is not None else []
        return finished + [entry.name for entry in (*begun, *self._queue.values())
                           if entry.inline is not None or entry.ready_at]

    async def settle(self, welcome: Mapping[str, Any]) -> None:
        """Find out from the server's first words what is still wanted of what this client has."""
        run, config = str(welcome.get("run")), welcome.get("run_config")
        if not run.isalnum() or not isinstance(config, dict):
            raise MalformedFrame("the server's first words cannot be understood")
        self._server_config, self._node_id = config, int(welcome.get("node", 0))
        if self.journal is None or self.journal.run != run:
            self.journal = await self._on_disk(Journal, self.state_folder, run)
        journal = self.journal
        undone = await self._on_disk(journal.follow, welcome.get("lineage"))
        if undone:
            logger.warning("The server was restored to an earlier moment: %d tasks are undone here, too.", len(undone))
        wanted, arrived = set(welcome.get("open", ())), set(welcome.get("arrived", ()))
        # The marks first: they say which of the replies that were taken must be kept all the same.
        journal.set_wanted(wanted)
        await self._on_disk(journal.set_marks, welcome.get("marks"))
        await self._on_disk(journal.set_taken, [name for name in journal.untaken if name not in wanted | arrived])
        for entry in [*self._queue.values(), *([self._running] if self._running is not None else [])]:
            entry.dropped = position(entry.id, journal.lineage) is None
        self._queue = {name: entry for name, entry in self._queue.items() if name in wanted and not entry.dropped}
        # Those that the server asks for again, because it was restored, are among them.
        self._unsent = {name: self._unsent.get(name) for name in journal.tasks if name in wanted}
        if self._unsent:
            self._outgoing.set()

    def accept(self, envelope: Envelope) -> None:
        task = TaskId.of(text_of(envelope.facts, "id"))
        name, journal = str(task), self.journal
        assert journal is not None
        running = self._running is not None and self._running.name == name
        if running or name in self._queue or journal.find(name) is not None:
            return    # it is known already; one that is finished is sent again when the connection is made
        now = time.monotonic()
        inline = envelope if envelope.facts.get("inline") else None
        self._queue[name] = Assignment(task, envelope.facts, inline, now, now if inline is not None else 0.0)
        self._work.set()

    async def hear(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Take note of what the server says about tasks."""
        assert self.journal is not None
        if kind == "taken":
            await self._on_disk(self.journal.set_taken, facts.get("ids", []))
        elif kind == "marks":
            await self._on_disk(self.journal.set_marks, facts.get("marks"))
        elif kind == "cancel":
            self._queue.pop(str(facts.get("id")), None)

    async def drain(self) -> None:
        """Begin nothing new, and wait for the task under way and for its reply to be sent.

        A task whose request is with a server that is out of reach has not begun.
        """
        self._stopping = True
        while not self._idle.is_set() and not (self._link is None and self._awaits_request()):
            await asyncio.sleep(0.01)
        while self._unsent and self._link is not None:
            await asyncio.sleep(0.01)

    def _awaits_request(self) -> bool:
        entry = self._running
        return entry is not None and entry.inline is None and not entry.ready_at

    # ---- the work ---------------------------------------------------------------------------------------------------

    async def do_work(self) -> None:
        while not self._stopping:
            if not self._queue:
                self._work.clear()
                await self._work.wait()
                continue
            name = next(iter(self._queue))
            entry = self._running = self._queue.pop(name)
            self._idle.clear()
            try:
                await self._do(entry)
            finally:
                self._running = None
                self._idle.set()
                self.on_status("idle")

    async def _do(self, entry: Assignment) -> None:
        """Do a task: bring its request, compute, write down, and let the reply be sent."""
        try:
            content = await self._request(entry)
        except TaskLost as error:
            logger.info("Task %s was given up: %s.", entry.name, error)
            return
        except NotAllowed as error:
            await self._finish(entry, Outcome(Error(NOT_ALLOWED, str(error)), self._state, 0.0), 0.0)
            return
        started = time.monotonic()
        self.on_status(printable(str(entry.facts.get("type"))))
        outcome = await self._compute(entry, content)
        if not entry.dropped:
            await self._finish(entry, outcome, started - entry.ready_at)

    @property
    def _state(self) -> RecordDict:
        assert self.journal is not None
        return self.journal.state

    async def _compute(self, entry: Assignment, content: RecordDict) -> Outcome:
        message = request_message(entry.facts, content, self._node_id)
        context = Context(RUN_ID, self._node_id, dict(self.node_config), self._state,
                          {**self._server_config, **self.run_config})
        before = self._state
        work = asyncio.ensure_future(self._in_app_thread(run_app, self.app, message, context, self.limits))
        done, _ = await asyncio.wait({work}, timeout=self.limits.max_seconds)
        if done:
            return work.result()
        seconds = self.limits.max_seconds
        reason = f"the operator of this client allows {seconds:g} s of computing in a task, and this one takes longer"
        work.add_done_callback(lambda _: None)    # the thread cannot be broken off: what it makes is dropped
        return Outcome(Error(NOT_ALLOWED, reason), before, float(seconds or 0.0))

    async def _request(self, entry: Assignment) -> RecordDict:
        """Return a task's request.

        Raises:
            TaskLost: the server does not have it any more.
            NotAllowed: the operator forbids it.
        """
        for refusal in (self.limits.refuse_action(str(entry.facts.get("type"))),
                        self.limits.refuse_bytes(int(entry.facts.get("size", 0)), "request")):
            if refusal is not None:
                raise NotAllowed(refusal)
        try:
            if entry.inline is not None:
                content = entry.inline.content()[1]
            else:
                download = await self._fetch(entry)
                content = download.plan.build(download.assembler.body)
        except MalformedFrame as error:
            raise NotAllowed(f"the request cannot be read: {error}") from error
        if isinstance(content, Error):
            raise NotAllowed("the request is an error message")
        return content

    async def _fetch(self, entry: Assignment) -> Download:
        self.on_status("downloading")
        pause = SHORTEST_PAUSE_S
        while True:
            await self._linked.wait()
            link = self._link
            assert link is not None
            if entry.dropped:
                raise TaskLost("the server has forgotten it")
            try:
                found = await link.fetch(entry.name, entry.partial, self._pool, self._check_size)
                entry.ready_at, entry.partial = time.monotonic(), None
                with suppress(ConnectionError):    # then the server learns it when the connection is made anew
                    await link.tell({"kind": "got", "id": entry.name})
                return found
            except Broken as error:
                entry.partial = error.download
                logger.info("A request was broken off after %d bytes: %s.", error.download.assembler.received, error)
            except (ConnectionError, TooSlow) as error:
                logger.info("A request was broken off: %s.", printable(str(error)))
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _check_size(self, plan: Plan) -> None:
        if (refusal := self.limits.refuse_bytes(plan.size, "request")) is not None:
            raise NotAllowed(refusal)

    async def _finish(self, entry: Assignment, outcome: Outcome, queue_s: float) -> None:
        """Write down what came of a task, and let it be sent."""
        journal = self.journal
        assert journal is not None
        facts = {"download_s": max(0.0, entry.ready_at - entry.heard_at), "queue_s": max(0.0, queue_s),
                 "compute_s": outcome.seconds}
        try:
            framed = encode(outcome.reply, **facts)
        except (MalformedFrame, TypeError) as error:
            outcome = outcome._replace(reply=Error(APP_RAISED, f"the reply cannot be sent: {error}"))
            framed = encode(outcome.reply, **facts)
        await self._on_disk(journal.add, entry.id, outcome.reply, facts, outcome.state)
        if position(entry.id, journal.lineage) is not None:
            self._unsent[entry.name] = framed
            self._outgoing.set()

    # ---- replies ----------------------------------------------------------------------------------------------------

    async def send_replies(self) -> None:
        pause = SHORTEST_PAUSE_S
        while True:
            if not self._unsent:
                self._outgoing.clear()
                await self._outgoing.wait()
                continue
            await self._linked.wait()
            link, name = self._link, next(iter(self._unsent), None)
            if link is None or name is None:
                continue
            try:
                await self._send(link, name)
                pause = SHORTEST_PAUSE_S
            except TaskLost:
                self._forget(name)
            except (ConnectionError, MalformedFrame, TooSlow) as error:
                logger.info("A reply was not delivered, and will be sent again: %s.", printable(str(error)))
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _send(self, link: Link, name: str) -> None:
        framed = self._unsent[name]
        if framed is None:
            assert self.journal is not None
            entry = self.journal.find(name)
            if entry is None:
                self._forget(name)
                return
            framed = await self._on_disk(_framed, entry)
        if framed.size + len(framed.head) <= INLINE_BYTES:
            await link.tell({"kind": "reply", "id": name}, framed)
        else:
            self.on_status("uploading")
            await link.send(name, framed)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._unsent.pop(name, None)


class NotAllowed(Exception):
    """A request that this client does not carry out; the server is told why."""


def _framed(entry: Entry) -> Framed:
    try:
        content, facts = reply_of(entry.load())
    except UnusableCheckpoint as error:
        return encode(Error(CRASHED, str(error)))
    return encode(content, **facts)
