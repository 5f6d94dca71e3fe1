"""Who takes part in which step of a run of real peers: what they agree on among themselves, without a server."""
import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from fedcore.checkpoint import Checkpoints
from fedcore.peers.accord import Words
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Membership
from fedcore.transport.peer_runner import PeerOptions, RosterBoard

# The names of what peers agree on: who takes part; and, where a strategy stops by time, that a step is over.
MEMBERS, ENDED, SETTLED = "members", "ended", "settled"
# A change of members is agreed on this many steps ahead of whoever is furthest: nobody has begun that step by then.
AHEAD = 2


class AgreedBoard(RosterBoard):
    """The steps and the members of a run, as one peer knows them; all peers know the same.

    Members change from a step on that nobody has begun: whoever notices that a peer is lost, or is asked by one that
    wants to join, lets all say in which step they are (`Accords`). Until all know what came of it, nobody goes on by
    more than one step.

    Args:
        count: of peers in the roster; all take part from the beginning.
        on_row: told what happens: (event, figures).
        on_change: told of a change of members, once it is agreed on: (first step, members, who joins).
        on_safe_point: told of every step that this peer has ended.
    """

    def __init__(
        self, count: int, options: PeerOptions, checkpoints: Checkpoints | None,
        on_row: Callable[[str, dict[str, Any]], None], on_change: Callable[[int, Membership, tuple[int, ...]], None],
        on_safe_point: Callable[[int], None],
    ):
        super().__init__(count, options, checkpoints, on_row, _no_words)
        self._on_change, self._on_safe_point = on_change, on_safe_point
        self.changes: list[tuple[int, Membership]] = [(0, Membership(0, tuple(range(count))))]
        self._stands_at: float | None = None         # what the clock shows while a step is being closed
        self._begun = -1
        self._promised = math.inf                    # no step beyond this one is begun before members are agreed on
        self._may_go_on = asyncio.Event()
        self._asking: dict[int, int] = {}            # incarnations of those who want to join, by rank
        self._admitted: dict[int, int] = {}
        self._agreeing = -1                          # the epoch whose successor is being agreed on
        self.is_over = False                         # this peer has done its last step, and still answers
        self.peer: Peer

    def attach(self, peer: Peer) -> None:
        """Take note of whose board it is."""
        self.peer = peer
        peer.accords.heard[MEMBERS] = lambda name, epoch: self.consider()
        peer.accords.on_loss.append(lambda rank: self.consider())

    # ---- time -------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since all peers were ready."""
        return time.monotonic() - self._started if self._stands_at is None else self._stands_at

    def set_clock(self, at: float) -> None:
        """Let the clock show a time now."""
        self._started = time.monotonic() - at

    def _end_of(self, step: int) -> float:
        if self._options.stop_s is None:
            return math.inf
        return self._options.stop_s * (step + 1) / self._options.num_steps

    # ---- steps ------------------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self._options.num_steps

    def membership(self, step: int) -> Membership:
        """Return who takes part in a step, as far as is known."""
        return next(found for first, found in reversed(self.changes) if first <= step)

    async def begin(self, peer: Peer, step: int) -> Membership | None:
        """Return who takes part in a step; None after the last."""
        if step >= self._options.num_steps:
            return None
        while step > self._promised:
            self._may_go_on.clear()
            await self._may_go_on.wait()
        self._begun, self.ends_at = step, self._end_of(step)
        self.consider()
        found = self.membership(step)
        if found.epoch != peer.epoch:
            for rank in set(found.members) - peer.accords.lost_in(found.epoch):
                peer.find(rank)
            self._on_row("members", {"step": step, "epoch": found.epoch, "members": list(found.members)})
        return found

    async def report(self, peer: Peer, state: Callable[[], Any]) -> None:
        """Write a checkpoint when it is time to; where peers stop by time, once all have come so far."""
        last = peer.step == self._options.num_steps - 1
        due = last or time.monotonic() - self._saved_at >= self._options.save_every_s
        if self._options.stop_s is not None:
            due = await self._settle(peer, due)
        plain = state()
        self.latest = (peer.step, plain, peer.params, peer.buffers)
        saved = peer.state_dict(plain) if self._checkpoints is not None and due else None
        self._stands_at = None
        self._on_safe_point(peer.step)
        if self._checkpoints is not None and saved is not None:
            row = {"kind": "peer", "rank": peer.rank, "peer": saved}
            await asyncio.get_running_loop().run_in_executor(None, self._checkpoints.save, row)
            self._saved_at = time.monotonic()
        self._on_row("step", {"step": peer.step, "loss": peer.loss, **peer.counters.as_dict()})

    async def _settle(self, peer: Peer, due: bool) -> bool:
        """Wait until all have ended their step and nothing is open between them; sets all clocks to the latest one.

        Args:
            due: whether this peer wants to save; if one does, all do.
        """
        await peer.accords.say(ENDED, peer.step, {}, peer.epoch, peer.members)
        await peer.settle_meetings()
        words = await peer.accords.say(SETTLED, peer.step, {"at": self.now, "due": due}, peer.epoch, peer.members)
        latest = max(float(word["at"]) for word in words.values())
        self.set_clock(latest)
        self._stands_at = latest
        return any(word["due"] for word in words.values())

    # ---- members ----------------------------------------------------------------------------------------------------

    def ask(self, rank: int, incarnation: int) -> None:
        """Take note that a peer wants to join; it was away, and remembers nothing."""
        if self._admitted.get(rank) != incarnation and self._asking.get(rank) != incarnation:
            self.peer.lose(rank)
            self._asking[rank] = incarnation
            self.consider()

    def consider(self) -> None:
        """Let all agree on new members, where there is a reason to."""
        accords, (_, latest) = self.peer.accords, self.changes[-1]
        epoch, members = latest.epoch, latest.members
        wanted = not self.is_over and (self._asking or accords.lost_in(epoch) & set(members))
        if self._begun < 0 or self._agreeing == epoch or not (wanted or accords.is_begun(MEMBERS, epoch)):
            return
        self._agreeing, self._promised = epoch, self._begun + 1
        joins = {str(rank): incarnation for rank, incarnation in self._asking.items()}
        accords.say(MEMBERS, epoch, {"step": self._begun, "joins": joins}, epoch, members).add_done_callback(
            self._change)

    def _change(self, ended: "asyncio.Future[Words]") -> None:
        """Take note of what all have agreed on."""
        if ended.cancelled() or ended.exception() is not None:
            return
        words = ended.result()
        joins: dict[int, int] = {}
        for word in words.values():
            for rank, incarnation in word["joins"].items():
                joins[int(rank)] = max(incarnation, joins.get(int(rank), 0))
        joins = {rank: incarnation for rank, incarnation in joins.items() if rank not in words}
        first = max(word["step"] for word in words.values()) + AHEAD
        members = Membership(self.changes[-1][1].epoch + 1, tuple(sorted({*words, *joins})))
        self.changes.append((first, members))
        self._admitted |= joins
        self._asking = {rank: number for rank, number in self._asking.items() if self._admitted.get(rank) != number}
        for rank in joins:
            self.peer.accords.admit(rank, members.epoch)
        self._promised = math.inf
        self._may_go_on.set()
        self._on_change(first, members, tuple(sorted(joins)))
        self.consider()

    def resume(self, peer: Peer, at: float) -> None:
        """Go on where a checkpoint was taken."""
        self.changes = [(0, Membership(peer.epoch, peer.members))]
        self.set_clock(at)

    def join(self, first: int, members: Membership, at: float) -> None:
        """Begin as a newcomer: with a step, its members, and what the clock shows."""
        self.changes, self.peer.accords.since_epoch = [(first, members)], members.epoch
        self._begun = first - 1
        self.set_clock(at)
        self.consider()


async def _no_words(word: str) -> None:
    """Peers of this board agree by `Accords`, not by single words."""
