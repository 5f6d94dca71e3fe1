"""FedCompass's scheduler alone: the pure functions, driven by a few lines of virtual clock."""
import heapq
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis.strategies import booleans, data, floats, integers, lists

from fedcore.strategies.compass_scheduler import (
    SHORTEST_STEP_S,
    Arrival,
    Client,
    Decision,
    Group,
    Rules,
    Schedule,
    assign,
    create,
    join,
    measure,
    on_absence,
    on_deadline,
    on_upload,
    start,
    strike_silent,
)

RULES = Rules(
    min_local_steps=20, max_local_steps=100, latest_time_factor=1.5, speed_momentum=0.9, initial_steps=20
)
UPLOAD, DEADLINE = 0, 1    # at equal times uploads come first


@dataclass
class Federation:
    """Clients of given speeds around a schedule; counts versions and follows every update to its application."""

    rules: Rules
    step_times: list[float]
    link_s: float = 0.0
    separate_links: bool = False
    jitter: object = lambda client, index: 1.0    # noqa: E731
    schedule: Schedule = field(default_factory=Schedule)
    version: int = 0
    now: float = 0.0
    queue: list = field(default_factory=list)
    tasks: dict = field(default_factory=dict)         # client -> (task, base version, sent at)
    late: list = field(default_factory=list)          # B: (client, base version)
    buffers: dict = field(default_factory=dict)       # B_g
    applied: list = field(default_factory=list)       # one list of (client, staleness) per version
    uploads: Counter = field(default_factory=Counter)
    waiting_since: dict = field(default_factory=dict)
    log: list = field(default_factory=list)
    _sequence: int = 0

    def begin(self):
        for client in range(len(self.step_times)):
            self.schedule, task = start(self.schedule, self.rules, client, self.now)
            self.send(task)
        return self

    def send(self, task):
        index = self.uploads[task.client]
        duration = task.local_steps * self.step_times[task.client] * self.jitter(task.client, index) + self.link_s
        self.tasks[task.client] = (task, self.version, self.now)
        self.waiting_since.pop(task.client, None)
        self.push(self.now + duration, UPLOAD, task.client)

    def push(self, at, kind, number):
        self._sequence += 1
        heapq.heappush(self.queue, (at, kind, number, self._sequence))

    def step(self):
        """Handle the next event; returns what was decided."""
        self.now, kind, number, _ = heapq.heappop(self.queue)
        known = set(self.schedule.groups)
        decision = self.upload(number) if kind == UPLOAD else self.deadline(number)
        for group in sorted(set(self.schedule.groups) - known):
            self.push(self.schedule.groups[group].latest_s, DEADLINE, group)
        return decision

    def upload(self, client):
        task, base, sent = self.tasks.pop(client)
        self.uploads[client] += 1
        elapsed = self.now - sent
        compute = elapsed - self.link_s if self.separate_links else None
        self.schedule, decision = on_upload(
            self.schedule, self.rules, client, self.now, elapsed, task.local_steps, compute
        )
        if decision.arrival is Arrival.FIRST:
            self.apply([(client, base)])
        elif decision.arrival is Arrival.LATE:
            self.late.append((client, base))
        else:
            self.buffers.setdefault(decision.group, []).append((client, base))
            self.waiting_since[client] = self.now
        return self.act(decision)

    def deadline(self, group):
        self.schedule, decision = on_deadline(self.schedule, self.rules, group, self.now)
        return self.act(decision)

    def act(self, decision):
        if decision.aggregate is not None:
            used, self.late = self.late + self.buffers.pop(decision.aggregate), []
            self.apply(used)
        for task in decision.tasks:
            self.send(task)
            self.log.append((round(self.now, 6), task.client, task.local_steps, task.group))
        return decision

    def apply(self, used):
        self.applied.append([(client, self.version - base) for client, base in used])
        self.version += 1

    def run(self, events):
        for _ in range(events):
            yield self.step()


def test_two_clients_follow_the_worked_example_exactly():
    """Step times of 1 and 4 seconds, Qmin 20, Qmax 100, lambda 1.5, worked through by hand."""
    federation = Federation(RULES, [1.0, 4.0]).begin()
    for _ in federation.run(7):
        pass
    assert federation.log[:6] == [
        (20, 0, 100, 0),      # founds group 0
        (80, 1, 47, 1),       # 10 steps until 120 are too few: founds group 1, to finish as client 0 would next
        (120, 0, 100, 2),     # 148 steps until 268 are too many, and so are 642: a full task
        (220, 0, 48, 1),      # joins group 1
        (268, 0, 100, 3),     # both arrive, one aggregation; the faster one is served first
        (268, 1, 25, 3),
    ]
    assert federation.applied == [[(0, 0)], [(1, 1)], [(0, 1)], [(0, 0)], [(0, 0), (1, 2)]]
    assert federation.schedule.groups[3] == Group(expected_s=368.0, latest_s=418.0, expecting=(0, 1))


def test_the_worked_example_s_deadlines_are_those_worked_out_by_hand():
    federation = Federation(RULES, [1.0, 4.0]).begin()
    seen = {}
    for _ in federation.run(6):
        for number, group in federation.schedule.groups.items():
            seen.setdefault(number, (group.expected_s, group.latest_s))
    assert [seen[number] for number in range(3)] == [(120.0, 170.0), (268.0, 362.0), (220.0, 270.0)]


def test_a_single_client_is_always_alone_in_a_full_length_group():
    federation = Federation(RULES, [0.3]).begin()
    for _ in federation.run(30):
        pass
    assert {task[2] for task in federation.log} == {100}
    assert all(used == [(0, 0)] for used in federation.applied)


@pytest.mark.parametrize("seconds_per_step", [0.1, 0.3, 1.0, 7.7e-3])
def test_equal_clients_share_one_group_after_their_first_task(seconds_per_step):
    rules = replace(RULES, min_local_steps=50, max_local_steps=50, initial_steps=50)
    federation = Federation(rules, [seconds_per_step] * 7, now=1e6).begin()
    for _ in federation.run(7 * 40):
        pass
    first, second, *others = federation.applied[7:]
    assert federation.applied[:7] == [[(client, client)] for client in range(7)]
    assert second == [(client, 0) for client in range(7)] == others[0] == others[-1]
    assert [client for client, _ in first] == list(range(7))


def test_speeds_within_the_ratio_of_the_step_limits_merge_into_one_group():
    """Expected of the method rather than proved, so these are examples."""
    for step_times in ([1.0, 4.0], [1.0, 1.5, 2.5, 4.5], [0.2, 0.31, 0.43, 0.55, 0.9], [3.0, 1.0, 2.0]):
        federation = Federation(RULES, step_times).begin()
        for _ in federation.run(60 * len(step_times)):
            pass
        assert len(federation.schedule.open_groups()) == 1
        assert sorted(federation.applied[-1]) == [(client, 0) for client in range(len(step_times))]


def schedule_of(groups, clients):
    return Schedule(clients, groups, len(groups))


def test_joining_prefers_the_group_with_most_steps():
    groups = {0: Group(30.0, 45.0, (1,)), 1: Group(60.0, 90.0, (2,)), 2: Group(200.0, 300.0, (3,))}
    clients = {number: Client(1.0, group=number - 1) for number in (1, 2, 3)} | {0: Client(1.0)}
    assert join(schedule_of(groups, clients), RULES, 0, now=0.0) == (1, 60)


def test_joining_takes_the_group_created_last_among_equals():
    groups = {number: Group(50.0, 75.0, (number + 1,)) for number in range(3)}
    clients = {number: Client(1.0) for number in range(4)}
    assert join(schedule_of(groups, clients), RULES, 0, now=0.0) == (2, 50)


def test_nobody_joins_a_closed_group():
    groups = {0: Group(50.0, 75.0, (1,), closed=True)}
    assert join(schedule_of(groups, {0: Client(1.0), 1: Client(1.0)}), RULES, 0, now=0.0) is None


def test_a_client_as_fast_as_the_founder_gets_the_founder_s_steps_in_spite_of_rounding():
    speed, now = 0.37476142718102057, 9.02660034547914
    groups = {0: Group(now + 100 * speed, now + 150 * speed, (1,))}
    clients = {0: Client(speed), 1: Client(speed)}
    assert (groups[0].expected_s - now) / speed < 100
    assert join(schedule_of(groups, clients), RULES, 0, now) == (0, 100)


def test_a_founder_with_too_little_time_still_gets_the_fewest_steps():
    groups = {0: Group(10.0, 15.0, (1,))}
    clients = {0: Client(10.0), 1: Client(0.1)}
    assert create(schedule_of(groups, clients), RULES, 0, now=5.0) == 20


def test_a_founder_does_not_plan_with_a_group_that_is_past_its_deadline():
    groups = {0: Group(10.0, 15.0, (1,))}
    clients = {0: Client(1.0), 1: Client(0.2)}
    assert create(schedule_of(groups, clients), RULES, 0, now=14.0) == 21
    assert create(schedule_of(groups, clients), RULES, 0, now=15.0) == 100


def test_a_founder_plans_with_members_that_have_arrived_already():
    groups = {0: Group(10.0, 15.0, (1,), arrived=(2,))}
    clients = {0: Client(1.0), 1: Client(9.0), 2: Client(0.2)}
    assert create(schedule_of(groups, clients), RULES, 0, now=0.0) == 35


def test_the_speed_is_a_moving_average_of_seconds_per_step():
    record = measure(Client(), RULES, 10.0, 10.0, 20, None)
    assert (record.seconds_per_step, record.measured_s, record.last_steps, record.total_steps) == (0.5, 10.0, 20, 20)
    record = measure(record, RULES, 60.0, 50.0, 50, None)
    assert record.seconds_per_step == pytest.approx(0.1 * 0.5 + 0.9 * 1.0)
    assert (record.last_steps, record.total_steps) == (50, 70)


def test_the_speed_uses_the_steps_that_were_really_done():
    assert measure(Client(), RULES, 8.0, 8.0, 4, None).seconds_per_step == 2.0


def test_work_without_measurable_time_keeps_a_positive_speed():
    assert measure(Client(), RULES, 0.0, 0.0, 20, None).seconds_per_step == SHORTEST_STEP_S
    assert measure(Client(), RULES, 0.0, 0.0, 0, None).seconds_per_step == SHORTEST_STEP_S


def test_link_time_is_kept_apart_from_the_speed_when_training_time_is_known():
    record = measure(Client(), RULES, 12.0, 12.0, 20, 10.0)
    assert (record.seconds_per_step, record.link_s) == (0.5, 2.0)
    assert record.task_seconds(100) == 52.0
    assert record.steps_until(52.0) == 100


def test_an_arrival_at_the_deadline_is_in_time_and_one_after_it_is_late():
    group = Group(10.0, 15.0, (0, 1))
    schedule = schedule_of({0: group}, {0: Client(0.1, group=0), 1: Client(0.1, group=0)})
    assert on_upload(schedule, RULES, 0, 15.0, 15.0, 100)[1] == Decision(Arrival.IN_TIME, 0)
    after, decision = on_upload(schedule, RULES, 0, 15.001, 15.001, 100)
    assert decision.arrival is Arrival.LATE and decision.aggregate is None
    assert [task.client for task in decision.tasks] == [0]
    assert after.groups[0].expecting == (1,)


def test_a_deadline_with_nobody_there_closes_the_group_and_makes_its_members_late():
    schedule = schedule_of({0: Group(10.0, 15.0, (0,))}, {0: Client(0.1, group=0)})
    schedule, decision = on_deadline(schedule, RULES, 0, 15.0)
    assert decision == Decision()
    assert schedule.groups[0].closed
    schedule, decision = on_upload(schedule, RULES, 0, 16.0, 16.0, 100)
    assert decision.arrival is Arrival.LATE
    assert 0 not in schedule.groups and schedule.clients[0].group == 1


def test_a_deadline_releases_those_who_wait_and_keeps_the_late_ones_in_a_closed_group():
    clients = {0: Client(0.2, group=0), 1: Client(0.1, group=0), 2: Client(0.3, group=0)}
    schedule = schedule_of({0: Group(10.0, 15.0, (2,), arrived=(0, 1))}, clients)
    schedule, decision = on_deadline(schedule, RULES, 0, 15.0)
    assert decision.aggregate == 0
    assert [task.client for task in decision.tasks] == [1, 0]    # the fastest first
    assert schedule.groups[0] == Group(10.0, 15.0, (2,), closed=True)


def test_equally_fast_clients_are_served_by_partition():
    clients = {number: Client(0.1, group=0) for number in (3, 1, 2)}
    schedule = schedule_of({0: Group(10.0, 15.0, (2,), arrived=(3, 1))}, clients)
    _, decision = on_upload(schedule, RULES, 2, 10.0, 10.0, 100)
    assert [task.client for task in decision.tasks] == [1, 2, 3]


def test_a_deadline_of_a_group_that_is_gone_does_nothing():
    assert on_deadline(Schedule(), RULES, 7, 15.0) == (Schedule(), Decision())


def test_the_last_expected_client_s_absence_releases_those_who_wait():
    clients = {0: Client(0.1, group=0), 1: Client(0.1, group=0)}
    schedule = schedule_of({0: Group(10.0, 15.0, (1,), arrived=(0,))}, clients)
    schedule, decision = on_absence(schedule, RULES, 1, 12.0)
    assert decision.aggregate == 0 and [task.client for task in decision.tasks] == [0]
    assert schedule.clients[1].group is None


def test_the_absence_of_a_group_s_only_client_removes_the_group():
    schedule = schedule_of({0: Group(10.0, 15.0, (0,))}, {0: Client(0.1, group=0)})
    schedule, decision = on_absence(schedule, RULES, 0, 5.0)
    assert decision == Decision() and schedule.groups == {}


def test_the_absence_of_a_client_that_waits_leaves_the_others_waiting():
    clients = {0: Client(0.1, group=0), 1: Client(0.1, group=0)}
    schedule = schedule_of({0: Group(10.0, 15.0, (1,), arrived=(0,))}, clients)
    schedule, decision = on_absence(schedule, RULES, 0, 12.0)
    assert decision == Decision()
    assert schedule.groups[0] == Group(10.0, 15.0, (1,))


def test_the_absence_of_a_late_client_only_empties_its_closed_group():
    schedule = schedule_of({0: Group(10.0, 15.0, (0,), closed=True)}, {0: Client(0.1, group=0)})
    assert on_absence(schedule, RULES, 0, 20.0)[0].groups == {}


def test_the_absence_of_a_client_without_a_group_changes_nothing():
    assert on_absence(Schedule(), RULES, 3, 1.0) == (Schedule(), Decision())
    schedule = Schedule({3: Client()})
    assert on_absence(schedule, RULES, 3, 1.0) == (schedule, Decision())


def test_a_silent_client_is_struck_after_the_absence_and_its_update_is_late_all_the_same():
    rules = replace(RULES, absence_s=100.0)
    schedule = schedule_of({0: Group(10.0, 15.0, (0,), closed=True)}, {0: Client(0.1, group=0)})
    assert strike_silent(schedule, rules, 115.0) is schedule
    schedule = strike_silent(schedule, rules, 115.1)
    assert schedule.groups == {}
    _, decision = on_upload(schedule, rules, 0, 200.0, 200.0, 100)
    assert decision.arrival is Arrival.LATE


def test_open_groups_are_never_struck():
    schedule = schedule_of({0: Group(10.0, 15.0, (0,))}, {0: Client(0.1, group=0)})
    assert strike_silent(schedule, replace(RULES, absence_s=1.0), 1e9) is schedule


def test_a_client_that_returns_soon_keeps_its_speed_and_one_that_returns_late_does_not():
    rules = replace(RULES, absence_s=100.0)
    schedule = Schedule({0: Client(0.5, 0.1, measured_s=10.0, total_steps=70)})
    kept, task = start(schedule, rules, 0, 110.0)
    assert kept.clients[0].seconds_per_step == 0.5 and (task.local_steps, task.group) == (20, None)
    forgotten, _ = start(schedule, rules, 0, 110.1)
    assert forgotten.clients[0] == Client(measured_s=10.0, total_steps=70)


def test_a_schedule_survives_being_written_down():
    federation = Federation(RULES, [1.0, 4.0, 2.2]).begin()
    for _ in federation.run(25):
        state = federation.schedule.state()
        assert Schedule.from_state(state) == federation.schedule
        assert list(Schedule.from_state(state).groups) == list(federation.schedule.groups)


def test_an_event_leaves_the_schedule_it_was_given_untouched():
    federation = Federation(RULES, [1.0, 4.0]).begin()
    for _ in federation.run(10):
        pass
    before, state = federation.schedule, federation.schedule.state()
    for _ in federation.run(10):
        pass
    assert before.state() == state


@pytest.mark.parametrize("separate", [False, True])
def test_estimating_link_times_predicts_arrivals_when_the_number_of_steps_changes(separate):
    """Elapsed time / Q charges the 10 s on the link to the steps: wrong as soon as the next task has another length."""
    federation = Federation(RULES, [0.1, 0.25, 0.4], link_s=10.0, separate_links=separate).begin()
    errors = []
    for decision in federation.run(60):
        for task in decision.tasks:
            predicted = federation.schedule.clients[task.client].task_seconds(task.local_steps)
            errors.append(abs(predicted - (10.0 + task.local_steps * federation.step_times[task.client])))
    assert (max(errors) < 1e-9) if separate else (max(errors) > 10.0)


speeds = lists(floats(0.01, 10.0), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    step_times=speeds, fewest=integers(1, 30), more=integers(0, 80), slack=floats(1.01, 3.0),
    momentum=floats(0.05, 1.0), link_s=floats(0, 5.0), separate=booleans(), draws=data(),
)
def test_invariants_hold_at_every_event(step_times, fewest, more, slack, momentum, link_s, separate, draws):
    """Steps within bounds, every upload applied once or buffered, one place per client, nobody waits too long."""
    rules = Rules(fewest, fewest + more, slack, momentum, draws.draw(integers(fewest, fewest + more)))
    clients = len(step_times)
    delays = draws.draw(lists(floats(0.2, 5.0), min_size=1, max_size=17))
    federation = Federation(
        rules, step_times, link_s=link_s, separate_links=separate,
        jitter=lambda client, index: delays[(client * 7 + index) % len(delays)],
    ).begin()
    for _ in federation.run(25 * clients):
        for task, base, _ in federation.tasks.values():
            assert rules.min_local_steps <= task.local_steps <= rules.max_local_steps
            assert base <= federation.version
        buffered = len(federation.late) + sum(map(len, federation.buffers.values()))
        assert sum(federation.uploads.values()) == sum(map(len, federation.applied)) + buffered
        assert federation.version == len(federation.applied)
        assert all(staleness >= 0 for used in federation.applied for _, staleness in used)
        check_places(federation)
        for client, since in federation.waiting_since.items():
            group = federation.schedule.groups[federation.schedule.clients[client].group]
            assert since <= group.latest_s and federation.now <= group.latest_s
    used_by = [Counter(client for client, _ in used) for used in federation.applied]
    for used, counts in zip(federation.applied, used_by, strict=True):
        if max(counts.values()) == 1:
            assert sum((1 + staleness) ** -0.5 / clients for _, staleness in used) <= 1 + 1e-12


def check_places(federation):
    """Every client works or waits, and is expected or has arrived in at most one group: its own."""
    places = Counter(
        member for group in federation.schedule.groups.values() for member in (*group.expecting, *group.arrived)
    )
    assert all(count == 1 for count in places.values())
    for client, record in federation.schedule.clients.items():
        waits = any(client in group.arrived for group in federation.schedule.groups.values())
        assert waits == (client in federation.waiting_since) == (client not in federation.tasks)
        if places[client]:
            assert client in (*(group := federation.schedule.groups[record.group]).expecting, *group.arrived)
    for number, group in federation.schedule.groups.items():
        assert group.expecting or group.arrived
        assert len(federation.buffers.get(number, [])) == len(group.arrived)
        assert not (group.closed and group.arrived)


@settings(max_examples=60, deadline=None)
@given(step_times=lists(floats(0.01, 10.0), min_size=2, max_size=6), draws=data())
def test_invariants_hold_when_clients_fail_and_return(step_times, draws):
    """Uploads of absent clients never come; those who wait are released all the same, and nothing is lost."""
    federation = Federation(RULES, step_times).begin()
    for _ in range(12 * len(step_times)):
        if federation.tasks and draws.draw(integers(0, 4)) == 0:
            client = draws.draw(integers(0, len(step_times) - 1))
            lose(federation, client)
        elif federation.queue:
            federation.step()
        buffered = len(federation.late) + sum(map(len, federation.buffers.values()))
        assert sum(federation.uploads.values()) == sum(map(len, federation.applied)) + buffered
        check_places(federation)


def lose(federation, client):
    """The client disappears, with its task or while it waits, and is back at once with a first task."""
    federation.queue = [entry for entry in federation.queue if entry[1:3] != (UPLOAD, client)]
    heapq.heapify(federation.queue)
    federation.tasks.pop(client, None)
    federation.waiting_since.pop(client, None)
    known = set(federation.schedule.groups)
    for number, updates in federation.buffers.items():
        federation.late += [update for update in updates if update[0] == client]
        federation.buffers[number] = [update for update in updates if update[0] != client]
    federation.schedule, decision = on_absence(federation.schedule, RULES, client, federation.now)
    federation.act(decision)
    federation.schedule, task = start(federation.schedule, RULES, client, federation.now)
    federation.send(task)
    for group in sorted(set(federation.schedule.groups) - known):
        federation.push(federation.schedule.groups[group].latest_s, DEADLINE, group)


def test_assigning_puts_the_client_into_the_group_it_was_given():
    schedule, task = assign(Schedule({0: Client(0.1)}), RULES, 0, 5.0)
    assert (task.local_steps, task.group) == (100, 0)
    assert schedule.groups == {0: Group(15.0, 20.0, (0,))}
    assert (schedule.next_group, schedule.clients[0].group) == (1, 0)
