"""Local SGD and SlowMo: local training, an average over everybody, and a momentum step on what it moved.

Source: Stich, 2019, arXiv:1805.09767 (Local SGD); Wang et al., 2020, arXiv:1910.00643, Algorithm 1 (SlowMo).
"""
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy
from fedcore.strategies.settings import check_choice, check_count, check_number

AVERAGING, INNER_STATES = ("uniform", "samples"), ("keep", "reset")


@dataclass(frozen=True)
class OuterState:
    """What all peers hold alike between rounds.

    Attributes:
        params: (d,) x, from which all start the next round.
        momentum: (d,) m, zero at first.
    """

    params: Tensor
    momentum: Tensor

    @classmethod
    def at(cls, params: Tensor) -> "OuterState":
        """Return the state before the first round."""
        return cls(params, torch.zeros_like(params))


def slow_momentum_step(state: OuterState, moved: Tensor, outer_lr: float, outer_momentum: float) -> OuterState:
    """Return the state after one round of SlowMo: m <- mu m + d; x <- x - eta m.

    The paper divides d by the local learning rate and multiplies it in again; that is the same where the rate does not
    change, and here there is no division by a rate that a schedule lets fall to zero.

    Args:
        moved: (d,) d = x - mean of the local models, of descent sign.
    """
    momentum = outer_momentum * state.momentum + moved
    return replace(state, params=state.params - outer_lr * momentum, momentum=momentum)


class LocalRounds(PeerStrategy):
    """Rounds of local training, whose results are averaged over everybody.

    Args:
        inner_steps: H, local optimizer steps per round, at least 1.
        averaging: `uniform`, or `samples`: weighted by each peer's number of training examples.
        inner_state: `keep` the local optimizer's memory from round to round, or `reset` it; it is never sent.
    """

    no_compression = ""

    def __init__(self, inner_steps: int, averaging: str, inner_state: str):
        check_count("inner_steps", inner_steps, 1)
        check_choice("averaging", averaging, AVERAGING)
        check_choice("inner_state", inner_state, INNER_STATES)
        self.inner_steps, self.averaging, self.inner_state = inner_steps, averaging, inner_state

    async def train(self, peer: Peer) -> None:
        """Make a round's local steps."""
        if self.inner_state == "reset":
            peer.forget_optimizer()
        await peer.train(self.inner_steps)

    def weight_of(self, peer: Peer) -> float:
        """Return a peer's weight in the average."""
        return float(peer.num_examples) if self.averaging == "samples" else 1.0


class AveragingStrategy(LocalRounds):
    """Rounds that wait for the average; what is made of it is up to the derived class."""

    @abstractmethod
    def outer_step(self, state: OuterState, mean_params: Tensor) -> OuterState:
        """Return the state after a round in which the local models have a given mean, shape (d,)."""

    async def run(self, peer: Peer) -> None:
        """Train, average with everybody, make the outer step."""
        state = peer.restore(OuterState) or OuterState.at(peer.params)
        async for _ in peer.steps():
            await self.train(peer)
            mean_params, contributors = await peer.all_reduce(
                peer.params, weight=self.weight_of(peer), base=state.params)
            if contributors:    # else nobody had a usable model, and all start again from the old one
                state = self.outer_step(state, mean_params)
            peer.params = state.params
            await peer.safe_point(state)


class LocalSgd(AveragingStrategy):
    """Local training, then the plain average of everybody's model: federated averaging without a server.

    Args:
        inner_steps: local optimizer steps between averages, at least 1.
        averaging: `uniform`, or `samples`: weighted by each peer's number of training examples.
        inner_state: `keep` or `reset` the local optimizer's memory at every average.
    """

    def __init__(self, inner_steps: int = 12, averaging: str = "uniform", inner_state: str = "keep"):
        super().__init__(inner_steps, averaging, inner_state)

    def outer_step(self, state: OuterState, mean_params: Tensor) -> OuterState:
        """Go on from the average."""
        return replace(state, params=mean_params)


class SlowMo(AveragingStrategy):
    """Local training, then a step with slow momentum on what the average moved.

    Args:
        inner_steps: local optimizer steps between averages, at least 1.
        outer_lr: eta, above 0.
        outer_momentum: mu, in [0, 1); 0 with outer_lr=1 is Local SGD.
        averaging: `uniform`, or `samples`: weighted by each peer's number of training examples.
        inner_state: `keep` or `reset` the local optimizer's memory at every average.
    """

    def __init__(
        self, inner_steps: int = 48, outer_lr: float = 1.0, outer_momentum: float = 0.5, averaging: str = "uniform",
        inner_state: str = "keep",
    ):
        super().__init__(inner_steps, averaging, inner_state)
        check_number("outer_lr", outer_lr, above=0)
        check_number("outer_momentum", outer_momentum, at_least=0, below=1)
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum

    def outer_step(self, state: OuterState, mean_params: Tensor) -> OuterState:
        """Make a step of slow momentum."""
        return slow_momentum_step(state, state.params - mean_params, self.outer_lr, self.outer_momentum)
