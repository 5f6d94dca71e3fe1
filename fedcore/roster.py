"""Who is here: the nodes of a run, by Flower's number and by the partition that they hold."""
from collections.abc import KeysView, Sequence

from fedcore.tasks import Node


class Roster:
    """The nodes that are here. Strategies keep what they know of a node by its partition, which never changes."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}         # by Flower's id
        self._partitions: dict[int, Node] = {}
        self._listed: tuple[Node, ...] | None = None    # all of them in order; None: to be listed anew
        self._kinds: dict[int, str] = {}          # what each partition says it can answer with

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are here, ascending partition."""
        if self._listed is None:
            self._listed = tuple(sorted(self._nodes.values(), key=lambda node: node.partition))
        return self._listed

    def node_of(self, partition: int) -> Node | None:
        """Return the node that holds a partition, None while it is not here."""
        return self._partitions.get(partition)

    @property
    def node_ids(self) -> KeysView[int]:
        """Flower's ids of the nodes that are here."""
        return self._nodes.keys()

    def add_nodes(self, nodes: Sequence[tuple[Node, str]]) -> None:
        """Admit nodes, each with what it says it can answer with (`update,model`)."""
        for node, kinds in nodes:
            self._kinds[node.partition] = kinds
            self._nodes[node.id] = self._partitions[node.partition] = node
        self._listed = None

    def remove_node(self, node_id: int) -> Node | None:
        """Forget a node that left; None when it was never admitted."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            self._partitions.pop(node.partition, None)
            self._listed = None
        return node
