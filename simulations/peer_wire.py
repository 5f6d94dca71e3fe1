"""Messages between peers in virtual time."""
import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcore.peers.envelope import ALONE, Envelope, is_finite, payload_bytes
from fedcore.peers.packing import Packed
from fedcore.peers.peer import Peer
from fedcore.peers.ring import chunk_bounds, ring_bytes, ring_sum, ring_times
from fedcore.peers.seams import Reduced
from fedcore.seeds import derive_seed
from fedcore.simulations.availability import Availability
from fedcore.simulations.failures import Failures
from fedcore.simulations.loop import VirtualLoop
from fedcore.simulations.network import Network


@dataclass(slots=True, eq=False)
class Contribution:
    """What a member brought to a reduction, and when."""

    vector: Tensor | Packed
    weight: float
    began: float
    future: "asyncio.Future[Reduced]"


@dataclass(slots=True, eq=False)
class Reduction:
    """A mean over all members that is under way."""

    epoch: int
    members: tuple[int, ...]
    places: dict[int, int]    # by rank
    contributions: dict[int, Contribution]


class VirtualWire:
    """Links with latency and bandwidth per node; a node sends one message after another, and all of them arrive.

    A message that reaches a node while it is offline waits until it is back, unless the node is lost meanwhile.
    Messages are lost only where the failures of the simulation say so: then neither end ever hears of them.

    Args:
        num_nodes: ranks are below it.
        availability: None: all nodes are always online.
    """

    def __init__(
        self, loop: VirtualLoop, network: Network, num_nodes: int, availability: Availability | None = None,
        failures: Failures | None = None,
    ):
        self._loop, self._network, self._num_nodes = loop, network, num_nodes
        self._availability, self._failures = availability, failures
        self.peers: dict[int, Peer] = {}
        self.lost_until: dict[int, float] = {}      # by rank: the last epoch in which it is lost; infinity: it is away
        self._sent: dict[int, int] = {}             # messages by sender
        self._uplink_free: dict[int, float] = {}
        self._held_up: dict[int, list[tuple[asyncio.Future[bool], Any]]] = {}    # by receiver that is offline
        self._reductions: dict[tuple[str, int], Reduction] = {}
        self._finished: dict[str, tuple[int, Reduced]] = {}         # by tag: the latest
        self._observers: dict[tuple[str, int], list[asyncio.Future[Reduced]]] = {}

    def post(self, to: int, envelope: Envelope) -> "asyncio.Future[bool]":
        """Send a message; the future becomes True when its acknowledgement is back."""
        acknowledged: asyncio.Future[bool] = self._loop.create_future()
        source, now = envelope.source, self._loop.time()
        index = self._sent.get(source, 0)
        self._sent[source] = index + 1
        if self._failures is not None and self._failures.loses_request(source, index):
            return acknowledged
        sending, latency = self._network.between(source, to, index, envelope.num_bytes)
        if sending:
            now = max(now, self._uplink_free.get(source, 0.0)) + sending
            self._uplink_free[source] = now
        at, tie = self._when_on(to, now + latency), to * self._num_nodes + source
        if at == math.inf:
            acknowledged.set_result(False)
        else:
            handle = self._loop.deliver_at(at, tie, self._deliver, to, envelope, acknowledged, latency, index)
            if at > now + latency:
                self._held_up.setdefault(to, []).append((acknowledged, handle))
        return acknowledged

    def _deliver(
        self, to: int, envelope: Envelope, acknowledged: "asyncio.Future[bool]", latency: float, index: int
    ) -> None:
        peer = self.peers.get(to)
        if peer is None or math.inf in (self.lost_until.get(to), self.lost_until.get(envelope.source)):
            self._acknowledge(acknowledged, False)
            return
        peer.take(envelope)
        if self._failures is not None and self._failures.loses_reply(envelope.source, index):
            return
        if latency:
            tie = envelope.source * self._num_nodes + to
            at = self._when_on(envelope.source, self._loop.time() + latency)
            self._loop.deliver_at(at, tie, self._acknowledge, acknowledged, True)
        else:
            self._acknowledge(acknowledged, True)

    @staticmethod
    def _acknowledge(acknowledged: "asyncio.Future[bool]", delivered: bool) -> None:
        if not acknowledged.done():
            acknowledged.set_result(delivered)

    def _when_on(self, rank: int, at: float) -> float:
        """Return when a node can first take something that arrives at `at`; infinity when it never will."""
        if self._availability is None or self._availability.is_on(rank, at):
            return at
        return self._availability.next_change(rank, at)

    # ---- reductions -------------------------------------------------------------------------------------------------

    def all_reduce(
        self, peer: Peer, vector: Tensor | Packed, tag: str, round: int, weight: float, began: float
    ) -> "asyncio.Future[Reduced]":
        """Contribute to a mean over a ring; its time is worked out when everybody has contributed.

        The sums are those of the ring, bit for bit; so are the times, on links without jitter that carry nothing else
        meanwhile. With jitter, each link has one factor for the whole reduction.
        """
        reduction = self._reductions.get((tag, round))
        if reduction is None:
            reduction = self._reductions[tag, round] = Reduction(
                peer.epoch, peer.members, {rank: place for place, rank in enumerate(peer.members)}, {})
        count, place = len(reduction.members), reduction.places[peer.rank]
        if isinstance(vector, Packed):
            peer.counters.bytes_sent += vector.bytes_sent(count)
            peer.counters.bytes_received += vector.bytes_sent(count)
        else:
            if not is_finite({ALONE: vector}):
                peer.log(refused_from=peer.rank, reason="not finite", tag=tag)
                vector, weight = torch.zeros_like(vector), 0.0
            peer.counters.bytes_sent += ring_bytes(vector, count, place)
            peer.counters.bytes_received += ring_bytes(vector, count, (place - 1) % count)
        future: asyncio.Future[Reduced] = self._loop.create_future()
        reduction.contributions[peer.rank] = Contribution(vector, weight, began, future)
        self._try_to_finish(tag, round)
        return future

    def observe(self, peer: Peer, tag: str, round: int) -> "asyncio.Future[Reduced]":
        """Return the result of a reduction to which a newcomer does not contribute, once the last member has it."""
        future: asyncio.Future[Reduced] = self._loop.create_future()
        finished = self._finished.get(tag)
        if finished is not None and finished[0] == round:
            future.set_result(finished[1])
        else:
            self._observers.setdefault((tag, round), []).append(future)
        return future

    def _try_to_finish(self, tag: str, round: int) -> None:
        reduction = self._reductions[tag, round]
        if len(reduction.contributions) < len(reduction.members) - len(self.lost_until):
            return    # whoever else is missing: looking at all members each time would take N squared steps
        ranks = [rank for rank in reduction.members
                 if rank in reduction.contributions or not self.is_lost(rank, reduction.epoch)]
        if len(reduction.contributions) < len(ranks):
            return
        del self._reductions[tag, round]
        parts = [reduction.contributions[rank] for rank in ranks]
        mean = _mean([part.vector for part in parts], [part.weight for part in parts])
        contributors = tuple(rank for rank, part in zip(ranks, parts, strict=True) if part.weight)
        result = Reduced(mean, contributors)
        times = self._times(ranks, parts, derive_seed(round, tag))
        for rank, part, at in zip(ranks, parts, times, strict=True):
            at = max(at, self._loop.time())
            self._loop.deliver_at(at, rank * self._num_nodes + rank, _give, part.future, result)
        self._finished[tag] = (round, result)
        for future in self._observers.pop((tag, round), []):
            self._loop.deliver_at(max([*times, self._loop.time()]), 0, _give, future, result)

    def _times(self, ranks: list[int], parts: list[Contribution], index: int) -> list[float]:
        """Return when each member has the result; `index` tells this reduction's jitter from that of others."""
        began = [part.began for part in parts]
        count = len(ranks)
        if count == 1:
            return began
        vector = parts[0].vector
        if isinstance(vector, Packed):
            sizes, rounds = np.full(count, payload_bytes({ALONE: vector.payload})), 1
        else:
            elements, empty = vector.element_size(), payload_bytes({ALONE: vector[:0]})
            sizes = np.array([empty + elements * (end - start) for start, end in chunk_bounds(len(vector), count)])
            rounds = 2
        following = [*ranks[1:], ranks[0]]
        links = [self._network.between(source, to, index, 1) for source, to in zip(ranks, following, strict=True)]
        per_byte, latency = np.array([link[0] for link in links]), np.array([link[1] for link in links])
        twice = np.concatenate([sizes, sizes])

        def sending(hop: int) -> np.ndarray:
            # Member i begins with chunk i, and passes on what it received the hop before: chunk i - hop.
            first = -hop % count
            return np.asarray(twice[first:first + count] * per_byte)

        times: list[float] = ring_times(began, sending, latency, rounds).tolist()
        return times

    # ---- those who come and go --------------------------------------------------------------------------------------

    @property
    def gone(self) -> set[int]:
        """Ranks that are away."""
        return {rank for rank, until in self.lost_until.items() if until == math.inf}

    def is_lost(self, rank: int, epoch: int) -> bool:
        """Say whether nothing will come of a peer in an epoch, though it was a member."""
        return self.lost_until.get(rank, -1.0) >= epoch

    def lose(self, rank: int) -> None:
        """Take note that a peer is gone; those who live go on without it."""
        self.lost_until[rank] = math.inf
        away = self.gone
        for acknowledged, handle in self._held_up.pop(rank, []):
            self._loop.heap.cancel(handle)
            self._acknowledge(acknowledged, False)
        for other in sorted(self.peers):
            if other not in away:
                self.peers[other].lose(rank)
        for tag, round in list(self._reductions):
            self._try_to_finish(tag, round)

    def state_dict(self, rank: int) -> dict[str, Any]:
        """Return what a node's own links must remember."""
        return {"sent": self._sent.get(rank, 0), "uplink_free": self._uplink_free.get(rank, 0.0)}

    def load_state_dict(self, rank: int, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._sent[rank], self._uplink_free[rank] = state["sent"], state["uplink_free"]


def _mean(vectors: Sequence[Tensor | Packed], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of what members brought, with the bits of a ring, shape (d,)."""
    packed = [vector for vector in vectors if isinstance(vector, Packed)]
    if packed:
        return packed[0].mean([one.payload for one in packed], weights)
    whole = [vector if weight in (0.0, 1.0) else weight * vector
             for vector, weight in zip(vectors, weights, strict=True) if isinstance(vector, Tensor)]
    total, mean = sum(weights), ring_sum(whole)
    return mean / total if total else mean


def _give(future: "asyncio.Future[Reduced]", result: Reduced) -> None:
    if not future.done():
        future.set_result(result)
