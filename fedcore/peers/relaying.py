"""Peers that nobody can dial, as the server that hosts them sees them: whether it may relay, between whom, how much."""
from collections.abc import Sequence
from typing import Any

from fedcore.errors import BadInput
from fedcore.tasks import Node


class Relaying:
    """Lets a grid pass on what peers say to those who give no address.

    Args:
        on: whether it is to.

    Attributes:
        bytes: passed on since the run began.
    """

    def __init__(self, on: bool):
        self.on, self.bytes = on, 0
        self._seen = 0    # of the grid's own count, which begins anew with each server

    def check(self, grid: Any) -> None:
        """Raise `BadInput` where a grid cannot relay, or must not."""
        if not self.on:
            return
        if not hasattr(grid, "relay_among"):
            raise BadInput("peers.relay: true, but only `fedcore server` relays between peers: a SuperLink carries "
                           "nothing between its nodes while they work. Leave it out, and give every node a peer-listen "
                           "that the others can dial.")
        if not grid.private:
            raise BadInput("peers.relay: true, but peers beyond one machine talk with certificates, and this server "
                           "has none. Start it with --tls DIR.")

    def begin(self, grid: Any, nodes: Sequence[Node]) -> None:
        """Relay between these nodes from now on, and no others."""
        if self.on:
            grid.relay_among([node.id for node in nodes])

    def count(self, grid: Any) -> None:
        """Take note of what was passed on."""
        if self.on:
            found = grid.relayed_bytes
            self.bytes, self._seen = self.bytes + found - self._seen, found
