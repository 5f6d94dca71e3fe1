"""What the methods have in common whose peers talk to their neighbours in a graph only."""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fedcore.edge_rates import edge_shares
from fedcore.errors import InvalidSetting
from fedcore.graphs import Edge, EdgeRates, Graph, mixing_weights
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy
from fedcore.registry import build
from fedcore.topologies import Topology

# A graph with more edges is not written into the run's metrics: nobody could tell its lines apart.
MOST_LOGGED_EDGES = 2_000


@dataclass(frozen=True)
class MemberGraph:
    """A graph whose nodes are the members of an epoch, in ascending order of rank."""

    graph: Graph
    members: tuple[int, ...]

    def node(self, rank: int) -> int:
        """Return a member's node."""
        return self._nodes[rank]

    @cached_property
    def _nodes(self) -> dict[int, int]:
        return {rank: node for node, rank in enumerate(self.members)}

    @cached_property
    def _rows(self) -> dict[int, dict[int, float]]:
        return {}    # of the Metropolis matrix, as far as they were asked for

    def neighbours(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that share an edge with a member, ascending."""
        return tuple([self.members[node] for node in self.graph.neighbours(self.node(rank))])

    def mixing_weights(self, rank: int) -> Mapping[int, float]:
        """Return a member's row of the Metropolis matrix by rank, ascending, its own included."""
        if rank not in self._rows:
            self._rows[rank] = {
                self.members[node]: weight for node, weight in mixing_weights(self.graph, self.node(rank)).items()}
        return self._rows[rank]

    def rates_of(self, rates: EdgeRates, rank: int) -> dict[int, float]:
        """Return the rates of a member's edges that are used, by the rank at the other end."""
        found = rates.of_node(self.node(rank))
        return {self.members[node]: rate for node, rate in sorted(found.items()) if rate > 0}


def without(edges: Iterable[Edge], gone: Iterable[int]) -> set[Edge]:
    """Return the edges of a graph from which nodes are removed, one by one in ascending order.

    The neighbours of a removed node are joined in a row, so that a connected graph stays connected.
    """
    left = set(edges)
    for node in sorted(gone):
        near = sorted({first + second - node for first, second in left if node in (first, second)})
        left = {edge for edge in left if node not in edge}
        left |= set(zip(near, near[1:], strict=False))
    return left


class GraphStrategy(PeerStrategy):
    """A peer strategy on a graph.

    The graph is that of all nodes of the run. Where some are absent, their neighbours are joined in a row.

    Args:
        graph: registered name, alone or under `name` among its settings.
        edge_rates: `uniform`, or `optimal` for the fewest exchanges.
    """

    def __init__(self, graph: str | Mapping[str, Any], edge_rates: str = "uniform"):
        self.topology: Topology = build("graphs", graph, "graph")
        self.edge_rates = edge_rates
        self.num_nodes: int | None = None
        self._graphs = lru_cache(maxsize=8)(self._graph)
        self._latest: tuple[tuple[int, ...], int, MemberGraph] | None = None
        self._shares = lru_cache(maxsize=8)(edge_shares)

    def check_clients(self, count: int) -> None:
        """Refuse a graph that does not suit so many nodes.

        Raises:
            InvalidSetting: with the setting that is wrong.
            DisconnectedGraph: some node cannot be reached.
        """
        self.num_nodes = count
        try:
            self.topology.graph(count, 0)
        except InvalidSetting as error:
            raise error if error.name.startswith("clients.") else error.under("graph") from error

    def members_graph(self, peer: Peer) -> MemberGraph:
        """Return the graph of those who take part in the present step; the same at all of them."""
        latest = self._latest
        # Recognised by identity: hashing thousands of members at every call would cost more than the rest of a step.
        if latest is None or latest[0] is not peer.members or latest[1] != peer.seed:
            count = max(self.num_nodes or 0, peer.members[-1] + 1)
            latest = self._latest = (peer.members, peer.seed, self._graphs(peer.members, count, peer.seed))
        return latest[2]

    def _graph(self, members: tuple[int, ...], count: int, seed: int) -> MemberGraph:
        whole = self.topology.graph(count, seed)
        if len(members) == count:
            return MemberGraph(whole, members)
        nodes = {rank: node for node, rank in enumerate(members)}
        left = without(whole.edges, set(range(count)) - set(members))
        return MemberGraph(Graph(len(members), tuple((nodes[one], nodes[other]) for one, other in left)), members)

    def shares(self, found: MemberGraph) -> EdgeRates:
        """Return each edge's share of all exchanges."""
        return self._shares(found.graph, self.edge_rates)

    def log_graph(self, peer: Peer, found: MemberGraph, rates: EdgeRates | None = None, unit_s: float = 1.0) -> None:
        """Write the graph into the run's metrics, once an epoch: (rank, rank, exchanges per second) for each edge.

        Args:
            rates: per unit of time; None: every edge is used at every step.
            unit_s: seconds of that unit.
        """
        if peer.rank != found.members[0] or len(found.graph.edges) > MOST_LOGGED_EDGES:
            return
        each = [None] * len(found.graph.edges) if rates is None else [rate / unit_s for rate in rates.rates]
        peer.log(graph=[[found.members[one], found.members[other], rate]
                        for (one, other), rate in zip(found.graph.edges, each, strict=True)])
