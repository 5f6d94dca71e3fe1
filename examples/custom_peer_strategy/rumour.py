"""A strategy that a user could have written: every peer tells its model to the next one on a ring that shifts.

In step t peer i sends its model to the peer t + 1 places further on, and mixes what it hears with its own. After as
many steps as there are other peers everybody has heard everybody; nobody ever waits for more than one.
"""
from dataclasses import dataclass

from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy


@dataclass(frozen=True)
class RumourState:
    """What a peer carries from step to step: here, only how often it has listened."""

    heard: int = 0


def mix(own: Tensor, theirs: Tensor, trust: float) -> Tensor:
    """Return the model after listening: own + trust (theirs - own), shape (d,)."""
    return own + trust * (theirs - own)


class Rumour(PeerStrategy):
    """Train, tell the next, listen to the one before.

    Args:
        inner_steps: local optimizer steps between rumours, at least 1.
        trust: weight of what is heard, in (0, 1).
    """

    def __init__(self, inner_steps: int = 10, trust: float = 0.5):
        if inner_steps < 1:
            raise InvalidSetting("inner_steps", inner_steps, "at least 1")
        if not 0 < trust < 1:
            raise InvalidSetting("trust", trust, "in (0, 1)", "0.5 weighs both models alike.")
        self.inner_steps, self.trust = inner_steps, trust

    async def run(self, peer: Peer) -> None:
        state = peer.restore(RumourState) or RumourState()
        async for step in peer.steps():
            await peer.train(self.inner_steps)
            place, count = peer.members.index(peer.rank), len(peer.members)
            if (shift := 1 + step % max(1, count - 1)) < count:
                peer.send(peer.members[(place + shift) % count], peer.params)
                theirs = await peer.receive(peer.members[place - shift])
                assert isinstance(theirs, Tensor)
                peer.params = mix(peer.params, theirs, self.trust)
                state = RumourState(state.heard + 1)
            await peer.safe_point(state)
