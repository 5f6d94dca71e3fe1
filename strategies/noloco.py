"""NoLoCo: local training, then a momentum step with one random partner instead of an all-reduce over everybody.

Source: Kolehmainen et al., 2025, arXiv:2506.10911, the modified Nesterov update; without pipeline stages, so that its
random routing is empty. As in the authors' code the momentum is heavy-ball, without look-ahead.
"""
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedcore.config import Experiment
from fedcore.errors import InvalidSetting
from fedcore.peers.groups import group_of
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy
from fedcore.strategies.settings import check_count, check_number, check_switch

SLOW, MOVED = "slow", "moved"
CALM_MOMENTUM = 0.8


@dataclass(frozen=True)
class PeerState:
    """What a peer carries from step to step.

    Attributes:
        slow_params: (d,) phi_i, the model at the last outer step.
        momentum: (d,) delta_i, a displacement, zero at first.
    """

    slow_params: Tensor
    momentum: Tensor

    @classmethod
    def at(cls, params: Tensor) -> "PeerState":
        """Return the state of a peer that has not moved yet."""
        return cls(params, torch.zeros_like(params))


def offer(state: PeerState, params: Tensor) -> dict[str, Tensor]:
    """Return what a peer sends to its group: phi and Delta = phi - theta, each of shape (d,)."""
    return {SLOW: state.slow_params, MOVED: state.slow_params - params}


def outer_step(
    state: PeerState, offers: Mapping[int, Mapping[str, Tensor]], outer_lr: float, outer_momentum: float,
    gossip_lr: float,
) -> PeerState:
    """Advance one outer step.

    delta <- alpha delta - beta mean(Delta) - gamma (phi - mean(phi)); phi <- phi + delta. A peer that is alone makes a
    heavy-ball step on its own Delta.

    Args:
        offers: by rank, ascending, the peer's own included; sums run in this order, so that all members of a group
            compute the same means.
        outer_lr: beta, above 0.
        outer_momentum: alpha, in [0, 1).
        gossip_lr: gamma, the pull towards the group's mean.

    Source: Kolehmainen et al., 2025, arXiv:2506.10911, modified Nesterov momentum.
    """
    mean_moved = _mean([sent[MOVED] for sent in offers.values()])
    momentum = outer_momentum * state.momentum - outer_lr * mean_moved
    if len(offers) > 1:
        momentum = momentum - gossip_lr * (state.slow_params - _mean([sent[SLOW] for sent in offers.values()]))
    return replace(state, slow_params=state.slow_params + momentum, momentum=momentum)


def _mean(vectors: list[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total / len(vectors)


def largest_gossip_lr(outer_momentum: float, group_size: int, count: int) -> float:
    """Return the bound below which disagreement decays in mean square when nobody trains.

    gamma_max = 2 (1 - alpha^2) / (1 + alpha - 2 alpha q), with q = (n - 1) / n * N / (N - 1): there the spectral radius
    of the recursion of (E|x|^2, E<x, delta>, E|delta|^2) is 1, x being a peer's distance from the mean.
    """
    agreement = (group_size - 1) / group_size * count / (count - 1)
    return 2 * (1 - outer_momentum**2) / (1 + outer_momentum - 2 * outer_momentum * agreement)


class NoLoCo(PeerStrategy):
    """Low-communication training without a collective operation: one random partner per outer step.

    Args:
        inner_steps: H, local optimizer steps between exchanges, at least 1.
        group_size: n, peers that average together, from 2 to the number of peers (all: DiLoCo). Peers that do not fill
            a group step alone.
        outer_lr: beta, above 0.
        outer_momentum: alpha, in [0, 1).
        gossip_lr: gamma, the pull towards the group's mean; None: as `outer_lr`. Above 0, and below a bound that
            follows from the other settings.
        pair_timeout_s: partners that have not answered, and acknowledged, after so long are left out; None waits for
            all that live.
        allow_no_consensus: accept gossip_lr=0, with which peers drift apart.
    """

    def __init__(
        self, inner_steps: int = 50, group_size: int = 2, outer_lr: float = 0.7, outer_momentum: float = 0.5,
        gossip_lr: float | None = None, pair_timeout_s: float | None = None, allow_no_consensus: bool = False,
    ):
        check_count("inner_steps", inner_steps, 1)
        check_count("group_size", group_size, 2)
        check_number("outer_lr", outer_lr, above=0)
        check_number("outer_momentum", outer_momentum, at_least=0, below=1)
        check_switch("allow_no_consensus", allow_no_consensus)
        gossip_lr = outer_lr if gossip_lr is None else gossip_lr
        check_number("gossip_lr", gossip_lr, at_least=0)
        if gossip_lr == 0 and not allow_no_consensus:
            raise InvalidSetting("gossip_lr", gossip_lr, "above 0",
                                 "Without a pull peers drift apart. If that is wanted: allow_no_consensus: true.")
        if pair_timeout_s is not None:
            check_number("pair_timeout_s", pair_timeout_s, above=0)
        self.inner_steps, self.group_size, self.outer_lr = inner_steps, group_size, outer_lr
        self.outer_momentum, self.gossip_lr, self.pair_timeout_s = outer_momentum, gossip_lr, pair_timeout_s

    def check_clients(self, count: int) -> None:
        """Refuse groups larger than the run, and a pull that lets disagreement grow.

        Raises:
            InvalidSetting: with the bound.
        """
        if self.group_size > count:
            raise InvalidSetting("group_size", self.group_size, f"from 2 to the number of peers, {count}")
        bound = largest_gossip_lr(self.outer_momentum, self.group_size, count)
        if self.gossip_lr >= bound:
            raise InvalidSetting(
                "gossip_lr", self.gossip_lr, f"below {bound:.4g}",
                f"With outer_momentum={self.outer_momentum:g} and groups of {self.group_size} of {count} peers a "
                "stronger pull makes them disagree more and more.")

    def doubts(self, experiment: Experiment) -> list[str]:
        """Warn of settings that work less well than they could."""
        found = []
        if self.outer_lr > 1:
            found.append(f"strategy.outer_lr={self.outer_lr:g} is above 1: each step goes further than training did.")
        if self.outer_momentum > CALM_MOMENTUM:
            found.append(f"strategy.outer_momentum={self.outer_momentum:g} leaves little room for strategy.gossip_lr.")
        if 0 < self.gossip_lr < self.outer_momentum:
            found.append(f"strategy.gossip_lr={self.gossip_lr:g} is below outer_momentum={self.outer_momentum:g}: "
                         "peers agree slowly.")
        if experiment.train.schedule in (None, "constant"):
            found.append("With a constant learning rate peers keep a constant distance from each other; one that "
                         "falls, such as train.schedule: {name: cosine, ...}, lets them agree.")
        return found

    async def run(self, peer: Peer) -> None:
        """Train, exchange with the group of this step, make the outer step."""
        state = peer.restore(PeerState) or PeerState.at(peer.params)
        async for step in peer.steps():
            await peer.train(self.inner_steps)
            group = group_of(peer.rank, peer.members, self.group_size, peer.seed, step)
            offers: Any = await peer.exchange(group, offer(state, peer.params), timeout_s=self.pair_timeout_s)
            state = outer_step(state, offers, self.outer_lr, self.outer_momentum, self.gossip_lr)
            peer.params = state.slow_params
            await peer.safe_point(state)

    def newcomer(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Start from a living peer's slow weights, at rest."""
        return {**state, "momentum": torch.zeros_like(state["slow_params"])}
