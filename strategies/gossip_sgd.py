"""Gossip SGD: local steps, and averaging with neighbours in a graph, all at once or one at a time.

Synchronous, with the Metropolis matrix W of the graph and G the peers' optimizer steps:

    X+ = W (X - G(X))     adapt, then combine
    X+ = W X - G(X)       combine, then adapt: gradients are computed while messages travel

Asynchronous: every peer computes at its own pace; each edge has a Poisson clock, at whose ticks its ends average.

Both end near, not at, the optimum of uneven data with a constant step.

Source: Lian et al., 2017, "Can decentralized algorithms outperform centralized algorithms?", arXiv:1705.09056 (D-PSGD);
Lian et al., 2018, arXiv:1710.06952 (asynchronous, here without a bound on staleness).
"""
from collections.abc import Mapping
from typing import Any

import torch

from fedcore.edge_rates import KINDS
from fedcore.errors import Diverged
from fedcore.peers.peer import Peer
from fedcore.strategies.gradient_tracking import combine
from fedcore.strategies.graph_peers import GraphStrategy
from fedcore.strategies.pairwise import run_pairwise
from fedcore.strategies.settings import check_choice, check_count, check_number

MODES = ("synchronous", "asynchronous")
ORDERS = ("adapt_then_combine", "combine_then_adapt")
PARAMS = "params"


class GossipSgd(GraphStrategy):
    """Decentralised SGD: the baseline of methods on graphs.

    The optimizer is `train.optimizer`.

    Args:
        graph: registered name, alone or under `name` among its settings.
        mode: `synchronous`: all average with all their neighbours after each step; `asynchronous`: nobody waits.
        local_steps: optimizer steps between two averagings, at least 1; synchronous, adapt then combine.
        order: synchronous: `adapt_then_combine`, or `combine_then_adapt`.
        exchanges_per_gradient: asynchronous: that a peer takes part in while one gradient is computed, on average.
        edge_rates: asynchronous: `uniform`, or `optimal` for the fewest exchanges that mix as well.
        timeout_s: neighbours that have not answered after so long are left out; None: synchronous, all that live are
            waited for; asynchronous, ten gradients, but at least ten seconds.
    """

    def __init__(
        self, graph: str | Mapping[str, Any] = "ring", mode: str = "synchronous", local_steps: int = 1,
        order: str = "adapt_then_combine", exchanges_per_gradient: float = 1.0, edge_rates: str = "uniform",
        timeout_s: float | None = None,
    ):
        super().__init__(graph, edge_rates)
        check_choice("mode", mode, MODES)
        check_choice("order", order, ORDERS)
        check_choice("edge_rates", edge_rates, KINDS)
        many = mode == "synchronous" and order == "adapt_then_combine"
        check_count("local_steps", local_steps, 1, None if many else 1, "Only adapt_then_combine knows more than one.")
        check_number("exchanges_per_gradient", exchanges_per_gradient, above=0)
        if timeout_s is not None:
            check_number("timeout_s", timeout_s, above=0)
        self.by_time = mode == "asynchronous"
        self.local_steps, self.order, self.timeout_s = local_steps, order, timeout_s
        self.exchanges_per_gradient = float(exchanges_per_gradient)

    async def run(self, peer: Peer) -> None:
        """Train and average, until the run ends."""
        if self.by_time:
            await run_pairwise(self, peer, self.exchanges_per_gradient, False, self.timeout_s)
            return
        saved: dict[str, int] = peer.restore(dict) or {}
        epoch = saved.get("epoch")
        async for _ in peer.steps():
            found = self.members_graph(peer)
            if epoch != peer.epoch:
                self.log_graph(peer, found)
                epoch = peer.epoch
            if self.order == "adapt_then_combine":
                await peer.train(self.local_steps)
                peer.params = await self._average(peer)
            else:
                step = peer.spawn(peer.displacement())
                mixed = await self._average(peer)
                peer.params = mixed - await step
            if not torch.isfinite(peer.params).all():
                raise Diverged(f"Training diverged at peer {peer.rank}: its parameters became infinite. Lower "
                               "train.lr, or set train.clip_norm.")
            await peer.safe_point({"epoch": epoch})

    async def _average(self, peer: Peer) -> torch.Tensor:
        """Return the weighted mean of this peer's and its neighbours' parameters, shape (d,)."""
        found = self.members_graph(peer)
        offers: Any = await peer.exchange(
            found.neighbours(peer.rank), {PARAMS: peer.params}, timeout_s=self.timeout_s)
        return combine(offers, found.mixing_weights(peer.rank), peer.rank, PARAMS)
