"""A peer's computing in virtual time."""
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedcore.peers.seams import Board, PeerWork, Trained
from fedcore.simulations.availability import Availability
from fedcore.simulations.devices import Devices
from fedcore.simulations.failures import Failures


class VirtualLabour:
    """Does a peer's work at once, and lets it take as long as its device would.

    A device that is offline does nothing until it is back; one that crashes begins the present piece of work again.
    """

    def __init__(
        self, rank: int, work: PeerWork, devices: Devices, board: Board, availability: Availability | None = None,
        failures: Failures | None = None,
    ):
        self._rank, self._work, self._devices, self._board = rank, work, devices, board
        self._availability, self._failures = availability, failures
        self._pieces = 0

    @property
    def curvature(self) -> tuple[float, float] | None:
        """Strong convexity and smoothness of the peer's objective, where the task knows them."""
        found: tuple[float, float] | None = getattr(self._work, "curvature", None)
        return found

    async def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained:
        """Make optimizer steps."""
        trained = self._work.train(params, buffers, steps)
        await self._take(steps)
        return trained

    async def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the gradient of the next batch; it takes as long as one optimizer step."""
        found = self._work.gradient(params, buffers)
        await self._take(1)
        return found

    async def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]:
        """Return the optimizer's next step; with a given gradient it takes no time."""
        found = self._work.displacement(params, buffers, gradient)
        if gradient is None:
            await self._take(1)
        return found

    async def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Return what the optimizer's next step makes of a model; it takes no time, as the gradient took it."""
        return self._work.descend(params, buffers, gradient)

    def forget_optimizer(self) -> None:
        """Let the optimizer start afresh."""
        self._work.forget_optimizer()

    async def _take(self, steps: int) -> None:
        seconds = self._devices.compute_seconds(self._rank, self._pieces, steps)
        if self._failures is not None and (point := self._failures.crash_point(self._rank, self._pieces)) is not None:
            seconds *= 1 + point
        self._pieces += 1
        await self._board.sleep_until(self._rank, self._done_at(self._board.now, seconds))

    def _done_at(self, now: float, seconds: float) -> float:
        """Return when so many seconds of computing are over, counting those alone in which the device is online."""
        if self._availability is None:
            return now + seconds
        while seconds > 0 and now < math.inf:
            change = self._availability.next_change(self._rank, now)
            if self._availability.is_on(self._rank, now):
                if now + seconds <= change:
                    return now + seconds
                seconds -= change - now
            now = change
        return now

    def state_dict(self) -> dict[str, Any]:
        """Return how much was done, and what the training remembers."""
        return {"pieces": self._pieces, "work": self._work.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._pieces = state["pieces"]
        self._work.load_state_dict(state["work"])
