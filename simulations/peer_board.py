"""Who takes part in a run of virtual peers, when its steps begin and end, and when it is over."""
import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedcore.peers.peer import Peer
from fedcore.peers.seams import Membership
from fedcore.simulations.loop import VirtualLoop
from fedcore.simulations.peer_wire import VirtualWire

ROUNDING = 1e-12
# A change of members is written down with their ranks, up to so many.
MOST_NAMED_MEMBERS = 2000


@dataclass(slots=True, eq=False)
class Report:
    """What a peer was when it finished a step.

    Attributes:
        began, at: when its step began and ended, seconds.
        counters: a copy.
        logged: rows of metrics that it wrote during the step: (time, event, figures).
        state: what a checkpoint holds of it; None where none is taken.
    """

    rank: int
    began: float
    at: float
    params: Any
    buffers: Any
    loss: float
    counters: dict[str, Any]
    logged: list[tuple[float, str, dict[str, Any]]]
    state: dict[str, Any] | None


class Host(Protocol):
    """Learns of every step that all have finished."""

    def wants_state(self, step: int) -> bool:
        """Say whether a checkpoint is to be taken at the end of a step."""

    def close_step(self, step: int, reports: list[Report]) -> None:
        """Take note that all members have finished a step; reports are in ascending order of rank."""


class Attendance(Protocol):
    """Learns of steps, where peers go and come."""

    def before(self, step: int) -> None:
        """Take note that nobody has begun a step yet, and that somebody does now."""

    def wants_state(self, step: int) -> bool:
        """Say whether the first that ends a step is to hand in its state."""

    def ended(self, rank: int, step: int, state: dict[str, Any]) -> None:
        """Take note of the first that has ended a step."""


class VirtualBoard:
    """The meeting point of all virtual peers.

    Args:
        members: ranks that are there from the beginning.
        num_steps: steps of the run; None: until `stop` is called.
        step_s: length of a step in seconds, for strategies that stop by time; None for the others.
        stop_s: when no further step begins, seconds; None: never.
    """

    def __init__(
        self, loop: VirtualLoop, wire: VirtualWire, host: Host, members: tuple[int, ...], num_ranks: int,
        num_steps: int | None, step_s: float | None, stop_s: float | None,
    ):
        self._loop, self._wire, self._host, self._num_ranks = loop, wire, host, num_ranks
        self.num_steps, self._step_s, self.stop_s = num_steps, step_s, stop_s
        self.stop_reason: str | None = None if num_steps is None else "rounds"
        self.begun = -1                                            # the latest step that any peer has begun
        self.closed = -1                                           # the latest step that all have finished
        self.changes: list[tuple[int, Membership]] = [(0, Membership(0, members))]
        self._reports: dict[int, dict[int, Report]] = {}
        self._logged: dict[int, list[tuple[float, str, dict[str, Any]]]] = {}
        self._began: dict[int, float] = {}
        self._gathered: dict[int, asyncio.Future[None]] = {}       # who waits for the others at the end of a step
        self.attendance: Attendance | None = None
        self._known: dict[int, list[tuple[int, Membership]]] = {}    # by step: changes before anybody had begun it
        self.ends_at = math.inf
        self._ending: asyncio.Task[None] | None = None
        if step_s is not None:
            if stop_s is not None:
                # A quotient that is rounded up by its last bit must not make one more step.
                self.num_steps, self.stop_reason = math.ceil(stop_s / step_s * (1 - ROUNDING)), "seconds"
            self.open(0)
        elif stop_s is not None:
            loop.call_at(stop_s, self.stop, "seconds")

    # ---- time -------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds since the run began."""
        return self._loop.time()

    async def sleep_until(self, rank: int, at: float) -> None:
        """Wait for a moment; at equal times the lower rank comes first."""
        if at == math.inf:
            await self._loop.create_future()    # it is gone for good
        woken: asyncio.Future[None] = self._loop.create_future()
        handle = self._loop.deliver_at(at, rank * self._num_ranks + rank, _wake, woken)
        try:
            await woken
        finally:
            self._loop.heap.cancel(handle)

    # ---- membership -------------------------------------------------------------------------------------------------

    def membership(self, step: int) -> Membership:
        """Return who takes part in a step."""
        return next(found for first, found in reversed(self.changes) if first <= step)

    def change_members(self, members: tuple[int, ...]) -> int:
        """Let others take part from the next step on that nobody has begun; returns that step."""
        first, latest = self.begun + 1, self.changes[-1]
        if latest[0] == first:
            self.changes.pop()
        self.changes.append((first, Membership(latest[1].epoch + 1, members)))
        return first

    def remove(self, rank: int) -> None:
        """Take note that a peer is gone."""
        self.change_members(tuple(other for other in self.changes[-1][1].members if other != rank))
        self._gathered.pop(rank, None)
        self._logged.pop(rank, None)
        self._wire.lose(rank)
        self._try_to_close(self.closed + 1)
        self._try_to_end()

    def _awaited(self, step: int) -> list[int]:
        """Return whose reports a step needs: those of its members that live, or have reported before they went."""
        reports, found = self._reports.get(step, {}), self.membership(step)
        return [rank for rank in found.members if not self._wire.is_lost(rank, found.epoch) or rank in reports]

    # ---- steps ------------------------------------------------------------------------------------------------------

    async def begin(self, peer: Peer, step: int) -> Membership | None:
        """Return who takes part in a step; None when the run ends before it."""
        if self.attendance is not None and step > self.begun and step not in self._known:
            # Also at the end of a run that was stopped: it is to go on as if it had not been.
            self._known = {step: list(self.changes)} | {
                later: known for later, known in self._known.items() if later > self.closed}
            self.attendance.before(step)
        if self.num_steps is not None and step >= self.num_steps:
            return None
        self.begun = max(self.begun, step)
        self._began[peer.rank] = self.now
        found = self.membership(step)
        for rank in peer.mailbox.lost.intersection(found.members) if found.epoch != peer.epoch else ():
            if not self._wire.is_lost(rank, found.epoch):
                peer.find(rank)
        if found.epoch != peer.epoch and peer.rank == found.members[0] and len(found.members) <= MOST_NAMED_MEMBERS:
            self.log(peer, {"epoch": found.epoch, "members": list(found.members)})
        return found

    async def report(self, peer: Peer, state: Callable[[], Any]) -> None:
        """Take note that a peer has finished its step."""
        step = peer.step
        if self._step_s is not None:
            self._gathered[peer.rank] = self._loop.create_future()
            self._try_to_end()
            await self._gathered[peer.rank]
        plain = state()
        is_first = self.attendance is not None and self.attendance.wants_state(step)
        whole = peer.state_dict(plain) if is_first or self._host.wants_state(step) else None
        if is_first and self.attendance is not None and whole is not None:
            self.attendance.ended(peer.rank, step, whole)
        counters = peer.counters.as_dict()
        reports = self._reports.setdefault(step, {})
        reports[peer.rank] = Report(
            peer.rank, self._began[peer.rank], self.now, peer.params, peer.buffers, peer.loss, counters,
            self._logged.pop(peer.rank, []), whole)
        if len(reports) >= len(self.membership(step).members) - len(self._wire.lost_until):
            self._try_to_close(step)

    def log(self, peer: Peer, figures: Mapping[str, Any]) -> None:
        """Keep a row of a peer until its step is over."""
        event = "refused" if "refused_from" in figures else "log"
        self._logged.setdefault(peer.rank, []).append((self.now, event, dict(figures)))

    def _try_to_close(self, step: int) -> None:
        if step != self.closed + 1 or step > self.begun:
            return
        reports = self._reports.get(step, {})
        if len(reports) < len(self._awaited(step)):
            return
        self._reports.pop(step, None)
        self.closed = step
        if reports:    # else none of its members has lived to its end
            self._host.close_step(step, [reports[rank] for rank in sorted(reports)])
        self._try_to_close(step + 1)

    def stop(self, reason: str) -> None:
        """End the run after the latest step that anybody has begun."""
        if self.num_steps is None or self.begun + 1 < self.num_steps:
            self.num_steps, self.stop_reason = self.begun + 1, reason

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return who takes part after a step, as far as that was known when nobody had gone beyond it."""
        return {"changes": [[first, found.epoch, list(found.members)] for first, found in self.known(step + 1)]}

    def known(self, step: int) -> list[tuple[int, Membership]]:
        """Return the changes of members up to a step, as far as they were known before anybody had begun it."""
        return [change for change in self._known.get(step, self.changes) if change[0] <= step]

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after a step."""
        self.changes = [(first, Membership(epoch, tuple(members))) for first, epoch, members in state["changes"]]
        self.begun = self.closed = step
        if self._step_s is not None:
            self.open(step + 1)

    # ---- strategies that stop by time -------------------------------------------------------------------------------

    def open(self, step: int) -> None:
        """Fix when a step ends; absolute times do not drift."""
        assert self._step_s is not None
        self.ends_at = (step + 1) * self._step_s
        if self.stop_s is not None and step + 1 == self.num_steps:
            self.ends_at = min(self.ends_at, self.stop_s)

    def _try_to_end(self) -> None:
        """End a step once all who live have come to its end."""
        found = self.membership(max(self.begun, 0))
        living = [rank for rank in found.members if not self._wire.is_lost(rank, found.epoch)]
        if self._gathered and set(living) <= self._gathered.keys() and self._ending is None:
            self._ending = self._loop.create_task(self._end_step(living))

    async def _end_step(self, living: list[int]) -> None:
        peers = [self._wire.peers[rank] for rank in living]
        while any(peer.meetings_open for peer in peers):
            for peer in peers:
                await peer.settle_meetings()
        if self.now < self.ends_at:
            await self.sleep_until(0, self.ends_at)
        waiting, self._gathered, self._ending = self._gathered, {}, None
        self.open(self.begun + 1)
        for rank in sorted(waiting):
            _wake(waiting[rank])


def _wake(woken: "asyncio.Future[None]") -> None:
    if not woken.done():
        woken.set_result(None)
