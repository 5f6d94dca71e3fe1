"""Private baselines: full gradients every round (DP-GD), of a sample (DP-SGD), and with recursive momentum (DP-SRM).

Source: DP-GD and DP-SGD: Abadi et al., 2016, arXiv:1607.00133, algorithm 1, with one step a round whose sum runs over
all clients; DP-SRM: the estimator of Cutkosky and Orabona, 2019 (STORM), arXiv:1905.10018,

    v <- g(x) + (1 - a)(v - g(x'))

with a clip(g(x), C1) + (1 - a) clip(g(x) - g(x'), C2 |x - x'|) of every record, noised. a = 1 is DP-GD; a = 0 is DIFF2
with a single full round.
"""
from fedcore.errors import InvalidSetting
from fedcore.privacy.mechanism import ADD_REMOVE
from fedcore.strategies.private import PrivateRounds
from fedcore.strategies.private_plan import Schedule
from fedcore.strategies.settings import check_number


class DpGd(PrivateRounds):
    """Every round the clipped and noised gradient of all records.

    Args:
        epsilon: largest epsilon of the whole run, for every single record; or give `noise_multiplier`.
        delta: below one over the number of records.
        noise_multiplier: z of every release, instead of an epsilon.
        rounds: R; without it, as many as the run has (`stop.rounds`). The noise grows with its root.
        clip_gradient: C1, largest norm of a record's gradient.
        server_lr: eta, the step size.
        noise_mode: `local`, every client adds noise for itself; `central`, the server does, and sees vectors without.
        neighbouring: `replace-one` or `add-remove` one record.
    """

    def __init__(
        self, epsilon: float | None = None, delta: float = 1e-5, noise_multiplier: float | None = None,
        rounds: int | None = None, clip_gradient: float = 1.0, server_lr: float = 0.1, noise_mode: str = "local",
        neighbouring: str = "replace-one",
    ):
        super().__init__(Schedule(), epsilon, noise_multiplier, delta, rounds, clip_gradient, 1.0, server_lr,
                         noise_mode, neighbouring)


class DpSgd(PrivateRounds):
    """Every round the clipped and noised gradient of a secret sample: each record takes part with the sample rate.

    Args:
        epsilon: largest epsilon of the whole run, for every single record; or give `noise_multiplier`.
        delta: below one over the number of records.
        noise_multiplier: z of every release, instead of an epsilon.
        rounds: R; without it, as many as the run has (`stop.rounds`).
        sample_rate: q, in (0, 1]; each record is drawn on its own, so that the sample's size varies.
        clip_gradient: C1, largest norm of a record's gradient.
        server_lr: eta, the step size.
        noise_mode: `local`, every client adds noise for itself; `central`, the server does, and sees vectors without.
        neighbouring: `add-remove`; `replace-one` only where every record takes part.
    """

    def __init__(
        self, epsilon: float | None = None, delta: float = 1e-5, noise_multiplier: float | None = None,
        rounds: int | None = None, sample_rate: float = 0.1, clip_gradient: float = 1.0, server_lr: float = 0.1,
        noise_mode: str = "local", neighbouring: str = "add-remove",
    ):
        check_number("sample_rate", sample_rate, above=0, at_most=1)
        if sample_rate < 1 and neighbouring != ADD_REMOVE:
            raise InvalidSetting("neighbouring", neighbouring, f"{ADD_REMOVE} where records are sampled",
                                 "The accounting of samples is for a record that is there or not.")
        super().__init__(Schedule(sample_rate=float(sample_rate)), epsilon, noise_multiplier, delta, rounds,
                         clip_gradient, 1.0, server_lr, noise_mode, neighbouring)


class DpSrm(PrivateRounds):
    """Recursive momentum: every round a noised mixture of gradients and gradient differences.

    Args:
        epsilon: largest epsilon of the whole run, for every single record; or give `noise_multiplier`.
        delta: below one over the number of records.
        noise_multiplier: z of every release, instead of an epsilon.
        rounds: R; without it, as many as the run has (`stop.rounds`).
        gradient_weight: a, in [0, 1]; 1 is DP-GD, 0 takes one full gradient and differences from then on.
        clip_gradient: C1, largest norm of a record's gradient.
        clip_difference: C2, largest norm of a record's gradient difference over the distance of the two points.
        server_lr: eta, the step size.
        noise_mode: `local`, every client adds noise for itself; `central`, the server does, and sees vectors without.
        neighbouring: `replace-one` or `add-remove` one record.
    """

    def __init__(
        self, epsilon: float | None = None, delta: float = 1e-5, noise_multiplier: float | None = None,
        rounds: int | None = None, gradient_weight: float = 0.1, clip_gradient: float = 1.0,
        clip_difference: float = 3.0, server_lr: float = 0.1, noise_mode: str = "local",
        neighbouring: str = "replace-one",
    ):
        check_number("gradient_weight", gradient_weight, at_least=0, at_most=1)
        super().__init__(Schedule(None, float(gradient_weight)), epsilon, noise_multiplier, delta, rounds,
                         clip_gradient, clip_difference, server_lr, noise_mode, neighbouring)
