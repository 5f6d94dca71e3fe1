"""Gradient tracking: every peer follows an estimate of the mean gradient, so that uneven data leave no bias.

Adapt, then combine: with the Metropolis matrix W of the graph, and G the peers' gradients,

    X+ = W (X - lr Y),    Y+ = W Y + G(X+) - G(X),    Y = G(X) at the start,

so that the mean of Y is the mean of G at every step. Two vectors travel over every edge and step, both ways.

Source: Nedic, Olshevsky and Shi, 2017, SIAM Journal on Optimization 27(4), "Achieving geometric convergence for
distributed optimization over time-varying graphs" (DIGing), arXiv:1607.03218, in its adapt-then-combine form.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.errors import Diverged
from fedcore.peers.peer import Peer
from fedcore.strategies.graph_peers import GraphStrategy
from fedcore.strategies.settings import check_number

STEPPED, TRACKED = "stepped", "tracked"


@dataclass(frozen=True)
class PeerState:
    """What a peer carries from step to step, each of shape (d,).

    Attributes:
        params: x_i.
        tracked: y_i, its estimate of the mean gradient.
        gradient: that at x_i, the latest it computed.
        epoch: of the membership under which y_i was started.
    """

    params: Tensor
    tracked: Tensor
    gradient: Tensor
    epoch: int


def offer(state: PeerState, lr: float) -> dict[str, Tensor]:
    """Return what a peer sends to its neighbours: x - lr y, and y."""
    return {STEPPED: state.params - lr * state.tracked, TRACKED: state.tracked}


def combine(offers: Mapping[int, Mapping[str, Tensor]], weights: Mapping[int, float], own: int, name: str) -> Tensor:
    """Return the weighted sum of what neighbours sent, shape (d,), in ascending order of rank.

    Args:
        offers: by rank, the peer's own included. The weight of a neighbour that is missing goes to the peer's own.
        weights: of the neighbours and of the peer itself.
        own: the peer's rank.
    """
    silent = sum(weight for rank, weight in weights.items() if rank not in offers)
    total = torch.zeros_like(offers[own][name])
    for rank, weight in weights.items():
        if rank in offers:
            total.add_(offers[rank][name], alpha=weight + silent if rank == own else weight)
    return total


class GradientTracking(GraphStrategy):
    """Exact decentralised gradient descent over a graph, with a constant step.

    Each step is one gradient of `train.batch_size` examples; `train`'s optimizer is not used. With full batches on a
    strongly convex problem it converges linearly to the optimum, however uneven the data.

    Args:
        lr: step size, above 0; 1 / smoothness and below.
        graph: registered name, alone or under `name` among its settings.
        timeout_s: neighbours that have not answered after so long are left out of a step, which costs exactness; None
            waits for all that live.
    """

    no_compression = "The mean of what peers track must stay the mean of their gradients, which a rounded y does not."

    def __init__(self, lr: float = 0.1, graph: str | Mapping[str, Any] = "ring", timeout_s: float | None = None):
        super().__init__(graph)
        check_number("lr", lr, above=0, advice="Theory asks for at most 1 / smoothness.")
        if timeout_s is not None:
            check_number("timeout_s", timeout_s, above=0)
        self.lr, self.timeout_s = float(lr), timeout_s

    async def run(self, peer: Peer) -> None:
        """Combine the neighbours' stepped models and estimates, then correct the estimate by the gradient's change."""
        state = peer.restore(PeerState)
        async for _ in peer.steps():
            found = self.members_graph(peer)
            if state is None or state.epoch != peer.epoch:
                # Estimates of other members would add up to another mean: everybody starts anew.
                self.log_graph(peer, found)
                gradient = await peer.gradient()
                state = PeerState(peer.params, gradient, gradient, peer.epoch)
            offers: Any = await peer.exchange(
                found.neighbours(peer.rank), offer(state, self.lr), timeout_s=self.timeout_s)
            weights = found.mixing_weights(peer.rank)
            params = combine(offers, weights, peer.rank, STEPPED)
            gradient = await peer.gradient(params)
            tracked = combine(offers, weights, peer.rank, TRACKED) + gradient - state.gradient
            state = PeerState(params, tracked, gradient, peer.epoch)
            if not torch.isfinite(params).all():
                raise Diverged(f"Gradient tracking diverged at peer {peer.rank}: its parameters became infinite. "
                               f"Lower strategy.lr, {self.lr:g}.")
            peer.params = params
            await peer.safe_point(state)

    def newcomer(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Start from a living peer's model; the estimates begin anew with the change of members anyway."""
        return state
