"""NoLoCo: local training, then a momentum step with one random partner instead of an all-reduce over everybody.

Source: Kolehmainen et al., 2025, arXiv:2506.10911, the modified Nesterov update; without pipeline stages, so that its
random routing is empty. As in the authors' code the momentum is heavy-ball, without look-ahead.

With the experiment's section `compression`, Delta travels compressed, with error feedback; everybody, its sender too,
goes on with what the payload holds. Partners that meet once have no common copy of phi to send differences to: of phi
some random coordinates travel, drawn alike by all and as many as the payload of Delta has room for, and the pull acts
on these. A group's pulls still add up to nothing; peers agree more slowly.
"""
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedcore.compressed import TRIAL_SHAPE, Compression
from fedcore.compression.base import Codec
from fedcore.config import Experiment
from fedcore.errors import InvalidSetting, MalformedPayload
from fedcore.peers.groups import group_of
from fedcore.peers.packing import Packing
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy
from fedcore.seeds import torch_generator
from fedcore.strategies.early_offers import MOVED, SLOW, EarlyOffers
from fedcore.strategies.settings import check_count, check_number, check_switch

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


def packed_offer(
    packing: Packing, state: PeerState, params: Tensor, chosen: Tensor, step: int
) -> dict[str, Tensor]:
    """Return what a peer sends to its group with compression: some of phi, shape (k,), and Delta as bytes."""
    return {SLOW: state.slow_params[chosen], MOVED: packing.pack(state.slow_params - params, MOVED, step)}


def opened(peer: Peer, codec: Codec, offers: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Return what members of a group sent, with Delta as a vector again; what cannot be read is left out."""
    found = {}
    for rank, sent in offers.items():
        try:
            if sent.keys() != {SLOW, MOVED} or sent[SLOW].shape != (room_for(codec),) or (
                    sent[SLOW].dtype != codec.dtype):
                raise MalformedPayload("an offer does not hold what it must")
            found[rank] = {SLOW: sent[SLOW], MOVED: codec.decode(sent[MOVED])}
        except MalformedPayload as error:
            peer.refuse(rank, str(error), MOVED)
    return found


def outer_step(
    state: PeerState, offers: Mapping[int, Mapping[str, Tensor]], outer_lr: float, outer_momentum: float,
    gossip_lr: float, chosen: Tensor | None = None,
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
        chosen: the coordinates of phi that were sent; None: all.

    Source: Kolehmainen et al., 2025, arXiv:2506.10911, modified Nesterov momentum.
    """
    mean_moved = _mean([sent[MOVED] for sent in offers.values()])
    momentum = outer_momentum * state.momentum - outer_lr * mean_moved
    if len(offers) > 1:
        mean_slow = _mean([sent[SLOW] for sent in offers.values()])
        if chosen is None:
            apart = state.slow_params - mean_slow
        else:
            apart = torch.zeros_like(momentum)
            apart[chosen] = state.slow_params[chosen] - mean_slow
        momentum = momentum - gossip_lr * apart
    return replace(state, slow_params=state.slow_params + momentum, momentum=momentum)


def _mean(vectors: list[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total / len(vectors)


@lru_cache(maxsize=4)
def coordinates(size: int, count: int, seed: int, step: int) -> Tensor:
    """Return which coordinates of phi travel at a step, the same at all peers: ascending, shape (count,)."""
    order = torch.randperm(size, generator=torch_generator(seed, "coordinates", step))
    return order[:count].sort().values


def drawn(peer: Peer) -> Tensor | None:
    """Return the coordinates of phi that travel at the present step; None: all, without compression."""
    if peer.packing is None:
        return None
    codec = peer.packing.codec
    return coordinates(codec.num_values, room_for(codec), peer.seed, peer.step)


def room_for(codec: Codec) -> int:
    """Return how many values a payload has room for, at least 1."""
    return max(1, min(codec.num_values, codec.num_bytes // codec.dtype.itemsize))


def largest_gossip_lr(outer_momentum: float, group_size: int, count: int, share: float = 1.0) -> float:
    """Return the bound below which disagreement decays in mean square when nobody trains.

    gamma_max = 2 (1 - alpha^2) / (1 + alpha - 2 alpha q), with q = p (n - 1) / n * N / (N - 1): there the spectral
    radius of the recursion of (E|x|^2, E<x, delta>, E|delta|^2) is 1, x being a peer's distance from the mean.

    Args:
        share: p, of the coordinates that are pulled, drawn anew at every step.
    """
    agreement = share * (group_size - 1) / group_size * count / (count - 1)
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
        early_sending: send phi before training, while the links are idle, and only Delta after it. Both belong to the
            same outer step, so the result is the same.
    """

    no_compression = ""

    def __init__(
        self, inner_steps: int = 50, group_size: int = 2, outer_lr: float = 0.7, outer_momentum: float = 0.5,
        gossip_lr: float | None = None, pair_timeout_s: float | None = None, allow_no_consensus: bool = False,
        early_sending: bool = False,
    ):
        check_count("inner_steps", inner_steps, 1)
        check_count("group_size", group_size, 2)
        check_number("outer_lr", outer_lr, above=0)
        check_number("outer_momentum", outer_momentum, at_least=0, below=1)
        check_switch("allow_no_consensus", allow_no_consensus)
        check_switch("early_sending", early_sending)
        gossip_lr = outer_lr if gossip_lr is None else gossip_lr
        check_number("gossip_lr", gossip_lr, at_least=0)
        if gossip_lr == 0 and not allow_no_consensus:
            raise InvalidSetting("gossip_lr", gossip_lr, "above 0",
                                 "Without a pull peers drift apart. If that is wanted: allow_no_consensus: true.")
        if pair_timeout_s is not None:
            check_number("pair_timeout_s", pair_timeout_s, above=0)
        self.inner_steps, self.group_size, self.outer_lr = inner_steps, group_size, outer_lr
        self.outer_momentum, self.gossip_lr, self.pair_timeout_s = outer_momentum, gossip_lr, pair_timeout_s
        self.early_sending = early_sending

    def check_clients(self, count: int) -> None:
        """Refuse groups larger than the run, and a pull that lets disagreement grow.

        Raises:
            InvalidSetting: with the bound.
        """
        if self.group_size > count:
            raise InvalidSetting("group_size", self.group_size, f"from 2 to the number of peers, {count}")
        self._check_pull(count, 1.0)

    def check_compression(self, settings: str | Mapping[str, Any], count: int) -> None:
        """Refuse a pull that lets disagreement grow where it acts on few coordinates at a time.

        Raises:
            InvalidSetting: with the bound.
        """
        trial = Compression.of(settings).compressor.codec([TRIAL_SHAPE], torch.float32)
        try:
            self._check_pull(count, room_for(trial) / trial.num_values)
        except InvalidSetting as error:
            raise error.under("strategy") from error

    def _check_pull(self, count: int, share: float) -> None:
        bound = largest_gossip_lr(self.outer_momentum, self.group_size, count, share)
        if self.gossip_lr >= bound:
            raise InvalidSetting(
                "gossip_lr", self.gossip_lr, f"below {bound:.4g}",
                f"With outer_momentum={self.outer_momentum:g} and groups of {self.group_size} of {count} peers "
                f"{'and compression ' if share < 1 else ''}a stronger pull makes them disagree more and more.")

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
            group = group_of(peer.rank, peer.members, self.group_size, peer.seed, step)
            chosen = drawn(peer)
            early = None
            if self.early_sending:
                slow = state.slow_params if chosen is None else state.slow_params[chosen]
                early = EarlyOffers(peer, group, slow)
            await peer.train(self.inner_steps)
            if chosen is None or peer.packing is None:
                sent = offer(state, peer.params)
            else:
                sent = packed_offer(peer.packing, state, peer.params, chosen, step)
            if early is None:
                offers: Any = await peer.exchange(group, sent, timeout_s=self.pair_timeout_s)
            else:
                offers = await early.exchange(sent, self.pair_timeout_s)
            if peer.packing is not None:
                offers = opened(peer, peer.packing.codec, offers)
            state = outer_step(state, offers, self.outer_lr, self.outer_momentum, self.gossip_lr, chosen)
            peer.params = state.slow_params
            await peer.safe_point(state)

    def newcomer(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Start from a living peer's slow weights, at rest."""
        return {**state, "momentum": torch.zeros_like(state["slow_params"])}
