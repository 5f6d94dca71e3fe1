"""Local optimizer steps, and averaging with one neighbour at a time, each at its own pace: the run of one peer.

A peer computes one gradient after another. Each edge has a Poisson clock, owned by its lower rank; at a tick both ends
exchange parameters, and both apply the exchange or neither does.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcore.edge_rates import paced_rates
from fedcore.errors import Diverged
from fedcore.peers.meeting import Meeting
from fedcore.peers.peer import Peer
from fedcore.strategies.acid_equations import PLAIN, Mixing, PeerState, advance, exchange_step, gradient_step
from fedcore.strategies.graph_peers import GraphStrategy
from fedcore.strategies.pace import FIRST_TIMEOUT_S, Hold, Pace, gather

TAG = "average"


class Node:
    """One peer under one membership."""

    def __init__(self, peer: Peer, state: PeerState, mixing: Mixing, pace: Pace):
        self.peer, self.state, self.mixing, self.pace, self.epoch = peer, state, mixing, pace, peer.epoch

    def drift(self) -> None:
        """Bring the state up to now."""
        self.state = advance(self.state, self.mixing, self.pace.at(self.peer.now))

    def offer(self) -> Tensor:
        """Return x as it is now, shape (d,)."""
        self.drift()
        return self.state.params

    def apply(self, partner: int, mine: Tensor, theirs: Tensor, at: float) -> None:
        """Take part in an exchange that happened at a moment of the run's clock."""
        self.state = exchange_step(self.state, self.mixing, mine, theirs, self.pace.at(at))

    async def compute(self) -> None:
        """Optimizer steps one after another, until the present step of the run ends."""
        while not self.peer.finished:
            self.drift()
            step = await self.peer.displacement(self.state.params)
            self.drift()
            self.state = gradient_step(self.state, step)

    async def meet(self, meeting: Meeting, partner: int, rate: float) -> None:
        """Exchanges with one partner, until the present step of the run ends."""
        async for _ in self.peer.ticks(rate / self.pace.unit_s, "exchange", partner):
            await meeting.with_(partner)

    def end(self) -> "Saved":
        """Bring everything up to now, and return what must survive a restart."""
        self.drift()
        if not torch.isfinite(self.state.params).all():
            raise Diverged(f"Training diverged at peer {self.peer.rank}: its parameters became infinite. Lower "
                           "train.lr, or set train.clip_norm.")
        self.peer.params = self.state.params
        pace = self.pace
        return Saved(self.state.copy, self.state.at, self.epoch, pace.unit_s, pace.since_s, pace.since, self.mixing.eta)


@dataclass(frozen=True)
class Saved:
    """What survives a restart besides the parameters: x~ and its time, the membership, the clock, and the drift."""

    copy: Tensor | None
    at: float
    epoch: int
    unit_s: float
    since_s: float
    since: float
    eta: float = 0.0


async def run_pairwise(
    strategy: GraphStrategy, peer: Peer, exchanges_per_gradient: float, momentum: bool, timeout_s: float | None
) -> None:
    """Train and average at random times, until the run ends.

    Args:
        exchanges_per_gradient: that a peer takes part in, on average over the peers, while one gradient is computed.
        momentum: whether there is a second copy of the parameters.
        timeout_s: after which an exchange is dropped; None: ten gradients, or ten seconds where that is longer.
    """
    saved, node = peer.restore(Saved), None
    async for _ in peer.steps():
        found = strategy.members_graph(peer)
        rates = paced_rates(strategy.shares(found), exchanges_per_gradient)
        mixing = Mixing.of(rates) if momentum else PLAIN
        if node is None and saved is not None and saved.epoch == peer.epoch:
            pace = Pace(saved.unit_s, saved.since_s, saved.since)
            node = Node(peer, PeerState(peer.params, saved.copy, saved.at), mixing, pace)
        elif node is None or node.epoch != peer.epoch:
            with Hold(peer, TAG):
                node = await _begin(peer, node, saved, mixing, momentum)
                peer.meeting(TAG, node.offer, node.apply, FIRST_TIMEOUT_S)
            strategy.log_graph(peer, found, rates, node.pace.unit_s)
        patience_s = max(10 * node.pace.unit_s, FIRST_TIMEOUT_S) if timeout_s is None else timeout_s
        meeting = peer.meeting(TAG, node.offer, node.apply, patience_s)
        partners = found.rates_of(rates, peer.rank)
        work = [peer.spawn(node.compute())]
        work += [peer.spawn(node.meet(meeting, other, rate)) for other, rate in partners.items() if other > peer.rank]
        for task in work:
            await task
        await peer.safe_point(node.end)


async def _begin(
    peer: Peer, before: Node | None, saved: Saved | None, mixing: Mixing, momentum: bool
) -> Node:
    """Agree with all members of a new epoch on the unit of time, the mean duration of a gradient."""
    began = peer.now
    await peer.gradient()
    rows = await gather(peer, [peer.now - began, began], "start")
    unit_s, latest = sum(row[0] for row in rows) / len(rows), max(row[0] + row[1] for row in rows)
    if before is not None:
        before.drift()
        since, state = before.pace.at(latest), before.state
    elif saved is not None:
        earlier = Pace(saved.unit_s, saved.since_s, saved.since)
        since = earlier.at(latest)
        # Under the earlier membership's drift, as if this peer had never stopped.
        state = PeerState(peer.params, saved.copy, saved.at)
        state = advance(state, replace(mixing, eta=saved.eta), earlier.at(peer.now))
    else:
        since, state = 0.0, PeerState(peer.params, peer.params if momentum else None)
    return Node(peer, state, mixing, Pace(unit_s, latest, since))

