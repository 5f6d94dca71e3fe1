"""FedCompass: asynchronous training in groups of clients that are scheduled to arrive together.

The server estimates every client's seconds per local step and chooses its number of steps, between Qmin and Qmax, so
that several clients finish at about the same moment and are aggregated at once. Groups do not wait for each other,
so nobody waits for a straggler.

Source: Li et al., 2024 (ICLR), arXiv:2309.14675. Who trains how long is decided in `compass_scheduler.py`.

Departures, each an option or a repair: first tasks have Qmin steps (`initial_steps`), so that speeds are known
sooner; the polynomial staleness factor has the exponent -a; late updates are kept in a list, so that a client's second
one does not replace its first; buffers and timers are freed when a group is aggregated early.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.events import EventStrategy
from fedcore.hub import Hub
from fedcore.strategies.buffers import blend_buffers
from fedcore.strategies.compass_scheduler import (
    Arrival,
    Decision,
    Rules,
    Schedule,
    Task,
    assign,
    on_absence,
    on_deadline,
    on_upload,
    start,
    strike_silent,
)
from fedcore.strategies.settings import check_choice, check_count, check_number, check_switch
from fedcore.strategies.staleness import Staleness
from fedcore.tasks import Failure, Node, Reply

TIMER = "group "

# An update that waits: as it arrived, or, after a restart, as plain data.
Held = Reply | dict[str, Any]


def client_share(weights: str, partition: int, num_examples: Mapping[int, int], expected: int) -> float:
    """Return p_i, a client's share of the model: 1/N, or its part of all examples. Not renormalised within a group.

    Raises:
        InvalidSetting: weights by examples, and nobody has any.
    """
    if weights == "equal":
        return 1.0 / expected
    total = sum(num_examples.values())
    if total <= 0:
        raise InvalidSetting("weights", weights, "equal", "No client has any examples to be weighed by.")
    return num_examples[partition] / total


def weighted_sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weights[k] * updates[k], each of shape (d,), added in the order given."""
    total = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        total.add_(update, alpha=weight)
    return total


class FedCompass(EventStrategy):
    """Semi-asynchronous training with local steps chosen per client; `train.local_steps` is not used.

    Args:
        min_local_steps: Qmin, fewest steps per task.
        max_local_steps: Qmax, most steps per task. Clients can share a group when their speeds differ by Qmax / Qmin at
            most.
        latest_time_factor: lambda > 1; a group waits that many times its expected duration for the last member.
        speed_momentum: mu in (0, 1], weight of the newest speed measurement.
        server_lr: alpha > 0, multiplies every update. There is no upper limit: each update is also multiplied by the
            client's share, so values of 2 to 4 can be best.
        staleness: `constant`, `polynomial` or `hinge`, or {name, a, b}.
        initial_steps: steps of a client's first task; None: `min_local_steps`.
        weights: `equal`, or by `num_examples`.
        lr_decay: the local learning rate is multiplied by it once per Qmax steps that a client has done.
        normalise_steps: multiply each update by (mean steps of all clients' latest tasks) / (its own steps), the
            normalisation of FedNova (Wang et al., 2020, arXiv:2007.07481): every client then pulls as hard as if it had
            done the mean number of steps. It removes the bias towards clients that are given more steps; it does not
            remove the one towards clients that upload more often.
        link_estimate: estimate the time on the link apart from the time per step, from the training time that
            clients report; otherwise all elapsed time counts as training. None: where a message takes seconds however
            little it holds, as between Flower's SuperLink and SuperNodes.
        absence_s: after so long a silence a client is struck from its group, and its measured speed is out of date.
    """

    def __init__(
        self,
        min_local_steps: int = 20,
        max_local_steps: int = 100,
        latest_time_factor: float = 1.5,
        speed_momentum: float = 0.9,
        server_lr: float = 0.9,
        staleness: str | Mapping[str, Any] = "polynomial",
        initial_steps: int | None = None,
        weights: Literal["equal", "num_examples"] = "equal",
        lr_decay: float = 1.0,
        normalise_steps: bool = False,
        link_estimate: bool | None = None,
        absence_s: float = 3600.0,
    ):
        check_count("max_local_steps", max_local_steps, 1)
        check_count("min_local_steps", min_local_steps, 1, max_local_steps, "It may not exceed max_local_steps.")
        check_number("latest_time_factor", latest_time_factor, above=1,
                     advice="At 1 or below every jitter would make clients late; 1.2 to 1.5 is usual.")
        check_number("speed_momentum", speed_momentum, above=0, at_most=1, advice="1 uses the newest measurement only.")
        check_number("server_lr", server_lr, above=0)
        initial_steps = min_local_steps if initial_steps is None else initial_steps
        check_count("initial_steps", initial_steps, min_local_steps, max_local_steps, "These are the step limits.")
        check_choice("weights", weights, ("equal", "num_examples"))
        check_number("lr_decay", lr_decay, above=0, at_most=1, advice="1 leaves the learning rate alone.")
        check_switch("normalise_steps", normalise_steps)
        if link_estimate is not None:
            check_switch("link_estimate", link_estimate)
        check_number("absence_s", absence_s, above=0, advice="Give seconds, longer than any task takes.")
        self.rules = Rules(
            min_local_steps, max_local_steps, latest_time_factor, speed_momentum, initial_steps, absence_s
        )
        self.server_lr, self.staleness, self.weights = float(server_lr), Staleness.of(staleness), weights
        self.lr_decay, self.normalise_steps, self.link_estimate = lr_decay, normalise_steps, link_estimate
        self.schedule = Schedule()
        self.num_examples: dict[int, int] = {}        # by partition
        self.late: list[Held] = []                    # B, the general buffer
        self.buffers: dict[int, list[Held]] = {}      # B_g, by group

    # ---- events -------------------------------------------------------------------------------------------------

    def on_start(self, hub: Hub) -> None:
        """Send everyone version 0 at one moment."""
        for node in hub.nodes:
            self.on_join(hub, node)

    def on_join(self, hub: Hub, node: Node) -> None:
        """Give a newcomer, or somebody who returns, a first task; its upload is applied at once."""
        if len(hub.nodes) > hub.expected:
            hub.log(turned_away=node.partition)
            return
        self.num_examples[node.partition] = node.num_examples
        self.schedule, task = start(self.schedule, self.rules, node.partition, hub.now)
        self._send(hub, node, task)

    def on_reply(self, hub: Hub, reply: Reply) -> None:
        """File the update where it belongs, aggregate when its group is complete, give out new work."""
        apart = hub.slow_messages if self.link_estimate is None else self.link_estimate
        compute_s = reply.train_seconds if apart else None
        before = self.schedule
        self.schedule, decision = on_upload(
            before, self.rules, reply.node.partition, hub.now, reply.elapsed_s, reply.local_steps, compute_s
        )
        if decision.arrival is Arrival.FIRST:
            self._apply(hub, [reply])
        elif decision.arrival is Arrival.LATE:
            self.late.append(reply)
        else:
            assert decision.group is not None
            self.buffers.setdefault(decision.group, []).append(reply)
        self._act(hub, before, decision)

    def on_timer(self, hub: Hub, name: str) -> None:
        """The latest arrival time of a group has come."""
        before = self.schedule
        self.schedule, decision = on_deadline(before, self.rules, int(name.removeprefix(TIMER)), hub.now)
        self._act(hub, before, decision)

    def on_failure(self, hub: Hub, failure: Failure) -> None:
        """Nobody waits any longer for a task that failed; the node gets other work."""
        self._withdraw(hub, failure.node.partition)
        super().on_failure(hub, failure)

    def hand_out(self, hub: Hub, node: Node) -> None:
        """Give work to a node whose last task failed."""
        record = self.schedule.clients.get(node.partition)
        if record is None or record.seconds_per_step is None:
            self.on_join(hub, node)
            return
        before = self.schedule
        self.schedule, task = assign(before, self.rules, node.partition, hub.now)
        self._act(hub, before, Decision(tasks=(task,)))

    def on_leave(self, hub: Hub, node: Node) -> None:
        """Nobody waits any longer for a node that left; what it has delivered counts."""
        self._withdraw(hub, node.partition)

    def on_stop(self, hub: Hub) -> None:
        """Apply everything that is buffered, in one last update."""
        held = self.late + [update for group in self.buffers.values() for update in group]
        for number in self.schedule.open_groups():
            hub.cancel_timer(f"{TIMER}{number}")
        self.late, self.buffers = [], {}
        if held:
            self._apply(hub, held)

    # ---- acting on decisions --------------------------------------------------------------------------------------

    def _withdraw(self, hub: Hub, partition: int) -> None:
        before = self.schedule
        for number, updates in self.buffers.items():
            # It waited and is gone: its update is applied with the next group, whichever that is.
            self.late += [update for update in updates if _partition(update) == partition]
            self.buffers[number] = [update for update in updates if _partition(update) != partition]
        self.schedule, decision = on_absence(before, self.rules, partition, hub.now)
        self._act(hub, before, decision)

    def _act(self, hub: Hub, before: Schedule, decision: Decision) -> None:
        """Aggregate, set the timers of new groups, cancel those of groups that are gone, send out work."""
        if decision.aggregate is not None:
            updates, late = self.buffers.pop(decision.aggregate) + self.late, len(self.late)
            self.late = []
            self._apply(hub, updates, group=decision.aggregate, late=late)
        self.schedule = strike_silent(self.schedule, self.rules, hub.now)
        self.buffers = {number: updates for number, updates in self.buffers.items() if updates}
        old, new = before.open_groups(), self.schedule.open_groups()
        for number in old.keys() - new.keys():
            hub.cancel_timer(f"{TIMER}{number}")
        for number in new.keys() - old.keys():
            hub.set_timer(f"{TIMER}{number}", new[number].latest_s)
        nodes = {node.partition: node for node in hub.nodes}
        for task in decision.tasks:
            self._send(hub, nodes[task.client], task)

    def _send(self, hub: Hub, node: Node, task: Task) -> None:
        config = {}
        if self.lr_decay < 1:
            steps_done = self.schedule.clients[task.client].total_steps
            config["lr-scale"] = self.lr_decay ** (steps_done // self.rules.max_local_steps)
        note = {} if task.group is None else {"group": task.group}
        hub.train(node, local_steps=task.local_steps, config=config, note=note)

    def _apply(self, hub: Hub, held: Sequence[Held], **figures: Any) -> None:
        """w <- w - sum of alpha st(v - v_i) p_i D_i, every staleness against the version before; one new version.

        The sum runs by partition, then by age, so that its bits do not depend on the order of arrival.
        """
        used = [update if isinstance(update, Reply) else hub.restore_reply(update) for update in held]
        used.sort(key=lambda reply: (reply.node.partition, reply.task_id))
        weights = [self._weight(hub, reply) for reply in used]
        params = weighted_sum([reply.update for reply in used], weights).add_(hub.model.params)
        buffers = blend_buffers(hub.model.buffers, [reply.buffers for reply in used], [1.0] * len(used))
        hub.publish(params, used=used, buffers=buffers, weights=weights, **figures)

    def _weight(self, hub: Hub, reply: Reply) -> float:
        share = client_share(self.weights, reply.node.partition, self.num_examples, hub.expected)
        weight = self.server_lr * self.staleness(reply.staleness) * share
        if self.normalise_steps:
            weight *= self._mean_steps(hub) / max(reply.local_steps, 1)
        return weight

    def _mean_steps(self, hub: Hub) -> float:
        """Return the mean of all clients' latest numbers of steps, weighted by their shares."""
        records = {client: record for client, record in self.schedule.clients.items() if record.last_steps}
        shares = [client_share(self.weights, client, self.num_examples, hub.expected) for client in records]
        steps = [share * record.last_steps for share, record in zip(shares, records.values(), strict=True)]
        return math.fsum(steps) / math.fsum(shares)

    # ---- what survives a restart ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule and the updates that wait."""
        return {
            "schedule": self.schedule.state(),
            "num_examples": dict(self.num_examples),
            "late": [_plain(update) for update in self.late],
            "buffers": {number: [_plain(update) for update in updates] for number, updates in self.buffers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.schedule = Schedule.from_state(state["schedule"])
        self.num_examples = dict(state["num_examples"])
        self.late = list(state["late"])
        self.buffers = {number: list(updates) for number, updates in state["buffers"].items()}


def _plain(update: Held) -> dict[str, Any]:
    return update.state() if isinstance(update, Reply) else update


def _partition(update: Held) -> int:
    return update.node.partition if isinstance(update, Reply) else int(update["partition"])
