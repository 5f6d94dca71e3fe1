"""Who may talk to whom: a connected undirected graph of peers, and how fast news spreads over it.

Two numbers say how well the exchanges of a graph mix, both in units of time. With the Laplacian
Lap = sum over edges of rate_ij (e_i - e_j)(e_i - e_j)^T,

    chi1 = 1 / (smallest positive eigenvalue of Lap)                  the inverse algebraic connectivity,
    chi2 = 1/2 max over edges of (e_i - e_j)^T Lap^+ (e_i - e_j)      half the largest effective resistance,

and chi2 <= chi1. Twice the rates halve both.

Source: Nabli and Oyallon, 2023 (ICML), arXiv:2208.00779; Metropolis weights: Xiao, Boyd and Kim, 2007.
"""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx
import numpy as np

from fedcore.errors import DisconnectedGraph, InvalidSetting, MalformedGraph

Edge = tuple[int, int]

# An edge without rate never fires: its ends may be as far from each other as they like.
LEAST_SHARE = 1e-9
# The second eigenvalue of a connected graph is zero to rounding only when rates differ by more than double precision.
LEAST_CONNECTIVITY = 1e-12


@dataclass(frozen=True)
class Graph:
    """A connected undirected graph; one node alone is connected.

    Attributes:
        num_nodes: n, at least 1; nodes are 0 to n - 1.
        edges: (i, j) with i < j, ascending, each once. May be given in any order, either way round, and twice.

    Raises:
        MalformedGraph: an edge of a node to itself, or to a node that does not exist.
        DisconnectedGraph: some node cannot be reached from another.
    """

    num_nodes: int
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise MalformedGraph(f"A graph of {self.num_nodes} nodes has nobody in it.")
        for first, second in self.edges:
            if first == second:
                raise MalformedGraph(f"Node {first} has an edge to itself.")
            if not (0 <= first < self.num_nodes and 0 <= second < self.num_nodes):
                raise MalformedGraph(f"The edge {first} - {second} needs a node that a graph of {self.num_nodes} "
                                     f"nodes, 0 to {self.num_nodes - 1}, does not have.")
        ordered = tuple(sorted({(min(edge), max(edge)) for edge in self.edges}))
        object.__setattr__(self, "edges", ordered)
        self._check_connected(ordered)

    @classmethod
    def of(cls, found: networkx.Graph) -> "Graph":
        """Return a networkx graph, its nodes numbered in their sorted order."""
        numbers = {node: number for number, node in enumerate(sorted(found.nodes))}
        return cls(len(numbers), tuple((numbers[one], numbers[other]) for one, other in found.edges if one != other))

    def _check_connected(self, edges: Iterable[Edge]) -> None:
        found = networkx.Graph(edges)
        found.add_nodes_from(range(self.num_nodes))
        parts = sorted((sorted(part) for part in networkx.connected_components(found)), key=lambda part: part[0])
        if len(parts) > 1:
            raise DisconnectedGraph(parts)

    @cached_property
    def ends(self) -> np.ndarray:
        """The two ends of every edge, shape (edges, 2)."""
        return np.asarray(self.edges, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def _adjacency(self) -> tuple[tuple[int, ...], ...]:
        near: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for first, second in self.edges:
            near[first].append(second)
            near[second].append(first)
        return tuple(tuple(sorted(others)) for others in near)

    def neighbours(self, node: int) -> tuple[int, ...]:
        """Return the nodes that share an edge with a node, ascending."""
        return self._adjacency[node]

    def degree(self, node: int) -> int:
        """Return how many neighbours a node has."""
        return len(self._adjacency[node])


@dataclass(frozen=True)
class EdgeRates:
    """How often each edge of a graph is used.

    Attributes:
        rates: exchanges per unit of time of each edge, in the graph's order; at least 0.

    Raises:
        InvalidSetting: too few or too many rates, or a negative one.
        DisconnectedGraph: the edges that are used do not connect the graph.
    """

    graph: Graph
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.graph.edges):
            raise InvalidSetting("rates", len(self.rates), f"one for each of the {len(self.graph.edges)} edges")
        if not all(0 <= rate < math.inf for rate in self.rates):
            raise InvalidSetting("rates", min(self.rates), "finite numbers of at least 0")
        used = [edge for edge, on in zip(self.graph.edges, self._used, strict=True) if on]
        self.graph._check_connected(used)

    @cached_property
    def _used(self) -> np.ndarray:
        rates = np.asarray(self.rates)
        return rates > LEAST_SHARE * rates.max(initial=0.0)

    @cached_property
    def total(self) -> float:
        """Exchanges per unit of time in the whole graph."""
        return math.fsum(self.rates)

    def of_node(self, node: int) -> dict[int, float]:
        """Return the rate of each edge of a node, by the neighbour at its other end."""
        return {(second if first == node else first): rate
                for (first, second), rate in zip(self.graph.edges, self.rates, strict=True) if node in (first, second)}

    @cached_property
    def node_rates(self) -> tuple[float, ...]:
        """Exchanges per unit of time that each node takes part in."""
        totals = np.zeros(self.graph.num_nodes)
        np.add.at(totals, self.graph.ends.reshape(-1), np.repeat(np.asarray(self.rates), 2))
        return tuple(totals.tolist())

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of the Laplacian, ascending, shape (n,), and its eigenvectors, the columns of (n, n)."""
        values, vectors = np.linalg.eigh(laplacian(self.graph, self.rates))
        if self.graph.num_nodes > 1 and values[1] <= LEAST_CONNECTIVITY * values[-1]:
            raise InvalidSetting("rates", min(self.rates), f"above {LEAST_CONNECTIVITY:g} of the largest",
                                 "The graph is connected by a thread that double precision cannot see.")
        return values, vectors

    @cached_property
    def resistances(self) -> np.ndarray:
        """Effective resistance (e_i - e_j)^T Lap^+ (e_i - e_j) between the ends of every edge, shape (edges,)."""
        values, vectors = self.spectrum
        drops = vectors[self.graph.ends[:, 0], 1:] - vectors[self.graph.ends[:, 1], 1:]
        return np.asarray((drops**2 / values[1:]).sum(axis=1))

    @cached_property
    def chi1(self) -> float:
        """Inverse algebraic connectivity, in units of time; 0 for one node alone."""
        return 1 / float(self.spectrum[0][1]) if self.graph.num_nodes > 1 else 0.0

    @cached_property
    def chi2(self) -> float:
        """Half the largest effective resistance among edges that are used, in units of time; 0 for one node alone."""
        return 0.5 * float(self.resistances[self._used].max()) if self.graph.edges else 0.0

    def scaled(self, factor: float) -> "EdgeRates":
        """Return the same shares of a total that is `factor` times as large."""
        return EdgeRates(self.graph, tuple(factor * rate for rate in self.rates))


def laplacian(graph: Graph, rates: Sequence[float]) -> np.ndarray:
    """Return sum over edges of rate_ij (e_i - e_j)(e_i - e_j)^T, shape (n, n), float64."""
    matrix = np.zeros((graph.num_nodes, graph.num_nodes))
    for (first, second), rate in zip(graph.edges, rates, strict=True):
        matrix[first, second] -= rate
        matrix[second, first] -= rate
        matrix[first, first] += rate
        matrix[second, second] += rate
    return matrix


def mixing_weights(graph: Graph, node: int) -> dict[int, float]:
    """Return a node's row of the Metropolis matrix W: its neighbours' weights and its own, ascending, sum 1.

    W_ij = 1 / (1 + larger of both degrees) makes W symmetric and doubly stochastic, whatever the graph.
    """
    weights = {other: 1 / (1 + max(graph.degree(node), graph.degree(other))) for other in graph.neighbours(node)}
    weights[node] = 1 - math.fsum(weights.values())
    return dict(sorted(weights.items()))


def mixing_matrix(graph: Graph) -> np.ndarray:
    """Return the Metropolis matrix W, shape (n, n), float64."""
    matrix = np.zeros((graph.num_nodes, graph.num_nodes))
    for node in range(graph.num_nodes):
        for other, weight in mixing_weights(graph, node).items():
            matrix[node, other] = weight
    return matrix


def spectral_gap(matrix: np.ndarray) -> float:
    """Return 1 minus the second largest absolute eigenvalue of a symmetric mixing matrix: 1 mixes at once, 0 never."""
    sizes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))
    return float(1 - sizes[-2]) if len(sizes) > 1 else 1.0
