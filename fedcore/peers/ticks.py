"""A peer's Poisson clocks."""
import math
from typing import TYPE_CHECKING, Self

from fedcore.seeds import derive_seed

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer


def exponential(rate: float, seed: int, *parts: int | str) -> float:
    """Return a draw from the exponential distribution with a given rate; it follows from the seed and the parts."""
    uniform = ((derive_seed(seed, *parts) >> 11) + 0.5) * 2.0**-52
    return -math.log(uniform) / rate


class Ticks:
    """The moments of a Poisson process, one after another, until the present step ends.

    A tick that comes while the peer is busy is kept: it follows as soon as the next one is asked for. The clock goes on
    in the next step where it stopped.

    Args:
        rate: expected ticks per second, above 0; may be another in the next step.
        purpose: names the clock; each of a peer's clocks ticks on its own.
    """

    def __init__(self, peer: "Peer", rate: float, purpose: tuple[int | str, ...]):
        if not 0 < rate < math.inf:
            raise ValueError(f"a clock's rate is {rate}, but must be a finite number above 0")
        self._peer, self._rate, self._purpose = peer, rate, purpose
        self._name = "/".join(str(part) for part in purpose)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> float:
        """Wait for the next tick and return its time, which may be past already."""
        peer, board = self._peer, self._peer.board
        count, at = peer.clocks.get(self._name, (0, None))
        if at is None:
            at = peer.now + self._gap(0)
        if at >= board.ends_at or peer.now >= board.ends_at:
            peer.clocks[self._name] = (count, at)
            raise StopAsyncIteration
        if at > peer.now:
            await board.sleep_until(peer.rank, at)
        peer.clocks[self._name] = (count + 1, at + self._gap(count + 1))
        return at

    def _gap(self, count: int) -> float:
        return exponential(self._rate, self._peer.seed, self._peer.rank, "ticks", *self._purpose, count)
