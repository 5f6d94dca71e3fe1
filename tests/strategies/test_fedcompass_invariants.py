"""What holds of FedCompass's scheduler at every event, whatever the speeds, delays, failures and returns."""
import heapq
from collections import Counter

from hypothesis import given, settings
from hypothesis.strategies import booleans, data, floats, integers, lists

from fedcore.strategies.compass_scheduler import Rules, on_absence, start
from tests.strategies.compass_clock import DEADLINE, RULES, UPLOAD, Federation

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
