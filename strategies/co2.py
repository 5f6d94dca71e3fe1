"""CO2: local training while the average of the round before is still under way.

Source: Sun et al., 2024, ICLR, arXiv:2401.16265. The average of a round is applied one round late; the staleness-gap
penalty and the clipping of the outer momentum are to keep that harmless. Departures: momentum is in units of
parameters, as in the authors' code, so that the local learning rate does not enter; the clipped value is stored (the
code drops it); the gap is measured against the largest so far, which keeps the penalty in [1, 2].
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedcore.config import Experiment
from fedcore.errors import EmptyRound, InvalidSetting
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Reduced
from fedcore.peers.underway import Underway
from fedcore.strategies.local_sgd import LocalRounds
from fedcore.strategies.settings import check_choice, check_number

PENALTIES, CLIP_MODES = ("none", "gap"), ("value", "norm")
MOST_EMPTY_ROUNDS = 3
# Exposed communication above this share of a round, for so many rounds, is told of once.
EXPOSED_SHARE, EXPOSED_ROUNDS = 0.1, 3


@dataclass(frozen=True)
class Co2State:
    """What all peers hold alike between rounds.

    Attributes:
        params: (d,) x_t, from which all start the next round.
        previous: (d,) x_{t-1}, from which they started the round before.
        momentum: (d,) m, zero at first.
        largest_gap: the largest distance between two consecutive starts so far.
        empty_rounds: rounds in a row without a usable average.
        exposed_rounds: rounds in a row whose communication was not hidden.
    """

    params: Tensor
    previous: Tensor
    momentum: Tensor
    largest_gap: float = 0.0
    empty_rounds: int = 0
    exposed_rounds: int = 0

    @classmethod
    def at(cls, params: Tensor) -> "Co2State":
        """Return the state before the first round."""
        return cls(params, params, torch.zeros_like(params))


def gap_penalty(gap: float, largest_gap: float) -> float:
    """Return 1 + |x_t - x_{t-1}| / the largest such gap so far, in [1, 2]; 1 as long as nothing has moved."""
    return 1.0 + (gap / largest_gap if largest_gap > 0 else 0.0)


def clip(momentum: Tensor, threshold: float | None, mode: str) -> Tensor:
    """Return the momentum with every value (`value`), or its l2 norm (`norm`), no larger than the threshold."""
    if threshold is None:
        return momentum
    if mode == "value":
        return momentum.clamp(-threshold, threshold)
    norm = float(torch.linalg.vector_norm(momentum))
    return momentum * (threshold / norm) if norm > threshold else momentum


def outer_step(
    state: Co2State, moved: Tensor, outer_lr: float, outer_momentum: float, penalty: float | str,
    clip_threshold: float | None, clip_mode: str,
) -> Co2State:
    """Return the state after one round: m <- clip(beta m + d / Lambda); x <- x - alpha m.

    Args:
        moved: (d,) d, what the averaged models moved from where they started, of descent sign.
        outer_lr: alpha, above 0.
        outer_momentum: beta, in [0, 1).
        penalty: Lambda: `none` (1), `gap`, or a constant of at least 1.
    """
    gap = float(torch.linalg.vector_norm(state.params - state.previous))
    largest_gap = max(state.largest_gap, gap)
    if penalty == "gap":
        divisor = gap_penalty(gap, largest_gap)
    else:
        divisor = 1.0 if penalty == "none" else float(penalty)
    momentum = clip(outer_momentum * state.momentum + moved / divisor, clip_threshold, clip_mode)
    params = state.params - outer_lr * momentum
    return replace(state, params=params, previous=state.params, momentum=momentum, largest_gap=largest_gap,
                   empty_rounds=0)


class Co2(LocalRounds):
    """Local training that hides the average of the round before; what it moved is applied one round late.

    Args:
        inner_steps: tau, local optimizer steps per round; communication is hidden where they take longer than it.
        outer_lr: alpha, above 0.
        outer_momentum: beta, in [0, 1).
        penalty: by which a late result is divided: `none`, `gap` (1 to 2, growing with the distance between the last
            two starts), or a number of at least 1.
        clip_threshold: largest momentum, in units of parameters; null: no limit.
        clip_mode: `value` clips each value, `norm` the l2 norm.
        delay: rounds by which an average is late: 1; or 0, which waits for it and is SlowMo.
        averaging: `uniform`, or `samples`: weighted by each peer's number of training examples.
        inner_state: `keep` or `reset` the local optimizer's memory every round.
    """

    def __init__(
        self, inner_steps: int = 12, outer_lr: float = 1.0, outer_momentum: float = 0.2,
        penalty: float | Literal["none", "gap"] = "gap", clip_threshold: float | None = None, clip_mode: str = "value",
        delay: int = 1, averaging: str = "uniform", inner_state: str = "keep",
    ):
        super().__init__(inner_steps, averaging, inner_state)
        check_number("outer_lr", outer_lr, above=0)
        check_number("outer_momentum", outer_momentum, at_least=0, below=1)
        if isinstance(penalty, str):
            check_choice("penalty", penalty, PENALTIES, "Or a number of at least 1.")
        else:
            check_number("penalty", penalty, at_least=1, advice="Or one of none, gap.")
        if clip_threshold is not None:
            check_number("clip_threshold", clip_threshold, above=0, advice="Leave it out for no limit.")
        check_choice("clip_mode", clip_mode, CLIP_MODES)
        if delay not in (0, 1) or isinstance(delay, bool):
            raise InvalidSetting("delay", delay, "0 or 1")
        self.outer_lr, self.outer_momentum, self.penalty = outer_lr, outer_momentum, penalty
        self.clip_threshold, self.clip_mode, self.delay = clip_threshold, clip_mode, delay

    def doubts(self, experiment: Experiment) -> list[str]:
        """Warn of settings with which a stiff problem diverges."""
        largest = {"none": 1.0, "gap": 2.0}.get(str(self.penalty)) or float(self.penalty)
        if self.delay and self.clip_threshold is None and self.outer_lr / largest >= 1 - self.outer_momentum:
            return [f"strategy.outer_lr={self.outer_lr:g} with outer_momentum={self.outer_momentum:g} can diverge "
                    "where a round's local steps reach the optimum of some direction: late averages are stable only "
                    f"while outer_lr / {largest:g} < 1 - outer_momentum. Lower it, or set strategy.clip_threshold."]
        return []

    async def run(self, peer: Peer) -> None:
        """Train while the average of the round before is under way, then apply it."""
        state = peer.restore(Co2State) or Co2State.at(peer.params)
        async for step in peer.steps():
            began, computed = peer.now, peer.counters.compute_s
            await self.train(peer)
            trained = peer.params
            if self.delay == 0:
                state = self._apply(state, state.params, await self._mean(peer, trained, state))
            else:
                earlier = peer.reduction(round=step - 1)
                late = None if earlier is None else await earlier
                state = replace(state, exposed_rounds=self._exposed_rounds(peer, state, began, computed))
                self._mean(peer, trained, state)
                # The first round has nothing to apply yet: rounds 0 and 1 begin at the same point.
                state = replace(state, previous=state.params) if late is None else (
                    self._apply(state, state.previous, late))
            peer.params = state.params
            await peer.safe_point(state)
        last = peer.reduction(round=peer.step)
        if last is not None:
            peer.params = self._apply(state, state.previous, await last).params

    def _mean(self, peer: Peer, trained: Tensor, state: Co2State) -> Underway:
        return peer.all_reduce(trained, weight=self.weight_of(peer), base=state.params)

    def _apply(self, state: Co2State, started: Tensor, late: Reduced) -> Co2State:
        """Make the outer step with an average; `started` is where its round began."""
        moved = started - late.mean if late.contributors else torch.zeros_like(started)
        if not late.contributors or not bool(moved.isfinite().all()):
            if state.empty_rounds + 1 >= MOST_EMPTY_ROUNDS:
                raise EmptyRound(f"{MOST_EMPTY_ROUNDS} rounds in a row had no usable average: nobody's model was "
                                 "finite. Lower train.lr, or strategy.outer_lr.")
            moved = torch.zeros_like(started)
            return replace(self._outer_step(state, moved), empty_rounds=state.empty_rounds + 1)
        return self._outer_step(state, moved)

    def _outer_step(self, state: Co2State, moved: Tensor) -> Co2State:
        return outer_step(state, moved, self.outer_lr, self.outer_momentum, self.penalty, self.clip_threshold,
                          self.clip_mode)

    def _exposed_rounds(self, peer: Peer, state: Co2State, began: float, computed: float) -> int:
        """Return how many rounds in a row had to wait for communication; one peer says what would hide it.

        Args:
            began: when this round began, seconds.
            computed: how long the peer had computed by then, seconds.
        """
        spent, computing = peer.now - began, peer.counters.compute_s - computed
        if spent - computing <= EXPOSED_SHARE * spent:
            return 0
        if state.exposed_rounds + 1 == EXPOSED_ROUNDS and peer.rank == peer.members[0] and computing > 0:
            peer.log(exposed_share=(spent - computing) / spent,
                     advised_inner_steps=math.ceil(self.inner_steps * spent / computing))
        return state.exposed_rounds + 1
