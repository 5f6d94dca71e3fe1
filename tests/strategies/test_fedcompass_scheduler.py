"""FedCompass's scheduler alone: the pure functions, driven by a few lines of virtual clock."""
from dataclasses import replace

import pytest

from fedcore.strategies.compass_scheduler import (
    SHORTEST_STEP_S,
    Arrival,
    Client,
    Decision,
    Group,
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
from tests.strategies.compass_clock import RULES, Federation


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


def test_assigning_puts_the_client_into_the_group_it_was_given():
    schedule, task = assign(Schedule({0: Client(0.1)}), RULES, 0, 5.0)
    assert (task.local_steps, task.group) == (100, 0)
    assert schedule.groups == {0: Group(15.0, 20.0, (0,))}
    assert (schedule.next_group, schedule.clients[0].group) == (1, 0)
