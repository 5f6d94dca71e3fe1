"""The server's book: who belongs to the run, who works on what, and what has become of it.

Everything here belongs to the event loop's thread and knows nothing of gRPC.
"""
import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

from flwr.app import Error, RecordDict

from fedcore.clock import Event
from fedcore.errors import FedcoreError, MalformedFrame, shown
from fedcore.flower import reply_to, with_id
from fedcore.tasks import NODE_GONE, printable
from fedcore.tls import Identity
from fedcore.transport.credits import Credits
from fedcore.transport.history import History, TaskId
from fedcore.transport.members import Job, Member
from fedcore.transport.records import Content
from fedcore.transport.settings import LinkSettings
from fedcore.transport.wire import INLINE_BYTES, node_id_of, text_of

logger = logging.getLogger("fedcore")

UNREADABLE, NO_ANSWER, CRASHED = 0, 3, 8
TIMES = ("download_s", "queue_s", "compute_s")
LEAST_REPLY_LIMIT = 64 << 20
MAX_PARTITION = 2**31
MAX_CONFIG_ENTRIES = 64
LONGEST_NAME, LONGEST_VALUE = 200, 4096

Incident = Callable[[str, str], None]


class Refusal(FedcoreError):
    """A client is turned away; `retry` says whether it may come again."""

    def __init__(self, reason: str, retry: bool):
        super().__init__(reason)
        self.reason, self.retry = reason, retry


class Board:
    """Members, their jobs, and what they are told.

    Args:
        emit: takes what happens: joins, leaves and replies.
        now: the grid's clock.
    """

    def __init__(self, settings: LinkSettings, history: History, now: Callable[[], float],
                 emit: Callable[[Event], None], on_incident: Incident):
        self.settings, self.history = settings, history
        self.now, self.emit, self.on_incident = now, emit, on_incident
        self.members: dict[int, Member] = {}
        self.jobs: dict[str, Job] = {}
        self.assigned: dict[str, int] = {}    # partitions of clients that name none
        self.credits = Credits(settings.max_uploads, settings.max_upload_bytes, self._evict, self._old_versions,
                               settings.pace.grace_s)
        self._held_requests: Counter[int] = Counter()    # jobs that wait to be fetched, by where their memory is
        self.largest_request = 0
        self._newest_model = 0                # where the model of the newest requests lies in memory
        self.on_memory: Callable[[], None] = lambda: None    # told when more or less of it is in use
        self.counts = {"replays": 0, "incidents": 0}

    # ---- members ----------------------------------------------------------------------------------------------------

    def admit(self, name: str, identity: Identity | None, hello: Mapping[str, Any], introduction: RecordDict | None
              ) -> Member:
        """Let a client in, or let it continue.

        Raises:
            Refusal: it cannot be let in.
            MalformedFrame: it says nothing of itself that can be understood.
        """
        config = read_config(hello.get("config"))
        member = self.members.get(node_id_of(name))
        if member is None:
            if len(self.members) >= self.settings.max_nodes:
                raise Refusal(f"the server has its {self.settings.max_nodes} clients already", retry=True)
            member = Member(name, node_id_of(name), self._partition(name, config), config, introduction)
            self.members[member.node_id] = member
            joins = True
        else:
            if config.get("partition-id", member.partition) != member.partition:
                raise Refusal(f"{name} held partition {member.partition} so far, and now names another", retry=True)
            joins = False
        if member.leaving is not None:
            member.leaving.cancel()
            member.leaving = None
        member.config, member.introduction, member.identity = config, introduction, identity
        member.session, member.instance = secrets.token_hex(16), text_of(hello, "instance")
        member.version = printable(text_of(hello, "version"))
        member.since = member.heard_at = self.now()
        member.outbox = asyncio.Queue(member.outbox.maxsize)
        if joins:
            self.emit(Event("join", self.now(), member.node_id))
        return member

    def _partition(self, name: str, config: Mapping[str, Any]) -> int:
        partition = config.get("partition-id")
        holders = {member.partition: member for member in self.members.values()}
        if partition is None:
            taken = {*holders, *self.assigned.values()}
            return self.assigned.setdefault(name, next(number for number in count() if number not in taken))
        if type(partition) is not int or not 0 <= partition < MAX_PARTITION:
            raise Refusal(f"its partition-id is {shown(partition)}, but must be a whole number from 0", retry=False)
        if (holder := holders.get(partition)) is not None:
            if holder.connected:
                raise Refusal(f"partition {partition} is held by {holder.name}, which is connected: "
                              "give every client a partition-id of its own", retry=True)
            self.retire(holder, f"{name} took its partition")
        return partition

    def welcome(self, member: Member, holds: Iterable[str]) -> dict[str, Any]:
        """Return what a client that has just been let in must know.

        Args:
            holds: the tasks that it has, finished or not.
        """
        return {
            "kind": "welcome", "run": self.history.run, "lineage": self.history.told(), "session": member.session,
            "node": member.node_id, "partition": member.partition, "marks": self._marks(member),
            "heartbeat_s": self.settings.heartbeat_s,
            "open": [job.name for job in member.jobs.values() if job.is_open],
            "arrived": [job.name for job in member.jobs.values() if not job.is_open],
            "known": [name for name in holds if name in member.jobs],
        }

    def resume_jobs(self, member: Member, holds: Iterable[str]) -> None:
        """Tell a client that has just been let in of its work; what it should have and has not is lost."""
        held = set(holds)
        for job in list(member.jobs.values()):
            if not job.is_open:
                continue
            if job.name in held:
                self.delivered(job)
            elif job.framed is not None:
                self._announce(member, job)
            else:
                self.fail(job, CRASHED, "the client was started anew in the middle of the task, and did not keep it")

    def lose(self, member: Member, session: str | None) -> None:
        """Note that a client's connection ended; it is waited for during the grace period."""
        if member.session != session or session is None:
            return    # it has a new one already
        member.session = None
        member.since = self.now()
        if member.node_id in self.members and member.leaving is None:
            self._wait_for(member, self.settings.grace_s)

    def _wait_for(self, member: Member, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        member.leaving = loop.call_later(seconds, self.retire, member, "it did not come back")

    def retire(self, member: Member, reason: str) -> None:
        """Call a client gone, and its work lost."""
        if self.members.get(member.node_id) is not member:
            return
        if member.leaving is not None:
            member.leaving.cancel()
        member.hang_up()
        member.session = None
        del self.members[member.node_id]
        self.emit(Event("leave", self.now(), member.node_id))
        logger.info("Client %s left: %s.", member.name, reason)
        for job in list(member.jobs.values()):
            if job.is_open:
                self.fail(job, NODE_GONE, reason)

    # ---- work -------------------------------------------------------------------------------------------------------

    def push(self, jobs: Iterable[Job]) -> None:
        """Give nodes work; it is announced at once to those that are connected."""
        for job in jobs:
            self.jobs[job.name] = job
            assert job.framed is not None
            self._hold(job)
            self._start_expiry(job)
            if (member := self.members.get(job.node_id)) is None:
                self.fail(job, NODE_GONE, "it had just left")
                continue
            member.jobs[job.name] = job
            self._announce(member, job)

    def _hold(self, job: Job) -> None:
        """Take note of a request's memory; those with an older model that were delivered are not kept any longer."""
        assert job.framed is not None
        self.largest_request = max(self.largest_request, job.framed.size)
        if memory := job.framed.memory:
            self._held_requests[memory] += 1
            if memory != self._newest_model:
                self._newest_model = memory
                for other in list(self.jobs.values()):
                    if other.stage != "waiting":
                        self.delivered(other)
        self.on_memory()

    def _let_go(self, job: Job) -> None:
        """Forget a request's content: the node has it, or does not need it any more."""
        if job.framed is not None and (memory := job.framed.memory):
            self._held_requests[memory] -= 1
            if not self._held_requests[memory]:
                del self._held_requests[memory]
        job.framed = None
        job.message = without_content(job)
        self.credits.admit()
        self.on_memory()

    def _old_versions(self) -> int:
        """Return how many models are kept only because they are still being sent; the newest is the strategy's own."""
        return max(0, len(self._held_requests) - 1)

    def _start_expiry(self, job: Job) -> None:
        ttl = job.message.metadata.ttl
        job.expiry = asyncio.get_running_loop().call_later(ttl, self.expire, job)

    def _announce(self, member: Member, job: Job) -> None:
        assert job.framed is not None
        framed, about = job.framed, job.message.metadata
        small = framed.size + len(framed.head) <= INLINE_BYTES
        member.tell({
            "kind": "work", "id": job.name, "type": about.message_type, "group": about.group_id, "ttl": about.ttl,
            "size": framed.size, "inline": small,
        }, framed if small else None)
        if small and member.connected:    # the announcement holds all of it
            member.down.add(framed.size, self.now())
            job.enter("working", self.now())

    def delivered(self, job: Job) -> None:
        """Note that a node has a request whole.

        Requests with the newest model are kept until they are answered: a client that is started anew in the middle of
        its task is given it again. That costs no memory where all requests share one model, as in a round.
        """
        if job.stage == "waiting":
            job.enter("working", self.now())
        framed = job.framed
        if framed is not None and framed.size + len(framed.head) > INLINE_BYTES and framed.memory != self._newest_model:
            self._let_go(job)

    def expire(self, job: Job) -> None:
        """Give up on a job whose time is over."""
        if job.is_open:
            if (member := self.members.get(job.node_id)) is not None:
                member.tell({"kind": "cancel", "id": job.name})
            self.fail(job, NO_ANSWER, f"there was no answer within {job.message.metadata.ttl:g} s")

    def fail(self, job: Job, code: int, reason: str) -> None:
        """End a job without an answer."""
        self._finish(job, Error(code, reason))

    def reply_limit(self) -> int:
        """Return how many bytes a reply may take."""
        return self.settings.max_reply_bytes or max(LEAST_REPLY_LIMIT, 4 * self.largest_request)

    def arrive(self, job: Job, content: Content, facts: Mapping[str, Any]) -> None:
        """Take note of a job's answer."""
        for name in TIMES:
            value = facts.get(name)
            if isinstance(value, (int, float)) and 0 <= value < 1e9:
                job.times[name] = float(value)
        self._finish(job, content)

    def _finish(self, job: Job, outcome: Content) -> None:
        if not job.is_open:
            return
        if job.expiry is not None:
            job.expiry.cancel()
        job.partial = None
        job.error = outcome if isinstance(outcome, Error) else None
        self._let_go(job)
        job.enter("arrived", self.now())
        if isinstance(outcome, Error):
            self.credits.release(job.name)
        at = self.now()
        known = sum(job.times.values())
        if set(job.times) == set(TIMES):
            job.times["upload_s"] = max(0.0, at - job.pushed_at - known)
        self.emit(Event("reply", at, job.node_id, reply_to(job.message, outcome)))

    def taken(self, names: Iterable[str]) -> None:
        """Note that the strategy has replies: their clients need not send them again."""
        by_member: dict[int, list[str]] = {}
        for name in names:
            if (job := self.jobs.pop(name, None)) is not None:
                by_member.setdefault(job.node_id, []).append(name)
        for node_id, done in by_member.items():
            if (member := self.members.get(node_id)) is not None:
                for name in done:
                    member.jobs.pop(name, None)
                member.tell({"kind": "taken", "ids": done})

    def _evict(self, name: str) -> None:
        if (job := self.jobs.get(name)) is not None:
            job.partial = None

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def mark(self) -> int:
        """Note that a checkpoint is taken now, and tell the clients; returns the mark's index."""
        pending = {node_id: list(member.jobs) for node_id, member in self.members.items() if member.jobs}
        mark = self.history.add_mark(pending)
        self.tell_marks()
        return mark.index

    def tell_marks(self) -> None:
        """Tell the clients which checkpoints the run may be continued from."""
        for member in self.members.values():
            member.tell({"kind": "marks", "marks": self._marks(member)})

    def _marks(self, member: Member) -> list[Any]:
        return [mark.body(member.node_id) for mark in self.history.marks]

    def state_dict(self) -> dict[str, Any]:
        """Return members and jobs for a checkpoint, which the caller has marked."""
        members = [{"name": member.name, "partition": member.partition, "config": member.config,
                    "introduction": member.introduction, "jobs": list(member.jobs)}
                   for member in self.members.values()]
        jobs = []
        for job in self.jobs.values():
            about = job.message.metadata
            waiting = job.framed is not None
            jobs.append({
                "id": job.name, "node_id": job.node_id, "type": about.message_type, "group": about.group_id,
                "ttl": about.ttl, "content": job.message.content if waiting else None,
                "error": None if job.error is None else [job.error.code, job.error.reason],
            })
        return {"history": self.history.state_dict(), "members": members, "jobs": jobs, "assigned": self.assigned}

    def load_state_dict(self, state: Mapping[str, Any], make_job: Callable[[Mapping[str, Any]], Job]) -> None:
        """Continue from what `state_dict` returned; all members are awaited."""
        self.history.load_state_dict(state["history"])
        self.assigned = dict(state["assigned"])
        for entry in state["jobs"]:
            job = make_job(entry)
            self.jobs[job.name] = job
        for entry in state["members"]:
            member = Member(entry["name"], node_id_of(entry["name"]), entry["partition"], entry["config"],
                            entry["introduction"], since=self.now())
            self.members[member.node_id] = member
            member.jobs = {name: self.jobs[name] for name in entry["jobs"]}

    def begin(self) -> None:
        """Begin to wait for the members of a restored run, and report what had ended already."""
        for member in self.members.values():
            self._wait_for(member, self.settings.resume_grace_s)
        for job in list(self.jobs.values()):
            if job.error is not None:
                self.fail(job, job.error.code, job.error.reason or "")
            elif job.node_id not in self.members:
                self.fail(job, NODE_GONE, "it left")
            else:
                if job.framed is not None:
                    self._hold(job)
                self._start_expiry(job)

    def incident(self, who: str, reason: str) -> None:
        """Report that somebody did what no client of ours does."""
        self.counts["incidents"] += 1
        self.on_incident(who, reason)


def without_content(job: Job) -> Any:
    """Return a job's message without its content, so that a model is not kept for its sake."""


    return with_id(job.message, RecordDict(), job.name)


def read_config(body: Any) -> dict[str, Any]:
    """Return the node configuration that a client sent.

    Raises:
        MalformedFrame: it is not a few named scalars.
    """
    if not isinstance(body, dict) or len(body) > MAX_CONFIG_ENTRIES:
        raise MalformedFrame("a node's configuration is not a few named values")
    for name, value in body.items():
        short = len(name) <= LONGEST_NAME and len(str(value)) <= LONGEST_VALUE
        if not isinstance(value, (str, int, float, bool)) or not short:
            raise MalformedFrame("a node's configuration holds something other than short names and values")
    return dict(body)


def read_ids(body: Any) -> list[str]:
    """Return the task ids that a client sent.

    Raises:
        MalformedFrame: they are none.
    """
    if not isinstance(body, list) or not all(isinstance(name, str) for name in body):
        raise MalformedFrame("a list of tasks is none")
    return [str(TaskId.of(name)) for name in body]


