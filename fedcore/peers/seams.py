"""What a peer stands on: the two engines, virtual and deployed, each bring their own of these."""
import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from fedcore.peers.envelope import Envelope

if TYPE_CHECKING:
    from fedcore.peers.packing import Packed
    from fedcore.peers.peer import Peer


@dataclass(frozen=True)
class Membership:
    """Who takes part from some step on.

    Attributes:
        epoch: counts the changes.
        members: ranks in ascending order.
    """

    epoch: int
    members: tuple[int, ...]


class Trained(NamedTuple):
    """What local training made of a model.

    Attributes:
        params: shape (d,); a new tensor.
        loss: mean training loss over the steps.
    """

    params: Tensor
    buffers: Mapping[str, Tensor]
    loss: float


class Reduced(NamedTuple):
    """What an all-reduce gave; the same bits on all members.

    Attributes:
        mean: weighted mean of the contributions, shape of a contribution.
        contributors: ranks whose vectors are in it, ascending.
    """

    mean: Tensor
    contributors: tuple[int, ...]


class PeerWork(Protocol):
    """What one peer computes. All of it follows from the inputs, the seed and how often it was asked before."""

    num_examples: int

    def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained: ...

    def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]: ...

    def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]: ...

    def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor: ...

    def forget_optimizer(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Labour(Protocol):
    """A peer's own computing, on its own data; work takes time, and leaves its inputs as they are."""

    async def train(self, params: Tensor, buffers: Mapping[str, Tensor], steps: int) -> Trained:
        """Make so many optimizer steps; the optimizer keeps its state from call to call."""

    async def gradient(self, params: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """Return the gradient of the next batch, shape (d,), and its loss."""

    async def displacement(
        self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor | None
    ) -> tuple[Tensor, float]:
        """Return what the optimizer's next step would subtract, and the batch's loss (NaN with a given gradient)."""

    async def descend(self, params: Tensor, buffers: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """Return what the optimizer's next step with a given gradient makes of a model, shape (d,)."""

    def forget_optimizer(self) -> None:
        """Let the optimizer start afresh."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Wire(Protocol):
    """Carries messages between peers."""

    def post(self, to: int, envelope: Envelope) -> "asyncio.Future[bool]":
        """Send a message; the future becomes True when it was delivered, False when it never will be."""

    def all_reduce(
        self, peer: "Peer", vector: "Tensor | Packed", tag: str, round: int, weight: float, began: float
    ) -> "asyncio.Future[Reduced]":
        """Contribute to a mean over all members; `began` is when the peer did, also where that was before a restart."""

    def observe(self, peer: "Peer", tag: str, round: int) -> "asyncio.Future[Reduced]":
        """Return the result of a reduction to which a newcomer does not contribute."""

    def state_dict(self, rank: int) -> dict[str, Any]:
        """Return what the links of one peer must remember."""

    def load_state_dict(self, rank: int, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class Board(Protocol):
    """Where peers learn who takes part and when to stop, and where they leave their checkpoints."""

    @property
    def now(self) -> float:
        """Seconds on the run's clock."""

    @property
    def ends_at(self) -> float:
        """When the present step ends, for strategies that stop by time; infinity for the others."""

    async def sleep_until(self, rank: int, at: float) -> None:
        """Wait for a moment of the run's clock."""

    async def begin(self, peer: "Peer", step: int) -> Membership | None:
        """Return who takes part in a step; None when the run ends before it."""

    async def report(self, peer: "Peer", state: Callable[[], Any]) -> None:
        """Take note that a peer has finished its step; a checkpoint may be taken of it.

        For strategies that stop by time this waits until all peers have come so far and their meetings are settled;
        `state` is called then.
        """

    def log(self, peer: "Peer", figures: Mapping[str, Any]) -> None:
        """Write figures of a peer into the run's metrics."""
