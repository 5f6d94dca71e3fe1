"""Virtual peers that go and come: who is away for long is lost to the others, and starts anew when it is back."""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedcore.peers.envelope import payload_bytes
from fedcore.simulations.availability import Availability
from fedcore.simulations.loop import VirtualLoop
from fedcore.simulations.network import Network
from fedcore.simulations.peer_board import VirtualBoard
from fedcore.simulations.peer_wire import VirtualWire

State = Mapping[str, Any]


@dataclass(frozen=True)
class Roll:
    """Who is there, and what happens next; all of it is replaced, never changed.

    Attributes:
        events: by rank: when it is lost, or comes (true) next; who has none stays as it is.
        lost_until: by rank: the last epoch in which it is lost; infinity while it is away.
        remnants: by rank: what one that was lost must not count anew when it is back.
        given: by rank of those who join: from whom they start, and when they have its state.
    """

    events: Mapping[int, tuple[float, bool]] = field(default_factory=dict)
    lost_until: Mapping[int, float] = field(default_factory=dict)
    remnants: Mapping[int, State] = field(default_factory=dict)
    given: Mapping[int, tuple[int, float]] = field(default_factory=dict)


class Attendance:
    """Lets peers go and come as their availability says.

    One that is away for a short time only stands still meanwhile. The others notice after `lost_after_s` that it is
    away, and go on without it; when it is back, it starts from what the first of them has that comes to the end of the
    last step without it.

    Args:
        lose: ends a peer; returns what it must not count anew.
        prepare: makes a peer that takes messages, but does nothing yet: (rank, remnants).
        start: lets it begin: (rank, the state that it starts from; empty where nobody has any).
    """

    def __init__(
        self, loop: VirtualLoop, availability: Availability, network: Network, board: VirtualBoard, wire: VirtualWire,
        count: int, lost_after_s: float, lose: Callable[[int], State], prepare: Callable[[int, State], None],
        start: Callable[[int, State], None],
    ):
        self._loop, self._availability, self._network, self._count = loop, availability, network, count
        self._board, self._wire, self._lost_after_s = board, wire, lost_after_s
        self._lose, self._prepare, self._start = lose, prepare, start
        self.roll = Roll()
        self._before: dict[int, Roll] = {}       # by step: what held before anybody had begun it
        self._waiting: dict[int, list[int]] = {}    # by step: who starts from the first that ends it
        self._kept: tuple[int, int, State] | None = None    # step, rank and state of the first that ended the latest
        self._firsts: dict[int, int] = {}        # by step: who ended it first
        board.attendance = self

    # ---- who goes and comes -----------------------------------------------------------------------------------------

    def begin(self, here: tuple[int, ...]) -> None:
        """Plan what happens next to everybody."""
        events = {rank: event for rank in range(self._count)
                  if (event := self._next(rank, self._loop.time(), rank in here)) is not None}
        self.roll = Roll(events, {rank: math.inf for rank in range(self._count) if rank not in here})
        self._wire.lost_until = dict(self.roll.lost_until)
        self._plan_all()

    def _plan_all(self) -> None:
        for rank in sorted(self.roll.events):
            self._plan(rank)

    def _plan(self, rank: int) -> None:
        at, comes = self.roll.events[rank]
        self._loop.deliver_at(at, rank * self._count + rank, self._comes if comes else self._goes, rank)

    def _next(self, rank: int, at: float, is_here: bool) -> tuple[float, bool] | None:
        """Return what happens to a peer next."""
        online = self._availability
        if not is_here:
            back = at if online.is_on(rank, at) else online.next_change(rank, at)
            return None if back == math.inf else (back, True)
        while True:
            off = online.next_change(rank, at) if online.is_on(rank, at) else at
            back = math.inf if off == math.inf else online.next_change(rank, off)
            if off == math.inf:
                return None
            if back - off > self._lost_after_s:
                return off + self._lost_after_s, False
            at = back

    def _set_next(self, rank: int, is_here: bool) -> None:
        event = self._next(rank, self._loop.time(), is_here)
        events = {other: planned for other, planned in self.roll.events.items() if other != rank}
        events = events if event is None else {**events, rank: event}
        self.roll = replace(self.roll, events=events, lost_until=self._wire.lost_until.copy())
        if event is not None:
            self._plan(rank)

    def _goes(self, rank: int) -> None:
        given = {other: what for other, what in self.roll.given.items() if other != rank}
        for ranks in self._waiting.values():
            if rank in ranks:
                ranks.remove(rank)
        self.roll = replace(self.roll, remnants={**self.roll.remnants, rank: self._lose(rank)}, given=given)
        self._board.remove(rank)
        self._set_next(rank, False)
        self._look_after_those_who_wait()

    def _comes(self, rank: int) -> None:
        board = self._board
        first, members = board.begun + 1, board.changes[-1][1].members
        board.change_members(tuple(sorted({*members, rank})))
        self._wire.lost_until[rank] = board.changes[-1][1].epoch - 1
        self._prepare(rank, self.roll.remnants.get(rank, {}))
        self._set_next(rank, True)
        if self._kept is not None and self._kept[0] == first - 1:
            self._give(rank, self._kept[1], self._kept[2])
        else:
            self._waiting.setdefault(first - 1, []).append(rank)
            self._look_after_those_who_wait()

    def _look_after_those_who_wait(self) -> None:
        """When nobody is left that could give them a state, they go on from the latest that anybody had."""
        waiting = {rank for ranks in self._waiting.values() for rank in ranks}
        if not waiting or not waiting | set(self.roll.given) >= set(self._board.changes[-1][1].members):
            return
        for step, ranks in sorted(self._waiting.items()):
            for rank in ranks:
                donor, state = (rank, {}) if self._kept is None else self._kept[1:]
                self._give(rank, donor, {**state, "step": step})
        self._waiting = {}

    # ---- states for those who come ----------------------------------------------------------------------------------

    def wants_state(self, step: int) -> bool:
        """Say whether the first that ends a step is to hand in its state."""
        return self._kept is None or step > self._kept[0]

    def ended(self, rank: int, step: int, state: State) -> None:
        """Take note of the first that has ended a step."""
        self._kept, self._firsts[step] = (step, rank, state), rank
        for other in self._waiting.pop(step, []):
            self._give(other, rank, state)

    def _give(self, rank: int, donor: int, state: State) -> None:
        size = _size_of(state)
        sending, latency = (0.0, 0.0) if donor == rank else self._network.between(donor, rank, 0, size)
        at = self._loop.time() + sending + latency
        self.roll = replace(self.roll, given={**self.roll.given, rank: (donor, at)})
        self._plan_beginning(rank, donor, at, state)

    def _plan_beginning(self, rank: int, donor: int, at: float, state: State) -> None:
        self._loop.deliver_at(at, rank * self._count + rank, self._begin, rank, donor, at, state)

    def _begin(self, rank: int, donor: int, at: float, state: State) -> None:
        if self.roll.given.get(rank) != (donor, at):
            return    # it went before it had begun
        given = {other: what for other, what in self.roll.given.items() if other != rank}
        self.roll = replace(self.roll, given=given)
        if donor != rank:
            size = _size_of(state)
            self._wire.peers[rank].counters.bytes_received += size
            if self._wire.lost_until.get(donor) != math.inf:
                self._wire.peers[donor].counters.bytes_sent += size
        self._start(rank, state)

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def before(self, step: int) -> None:
        """Remember what holds before anybody has begun a step."""
        self._before[step] = self.roll
        for found in (self._before, self._firsts):
            for old in [old for old in found if old < self._board.closed]:
                del found[old]

    def can_save(self, step: int, states: Mapping[int, State]) -> bool:
        """Say whether a run can go on from the states at the end of a step alone."""
        roll, now = self._before.get(step + 1, self.roll), self._board.membership(step)
        following = self._board.known(step + 1)[-1][1].members
        if not all(rank in states or rank in roll.given for rank in following):
            return False    # somebody had begun the next step when another was lost in this one
        pending = any(one["vector"] is not None for state in states.values() for one in state["pending"])
        return not pending or set(states) == set(now.members) <= set(following)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what held before anybody had begun the step after this one."""
        roll = self._before.get(step + 1, self.roll)
        return {"events": dict(roll.events), "lost_until": dict(roll.lost_until), "remnants": dict(roll.remnants),
                "given": dict(roll.given),
                "first": self._firsts[step]}

    def load_state_dict(self, state: Mapping[str, Any], step: int, states: Mapping[int, State]) -> None:
        """Continue after a step from what `state_dict` returned."""
        events = {rank: (at, bool(comes)) for rank, (at, comes) in state["events"].items()}
        given = {rank: (donor, at) for rank, (donor, at) in state["given"].items()}
        self.roll = Roll(events, dict(state["lost_until"]), dict(state["remnants"]), given)
        self._wire.lost_until = dict(state["lost_until"])
        self._kept = (step, state["first"], states[state["first"]])
        self._firsts[step] = state["first"]
        self._plan_all()
        for rank, (donor, at) in sorted(given.items()):
            self._prepare(rank, self.roll.remnants.get(rank, {}))
            self._plan_beginning(rank, donor, at, states[donor])

    @property
    def next_arrival(self) -> float:
        """When somebody comes next; infinity when nobody will."""
        return min((at for at, comes in self.roll.events.values() if comes), default=math.inf)


def _size_of(state: State) -> int:
    """Return how many bytes the state of a newcomer takes: the model, and the vectors of the strategy."""
    if "params" not in state:
        return 0
    own = state["state"] or {}
    vectors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return payload_bytes({"params": state["params"], **vectors})
