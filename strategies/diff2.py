"""DIFF2: private training from gradient differences.

Source: Murata and Suzuki, 2023, "DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex
Distributed Learning", ICML, arXiv:2302.03884. Every T rounds the clients send a clipped and noised gradient; in between
differences of gradients at the last two points, clipped to C2 |x - x'|, whose sensitivity is small where steps are:

    v <- mean m                          in a full round
    v <- v + mean m                      between them
    x' , x <- x, x - eta v               routine gd
    x' , x <- x, y_K of one client       routine bvr_l_sgd: K steps from x along v, corrected by differences on batches

T = 1 is DP-GD. We account exactly for Gaussian releases, which needs less noise than the paper's Renyi accounting.
Where we depart from it: a client's local batches of one pass are disjoint, so that a record takes part in few of them,
and no amplification by sampling is claimed; clients take turns at the local steps, in an order drawn anew for every
turn of all, so that nobody's records pay for more visits than another's.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedcore.hub import Hub
from fedcore.payload import ARRAYS, CONFIG, VectorRecord
from fedcore.privacy.accounting import Release
from fedcore.privacy.wire import DIRECTION, PRIVATE, STEPS, Ask
from fedcore.seeds import torch_generator
from fedcore.strategies.private import PrivateRounds, gradient_step, logger
from fedcore.strategies.private_plan import FULL, LOCAL_STEPS, Budget, Schedule
from fedcore.strategies.settings import check_choice, check_count, check_number
from fedcore.tasks import Node, Reply
from fedcore.vectors import Model

GD, BVR_L_SGD = ROUTINES = ("gd", "bvr_l_sgd")


class Diff2(PrivateRounds):
    """Full noisy gradients now and then, and between them noisy differences, which need much less noise.

    For few, reliable clients that all take part in every round. Who misses a round makes the next one a full one.

    Args:
        epsilon: largest epsilon of the whole run, for every single record; or give `noise_multiplier`.
        delta: below one over the number of records.
        noise_multiplier: z of every release, instead of an epsilon.
        rounds: R; without it, as many as the run has (`stop.rounds`).
        restart_interval: T, rounds from one full gradient to the next; more than R counts as R.
        clip_gradient: C1, largest norm of a record's gradient; about the median norm is a start.
        clip_difference: C2, largest norm of a record's gradient difference over the distance of the two points; about
            the largest curvature of a record's loss. Too small is worse than too large.
        budget_split: beta, share of the budget for full gradients, in (0, 1).
        server_lr: eta, the step size.
        noise_mode: `local`, every client adds noise for itself; `central`, the server does, and sees vectors without.
        neighbouring: `replace-one` or `add-remove` one record.
        routine: `gd`, or `bvr_l_sgd` with local steps.
        local_steps: K of `bvr_l_sgd`; 1 is `gd`.
        local_batch_size: b, records of a local step.
        clip_local: C3, as `clip_difference` for local steps; None: the same.
        local_budget: share of the budget for local steps, in (0, 1).
    """

    def __init__(
        self, epsilon: float | None = None, delta: float = 1e-5, noise_multiplier: float | None = None,
        rounds: int | None = None, restart_interval: int = 10, clip_gradient: float = 1.0,
        clip_difference: float = 3.0, budget_split: float = 0.5, server_lr: float = 0.1, noise_mode: str = "local",
        neighbouring: str = "replace-one", routine: str = "gd", local_steps: int = 8, local_batch_size: int = 32,
        clip_local: float | None = None, local_budget: float = 0.5,
    ):
        check_count("restart_interval", restart_interval, 1)
        check_number("budget_split", budget_split, above=0, below=1)
        check_choice("routine", routine, ROUTINES)
        check_count("local_steps", local_steps, 1)
        check_count("local_batch_size", local_batch_size, 1)
        check_number("local_budget", local_budget, above=0, below=1)
        if clip_local is not None:
            check_number("clip_local", clip_local, above=0)
        if rounds is not None and restart_interval > rounds:
            logger.warning("restart_interval=%d is more than the %d rounds: only the first one is a full one.",
                           restart_interval, rounds)
            restart_interval = rounds
        schedule = Schedule(restart_interval, split=float(budget_split), local_share=float(local_budget))
        super().__init__(schedule, epsilon, noise_multiplier, delta, rounds, clip_gradient, clip_difference, server_lr,
                         noise_mode, neighbouring)
        self.routine, self.local_steps, self.local_batch_size = routine, local_steps, local_batch_size
        self.clip_local = self.clip_difference if clip_local is None else float(clip_local)
        self.turn: list[int] = []    # clients that still have their visit in this turn of all
        self.turns = 0

    def local_releases(self, rounds: int, sizes: Sequence[int]) -> int:
        if self.routine == GD:
            return 0
        return math.ceil(rounds / len(sizes)) * max(self._participations(size) for size in sizes)

    def _participations(self, num_records: int) -> int:
        """Return in how many of a visit's noised steps a record takes part at most; the first step has no noise."""
        return math.ceil((self.local_steps - 1) / math.ceil(num_records / self.local_batch_size))

    def step(self, hub: Hub, estimate: Tensor, answered: Sequence[Reply]) -> tuple[Tensor, Sequence[Reply]]:
        if self.routine == GD:
            return super().step(hub, estimate, answered)
        assert self.budget is not None
        node, ask = self._next_visit(hub, answered), self._local_ask(hub, self.budget)
        release = Release(ask.noise_multiplier, 1.0, self._participations(node.num_examples))
        if release.times and not self.charge(LOCAL_STEPS, [node.partition], release):
            return gradient_step(hub.model.params, estimate, self.server_lr), answered
        content = RecordDict({
            ARRAYS: hub.model_record(), CONFIG: ask.config(),
            DIRECTION: VectorRecord(Model(estimate, hub.model.buffers, hub.model.layout)),
        })
        found = self.usable(hub, hub.ask([node], PRIVATE, content).arrived, ask)
        if not found or found[0][1].values is None:
            # Nobody walked: one step of the same length along v is what the first of K would have been.
            return gradient_step(hub.model.params, estimate, self.server_lr), answered
        visited = self._reply(hub, *found[0])
        return visited.values, answered

    def _next_visit(self, hub: Hub, answered: Sequence[Reply]) -> Node:
        here = {reply.node.partition: reply.node for reply in answered}
        self.turn = [partition for partition in self.turn if partition in here]
        if not self.turn:
            everybody = sorted(here)
            order = torch.randperm(len(everybody), generator=torch_generator(hub.seed, "visits", self.turns))
            self.turn, self.turns = [everybody[index] for index in order.tolist()], self.turns + 1
        return here[self.turn.pop(0)]

    def _local_ask(self, hub: Hub, budget: Budget) -> Ask:
        return Ask(
            # The plan has no noise for local steps where there are none that need any.
            budget.terms, self.exchanges, hub.seed, STEPS, budget.noise.get(LOCAL_STEPS, budget.noise[FULL]),
            self.clip_gradient, self.clip_local, num_steps=self.local_steps, batch_size=self.local_batch_size,
            step_size=self.server_lr,
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "turn": list(self.turn), "turns": self.turns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.turn, self.turns = list(state["turn"]), state["turns"]
