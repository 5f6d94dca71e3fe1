"""DiLoCo: many local steps, then one step of momentum SGD on the average of what they moved.

Source: Douillard et al., 2023, arXiv:2311.08105, Algorithm 1, with Nesterov momentum; the heavy-ball form is the one
that the code of NoLoCo (arXiv:2506.10911) compares with.
"""
from dataclasses import replace

from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.strategies.local_sgd import AveragingStrategy, OuterState
from fedcore.strategies.settings import check_number, check_switch


def nesterov_step(state: OuterState, moved: Tensor, outer_lr: float, outer_momentum: float) -> OuterState:
    """Return the state after one round: m <- mu m + d; x <- x - eta (d + mu m), as torch.optim.SGD with nesterov.

    Args:
        moved: (d,) d = x - mean of the local models, of descent sign.
    """
    momentum = outer_momentum * state.momentum + moved
    return replace(state, params=state.params - outer_lr * (moved + outer_momentum * momentum), momentum=momentum)


def heavy_ball_step(state: OuterState, moved: Tensor, outer_lr: float, outer_momentum: float) -> OuterState:
    """Return the state after one round: m <- mu m - eta d; x <- x + m.

    Args:
        moved: (d,) d = x - mean of the local models, of descent sign.
    """
    momentum = outer_momentum * state.momentum - outer_lr * moved
    return replace(state, params=state.params + momentum, momentum=momentum)


class DiLoCo(AveragingStrategy):
    """Many local steps, then one momentum step on the average of what everybody's model moved.

    Args:
        inner_steps: H, local optimizer steps between averages, at least 1.
        outer_lr: eta, above 0.
        outer_momentum: mu, in [0, 1).
        nesterov: look ahead, as published; false: heavy ball.
        averaging: `uniform`, or `samples`: weighted by each peer's number of training examples.
        inner_state: `keep` or `reset` the local optimizer's memory at every average.
    """

    def __init__(
        self, inner_steps: int = 50, outer_lr: float = 0.7, outer_momentum: float = 0.9, nesterov: bool = True,
        averaging: str = "uniform", inner_state: str = "keep",
    ):
        super().__init__(inner_steps, averaging, inner_state)
        check_number("outer_lr", outer_lr, above=0)
        check_number("outer_momentum", outer_momentum, at_least=0, below=1)
        check_switch("nesterov", nesterov)
        if nesterov and outer_momentum == 0:
            raise InvalidSetting("nesterov", nesterov, "false when outer_momentum is 0",
                                 "There is no momentum to look ahead with.")
        self.outer_lr, self.outer_momentum, self.nesterov = outer_lr, outer_momentum, nesterov

    def outer_step(self, state: OuterState, mean_params: Tensor) -> OuterState:
        """Make a momentum step, of the form that was chosen."""
        step = nesterov_step if self.nesterov else heavy_ball_step
        return step(state, state.params - mean_params, self.outer_lr, self.outer_momentum)
