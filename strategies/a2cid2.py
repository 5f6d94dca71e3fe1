"""A2CiD2: asynchronous pairwise averaging that a second copy of the parameters accelerates, for neural networks.

Source: Nabli, Belilovsky and Oyallon, 2023 (NeurIPS), arXiv:2306.08289. The equations are in `acid_equations.py`, a
peer's run in `pairwise.py`.

Departure: one unit of time, the mean duration of a gradient over all peers, measured at the start, holds for everybody,
where the authors' code has one for each peer. With it the drift keeps the mean of x and x~ over the peers exactly.
"""
import logging
from collections.abc import Mapping
from typing import Any

from fedcore.edge_rates import KINDS
from fedcore.peers.peer import Peer
from fedcore.strategies.graph_peers import GraphStrategy
from fedcore.strategies.pairwise import run_pairwise
from fedcore.strategies.settings import check_choice, check_number
from fedcore.topologies import Complete

logger = logging.getLogger("fedcore")


class A2Cid2(GraphStrategy):
    """Asynchronous decentralised training with accelerated averaging on poorly connected graphs.

    The optimizer is `train.optimizer`. Peers compute all the time, each at its own speed, and average with one
    neighbour at a time.

    Args:
        graph: registered name, alone or under `name` among its settings.
        exchanges_per_gradient: that a peer takes part in while one gradient is computed, on average over the peers.
        edge_rates: `uniform`, or `optimal` for the fewest exchanges that mix as well.
        timeout_s: after which an exchange is dropped at both ends; None: ten gradients, but at least ten seconds.
    """

    by_time = True
    no_compression = "Pairs that meet at random exchange whole vectors, so that the mean over the peers stays exact."

    def __init__(
        self, graph: str | Mapping[str, Any] = "ring", exchanges_per_gradient: float = 1.0, edge_rates: str = "uniform",
        timeout_s: float | None = None,
    ):
        super().__init__(graph, edge_rates)
        check_choice("edge_rates", edge_rates, KINDS)
        check_number("exchanges_per_gradient", exchanges_per_gradient, above=0)
        if timeout_s is not None:
            check_number("timeout_s", timeout_s, above=0)
        if isinstance(self.topology, Complete):
            logger.warning("A2CiD2 gains nothing on the complete graph, which mixes as fast without it: gossip_sgd "
                           "with mode: asynchronous does the same with half the memory.")
        self.exchanges_per_gradient, self.timeout_s = float(exchanges_per_gradient), timeout_s

    async def run(self, peer: Peer) -> None:
        """Train and average at random times, until the run ends."""
        await run_pairwise(self, peer, self.exchanges_per_gradient, True, self.timeout_s)
