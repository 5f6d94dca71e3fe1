"""Gossip SGD: local steps, and averaging with neighbours in a graph, all at once or one at a time.

Synchronous, with the Metropolis matrix W of the graph and G the peers' optimizer steps:

    X+ = W (X - G(X))     adapt, then combine
    X+ = W X - G(X)       combine, then adapt: gradients are computed while messages travel

With the experiment's section `compression` only compressed changes travel: each peer moves by
gamma sum_j w_ij (x^_j - x^_i), x^ being copies that both ends of an edge hold of each other's x (CHOCO-SGD;
`fedcore.peers.copies`).

Asynchronous: every peer computes at its own pace; each edge has a Poisson clock, at whose ticks its ends average.

Both end near, not at, the optimum of uneven data with a constant step.

Source: Lian et al., 2017, "Can decentralized algorithms outperform centralized algorithms?", arXiv:1705.09056 (D-PSGD);
Lian et al., 2018, arXiv:1710.06952 (asynchronous, here without a bound on staleness); Koloskova, Stich and Jaggi, 2019,
arXiv:1902.00340, algorithm 2 (with compression).
"""
from collections.abc import Mapping
from typing import Any

import torch

from fedcore.compressed import Compression
from fedcore.edge_rates import KINDS
from fedcore.errors import Diverged, InvalidSetting, MalformedPayload
from fedcore.peers.copies import Copies
from fedcore.peers.packing import Packing
from fedcore.peers.peer import Peer
from fedcore.strategies.gradient_tracking import combine
from fedcore.strategies.graph_peers import GraphStrategy, MemberGraph
from fedcore.strategies.pairwise import run_pairwise
from fedcore.strategies.settings import check_choice, check_count, check_number

MODES = ("synchronous", "asynchronous")
ORDERS = ("adapt_then_combine", "combine_then_adapt")
PARAMS = "params"
# The own copy does not travel.
NOTHING_SENT = torch.empty(0, dtype=torch.uint8)


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
        consensus_lr: with compression, gamma: how far a peer goes towards what it knows of its neighbours, in (0, 1];
            None: the square root of the compressor's contraction.
    """

    def __init__(
        self, graph: str | Mapping[str, Any] = "ring", mode: str = "synchronous", local_steps: int = 1,
        order: str = "adapt_then_combine", exchanges_per_gradient: float = 1.0, edge_rates: str = "uniform",
        timeout_s: float | None = None, consensus_lr: float | None = None,
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
        if consensus_lr is not None:
            check_number("consensus_lr", consensus_lr, above=0, at_most=1)
        self.consensus_lr = consensus_lr
        self.by_time = mode == "asynchronous"
        self.no_compression = "Pairs that meet at random exchange whole vectors: mode: synchronous compresses." if (
            self.by_time) else ""
        self.local_steps, self.order, self.timeout_s = local_steps, order, timeout_s
        self.exchanges_per_gradient = float(exchanges_per_gradient)

    def check_compression(self, settings: str | Mapping[str, Any], count: int) -> None:
        """Refuse to go without error feedback, which the copies are.

        Raises:
            InvalidSetting: the section says so.
        """
        if not Compression.of(settings).error_feedback:
            raise InvalidSetting("compression.error_feedback", False, "true with gossip_sgd",
                                 "Its peers compress differences to copies, which make up for all that was left out.")

    async def run(self, peer: Peer) -> None:
        """Train and average, until the run ends."""
        if self.by_time:
            await run_pairwise(self, peer, self.exchanges_per_gradient, False, self.timeout_s)
            return
        saved: dict[str, int] | None = peer.restore(dict)
        epoch = None if saved is None else saved["epoch"]
        async for step in peer.steps():
            found = self.members_graph(peer)
            if step == 0 and peer.packing is not None:
                peer.packing.copies(PARAMS).begin(peer.params, found.neighbours(peer.rank))
            if epoch != peer.epoch:
                self.log_graph(peer, found)
                epoch = peer.epoch
            if self.order == "adapt_then_combine":
                await peer.train(self.local_steps)
                peer.params = await self._average(peer)
            else:
                subtracted = peer.spawn(peer.displacement())
                mixed = await self._average(peer)
                peer.params = mixed - await subtracted
            if not torch.isfinite(peer.params).all():
                raise Diverged(f"Training diverged at peer {peer.rank}: its parameters became infinite. Lower "
                               "train.lr, or set train.clip_norm.")
            await peer.safe_point({"epoch": epoch})

    async def _average(self, peer: Peer) -> torch.Tensor:
        """Return the weighted mean of this peer's and its neighbours' parameters, shape (d,)."""
        found = self.members_graph(peer)
        if peer.packing is not None and not peer.packing.codec.is_exact:
            return await self._approach(peer, peer.packing, found)
        offers: Any = await peer.exchange(
            found.neighbours(peer.rank), {PARAMS: peer.params}, timeout_s=self.timeout_s)
        return combine(offers, found.mixing_weights(peer.rank), peer.rank, PARAMS)

    async def _approach(self, peer: Peer, packing: Packing, found: MemberGraph) -> torch.Tensor:
        """Return x + gamma sum_j w_ij (x^_j - x^_i), shape (d,); neighbours with whom copies disagree are left out."""
        copies, neighbours = packing.copies(PARAMS), found.neighbours(peer.rank)
        mine = copies.offers(peer.params, neighbours, peer.step)
        offers: Any = await peer.exchange(
            neighbours, lambda rank: mine.get(rank, NOTHING_SENT), timeout_s=self.timeout_s)
        pull = torch.zeros_like(peer.params)
        for rank, weight in found.mixing_weights(peer.rank).items():
            if rank != peer.rank and rank in offers and self._hear(peer, copies, rank, offers[rank]):
                pull += weight * (copies.theirs(rank) - copies.mine(rank))
        contraction = packing.codec.contraction
        assert contraction is not None
        return peer.params + (contraction**0.5 if self.consensus_lr is None else self.consensus_lr) * pull

    @staticmethod
    def _hear(peer: Peer, copies: Copies, rank: int, offer: torch.Tensor) -> bool:
        try:
            return copies.hear(rank, offer)
        except MalformedPayload as error:
            peer.refuse(rank, str(error), PARAMS)
            return False
