"""A reduction that was begun and whose result is wanted later."""
import asyncio
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fedcore.peers.seams import Reduced

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer


class Underway:
    """Gives (mean, contributors) when it is awaited; until then its inputs belong to every checkpoint.

    Attributes:
        inputs: tag, round, vector, weight, and when it began.
    """

    def __init__(self, peer: "Peer", inputs: dict[str, Any], future: "asyncio.Future[Reduced]"):
        self.inputs, self._peer, self._future = inputs, peer, future

    def done(self) -> bool:
        """Say whether the result is there."""
        return self._future.done()

    def cancel(self) -> None:
        """Give up: nobody will ask for the result any more."""
        self._future.cancel()

    def then(self, act: Callable[[Reduced], None]) -> None:
        """Call a function with the result once it is there, if it ever is."""
        self._future.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() is not None else act(done.result()))

    def __await__(self) -> Generator[Any, None, Reduced]:
        began = self._peer.now
        result = yield from self._future.__await__()
        self._peer.counters.waiting_s += self._peer.now - began
        self._peer.forget_reduction(self.inputs["tag"], self.inputs["round"])
        return result
