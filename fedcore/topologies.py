"""The graphs that an experiment can name, each fitted to the number of nodes when that is known.

    strategy: {name: dadao, graph: {name: random_regular, degree: 3}, ...}

One of your own is a class with `graph(num_nodes, seed)`, named `package.module:Class`.
"""
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import networkx

from fedcore.errors import DisconnectedGraph, InvalidSetting, MalformedGraph, MissingData
from fedcore.graphs import Edge, Graph
from fedcore.seeds import derive_seed, numpy_generator

# So many random graphs are drawn until one is connected; a sensible density needs one or two.
MOST_DRAWS = 100
MOST_WRONG_LINE = 40    # characters of a wrong line that are shown


class Topology(ABC):
    """A graph's settings."""

    @abstractmethod
    def graph(self, num_nodes: int, seed: int) -> Graph:
        """Return the graph of so many nodes.

        Args:
            num_nodes: at least 1.
            seed: of the run; only random graphs depend on it.

        Raises:
            InvalidSetting: there is no such graph of that size.
            DisconnectedGraph: some node cannot be reached.
        """


class Complete(Topology):
    """Everybody with everybody."""

    def graph(self, num_nodes: int, seed: int) -> Graph:
        return Graph.of(networkx.complete_graph(num_nodes))


class Ring(Topology):
    """Each with the next, the last with the first."""

    def graph(self, num_nodes: int, seed: int) -> Graph:
        return Graph.of(networkx.cycle_graph(num_nodes))


class Star(Topology):
    """Node 0 with everybody else."""

    def graph(self, num_nodes: int, seed: int) -> Graph:
        return Graph(num_nodes, tuple((0, node) for node in range(1, num_nodes)))


class Line(Topology):
    """Each with the next."""

    def graph(self, num_nodes: int, seed: int) -> Graph:
        return Graph.of(networkx.path_graph(num_nodes))


class Grid(Topology):
    """Rows and columns, each node with those beside, above and below it.

    Args:
        rows: of the grid, a divisor of the number of nodes; None: what makes it most nearly square.
    """

    least_side = 1
    periodic = False

    def __init__(self, rows: int | None = None):
        if rows is not None and rows < self.least_side:
            raise InvalidSetting("rows", rows, f"a whole number of at least {self.least_side}")
        self.rows = rows

    def graph(self, num_nodes: int, seed: int) -> Graph:
        rows = self.rows or self._nearest_square(num_nodes)
        columns, rest = divmod(num_nodes, rows)
        if rest or columns < self.least_side:
            raise InvalidSetting("rows", rows, f"a divisor of the {num_nodes} nodes that leaves "
                                 f"{max(self.least_side, 1)} columns or more")
        return Graph.of(networkx.grid_2d_graph(rows, columns, periodic=self.periodic))

    def _nearest_square(self, num_nodes: int) -> int:
        least = max(self.least_side, 2)
        sides = [side for side in range(least, math.isqrt(num_nodes) + 1) if num_nodes % side == 0]
        if sides:
            return sides[-1]
        if num_nodes <= 3 and self.least_side == 1:
            return 1
        raise _wrong_size(num_nodes, f"a product of two whole numbers of at least {least}",
                          "Change the number of clients, or take a ring.")


class Torus(Grid):
    """A grid whose opposite sides are joined; at least three rows and three columns.

    Args:
        rows: of the torus, a divisor of the number of nodes; None: what makes it most nearly square.
    """

    least_side = 3
    periodic = True


class Hypercube(Topology):
    """Nodes are corners of a cube of log2 n dimensions: those whose numbers differ in one binary digit are joined."""

    def graph(self, num_nodes: int, seed: int) -> Graph:
        if num_nodes & (num_nodes - 1):
            raise _wrong_size(num_nodes, "a power of two", "An exponential graph takes any number.")
        digits = range(num_nodes.bit_length() - 1)
        return Graph(num_nodes, tuple((node, node ^ 1 << digit) for node in range(num_nodes) for digit in digits))


class Exponential(Topology):
    """Each with those 1, 2, 4, 8, ... places further on a ring: few edges, few hops between any two."""

    def graph(self, num_nodes: int, seed: int) -> Graph:
        jumps = [1 << power for power in range(max(num_nodes - 1, 0).bit_length())]
        edges = tuple((node, (node + jump) % num_nodes) for node in range(num_nodes) for jump in jumps)
        return Graph(num_nodes, tuple(edge for edge in edges if edge[0] != edge[1]))


class RandomRegular(Topology):
    """A random graph in which everybody has equally many neighbours.

    Args:
        degree: neighbours of each node, at least 1; below the number of nodes, and one of both even.
    """

    def __init__(self, degree: int = 4):
        if degree < 1:
            raise InvalidSetting("degree", degree, "a whole number of at least 1")
        self.degree = degree

    def graph(self, num_nodes: int, seed: int) -> Graph:
        if self.degree >= num_nodes and num_nodes > 1:
            raise InvalidSetting("degree", self.degree, f"below the number of nodes, {num_nodes}")
        if num_nodes * self.degree % 2:
            raise InvalidSetting("degree", self.degree, f"even with {num_nodes} nodes, an odd number",
                                 "Every edge has two ends, so degree times nodes is even.")
        if num_nodes == 1:
            return Graph(1, ())
        return _first_connected(lambda draw: networkx.random_regular_graph(
            self.degree, num_nodes, seed=derive_seed(seed, "graph", "random_regular", draw)))


class RandomGeometric(Topology):
    """Places drawn in a unit square; those nearer to each other than a radius are joined. Drawn until connected.

    Args:
        radius: in units of the square's side, in (0, 1.5]; None: sqrt(2 ln n / n), which connects nearly always.
    """

    def __init__(self, radius: float | None = None):
        if radius is not None and not 0 < radius <= 1.5:
            raise InvalidSetting("radius", radius, "above 0 and at most 1.5", "The diagonal is 1.42 sides long.")
        self.radius = radius

    def graph(self, num_nodes: int, seed: int) -> Graph:
        radius = self.radius or math.sqrt(2 * math.log(max(num_nodes, 2)) / max(num_nodes, 2))
        return _first_connected(lambda draw: self._drawn(num_nodes, radius, seed, draw))

    def _drawn(self, num_nodes: int, radius: float, seed: int, draw: int) -> networkx.Graph:
        places = numpy_generator(seed, "graph", "random_geometric", draw).random((num_nodes, 2)).tolist()
        return networkx.random_geometric_graph(num_nodes, radius, pos=dict(enumerate(places)))


class Barbell(Topology):
    """Two groups in which everybody knows everybody, and a thin path between them.

    Args:
        bridge: nodes on the path between the groups, at least 0; the rest, an even number, is halved.
    """

    def __init__(self, bridge: int = 0):
        if bridge < 0:
            raise InvalidSetting("bridge", bridge, "a whole number of at least 0")
        self.bridge = bridge

    def graph(self, num_nodes: int, seed: int) -> Graph:
        group, rest = divmod(num_nodes - self.bridge, 2)
        if rest or group < 2:
            raise InvalidSetting("bridge", self.bridge, f"so that an even number of at least 4 of the {num_nodes} "
                                 "nodes is left for the two groups")
        return Graph.of(networkx.barbell_graph(group, self.bridge))


class FromFile(Topology):
    """The edges listed in a text file.

    Args:
        path: one edge per line, two node numbers from 0 apart by spaces or a comma; `#` begins a comment.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.edges = read_edges(self.path)

    def graph(self, num_nodes: int, seed: int) -> Graph:
        try:
            return Graph(num_nodes, self.edges)
        except MalformedGraph as error:
            raise MalformedGraph(f"{self.path}: {error}") from error
        except DisconnectedGraph as error:
            raise DisconnectedGraph(error.parts, f"The graph in {self.path}") from error


def read_edges(path: Path) -> tuple[Edge, ...]:
    """Return the edges in a text file.

    Raises:
        MissingData: the file cannot be read.
        MalformedGraph: a line holds something else than two whole numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MissingData(f"The edge list {path} cannot be read: {error}.") from error
    edges = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise MalformedGraph(f"{path}, line {number}: {line.strip()[:MOST_WRONG_LINE]!r} is not an edge. Write two "
                                 "node numbers from 0, e.g. 0 3.")
        edges.append((int(words[0]), int(words[1])))
    return tuple(edges)


def _first_connected(draw_graph: Callable[[int], networkx.Graph]) -> Graph:
    """Return the first of some random graphs that is connected, or raise `DisconnectedGraph` for the last."""
    for draw in range(MOST_DRAWS):
        found = draw_graph(draw)
        if networkx.is_connected(found):
            break
    return Graph.of(found)


def _wrong_size(num_nodes: int, allowed: str, advice: str) -> InvalidSetting:
    return InvalidSetting("clients.count", num_nodes, f"{allowed} for this graph", advice)
