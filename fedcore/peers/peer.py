"""A node of a run without a server: what its strategy can do."""
import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedcore.errors import PeerLost
from fedcore.peers.accord import ACCORD, Accords
from fedcore.peers.atomic import AtomicMeans
from fedcore.peers.counters import Counters, Offers
from fedcore.peers.envelope import Envelope, Payload, named, payload_bytes
from fedcore.peers.mailbox import Mailbox
from fedcore.peers.meeting import Apply, Meeting, Offer, Turn
from fedcore.peers.packing import Packing
from fedcore.peers.reductions import Reductions
from fedcore.peers.roll import from_checkpoint, to_checkpoint
from fedcore.peers.seams import Board, Labour, Wire
from fedcore.peers.steps import Steps, as_plain
from fedcore.peers.ticks import Ticks
from fedcore.peers.underway import Underway
from fedcore.seeds import torch_generator

S = TypeVar("S")


class Peer:
    """One peer, as its strategy sees it.

    Tensors are values: nothing here writes into a tensor that was handed in or out, and neither may a strategy.

    Attributes:
        rank: this peer's number, which also says whose data it holds.
        members: ranks of all who take part in this step, ascending, this peer's included.
        epoch: counts the changes of `members`.
        seed: of the run.
        step: the present step, from 0.
        params: this peer's model, shape (d,). Set it to a new tensor to change it; it is what is evaluated.
        buffers: values of the model that are not trained; each peer keeps its own.
        num_examples: training examples that this peer holds.
        counters: what it has done so far.
        clocks: position of each Poisson clock.
        packing: compresses what this peer sends, where the experiment asks for that and the strategy can; else None.
    """

    def __init__(
        self, rank: int, seed: int, params: Tensor, buffers: Mapping[str, Tensor], *, run: str, labour: Labour,
        wire: Wire, board: Board, num_examples: int = 1, packing: Packing | None = None,
    ):
        self.rank, self.seed, self.run, self.num_examples = rank, seed, run, num_examples
        self.params, self.buffers = params, buffers
        self.members: tuple[int, ...] = (rank,)
        self.epoch, self.step = 0, -1
        self.labour, self.wire, self.board, self.packing = labour, wire, board, packing
        self.counters = Counters()
        self.clocks: dict[str, tuple[int, float | None]] = {}
        self.mailbox = Mailbox(run)
        self.loss = float("nan")     # of the latest training
        self.turn = Turn()
        self.incarnation = 0         # above 0 once it was away: tells its meetings from those of before
        self.accords = Accords(self)
        self.means = AtomicMeans(self)
        self._meetings: dict[str, Meeting] = {}
        self.reductions = Reductions(self)
        self._restored: Any = None
        self._spawned: list[asyncio.Task[Any]] = []
        self._reported = False                         # whether the present step had its safe point

    # ---- time and randomness ----------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return self.board.now

    @property
    def finished(self) -> bool:
        """Whether the present step is over, for strategies that stop by time."""
        return self.board.now >= self.board.ends_at

    def rng(self, *purpose: int | str) -> torch.Generator:
        """Return a generator that follows from the run's seed, this peer and a purpose; the same at every call."""
        return torch_generator(self.seed, self.rank, "peer", *purpose)

    def ticks(self, rate: float, *purpose: int | str) -> Ticks:
        """Return a Poisson clock: `async for at in peer.ticks(2.0, "gradient")`; it ends with the present step.

        Args:
            rate: expected ticks per second.
        """
        return Ticks(self, rate, purpose or ("clock",))

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds of the run's clock."""
        await self.board.sleep_until(self.rank, self.board.now + seconds)

    # ---- steps and what survives a restart --------------------------------------------------------------------------

    def steps(self) -> Steps:
        """Return the steps of the run: `async for step in peer.steps()`.

        Here, and only here, membership changes and the run ends. For strategies that stop by time a step is a span of
        time, and all peers begin it together.
        """
        return Steps(self)

    async def safe_point(self, state: Any = None) -> None:
        """End the present step; a checkpoint may be taken here, and nowhere else.

        Args:
            state: what `restore` is to return after a restart: a dataclass or a mapping whose values a checkpoint can
                hold; or a function that returns it, called once all meetings are settled (a partner may commit late; it
                may set `params`, too). Model, optimizer, clocks, counters and reductions under way are kept besides.
        """
        await self.board.report(self, lambda: as_plain(state() if callable(state) else state))
        self._reported = True

    def restore(self, kind: Callable[..., S]) -> S | None:
        """Return the state of the last safe point, or that which a newcomer starts from; None at a fresh start.

        Args:
            kind: called with the state's fields as arguments, e.g. the dataclass itself.
        """
        return None if self._restored is None else kind(**self._restored)

    def state_dict(self, state: Any) -> dict[str, Any]:
        """Return everything of this peer that must survive a restart, `state` being its strategy's own."""
        packing = {} if self.packing is None else {"packing": self.packing.state_dict()}
        return {
            "state": state, "params": self.params, "buffers": dict(self.buffers), "step": self.step,
            "labour": self.labour.state_dict(), "wire": self.wire.state_dict(self.rank), "clocks": dict(self.clocks),
            "members": to_checkpoint(self.members), "epoch": self.epoch, "pending": self.reductions.pending(),
            "at": self.now, "counters": self.counters.as_dict(), "loss": self.loss, **packing,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; reductions under way begin again, with their inputs."""
        self._restored, self.params, self.buffers = saved["state"], saved["params"], saved["buffers"]
        self.step, self.clocks, self.loss = saved["step"], dict(saved["clocks"]), saved["loss"]
        self.members, self.epoch = from_checkpoint(saved["members"]), saved["epoch"]
        self.labour.load_state_dict(saved["labour"])
        self.wire.load_state_dict(self.rank, saved["wire"])
        self.counters = Counters(**saved["counters"])
        self.reductions.remember(saved["pending"])
        if self.packing is not None:
            self.packing.load_state_dict(saved["packing"])

    @property
    def restored(self) -> Any:
        """The strategy's state that `restore` starts from."""
        return self._restored

    def take_up(self, reductions: list[dict[str, Any]]) -> None:
        """Let `resume` begin these reductions, in place of those that were saved."""
        self.reductions.remember(reductions)

    def resume(self) -> None:
        """Take up the reductions that were under way; once the run's clock stands where it stood."""
        self.reductions.resume()

    # ---- training -----------------------------------------------------------------------------------------------

    async def train(self, steps: int) -> None:
        """Make local optimizer steps on `params`; the new values are in `params` afterwards, and not before."""
        trained = await self._work(steps, self.labour.train(self.params, self.buffers, steps))
        self.params, self.buffers, self.loss = trained

    async def gradient(self, at: Tensor | None = None) -> Tensor:
        """Return a stochastic gradient at `at` (or at `params`), shape (d,); every call takes the next batch."""
        gradient, self.loss = await self._work(
            1, self.labour.gradient(self.params if at is None else at, self.buffers))
        return gradient

    async def displacement(self, at: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Return what the local optimizer's next step would subtract from `at` (or `params`), shape (d,).

        The optimizer's memory takes the step; the model does not.

        Args:
            gradient: of the step; None: a stochastic one at `at`, from the next batch.
        """
        subtracted, loss = await self._work(
            gradient is None, self.labour.displacement(self.params if at is None else at, self.buffers, gradient))
        if gradient is None:
            self.loss = loss
        return subtracted

    async def descend(self, gradient: Tensor) -> None:
        """Make the local optimizer's next step on `params`, with a gradient that is given."""
        self.params = await self.labour.descend(self.params, self.buffers, gradient)

    def forget_optimizer(self) -> None:
        """Let the local optimizer start afresh."""
        self.labour.forget_optimizer()

    async def _work(self, gradients: int, work: Awaitable[S]) -> S:
        began = self.board.now
        result = await work
        self.counters.compute_s += self.board.now - began
        self.counters.gradients += gradients
        self.counters.updates += 1
        return result

    # ---- messages ---------------------------------------------------------------------------------------------------

    def send(
        self, to: int, payload: Payload, tag: str = "message", round: int | None = None
    ) -> "asyncio.Future[bool]":
        """Send a message; the future becomes True when it has been delivered, False when it never will be."""
        return self.post(to, "message", tag, self.step if round is None else round, payload)

    async def receive(self, sender: int, tag: str = "message", round: int | None = None) -> Payload:
        """Wait for a message that was sent with the same tag and round.

        Raises:
            PeerLost: the sender will never answer again.
        """
        began = self.now
        envelope = await self.expect("message", tag, self.step if round is None else round, sender)
        self.counters.waiting_s += self.now - began
        if envelope is None:
            raise PeerLost(sender)
        self.counters.exchanges += 1
        self.counters.bytes_received += envelope.num_bytes
        return envelope.payload

    async def exchange(
        self, group: Sequence[int], payload: Payload | Callable[[int], Payload], *, tag: str = "exchange",
        round: int | None = None, timeout_s: float | None = None, need_all: bool = False,
    ) -> Offers:
        """Send a payload to everybody in a group and wait for theirs.

        Args:
            group: ranks; this peer's own may be among them.
            payload: for all, or a function that returns what to send to a rank; the own one stays here.
            tag, round: name the conversation (round: the present step, unless given).
            timeout_s: who has not answered, and acknowledged, within so many seconds is left out; None waits for all
                that live.
            need_all: raise instead of leaving anybody out.

        Raises:
            PeerLost: with `need_all`, when somebody is left out.
        """
        round = self.step if round is None else round
        others = [rank for rank in group if rank != self.rank]
        each = payload if callable(payload) else lambda _: payload
        posted = {rank: self.post(rank, "exchange", tag, round, each(rank)) for rank in others}
        awaited = {rank: self.expect("exchange", tag, round, rank) for rank in others}
        timer = None
        if timeout_s is not None and others:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._time_out, tag, round, others, posted)
        received: dict[int, Payload] = {self.rank: each(self.rank)}
        began = self.now
        for rank in others:
            envelope, delivered = await awaited[rank], await posted[rank]
            # Counted when it is used: what comes early belongs to a later step.
            self.counters.bytes_received += 0 if envelope is None else envelope.num_bytes
            if envelope is not None and delivered:
                received[rank] = envelope.payload
            elif envelope is not None:
                self.counters.asymmetric_exchanges += 1
        self.counters.waiting_s += self.now - began
        if timer is not None:
            timer.cancel()
        offers = Offers(sorted(received.items()))
        offers.missing = tuple(rank for rank in sorted(others) if rank not in received)
        self.counters.silent += len(offers.missing)
        self.counters.exchanges += len(received) > 1
        if need_all and offers.missing:
            raise PeerLost(offers.missing[0])
        return offers

    def _time_out(
        self, tag: str, round: int, others: list[int], posted: "Mapping[int, asyncio.Future[bool]]"
    ) -> None:
        self.mailbox.give_up("exchange", tag, round, others)
        for future in posted.values():
            if not future.done():
                future.set_result(False)

    def meeting(self, tag: str, offer: Offer, apply: Apply, timeout_s: float, exclusive: bool = True) -> Meeting:
        """Return a kind of pairwise exchange that happens at both ends or at neither; see `Meeting`.

        It answers other peers' proposals from now on; every peer of the run must make the same meetings.
        """
        if tag not in self._meetings:
            self._meetings[tag] = Meeting(self, tag, offer, apply, timeout_s, exclusive)
        else:
            self._meetings[tag].rebind(offer, apply, timeout_s)
        return self._meetings[tag]

    def all_reduce(
        self, vector: Tensor, *, tag: str = "mean", round: int | None = None, weight: float = 1.0,
        base: Tensor | None = None,
    ) -> Underway:
        """Contribute to a mean over all members, starting now; await the result when it is needed.

        In a run with compression vectors of the model's length travel as compressed differences to `base`, with error
        feedback; others go as they are.

        Args:
            vector: shape (d,), of equal length at all members; it is not written to, and must not be.
            weight: of this peer's vector, above 0.
            base: (d,) near the vector, and the same at all members; None: zero.

        Returns:
            What gives (mean, contributors) when it is awaited, the same at all members.
        """
        return self.reductions.begin(vector, tag, self.step if round is None else round, weight, base)

    def reduction(self, tag: str = "mean", round: int | None = None) -> Underway | None:
        """Return a reduction that was begun and not awaited yet, also one from before a restart; else None."""
        return self.reductions.find(tag, self.step if round is None else round)

    def forget_reduction(self, tag: str, round: int) -> None:
        """Take note that a reduction's result was handed over."""
        self.reductions.forget(tag, round)

    # ---- below the strategy -------------------------------------------------------------------------------------

    def post(
        self, to: int, kind: str, tag: str, round: int, payload: Payload, meta: Mapping[str, Any] | None = None
    ) -> "asyncio.Future[bool]":
        """Send an envelope of any kind."""
        size = payload_bytes(payload)
        self.counters.bytes_sent += size
        return self.wire.post(
            to, Envelope(self.run, self.epoch, kind, tag, round, self.rank, named(payload), meta or {}, size))

    def take(self, envelope: Envelope) -> str | None:
        """Accept an envelope from the wire; returns why it was not used, if it was not."""
        meeting = self._meetings.get(envelope.tag) if envelope.kind == "meeting" else None
        part = self.accords if envelope.kind == ACCORD else meeting
        if part is not None and envelope.run == self.run:
            self.counters.bytes_received += envelope.num_bytes
            refused = part.take(envelope)
        else:
            refused = self.mailbox.take(envelope)
        if refused is not None:
            self.counters.refused += 1
            if refused != "second or late":
                self.log(refused_from=envelope.source, reason=refused, tag=envelope.tag)
        return refused

    def refuse(self, source: int, reason: str, tag: str) -> None:
        """Count and log a message that the strategy could not use."""
        self.counters.refused += 1
        self.log(refused_from=source, reason=reason, tag=tag)

    def lose(self, rank: int) -> None:
        """Take note that a peer is gone: whoever waits for it waits no longer."""
        self.mailbox.lose(rank)
        for meeting in self._meetings.values():
            meeting.lose(rank)
        self.accords.lose(rank)

    def find(self, rank: int) -> None:
        """Take note that a peer that was lost takes part in the present step, as one that knows nothing."""
        self.mailbox.lost.discard(rank)

    def start_from(self, state: Any, params: Tensor, buffers: Mapping[str, Tensor], step: int) -> None:
        """Start after a step as a newcomer, with a model and a strategy's state that a living peer gave."""
        self._restored, self.params, self.buffers, self.step = state, params, buffers, step

    def expect(self, kind: str, tag: str, round: int, source: int) -> "asyncio.Future[Envelope | None]":
        """Return a future that becomes a message of any kind; None once its sender is known to be gone."""
        future: asyncio.Future[Envelope | None] = asyncio.get_running_loop().create_future()
        self.mailbox.expect(kind, tag, round, source, future)
        return future

    @property
    def meetings_open(self) -> bool:
        """Whether some pairwise exchange is not settled yet."""
        return any(meeting.is_open for meeting in self._meetings.values())

    async def settle_meetings(self) -> None:
        """Wait until all pairwise exchanges that this peer takes part in are settled."""
        for meeting in self._meetings.values():
            await meeting.drain()

    # ---- besides ------------------------------------------------------------------------------------------------

    def log(self, **figures: Any) -> None:
        """Write figures of this peer into the run's metrics."""
        self.board.log(self, figures)

    def spawn(self, coroutine: Coroutine[Any, Any, S]) -> "asyncio.Task[S]":
        """Let a coroutine run beside the strategy's own; it is cancelled when the strategy ends."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._spawned.append(task)
        return task

    def close(self) -> None:
        """Cancel what was spawned, and the reductions that are under way."""
        for task in self._spawned:
            task.cancel()
        self.reductions.cancel()
        self._spawned = []
