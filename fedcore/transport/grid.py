"""Clients on other machines, behind Flower's `Grid`: what a ServerApp, or fedcore's hub, sees of the link."""
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from queue import Empty
from types import TracebackType
from typing import Any, Self

from flwr.app import Error, Message, Metadata, RecordDict

from fedcore.clock import Event
from fedcore.flower import SERVER_NODE_ID, adopt_identity, with_id
from fedcore.own_grid import OwnGrid
from fedcore.payload import clone_content
from fedcore.tasks import printable
from fedcore.tls import Credentials, Identity
from fedcore.transport.history import TaskId
from fedcore.transport.members import Job
from fedcore.transport.records import encode
from fedcore.transport.server import Server
from fedcore.transport.settings import LinkSettings
from fedcore.transport.wire import host_of, is_loopback

logger = logging.getLogger("fedcore")

# How often it is said who is waited for, seconds.
SAY_WAITING_S = 60.0
MOST_NAMED = 8


def log_incident(name: str, reason: str) -> None:
    """Write what a client did that it should not."""
    logger.warning("%s: %s", printable(name), printable(reason))


class GrpcGrid(OwnGrid):
    """Runs any ServerApp's messages against clients that dial in (`ClientAgent`).

    Serving starts with `start`, or with the first question to the grid: a restored state must be loaded before.
    All methods belong to one thread, except `snapshot`, `disconnect` and `wake`.

    Args:
        listen: `HOST:PORT`; port 0 picks a free one.
        credentials: a server's, for mutual TLS. None: in clear, where clients are who they say they are.
        run_config: what clients find in `context.run_config`.
        refuse: says why a certificate is not accepted any more (revocation); asked at every call, and again and again.
        on_incident: told who did what no client of ours does; called in the link's thread.
        kept_checkpoints: how many checkpoints stay on disk, and can be continued from.
        insecure_anywhere: listen in clear on more than loopback.

    Raises:
        CannotListen: the address is taken, or not this machine's, or is not loopback and in clear.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        credentials: Credentials | None = None,
        *,
        run_config: Mapping[str, Any] | None = None,
        settings: LinkSettings | None = None,
        refuse: Callable[[Identity], str | None] = lambda _: None,
        on_incident: Callable[[str, str], None] = log_incident,
        kept_checkpoints: int = 2,
        insecure_anywhere: bool = False,
    ):
        adopt_identity()
        self.settings = settings or LinkSettings()
        self._server = Server(listen, credentials, self.settings, dict(run_config or {}), refuse, on_incident,
                              kept_checkpoints, insecure_anywhere)
        self._board = self._server.board
        super().__init__()
        self._inbox: dict[str, Message] = {}    # replies that came while something else was waited for
        self._awaited: dict[str, None] = {}     # pushed, and no reply is here
        self._news: deque[Event] = deque()
        self._heard = False                     # somebody listens to events, and must not miss any
        self._told: dict[int, None] = {}        # nodes that whoever listens knows to be here
        self._at = 0.0                          # the hub's time: of the last event, or of the last `until`
        self._in_hand: str | None = None        # the reply that is being used now
        self._mark: int | None = None
        self._times: dict[str, dict[str, float]] = {}

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where clients reach it, `HOST:PORT`."""
        return self._server.address

    def start(self) -> None:
        """Begin to serve; calling it again does nothing."""
        self._server.start()

    def close(self, reason: str = "the run is over", final: bool = True) -> None:
        """Tell the clients, and end the server.

        Args:
            final: they need not come back; otherwise they try to reach the server again and again.
        """
        self._put_down()
        self._server.close(reason, final)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.close("the server stopped because of an error", final=False)

    # ---- Flower's interface -----------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Return the clients that belong to the run, ascending; one whose connection broke a moment ago still does."""
        self.start()
        found = sorted(list(self._board.members))
        self._told.update(dict.fromkeys(found))
        return found

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:  # type: ignore[override]
        """Send messages; returns their ids in order, None for a node that is not there."""
        self.start()
        jobs = [self._job(message) if message.metadata.dst_node_id in self._board.members else None
                for message in messages]
        known = [job for job in jobs if job is not None]
        self._awaited.update((job.name, None) for job in known)
        self._server.call(self._board.push, known)
        return [None if job is None else job.name for job in jobs]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, without waiting."""
        self.start()
        wanted = dict.fromkeys(message_ids)
        self._drain()
        found = [self._inbox.pop(name) for name in wanted if name in self._inbox]
        answered = {reply.metadata.reply_to_message_id for reply in found}
        return found + [_no_reply(name) for name in wanted if name not in answered and name not in self._awaited]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for their replies, in the order of the messages; `timeout` in seconds."""
        sent = [name for name in self.push_messages(messages) if name is not None]
        until = None if timeout is None else time.monotonic() + timeout
        missing = dict.fromkeys(name for name in sent if name not in self._inbox)
        while missing:
            event = self._wait(until)
            if event is None:
                logger.warning("%d of %d replies had not arrived after %s s.", len(missing), len(sent), timeout)
                break
            self._keep(event)
            if event.message is not None:
                missing.pop(event.message.metadata.reply_to_message_id, None)
        return [self._inbox.pop(name) for name in sent if name in self._inbox]

    # ---- what fedcore's hub uses ------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since this grid was made."""
        return self._server.now

    def partition_of(self, node_id: int) -> int:
        """Return which share of the data a node says it holds; one that does not say got the first free number."""
        return self._server.member(node_id).partition

    def introduction(self, node_id: int) -> RecordDict | None:
        """Return what a node answers to a query, if it said so when it came."""
        return self._server.member(node_id).introduction

    def next_event(self, until: float | None) -> Event | None:
        """Wait for what happens next, at most until `until`.

        The reply handed out before counts as used: its client may forget it once a checkpoint holds it.
        """
        self.start()
        self._heard = True
        self._put_down()
        if self._news:
            return self._hand_out(self._news.popleft())
        event = self._wait(None if until is None else time.monotonic() + max(0.0, until - self.now))
        if event is not None:
            return self._hand_out(event)
        assert until is not None
        self._at = max(self._at, until)
        return Event("time", until)

    def wake(self) -> None:
        """Let `next_event`, which waits in another thread or is about to, return an event of kind `wake` at once."""
        self._server.emit(Event("wake", self.now))

    def task_times(self, message_id: str | None) -> dict[str, float] | None:
        """Return how long the parts of a task took, once, after its reply was handed out."""
        return self._times.pop(message_id or "", None)

    def snapshot(self) -> dict[str, Any]:
        """Return who is connected, what each does since when, and how much is moved; from any thread."""
        return self._server.snapshot()

    @property
    def private(self) -> bool:
        """Whether nobody on the network can listen in: mutual TLS, or this machine alone."""
        return self._server.service.secure or is_loopback(host_of(self.address))

    @property
    def relayed_bytes(self) -> int:
        """How many bytes were passed on between peers that cannot reach each other."""
        return self._server.service.relay.bytes

    def relay_among(self, node_ids: Collection[int]) -> None:
        """Pass on what these nodes say to each other, and nothing of others; from any thread."""
        self._server.call(self._server.service.relay.set_members, tuple(node_ids))

    def disconnect(self, name: str, reason: str) -> None:
        """End a client's connection for good; from any thread."""
        self._server.call(self._server.expel, name, reason)

    def report(self, who: str, reason: str) -> None:
        """Note that somebody did what no client of ours does, where the link itself could not see it; from any thread.
        """
        self._server.call(self._board.incident, who, reason)

    # ---- what survives a restart ------------------------------------------------------------------------------------

    @property
    def mark(self) -> int | None:
        """Which checkpoint the last `state_dict` was for; None before the first."""
        return self._mark

    def state_dict(self) -> dict[str, Any]:
        """Return members and work under way, for a checkpoint that is taken now.

        Whatever was handed out before is taken to be in the rest of the checkpoint. Requests hold the model that they
        bring: it is shared, not copied.
        """
        self._put_down()
        assert not self._inbox, "an app that pulls by itself cannot be saved"
        self._mark, state = self._server.ask(self._server.state_dict)
        return {**state, "mark": self._mark, "told": list(self._told)}

    def saving(self, mark: int | None = None) -> None:
        """Say that the checkpoint of a mark (default: the last) is being written, and may be saved later than others
        are taken."""
        self._server.call(self._board.history.saving.add, self._mark if mark is None else mark)

    def saved(self, mark: int | None = None) -> None:
        """Say that the checkpoint of a mark (default: the last) is on disk: clients may forget what it holds."""
        self._server.call(self._server.set_saved, self._mark if mark is None else mark)

    def unsaved(self, mark: int | None = None) -> None:
        """Say that the checkpoint of a mark (default: the last) could not be written."""
        self._server.call(self._board.history.set_unsaved, self._mark if mark is None else mark)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; before the first client is let in.

        Clients of the run are awaited for the `resume_grace_s` of the settings, and then count as gone.
        """
        assert not self._server.started, "clients are connected already"
        self._board.load_state_dict(state, self._restored_job)
        self._mark = state["mark"]
        self._awaited = dict.fromkeys(self._board.jobs)
        told = dict.fromkeys(state["told"])
        self._told = dict(told)
        for node_id in self._board.members:
            if node_id not in told:
                self._news.append(Event("join", self.now, node_id))
        for node_id in told:
            if node_id not in self._board.members:
                self._news.append(Event("leave", self.now, node_id))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _job(self, message: Message) -> Job:
        # The sender may go on changing its records (Flower's FedAvg does): take them as they are now.
        content = clone_content(message.content)
        number = self._board.history.next_id()
        return Job(number, message.metadata.dst_node_id, with_id(message, content, str(number)),
                   encode(content), self._at, self.now)

    def _restored_job(self, entry: Mapping[str, Any]) -> Job:
        number, content = TaskId.of(entry["id"]), entry["content"]
        about = Metadata(self._run.run_id, str(number), SERVER_NODE_ID, entry["node_id"], "", entry["group"],
                         time.time(), entry["ttl"], entry["type"])
        message = Message(content or RecordDict(), metadata=about)  # type: ignore[call-overload]
        error = None if entry["error"] is None else Error(*entry["error"])
        return Job(number, entry["node_id"], message, None if content is None else encode(content), 0.0, self.now,
                   stage="waiting" if content is not None else "working", error=error)

    def _wait(self, until: float | None) -> Event | None:
        """Return the next thing that happens; None when `until`, of the monotonic clock, came first."""
        waiting_since = time.monotonic()
        say_at = waiting_since + SAY_WAITING_S
        while True:
            now = time.monotonic()
            limit = say_at if until is None else min(say_at, until)
            try:
                return self._server.events.get(timeout=max(0.0, limit - now))
            except Empty:
                if until is not None and time.monotonic() >= until:
                    return None
                self._say_who_is_awaited()
                say_at = time.monotonic() + SAY_WAITING_S

    def _say_who_is_awaited(self) -> None:
        busy = [node for node in self.snapshot()["nodes"] if node["doing"] != "idle" or not node["connected"]]
        names = [f"{node['name']} ({node['doing'] if node['connected'] else 'away'} for {node['doing_s']:.0f} s)"
                 for node in busy[:MOST_NAMED]]
        more = f" and {len(busy) - MOST_NAMED} more" if len(busy) > MOST_NAMED else ""
        logger.info("Waiting for %s%s.", ", ".join(names) or "clients to connect", more)

    def _drain(self) -> None:
        while True:
            try:
                self._keep(self._server.events.get_nowait())
            except Empty:
                return

    def _keep(self, event: Event) -> None:
        """Keep what came while something else was waited for; a reply in hand needs no credit any more."""
        if event.message is not None:
            name = event.message.metadata.reply_to_message_id
            self._inbox[name] = event.message
            self._awaited.pop(name, None)
            if self._heard:    # whoever pulls does not ask for the times
                self._note_times(name)
            self._server.call(self._server.taken, [name])
        elif self._heard:
            self._news.append(event)

    def _hand_out(self, event: Event) -> Event:
        self._at = max(self._at, event.at)
        if event.kind == "join" and event.node_id is not None:
            self._told[event.node_id] = None
        elif event.kind == "leave" and event.node_id is not None:
            self._told.pop(event.node_id, None)
        elif event.message is not None:
            self._in_hand = event.message.metadata.reply_to_message_id
            self._awaited.pop(self._in_hand, None)
            self._note_times(self._in_hand)
        return event

    def _put_down(self) -> None:
        """Call the reply that was handed out last used."""
        if self._in_hand is not None:
            self._server.call(self._server.taken, [self._in_hand])
            self._in_hand = None

    def _note_times(self, name: str) -> None:
        job = self._board.jobs.get(name)
        if job is not None and "upload_s" in job.times:
            self._times[name] = dict(job.times)


def _no_reply(name: str) -> Message:
    metadata = Metadata(SERVER_NODE_ID, "", 0, SERVER_NODE_ID, name, "", time.time(), 1.0, "train")
    error = Error(4, f"message {name} is unknown, or its reply was pulled before")
    return Message(error, metadata=metadata)  # type: ignore[call-overload]    # Flower's own keyword
