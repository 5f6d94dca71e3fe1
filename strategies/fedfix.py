"""FedFix: a new model every dt seconds, with weights that give slow clients their share back.

Source: Fraboni, Vidal, Kameni, Lorenzi, 2023, "A General Theory for Federated Optimization with Asynchronous and
Heterogeneous Clients Updates", JMLR 24(110), arXiv:2206.10189, and its published code. Every `interval_s` (dt) the
server adds the updates that arrived since the last tick, each with d_i = p_i E[ticks per task of i], so that a
client's expected weight per tick is its importance p_i, however slow it is.

Two departures. Where task times are not given, the mean number of *ticks used* is measured, which is right under
jitter too (the mean of a ceiling is not the ceiling of a mean). And the period is longer than dt by one part in 10^9:
an upload stamped exactly at a tick belongs to that tick, whatever rounding did to either time.
"""
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.events import EventStrategy
from fedcore.hub import MAX_FAILURES_IN_A_ROW, Hub
from fedcore.strategies.buffers import blend_buffers
from fedcore.strategies.settings import check_choice, check_count, check_number
from fedcore.tasks import NODE_GONE, Failure, Node, Reply

GUARD = 1e-9             # relative; see the departures above
AUTO_SHARE = 0.5         # `interval_s: auto` is this share of the slowest first task
SILENT_FACTOR = 10       # by default a client is silent after this many times the slowest client's ticks
TICK, PATIENCE = "tick", "patience"


@dataclass(frozen=True)
class Pace:
    """How many ticks a client takes.

    Attributes:
        sent_tick: the tick at which its current task was handed out.
        tasks: tasks measured.
        ticks: ticks they took together.
    """

    sent_tick: int
    tasks: int = 0
    ticks: int = 0

    @property
    def mean_ticks(self) -> float:
        """c_i, mean ticks per task."""
        return self.ticks / self.tasks


def ticks_of(task_time_s: float, interval_s: float) -> int:
    """Return c_i = ceil(tau_i / dt), at least 1: at which tick after its start a task's update is used."""
    return max(1, math.ceil(task_time_s / interval_s - GUARD))


def tick_time(origin_s: float, interval_s: float, tick: int) -> float:
    """Return when a tick is due: always counted from the origin, so that the period does not drift."""
    return origin_s + tick * interval_s * (1.0 + GUARD)


def tick_at(now_s: float, origin_s: float, interval_s: float) -> float:
    """Return the time in ticks since the origin; ticks are its whole numbers."""
    return (now_s - origin_s) / (interval_s * (1.0 + GUARD))


def next_tick(now_s: float, origin_s: float, interval_s: float, last_tick: int) -> int:
    """Return the first tick that is neither before `now_s` nor done already."""
    return max(last_tick + 1, math.ceil(tick_at(now_s, origin_s, interval_s) - GUARD))


def due_tick(now_s: float, origin_s: float, interval_s: float, last_tick: int) -> int:
    """Return the tick that a server step at `now_s` is: one that comes whole periods late counts those it missed."""
    return max(last_tick + 1, math.floor(tick_at(now_s, origin_s, interval_s) + GUARD))


def measured(pace: Pace, tick: int) -> Pace:
    """Return a client's pace after its update is used at `tick`."""
    return replace(pace, tasks=pace.tasks + 1, ticks=pace.ticks + max(1, tick - pace.sent_tick))


def shares(importance: Mapping[int, float], members: Iterable[int]) -> dict[int, float]:
    """Return p_i of the members: their importance divided by its sum."""
    raw = {member: importance[member] for member in sorted(members)}
    total = math.fsum(raw.values())
    return {member: value / total if total > 0 else 0.0 for member, value in raw.items()}


def server_step(params: Tensor, updates: Sequence[Tensor], weights: Sequence[float], server_lr: float) -> Tensor:
    """Return w + eta sum d_i D_i, summed in the order given; neither divided by their number nor by sum d_i.

    Args:
        params: w_n, shape (d,).
        updates: D_i, trained minus received, shape (d,) each.
        weights: d_i, at least 0.
        server_lr: eta.
    """
    step = torch.zeros_like(params)
    for update, weight in zip(updates, weights, strict=True):
        step.add_(update, alpha=weight)
    return params + server_lr * step


class FedFix(EventStrategy):
    """Federated averaging with a fixed server period.

    Args:
        interval_s: dt, seconds between server steps. `auto`: half the time of the slowest client's first task, which
            makes the first round synchronous (or half the largest of `task_times_s`). At or above the slowest
            client's time this is FedAvg; a small one is a larger server step, because progress per *tick* is fixed.
        server_lr: eta.
        weights: `corrected` by p_i E[ticks], or `identical`, p_i alone, which is biased towards fast clients.
        importance: p_i: `uniform`, by `num_examples`, or one number per partition (any positive sum).
        task_times_s: tau_i per partition where they are known and constant; None: ticks are measured.
        max_weight_ratio: warn once when some d_i / p_i exceeds this. Nothing is clipped: that would bias the limit.
        drop_after: ticks without an answer after which a client counts as gone, and its importance goes to the
            others; None: ten times the slowest client's ticks. It is back with its next update.
    """

    def __init__(
        self,
        interval_s: float | Literal["auto"] = "auto",
        server_lr: float = 1.0,
        weights: Literal["corrected", "identical"] = "corrected",
        importance: Literal["uniform", "num_examples"] | list[float] = "uniform",
        task_times_s: list[float] | None = None,
        max_weight_ratio: float = 20.0,
        drop_after: int | None = None,
    ):
        if interval_s != "auto":
            check_number("interval_s", interval_s, above=0,
                         advice="Half the slowest client's task time is a good start; auto measures that.")
        check_number("server_lr", server_lr, above=0, advice="The paper uses 1.")
        check_choice("weights", weights, ("corrected", "identical"))
        _check_importance(importance)
        for partition, time_s in enumerate(task_times_s or []):
            check_number(f"task_times_s[{partition}]", time_s, above=0, advice="It is one task's time in seconds.")
        if task_times_s is not None and not task_times_s:
            raise InvalidSetting("task_times_s", task_times_s, "one time per client", "null measures them.")
        check_number("max_weight_ratio", max_weight_ratio, at_least=1, advice="Its only effect is a warning.")
        if drop_after is not None:
            check_count("drop_after", drop_after, at_least=1, advice="It counts ticks.")
        self.interval_s: float | None = None if interval_s == "auto" else float(interval_s)
        if interval_s == "auto" and task_times_s:
            self.interval_s = AUTO_SHARE * max(task_times_s)
        self.server_lr, self.weights, self.importance = float(server_lr), weights, importance
        self.task_times_s, self.max_weight_ratio, self.drop_after = task_times_s, max_weight_ratio, drop_after
        if drop_after is not None and task_times_s and self.interval_s:
            slowest = ticks_of(max(task_times_s), self.interval_s)
            if drop_after < slowest:
                raise InvalidSetting("drop_after", drop_after, f"at least {slowest}, the slowest client's ticks",
                                     "Otherwise it would be dropped in every task.")
        self.origin_s, self.tick = 0.0, 0
        self.raw_importance: dict[int, float] = {}     # by partition, of everybody who was ever given work
        self.paces: dict[int, Pace] = {}
        self.inbox: dict[int, dict[str, Any]] = {}     # partition -> Reply.state(), since the last tick
        self.absent: set[int] = set()                  # left, silent, or failing again and again
        self.told: set[str] = set()                    # warnings given

    # ---- time ---------------------------------------------------------------------------------------------------

    def check_clients(self, count: int) -> None:
        """Raise `InvalidSetting` when a list has no value for some client."""
        for name, values in (("importance", self.importance), ("task_times_s", self.task_times_s)):
            if isinstance(values, list) and len(values) < count:
                raise InvalidSetting(name, values, f"one value for each of {count} clients",
                                     f"{len(values)} are given.")

    def on_start(self, hub: Hub) -> None:
        self.check_clients(hub.expected)
        if self.weights == "identical":
            self._warn(hub, "identical", "weights=identical: the limit is biased towards fast clients.")
        self.origin_s = hub.now
        for node in hub.nodes:
            self.on_join(hub, node)

    def on_reply(self, hub: Hub, reply: Reply) -> None:
        partition = reply.node.partition
        if partition in self.absent:
            self._set_absent(hub, partition, False, "answers again")
        self.inbox[partition] = reply.state()
        if self.interval_s is None:
            self._end_first_round_if_complete(hub)
        else:
            self._arm(hub, self.interval_s)

    def _arm(self, hub: Hub, interval_s: float) -> None:
        # A tick at which nothing has arrived does nothing, so a timer is set only when there is something to add.
        tick = next_tick(hub.now, self.origin_s, interval_s, self.tick)
        hub.set_timer(TICK, tick_time(self.origin_s, interval_s, tick))

    def on_timer(self, hub: Hub, name: str) -> None:
        if self.interval_s is None:
            self._end_first_round(hub)
        elif name == TICK:
            self._on_tick(hub, self.interval_s)

    def _on_tick(self, hub: Hub, interval_s: float) -> None:
        self._count_tick(due_tick(hub.now, self.origin_s, interval_s, self.tick))
        self._hand_out_to(hub, self._aggregate(hub))
        self._drop_silent(hub)

    def _count_tick(self, tick: int) -> None:
        self.tick = tick
        for partition in self.inbox:
            self.paces[partition] = measured(self.paces[partition], tick)

    # ---- the first round, where the interval is measured --------------------------------------------------------

    def _end_first_round_if_complete(self, hub: Hub) -> None:
        if self.interval_s is not None or not self.inbox:
            return
        if all(node.partition in self.inbox or node.partition in self.absent for node in hub.nodes):
            self._end_first_round(hub)
            return
        # Whoever is far slower than everybody else so far may never answer: the others do not wait for ever.
        patience = SILENT_FACTOR if self.drop_after is None else max(1.0, AUTO_SHARE * self.drop_after)
        if hub.now > self.origin_s:
            hub.set_timer(PATIENCE, self.origin_s + patience * (hub.now - self.origin_s))

    def _end_first_round(self, hub: Hub) -> None:
        """Take the interval from the first tasks, and average them as FedAvg does; ticks count from here."""
        times_s = {partition: state["elapsed_s"] for partition, state in self.inbox.items()}
        hub.cancel_timer(PATIENCE)
        interval_s = AUTO_SHARE * max(times_s.values())
        if interval_s <= 0:
            raise InvalidSetting("interval_s", "auto", "a number of seconds when tasks take no time")
        for partition in self.paces:
            since_ticks = ticks_of(hub.now - self.origin_s, interval_s)
            self.paces[partition] = Pace(-since_ticks)
            if partition in times_s:
                self.paces[partition] = Pace(0, 1, ticks_of(times_s[partition], interval_s))
        self.interval_s, self.origin_s = interval_s, hub.now
        hub.log(interval_s=interval_s, answered=len(times_s))
        self._hand_out_to(hub, self._aggregate(hub, first=True))

    # ---- the server step ----------------------------------------------------------------------------------------

    def _aggregate(self, hub: Hub, first: bool = False) -> list[int]:
        """w <- w + eta sum d_i D_i over the inbox in partition order; returns whose updates were used."""
        replies = [hub.restore_reply(self.inbox[partition]) for partition in sorted(self.inbox)]
        share = self._shares(hub)
        partitions = [reply.node.partition for reply in replies]
        weights = [share[partition] * (1.0 if first else self._factor(partition)) for partition in partitions]
        params = server_step(hub.model.params, [reply.update for reply in replies], weights, self.server_lr)
        buffers = blend_buffers(hub.model.buffers, [reply.buffers for reply in replies], weights)
        self.inbox = {}
        hub.publish(params, replies, buffers, [self.server_lr * weight for weight in weights], tick=self.tick)
        self._check_interval(hub, share)
        return partitions

    def _hand_out_to(self, hub: Hub, partitions: list[int]) -> None:
        """Send the new model to those whose updates made it; the others go on with what they have."""
        here = {node.partition: node for node in hub.nodes}
        for partition in partitions:
            self.paces[partition] = replace(self.paces[partition], sent_tick=self.tick)
            if partition in here:
                self.hand_out(hub, here[partition])

    def on_stop(self, hub: Hub) -> None:
        """Bring the last tick forward where the run ends by a number of updates, all of which then count."""
        if self.inbox and hub.stop_reason in ("rounds", "client_updates"):
            if self.interval_s is not None:
                self._count_tick(next_tick(hub.now, self.origin_s, self.interval_s, self.tick))
            self._aggregate(hub, first=self.interval_s is None)
        hub.log(ticks=self.tick, discarded=len(self.inbox))

    def _shares(self, hub: Hub) -> dict[int, float]:
        """Return p_i of those who are here or whose last update still waits."""
        here = {node.partition for node in hub.nodes if node.partition in self.raw_importance}
        return shares(self.raw_importance, (here - self.absent) | self.inbox.keys())

    def _ticks(self, partition: int) -> float | None:
        """Return E[c_i], or None before it is known."""
        if self.task_times_s is not None and self.interval_s is not None:
            return float(ticks_of(self.task_times_s[partition], self.interval_s))
        pace = self.paces[partition]
        return pace.mean_ticks if pace.tasks else None

    def _factor(self, partition: int) -> float:
        ticks = self._ticks(partition) if self.weights == "corrected" else 1.0
        assert ticks is not None
        return ticks

    # ---- who is here --------------------------------------------------------------------------------------------

    def on_join(self, hub: Hub, node: Node) -> None:
        """Hand out work, at the pace measured before if the node was here earlier."""
        partition, lists = node.partition, (self.importance, self.task_times_s)
        if any(isinstance(values, list) and partition >= len(values) for values in lists):
            hub.warn(f"Node {partition} gets no work: importance or task_times_s has no value for it.")
            return
        if isinstance(self.importance, list):
            self.raw_importance[partition] = float(self.importance[partition])
        else:
            self.raw_importance[partition] = 1.0 if self.importance == "uniform" else float(node.num_examples)
        if partition in self.absent:
            self._set_absent(hub, partition, False, "is back")
        if partition not in self.inbox:    # otherwise it gets work at the tick
            now = 0.0 if self.interval_s is None else tick_at(hub.now, self.origin_s, self.interval_s)
            self.paces[partition] = replace(self.paces.get(partition, Pace(0)), sent_tick=math.floor(now + GUARD))
            self.hand_out(hub, node)

    def on_leave(self, hub: Hub, node: Node) -> None:
        self._set_absent(hub, node.partition, True, "left")

    def on_failure(self, hub: Hub, failure: Failure) -> None:
        """Repeat the work. The task's ticks go on counting from its first attempt: that is the client's real pace."""
        super().on_failure(hub, failure)
        if hub.failures_in_a_row.get(failure.node.partition, 0) >= MAX_FAILURES_IN_A_ROW:
            why = "is out of reach" if failure.code == NODE_GONE else "failed again and again"
            self._set_absent(hub, failure.node.partition, True, why)

    def _drop_silent(self, hub: Hub) -> None:
        known = [ticks for partition in self.paces if (ticks := self._ticks(partition)) is not None]
        limit = self.drop_after or SILENT_FACTOR * max(known)
        for partition, pace in self.paces.items():
            # By default a client that has never answered is waited for: it may just be slower than all others.
            measurable = self.drop_after is not None or self._ticks(partition) is not None
            if measurable and partition not in self.absent and self.tick - pace.sent_tick > limit:
                self._set_absent(hub, partition, True, f"gave no answer for {self.tick - pace.sent_tick} ticks")

    def _set_absent(self, hub: Hub, partition: int, absent: bool, why: str) -> None:
        """Change who shares the objective, and say so."""
        if (partition in self.absent) == absent or partition not in self.raw_importance:
            return
        if absent:
            self.absent.add(partition)
        else:
            self.absent.discard(partition)
        members = [member for member, share in self._shares(hub).items() if share > 0]
        hub.log(objective=f"node {partition} {why}; the objective is now that of {len(members)} nodes",
                node=partition, nodes=members)
        self._end_first_round_if_complete(hub)

    # ---- warnings -----------------------------------------------------------------------------------------------

    def _check_interval(self, hub: Hub, share: Mapping[int, float]) -> None:
        known = {partition: self._ticks(partition) for partition in share}
        ticks = [value for value in known.values() if value is not None]
        if ticks and max(ticks) > self.max_weight_ratio and self.weights == "corrected":
            self._warn(hub, "ratio", f"An update counts {max(ticks):.3g} times its client's importance, more than "
                                     f"max_weight_ratio={self.max_weight_ratio:g}: a longer interval_s is more stable.")
        if len(ticks) < len(known) or not ticks:
            return
        if max(ticks) == 1:
            self._warn(hub, "fedavg", "interval_s is at or above the slowest client's time: this is FedAvg.")
        elif min(ticks) >= 2:
            self._warn(hub, "short", "interval_s is below the fastest client's time: the server step is larger by "
                                     f"about {min(ticks):.3g} than FedAvg's; consider a smaller server_lr.")

    def _warn(self, hub: Hub, topic: str, text: str) -> None:
        if topic not in self.told:
            self.told.add(topic)
            hub.warn(text)

    # ---- what survives a restart --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "interval_s": self.interval_s, "origin_s": self.origin_s, "tick": self.tick,
            "raw_importance": dict(self.raw_importance), "inbox": dict(self.inbox),
            "paces": {partition: (pace.sent_tick, pace.tasks, pace.ticks) for partition, pace in self.paces.items()},
            "absent": sorted(self.absent), "told": sorted(self.told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("interval_s", "origin_s", "tick", "raw_importance", "inbox"):
            setattr(self, name, state[name])
        self.paces = {partition: Pace(*numbers) for partition, numbers in state["paces"].items()}
        self.absent, self.told = set(state["absent"]), set(state["told"])


def _check_importance(importance: object) -> None:
    if not isinstance(importance, list):
        check_choice("importance", importance, ("uniform", "num_examples"), "Or give one number per client.")
        return
    for partition, value in enumerate(importance):
        check_number(f"importance[{partition}]", value, at_least=0, advice="0 leaves a client out of the objective.")
    if sum(importance) <= 0:
        raise InvalidSetting("importance", importance, "of positive sum", "Somebody's objective must count.")
