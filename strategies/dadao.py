"""DADAO: gradients and pairwise exchanges at independent random times, accelerated, for badly conditioned problems.

Every peer computes gradients at the ticks of a Poisson clock, and meets each neighbour at the ticks of another, as
often as the graph asks for. Nobody waits for anybody, and there is no server, no round and no inner loop.

Source: Nabli and Oyallon, 2023 (ICML), arXiv:2208.00779. The equations are in `dadao_equations.py`.

Departures: the analysis assumes exchanges that take no time. Here they do: the unit of time is as long as gradients and
exchanges need, the same at all peers, and is stretched where they cannot keep up (`dadao_pace.py`). When members
change, what a peer that is gone had of the dual variables of consensus goes to the others in equal parts: their sum is
zero again, and nobody else begins anew.
"""
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedcore.edge_rates import KINDS, required_rates
from fedcore.errors import Diverged, InvalidSetting
from fedcore.graphs import EdgeRates
from fedcore.peers.meeting import Meeting
from fedcore.peers.peer import Peer
from fedcore.strategies.dadao_equations import (
    X_COPY,
    Constants,
    PeerState,
    X,
    Z,
    advance,
    check_rates,
    exchange_step,
    gradient_step,
    offer,
)
from fedcore.strategies.dadao_pace import Tally, Terms, first_terms, next_terms
from fedcore.strategies.graph_peers import GraphStrategy
from fedcore.strategies.pace import Hold, Probe, rows_of, spread
from fedcore.strategies.settings import check_choice, check_number, check_switch

TAG = "dadao"
# Values beyond this have diverged, though they are finite still.
LARGEST = 1e30


class Node:
    """One peer under one membership: its state, what all have agreed on, and what it did since the last safe point.

    Args:
        partners: rate of each edge that is used, per unit of time, by the rank at its other end.
    """

    def __init__(self, peer: Peer, state: PeerState, terms: Terms, partners: Mapping[int, float]):
        self.peer, self.state, self.terms, self.epoch, self.partners = peer, state, terms, peer.epoch, partners
        self.constants = Constants.of(terms.strong_convexity, terms.smoothness, terms.chi1)
        self.tally = Tally()                            # what this peer did since it last told the others
        self.told: list[list[float]] = []               # what all told each other in this step, if they did
        self._upcoming = terms

    @property
    def now(self) -> float:
        """Units of time that have passed."""
        return self.terms.pace.at(self.peer.now)

    @property
    def owned(self) -> dict[int, float]:
        """The rates of those edges at which this peer proposes."""
        return {partner: rate for partner, rate in self.partners.items() if partner > self.peer.rank}

    def drift(self) -> None:
        """Bring the state up to now."""
        self.state = advance(self.state, self.constants, self.now)

    def offer(self) -> Tensor:
        """Return y + z as it is now, shape (d,)."""
        self.drift()
        return offer(self.state)

    def apply(self, partner: int, mine: Tensor, theirs: Tensor, at: float) -> None:
        """Take part in an exchange that happened at a moment of the run's clock."""
        self.state = exchange_step(self.state, self.constants, mine, theirs, self.terms.pace.at(at))

    async def compute(self) -> None:
        """Gradient events, until the step ends."""
        async for _ in self.peer.ticks(1 / self.terms.pace.unit_s, "gradient"):
            self.drift()
            gradient = await self.peer.gradient(self.state.params)
            self.drift()
            self.state = gradient_step(self.state, self.constants, gradient)
            self.tally.gradients += 1

    async def meet(self, meeting: Meeting, partner: int, rate: float) -> None:
        """Exchange events with one partner, until the step ends."""
        async for _ in self.peer.ticks(rate * self.terms.boost / self.terms.pace.unit_s, "exchange", partner):
            self.tally.attempted += 1
            met = await meeting.with_(partner)
            self.tally.succeeded += met

    def tell(self) -> None:
        """Begin to tell the others what this peer has done; at every peer in the same step."""
        self.told = []
        if self.peer.step % self.terms.period == 0:
            mine, self.tally = self.tally.values(), Tally()
            self.peer.all_reduce(spread(self.peer, mine), tag=self._tag, round=self.peer.step // self.terms.period)

    @property
    def _tag(self) -> str:
        return f"tally {self.epoch}"

    async def close(self, since_s: float, ends_at: float, fixed: bool) -> None:
        """Count what was due in a step; at the end of a period work out the next terms from what all have told.

        Args:
            since_s, ends_at: of the step, on the run's clock.
            fixed: whether the user gave the unit of time.
        """
        units = max(ends_at - since_s, 0.0) / self.terms.pace.unit_s
        self.tally.due_gradients += units
        self.tally.due += units * self.terms.boost * sum(self.owned.values())
        telling = self.peer.reduction(self._tag, self.peer.step // self.terms.period)
        if (self.peer.step + 1) % self.terms.period == 0 and telling is not None:
            self.told = rows_of(self.peer, await telling, len(self.tally.values()))
            self._upcoming = next_terms(self.terms, self.told, ends_at, fixed)

    def end(self) -> "Saved":
        """Bring everything up to now, take over the next step's terms, and return what must survive a restart."""
        self.drift()
        self.terms = self._upcoming
        if not self.state.rows.abs().max() < LARGEST:
            raise Diverged(
                f"DADAO diverged at peer {self.peer.rank}: its values grew beyond all bounds. The smoothness, "
                f"{self.terms.smoothness:g}, or the strong convexity, {self.terms.strong_convexity:g}, is not that "
                "of the problem; or exchanges came too late: give a time_unit_s that is longer than "
                f"{self.terms.pace.unit_s:.3g}.")
        self.peer.params = self.state.params
        return Saved(self.state.rows, self.state.at, self.epoch, self.terms.state(), self.tally.values())


@dataclass(frozen=True)
class Saved:
    """What survives a restart: the six vectors and their time, the membership, what was agreed on, and done."""

    rows: Tensor
    at: float
    epoch: int
    terms: dict[str, float]
    tally: list[float]


class Dadao(GraphStrategy):
    """Accelerated decentralised optimisation of strongly convex problems, without any barrier.

    `train.lr` and `train.optimizer` are not used: step sizes follow from strong convexity and smoothness. Gradients are
    of `train.batch_size` examples; with full batches it converges linearly to the optimum, otherwise to a ball around
    it.

    Args:
        strong_convexity: mu above 0, of the worst peer; None: as the task knows it.
        smoothness: L, of the worst peer, at least `strong_convexity`; None: as the task knows it. Too small a value
            diverges, too large a one only slows down.
        graph: registered name, alone or under `name` among its settings.
        edge_rates: `uniform`, or `optimal` for the fewest exchanges.
        rate_multiplier: exchanges, in units of the fewest with which it converges; at least 1.
        time_unit_s: seconds of the unit in which a peer computes one gradient on average; None: as short as gradients
            and links allow, and stretched when they do not keep up. A number that they do not allow is refused.
        assume_convex: accept a task of which nothing is known, because its loss is strongly convex all the same.
        allow_divergence: accept a `rate_multiplier` below 1, with which it may diverge.
    """

    by_time = True
    no_compression = "Its exchanges keep sums of dual variables exactly, which compressed ones do not."

    def __init__(
        self, strong_convexity: float | None = None, smoothness: float | None = None,
        graph: str | Mapping[str, Any] = "ring", edge_rates: str = "uniform", rate_multiplier: float = 1.0,
        time_unit_s: float | None = None, assume_convex: bool = False, allow_divergence: bool = False,
    ):
        super().__init__(graph, edge_rates)
        check_choice("edge_rates", edge_rates, KINDS)
        check_switch("assume_convex", assume_convex)
        check_switch("allow_divergence", allow_divergence)
        if strong_convexity is not None:
            check_number("strong_convexity", strong_convexity, above=0,
                         advice="DADAO needs strong convexity: mu must be > 0. For neural networks take a2cid2.")
        if smoothness is not None:
            check_number("smoothness", smoothness, at_least=strong_convexity, above=0)
        check_number("rate_multiplier", rate_multiplier, above=0)
        if rate_multiplier < 1 and not allow_divergence:
            raise InvalidSetting("rate_multiplier", rate_multiplier, "at least 1",
                                 "With fewer exchanges chi1 chi2 exceeds 1/2, and the iteration may diverge. If that "
                                 "is wanted: allow_divergence: true.")
        if time_unit_s is not None:
            check_number("time_unit_s", time_unit_s, above=0)
        self.strong_convexity, self.smoothness, self.rate_multiplier = strong_convexity, smoothness, rate_multiplier
        self.time_unit_s, self.assume_convex = time_unit_s, assume_convex
        self.allow_divergence = allow_divergence

    def check_task(self, task: Any) -> None:
        """Refuse a task that does not say that it is strongly convex, unless the user does.

        Raises:
            InvalidSetting: with what to do.
        """
        if hasattr(task, "curvature"):
            return
        if not self.assume_convex:
            raise InvalidSetting(
                "strong_convexity", self.strong_convexity, "that of a strongly convex task, such as logistic",
                f"{type(task).__name__} does not say that it is one, and no neural network is: take a2cid2. If you "
                "know that it is: assume_convex: true, with strong_convexity and smoothness.")
        for name in ("strong_convexity", "smoothness"):
            if getattr(self, name) is None:
                raise InvalidSetting(name, None, "given", f"{type(task).__name__} does not know it.")

    # ---- one peer ---------------------------------------------------------------------------------------------------

    async def run(self, peer: Peer) -> None:
        """Compute and meet at random times, until the run ends."""
        probe, saved = Probe(peer), peer.restore(Saved)
        node: Node | None = None
        async for _ in peer.steps():
            ends_at = peer.board.ends_at
            since_s = ends_at * peer.step / (peer.step + 1)     # the clocks tick while the last gradient is computed
            if node is None and saved is not None and saved.epoch == peer.epoch:
                node = self._restored(peer, saved)
            elif node is None or node.epoch != peer.epoch:
                with Hold(peer, TAG):
                    node = await self._begin(peer, probe, node, saved)
                since_s = max(since_s, peer.now)
            meeting = peer.meeting(TAG, node.offer, node.apply, node.terms.timeout_s)
            node.tell()
            work = [peer.spawn(node.compute())]
            work += [peer.spawn(node.meet(meeting, partner, rate)) for partner, rate in node.owned.items()]
            for task in work:
                await task
            await node.close(since_s, ends_at, fixed=self.time_unit_s is not None)
            self._log_pace(peer, node)
            await peer.safe_point(node.end)

    async def _begin(self, peer: Peer, probe: Probe, before: Node | None, saved: Saved | None) -> Node:
        """Agree with all members of a new epoch on everything, and start; consensus variables add up to zero."""
        found, rates = self.members_graph(peer), self._rates(peer)
        terms = before.terms if before is not None else None if saved is None else Terms.from_state(saved.terms)
        partners = found.rates_of(rates, peer.rank)
        known = self.strong_convexity, self.smoothness
        agreed = await first_terms(peer, probe, partners, rates.chi1, terms, self.time_unit_s, known)
        state = PeerState.start(peer.params, agreed.pace.since)
        if before is not None:
            state = before.state
        elif saved is not None:
            state = PeerState(saved.rows, saved.at)
        if peer.epoch > 0:
            duals, _ = await peer.all_reduce(state.rows[Z:].reshape(-1), tag="duals")
            state = replace(state, rows=torch.cat([state.rows[:Z], state.rows[Z:] - duals.view_as(state.rows[Z:])]))
        node = Node(peer, state, agreed, partners)
        self.log_graph(peer, found, rates, agreed.pace.unit_s)
        peer.meeting(TAG, node.offer, node.apply, agreed.timeout_s)
        return node

    def _restored(self, peer: Peer, saved: Saved) -> Node:
        partners = self.members_graph(peer).rates_of(self._rates(peer), peer.rank)
        node = Node(peer, PeerState(saved.rows, saved.at), Terms.from_state(saved.terms), partners)
        node.tally = Tally(*saved.tally)
        return node

    def _rates(self, peer: Peer) -> EdgeRates:
        """Return the rates at which exchanges must succeed, per unit of time."""
        rates = required_rates(self.shares(self.members_graph(peer)), self.rate_multiplier)
        if not self.allow_divergence:
            check_rates(rates)
        return rates

    def _log_pace(self, peer: Peer, node: Node) -> None:
        """Write what all have achieved against what was required, once a period and once for all peers."""
        tallies = [Tally(*row) for row in node.told]
        due, done = sum(tally.due for tally in tallies), sum(tally.succeeded for tally in tallies)
        if peer.rank == peer.members[0] and due > 0:
            peer.log(time_unit_s=node.terms.pace.unit_s, boost=node.terms.boost,
                     required_exchanges=due / node.terms.boost, achieved_exchanges=done,
                     required_gradients=sum(tally.due_gradients for tally in tallies),
                     achieved_gradients=sum(tally.gradients for tally in tallies))

    def newcomer(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Start from a living peer's parameters, with dual variables of zero."""
        rows = torch.zeros_like(state["rows"])
        rows[X] = rows[X_COPY] = state["rows"][X]
        return {**state, "rows": rows}
