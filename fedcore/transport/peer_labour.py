"""A real peer's computing, in a thread of its own."""
import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from fedcore.peers.seams import PeerWork, Trained

T = TypeVar("T")


class ThreadLabour:
    """Computes in a thread of its own, so that the peer answers others meanwhile."""

    def __init__(self, work: PeerWork):
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedcore-peer")

    @property
    def curvature(self) -> tuple[float, float] | None:
        """Strong convexity and smoothness of the peer's objective, where the task knows them."""
        found: tuple[float, float] | None = getattr(self._work, "curvature", None)
        return found

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained:
        """Make optimizer steps."""
        return await self._run(self._work.train, params, buffers, steps)

    async def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the gradient of the next batch."""
        return await self._run(self._work.gradient, params, buffers)

    async def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]:
        """Return what the optimizer's next step would subtract."""
        return await self._run(self._work.displacement, params, buffers, gradient)

    async def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Return what the optimizer's next step makes of a model."""
        return await self._run(self._work.descend, params, buffers, gradient)

    def forget_optimizer(self) -> None:
        """Let the optimizer start afresh."""
        self._work.forget_optimizer()

    def state_dict(self) -> dict[str, Any]:
        """Return what the training remembers."""
        return self._work.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._work.load_state_dict(state)

    def newcomer(self) -> dict[str, Any]:
        """Return what the training of a newcomer begins with: this one's place in its schedule, and no memory."""
        state = self._work.state_dict()
        return {**state, "optimizer": None} if "optimizer" in state else state

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
