"""Pairwise exchanges that happen at both ends or at neither.

Two phases: the initiator proposes its vector; the partner votes with its own and is bound from then on; the initiator
applies, which is the point of no return, and commits; the partner applies and says that it is done. A partner that
hears nothing asks: what the initiator does not remember was never committed (presumed abort). An initiator remembers a
commit until the partner is done, and names those it remembers in its next proposal, which settles all older ones.

Whoever has the lower rank proposes. Turns are then taken in ascending order of rank, so no circle of peers can wait for
each other.

Source: presumed abort: Mohan and Lindsay, 1983, PODC, "Efficient commit protocols for the tree of processes model of
distributed transactions".
"""
import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedcore.peers.envelope import ALONE, Envelope, is_finite

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer

Offer = Callable[[], Tensor]
Apply = Callable[[int, Tensor, Tensor, float], None]

# In doubt, a peer asks again after so many times its timeout, doubling up to the limit.
FIRST_PATIENCE, MOST_PATIENCE = 1.0, 16.0
# In the end, a partner is reminded of a commit after so many times what its vote took to come, doubling, too.
REMINDING_TRIPS = 2.0
# Proposals are counted from the peer's incarnation on, in units of two to this power: all that it makes after it was
# away are newer than those from before.
INCARNATION_BITS = 20


class Turn:
    """A peer takes part in one exclusive meeting at a time; who asked first comes first."""

    def __init__(self) -> None:
        self._holder: object | None = None
        self._queue: deque[tuple[object, Callable[[], None]]] = deque()

    def take(self, owner: object, then: Callable[[], None]) -> None:
        """Call `then` as soon as it is this owner's turn."""
        if self._holder is None:
            self._holder = owner
            then()
        else:
            self._queue.append((owner, then))

    def leave(self, owner: object) -> None:
        """Give up the turn, or the place in the queue."""
        if self._holder is not owner:
            self._queue = deque(entry for entry in self._queue if entry[0] is not owner)
            return
        self._holder = None
        while self._holder is None and self._queue:
            self._holder, then = self._queue.popleft()
            then()


@dataclass(slots=True, eq=False)
class Bound:
    """A vote that this peer gave and has not heard of since."""

    number: int
    mine: Tensor
    theirs: Tensor
    patience: float = FIRST_PATIENCE


@dataclass(slots=True, eq=False)
class Commit:
    """A meeting that this peer has applied, and whose partner has not said yet that it has, too.

    Attributes:
        at: when it was applied, on the run's clock.
        remind_at: when the partner is reminded, on the event loop's clock.
        patience_s: between two reminders, seconds.
    """

    at: float
    remind_at: float
    patience_s: float


class Meeting:
    """A kind of pairwise exchange.

    Args:
        offer: returns the vector to send; called when it is this peer's turn.
        apply: called with (partner, mine, theirs, at) at both ends once it is certain that both will: `mine` and
            `theirs` as offered, `at` the moment at which it counts, on the run's clock. At the end that was asked it
            comes a message's travel later, or more, and whatever happened there since then has to be accounted for.
        timeout_s: how long a proposal waits for its answer.
        exclusive: a peer's turn lasts from its offer to its apply, so nothing else is offered in between.
    """

    def __init__(self, peer: "Peer", tag: str, offer: Offer, apply: Apply, timeout_s: float, exclusive: bool):
        self._peer, self._tag, self._exclusive = peer, tag, exclusive
        self._offer, self._apply, self._timeout_s = offer, apply, timeout_s
        self._counts: dict[int, int] = {}                             # proposals made, by partner
        self._asked: dict[tuple[int, int], asyncio.Future[Tensor | None]] = {}
        self._commits: dict[int, dict[int, Commit]] = {}              # by partner and number
        self._seen: dict[int, int] = {}                               # newest proposal, by initiator
        self._bound: dict[int, dict[int, Bound]] = {}                 # by initiator and number
        self._idle: list[asyncio.Future[None]] = []
        for envelope in peer.mailbox.pop_early("meeting", tag):    # of partners that began before this peer
            self.take(envelope)

    def rebind(self, offer: Offer, apply: Apply, timeout_s: float) -> None:
        """Let other functions of the same peer answer from now on."""
        self._offer, self._apply, self._timeout_s = offer, apply, timeout_s

    # ---- the end that proposes --------------------------------------------------------------------------------------

    async def with_(self, partner: int) -> bool:
        """Meet a partner; returns False when the meeting was dropped, at both ends.

        Args:
            partner: of a higher rank than this peer's.
        """
        if partner <= self._peer.rank:
            raise ValueError(f"peer {self._peer.rank} cannot propose to {partner}: the lower rank proposes")
        if partner in self._peer.mailbox.lost:
            return False
        loop = asyncio.get_running_loop()
        number = self._counts[partner] = self._counts.get(partner, (self._peer.incarnation << INCARNATION_BITS) - 1) + 1
        owner = object()
        my_turn: asyncio.Future[None] = loop.create_future()
        answer: asyncio.Future[Tensor | None] = loop.create_future()
        if self._exclusive:
            self._peer.turn.take(owner, lambda: _settle(my_turn))
            await my_turn
        mine = self._offer()
        self._asked[partner, number] = answer
        timer, asked_at = loop.call_later(self._timeout_s, _settle, answer), loop.time()
        remembered = {old: commit.at for old, commit in self._commits.get(partner, {}).items()}
        self._post(partner, "propose", number, mine, commits=remembered)
        theirs = await answer
        timer.cancel()
        del self._asked[partner, number]
        if theirs is not None:
            at, patience_s = self._peer.now, REMINDING_TRIPS * (loop.time() - asked_at) or self._timeout_s
            self._commits.setdefault(partner, {})[number] = Commit(at, loop.time() + patience_s, patience_s)
            self._apply(partner, mine, theirs, at)
            self._peer.counters.exchanges += 1
        else:
            self._peer.counters.failed_meetings += 1
        if self._exclusive:
            self._peer.turn.leave(owner)
        if theirs is None:
            self._post(partner, "abort", number)
            return False
        self._post(partner, "commit", number, at=at)
        return True

    def _on_vote(self, partner: int, number: int, envelope: Envelope) -> None:
        answer = self._asked.get((partner, number))
        if answer is not None and not answer.done():
            answer.set_result(envelope.data[ALONE])
        else:
            self._on_ask(partner, number, envelope)

    def _on_ask(self, partner: int, number: int, _: Envelope) -> None:
        """Say what became of a proposal; while its vote is still awaited, nothing is decided."""
        commit = self._commits.get(partner, {}).get(number)
        if commit is not None:
            self._post(partner, "commit", number, at=commit.at)
        elif (partner, number) not in self._asked:
            self._post(partner, "abort", number)

    def _on_done(self, partner: int, number: int, _: Envelope) -> None:
        self._commits.get(partner, {}).pop(number, None)
        self._wake_idle()

    # ---- the end that is asked --------------------------------------------------------------------------------------

    def _on_propose(self, initiator: int, number: int, envelope: Envelope) -> None:
        if number <= self._seen.get(initiator, -1):
            return
        self._seen[initiator] = number
        commits: dict[Any, float] = envelope.meta["commits"]
        for old, at in commits.items():
            self._commit(initiator, int(old), at)
        for old in [old for old in self._bound.get(initiator, {}) if old < number]:
            self._drop(initiator, old)
        bound = Bound(number, envelope.data[ALONE], envelope.data[ALONE])
        if self._exclusive:
            # An initiator that has waited for so long has given up by now.
            asyncio.get_running_loop().call_later(self._timeout_s, self._forget_turn, initiator, bound)
            self._peer.turn.take(bound, lambda: self._vote(initiator, bound))
        else:
            self._vote(initiator, bound)

    def _forget_turn(self, initiator: int, bound: Bound) -> None:
        if self._bound.get(initiator, {}).get(bound.number) is not bound:
            self._peer.turn.leave(bound)

    def _vote(self, initiator: int, bound: Bound) -> None:
        bound.mine = self._offer()
        self._bound.setdefault(initiator, {})[bound.number] = bound
        self._post(initiator, "vote", bound.number, bound.mine)
        self._doubt_later(initiator, bound)

    def _doubt_later(self, initiator: int, bound: Bound) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(bound.patience * self._timeout_s, self._doubt, initiator, bound)
        bound.patience = min(2 * bound.patience, MOST_PATIENCE)

    def _doubt(self, initiator: int, bound: Bound) -> None:
        """Ask what became of a vote, and let others have their turn meanwhile."""
        if self._bound.get(initiator, {}).get(bound.number) is bound:
            self._peer.turn.leave(bound)
            self._post(initiator, "ask", bound.number)
            self._doubt_later(initiator, bound)

    def _on_commit(self, initiator: int, number: int, envelope: Envelope) -> None:
        self._commit(initiator, number, envelope.meta["at"])

    def _commit(self, initiator: int, number: int, at: float) -> None:
        bound = self._bound.get(initiator, {}).pop(number, None)
        if bound is not None:
            self._apply(initiator, bound.mine, bound.theirs, at)
            self._peer.counters.exchanges += 1
            self._peer.turn.leave(bound)
            self._wake_idle()
        self._post(initiator, "done", number)

    def _on_abort(self, initiator: int, number: int, _: Envelope) -> None:
        self._drop(initiator, number)

    def _drop(self, initiator: int, number: int) -> None:
        bound = self._bound.get(initiator, {}).pop(number, None)
        if bound is not None:
            self._peer.turn.leave(bound)
            self._wake_idle()

    # ---- both ends --------------------------------------------------------------------------------------------------

    def take(self, envelope: Envelope) -> str | None:
        """Act on a message; returns why it was refused, if it was."""
        if not is_finite(envelope.data):
            return "not finite"
        # An abort that overtakes its proposal would find nothing to abort; the proposal is then voted on and asked for.
        ON[envelope.meta["act"]](self, envelope.source, envelope.round, envelope)
        return None

    def _post(self, to: int, act: str, number: int, vector: Tensor | None = None, **meta: Any) -> None:
        payload = {} if vector is None else {ALONE: vector}
        self._peer.post(to, "meeting", self._tag, number, payload, {"act": act, **meta})

    def lose(self, rank: int) -> None:
        """Take note that a peer is gone: what it voted on or proposed and did not commit never happened."""
        for (partner, _), answer in list(self._asked.items()):
            if partner == rank:
                _settle(answer)
        self._commits.pop(rank, None)
        for number in list(self._bound.get(rank, {})):
            self._drop(rank, number)
        self._wake_idle()

    @property
    def is_open(self) -> bool:
        """Whether something is under way that is not settled."""
        return bool(self._asked) or any(self._commits.values()) or any(self._bound.values())

    async def drain(self) -> None:
        """Wait until everything is settled; partners that have not confirmed are reminded."""
        loop = asyncio.get_running_loop()
        while self.is_open:
            due = [commit.remind_at for commits in self._commits.values() for commit in commits.values()]
            idle: asyncio.Future[None] = loop.create_future()
            self._idle.append(idle)
            # A vote that is in doubt asks by itself.
            timer = loop.call_at(max(min(due), loop.time()), _settle, idle) if due else None
            await idle
            if timer is not None:
                timer.cancel()
            self._remind(loop.time())

    def _remind(self, now: float) -> None:
        for partner in sorted(self._commits):
            for number, commit in sorted(self._commits[partner].items()):
                if commit.remind_at <= now:
                    self._post(partner, "commit", number, at=commit.at)
                    commit.patience_s = min(2 * commit.patience_s, MOST_PATIENCE * self._timeout_s)
                    commit.remind_at = now + commit.patience_s

    def _wake_idle(self) -> None:
        if self._idle and not self.is_open:
            for idle in self._idle:
                _settle(idle)
            self._idle = []


def _settle(future: "asyncio.Future[Any]") -> None:
    if not future.done():
        future.set_result(None)


ON = {
    "propose": Meeting._on_propose, "vote": Meeting._on_vote, "commit": Meeting._on_commit, "done": Meeting._on_done,
    "ask": Meeting._on_ask, "abort": Meeting._on_abort,
}
