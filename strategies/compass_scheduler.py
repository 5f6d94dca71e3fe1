"""FedCompass's scheduler: who trains how many steps, and with whom it is expected to arrive.

Pure: a schedule and an event go in, a new schedule and a decision come out. No model, no clock, no messages; time
arrives as a number of seconds. `strategies/fedcompass.py` acts on the decisions.

Source: Li et al., 2024 (ICLR), arXiv:2309.14675, the COMPASS scheduler. The letters in the comments are the paper's
and its public implementation's: S_i seconds per local step, Q_i assigned steps, g_i arrival group, A_g members still
expected, R_g members that have arrived, Ta_g expected and Tmax_g latest arrival time.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

# A quotient this close below a whole number of steps is that number: a client exactly as fast as the founder of a
# group must get the founder's steps, whatever rounding did to the times.
STEP_TOLERANCE = 1e-6

# Work that took no measurable time still needs a positive price, or the number of steps that fit would be infinite.
SHORTEST_STEP_S = 1e-9


@dataclass(frozen=True)
class Rules:
    """The scheduler's settings.

    Attributes:
        min_local_steps: Qmin, fewest steps per task.
        max_local_steps: Qmax, most steps per task.
        latest_time_factor: lambda > 1, how far beyond its expected duration a group may be late.
        speed_momentum: mu in (0, 1], weight of the newest measurement.
        initial_steps: steps of a first task.
        absence_s: seconds after which a silent client is struck from its group, and its speed is out of date.
    """

    min_local_steps: int
    max_local_steps: int
    latest_time_factor: float
    speed_momentum: float
    initial_steps: int
    absence_s: float = math.inf


@dataclass(frozen=True)
class Client:
    """What the server knows of one client.

    Attributes:
        seconds_per_step: S_i; None before its first upload.
        link_s: time per task that does not depend on the number of steps; 0 unless it is estimated.
        group: g_i; None while it does its first task, whose upload is applied at once.
        measured_s: when `seconds_per_step` was last measured.
        last_steps: steps of its latest finished task.
        total_steps: steps of all its finished tasks.
    """

    seconds_per_step: float | None = None
    link_s: float = 0.0
    group: int | None = None
    measured_s: float = 0.0
    last_steps: int = 0
    total_steps: int = 0

    def task_seconds(self, local_steps: int) -> float:
        """Return how long a task of so many steps is expected to take."""
        assert self.seconds_per_step is not None
        return self.link_s + local_steps * self.seconds_per_step

    def steps_until(self, seconds: float) -> int:
        """Return how many steps the client is expected to finish within `seconds`; negative when none."""
        assert self.seconds_per_step is not None
        return math.floor((seconds - self.link_s) / self.seconds_per_step + STEP_TOLERANCE)


@dataclass(frozen=True)
class Group:
    """Clients that are expected to arrive together.

    Attributes:
        expected_s: Ta_g.
        latest_s: Tmax_g; an arrival at this very moment is in time.
        expecting: A_g.
        arrived: R_g, in the order of arrival; they wait for the others.
        closed: nobody can join, and whoever still comes is late.
    """

    expected_s: float
    latest_s: float
    expecting: tuple[int, ...]
    arrived: tuple[int, ...] = ()
    closed: bool = False

    def without(self, client: int) -> "Group":
        """Return the group without a client."""
        return replace(
            self,
            expecting=tuple(member for member in self.expecting if member != client),
            arrived=tuple(member for member in self.arrived if member != client),
        )


@dataclass(frozen=True)
class Schedule:
    """Everything the scheduler remembers.

    Attributes:
        clients: by partition.
        groups: by number, in the order of creation; a group is gone when nobody is expected or waiting in it.
        next_group: number of the next group.
    """

    clients: Mapping[int, Client] = field(default_factory=dict)
    groups: Mapping[int, Group] = field(default_factory=dict)
    next_group: int = 0

    def with_client(self, client: int, record: Client) -> "Schedule":
        return replace(self, clients={**self.clients, client: record})

    def with_group(self, number: int, group: Group) -> "Schedule":
        """Return the schedule with a group changed, or without it when it is empty."""
        groups = {**self.groups, number: group}
        if not group.expecting and not group.arrived:
            del groups[number]
        return replace(self, groups=groups)

    def open_groups(self) -> dict[int, Group]:
        return {number: group for number, group in self.groups.items() if not group.closed}

    def state(self) -> dict[str, Any]:
        """Return plain data from which `from_state` makes the same schedule."""
        return {
            "clients": {client: dict(vars(record)) for client, record in self.clients.items()},
            "groups": {number: dict(vars(group)) for number, group in self.groups.items()},
            "next_group": self.next_group,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Schedule":
        groups = {
            number: Group(**{**group, "expecting": tuple(group["expecting"]), "arrived": tuple(group["arrived"])})
            for number, group in state["groups"].items()
        }
        clients = {client: Client(**record) for client, record in state["clients"].items()}
        return cls(clients, groups, state["next_group"])


@dataclass(frozen=True)
class Task:
    """Work for one client: `local_steps` steps on the current model, as a member of `group` (None: a first task)."""

    client: int
    local_steps: int
    group: int | None


class Arrival(Enum):
    """What becomes of an uploaded update."""

    FIRST = "first"        # apply it at once: no group is waiting for it
    IN_TIME = "in time"    # into the buffer of its group
    LATE = "late"          # into the general buffer


@dataclass(frozen=True)
class Decision:
    """What to do now, in this order: file the upload, aggregate, send out work.

    Attributes:
        arrival: what becomes of the upload; None when the event was not one.
        group: g, whose buffer the upload goes to (`IN_TIME`).
        aggregate: the group to aggregate, together with the general buffer; None: no aggregation.
        tasks: work to hand out on the model as it is after the aggregation.
    """

    arrival: Arrival | None = None
    group: int | None = None
    aggregate: int | None = None
    tasks: tuple[Task, ...] = ()


def start(schedule: Schedule, rules: Rules, client: int, now: float) -> tuple[Schedule, Task]:
    """Give a client its first task, or the first one after an absence: `initial_steps` steps in no group.

    A speed that is known and recent is kept; it is the start of the next estimate.
    """
    record = schedule.clients.get(client, Client())
    if now - record.measured_s > rules.absence_s:
        record = replace(record, seconds_per_step=None, link_s=0.0)
    return schedule.with_client(client, replace(record, group=None)), Task(client, rules.initial_steps, None)


def on_upload(
    schedule: Schedule,
    rules: Rules,
    client: int,
    now: float,
    elapsed_s: float,
    local_steps: int,
    compute_s: float | None = None,
) -> tuple[Schedule, Decision]:
    """A client's update has arrived.

    Args:
        now: seconds on the server's clock.
        elapsed_s: now - b_i, seconds since its task was sent.
        local_steps: steps it has really done.
        compute_s: seconds of these that it trained; given only when link times are estimated separately.
    """
    record = measure(schedule.clients[client], rules, now, elapsed_s, local_steps, compute_s)
    schedule = schedule.with_client(client, record)
    if record.group is None:
        schedule, task = assign(schedule, rules, client, now)
        return schedule, Decision(Arrival.FIRST, tasks=(task,))
    number, group = record.group, schedule.groups.get(record.group)
    if group is None or group.closed or now > group.latest_s:
        if group is not None:
            schedule = schedule.with_group(number, group.without(client))
        schedule, task = assign(schedule, rules, client, now)
        return schedule, Decision(Arrival.LATE, tasks=(task,))
    group = group.without(client)
    schedule = schedule.with_group(number, replace(group, arrived=(*group.arrived, client)))
    if group.expecting:
        return schedule, Decision(Arrival.IN_TIME, number)
    schedule, tasks = release(schedule, rules, number, now)
    return schedule, Decision(Arrival.IN_TIME, number, aggregate=number, tasks=tasks)


def on_deadline(schedule: Schedule, rules: Rules, number: int, now: float) -> tuple[Schedule, Decision]:
    """The latest arrival time of a group has come; whoever of it has not arrived is late from now on."""
    group = schedule.groups.get(number)
    if group is None or group.closed:
        return schedule, Decision()
    if not group.arrived:
        return schedule.with_group(number, replace(group, closed=True)), Decision()
    schedule, tasks = release(schedule, rules, number, now)
    return schedule, Decision(aggregate=number, tasks=tasks)


def on_absence(schedule: Schedule, rules: Rules, client: int, now: float) -> tuple[Schedule, Decision]:
    """A client's task is lost, or the client is gone: nobody waits for it any longer.

    A client that was waiting takes no further part in its group; its update must then go to the general buffer.
    """
    record = schedule.clients.get(client)
    if record is None or record.group is None or record.group not in schedule.groups:
        return schedule, Decision()
    number, group = record.group, schedule.groups[record.group].without(client)
    schedule = schedule.with_client(client, replace(record, group=None)).with_group(number, group)
    if group.closed or group.expecting or not group.arrived:
        return schedule, Decision()
    schedule, tasks = release(schedule, rules, number, now)
    return schedule, Decision(aggregate=number, tasks=tasks)


def strike_silent(schedule: Schedule, rules: Rules, now: float) -> Schedule:
    """Forget closed groups whose last members have been silent for `absence_s`; an update that still comes is late."""
    silent = [
        number for number, group in schedule.groups.items() if group.closed and now > group.latest_s + rules.absence_s
    ]
    if not silent:
        return schedule
    return replace(schedule, groups={key: group for key, group in schedule.groups.items() if key not in silent})


def measure(
    record: Client, rules: Rules, now: float, elapsed_s: float, local_steps: int, compute_s: float | None
) -> Client:
    """Update the speed estimate: S_i <- (1 - mu) S_i + mu elapsed / Q_i, or elapsed / Q_i when there was none."""
    steps = max(local_steps, 1)
    link_s = 0.0 if compute_s is None else max(elapsed_s - compute_s, 0.0)
    seconds_per_step = max((elapsed_s - link_s) / steps, SHORTEST_STEP_S)
    if record.seconds_per_step is not None:
        mu = rules.speed_momentum
        seconds_per_step = (1 - mu) * record.seconds_per_step + mu * seconds_per_step
        link_s = (1 - mu) * record.link_s + mu * link_s
    return replace(
        record, seconds_per_step=seconds_per_step, link_s=link_s, measured_s=now, last_steps=steps,
        total_steps=record.total_steps + steps,
    )


def release(schedule: Schedule, rules: Rules, number: int, now: float) -> tuple[Schedule, tuple[Task, ...]]:
    """Close a group that is aggregated now and assign new work to those who waited, from the fastest to the slowest."""
    group = schedule.groups[number]
    assert group.arrived and not group.closed
    schedule = schedule.with_group(number, replace(group, arrived=(), closed=True))
    tasks = []
    for client in sorted(group.arrived, key=lambda member: (schedule.clients[member].seconds_per_step, member)):
        schedule, task = assign(schedule, rules, client, now)
        tasks.append(task)
    return schedule, tuple(tasks)


def assign(schedule: Schedule, rules: Rules, client: int, now: float) -> tuple[Schedule, Task]:
    """Choose a client's steps and its group: one it can arrive with, else a new one."""
    joined = join(schedule, rules, client, now)
    if joined is not None:
        number, local_steps = joined
        group = schedule.groups[number]
        group = replace(group, expecting=(*group.expecting, client))
    else:
        number, local_steps = schedule.next_group, create(schedule, rules, client, now)
        duration_s = schedule.clients[client].task_seconds(local_steps)
        group = Group(now + duration_s, now + rules.latest_time_factor * duration_s, (client,))
        schedule = replace(schedule, next_group=number + 1)
    record = replace(schedule.clients[client], group=number)
    return schedule.with_client(client, record).with_group(number, group), Task(client, local_steps, number)


def join(schedule: Schedule, rules: Rules, client: int, now: float) -> tuple[int, int] | None:
    """Return the open group in which the client can do most steps, and these steps; None when none suits.

    q_g = floor((Ta_g - now) / S_i), wanted within [Qmin, Qmax]; of equals the group created last.
    """
    record = schedule.clients[client]
    fits = [
        (steps, number)
        for number, group in schedule.open_groups().items()
        if rules.min_local_steps <= (steps := record.steps_until(group.expected_s - now)) <= rules.max_local_steps
    ]
    if not fits:
        return None
    local_steps, number = max(fits)
    return number, local_steps


def create(schedule: Schedule, rules: Rules, client: int, now: float) -> int:
    """Return the steps of a client that founds a group.

    It should finish when the fastest member of an open group would return after its next full task:
    q_g = floor((Tmax_g + Qmax F_g - now) / S_i), the largest of those up to Qmax, at least Qmin; else Qmax.
    """
    record, most = schedule.clients[client], rules.max_local_steps
    fits = []
    for group in schedule.open_groups().values():
        if now < group.latest_s:
            members = (*group.expecting, *group.arrived)
            next_task_s = min(schedule.clients[member].task_seconds(most) for member in members)
            fits.append(record.steps_until(group.latest_s + next_task_s - now))
    fits = [steps for steps in fits if steps <= most]
    return max(max(fits), rules.min_local_steps) if fits else most
