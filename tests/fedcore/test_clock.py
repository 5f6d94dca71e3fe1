"""Any Flower grid, made eventful by asking it again and again; and virtual time's heap of events."""
import time

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clock import EventfulGrid, PolledGrid, WallClock
from fedcore.simulations.clock import COMPACT_ABOVE, EventHeap
from tests.support import ForeignGrid, Toy, train_request, vector_model

A, B, C = 2**63 + 11, 5, 2**40


@pytest.fixture
def pauses(monkeypatch):
    """Let pauses take no time, and note how long they would have been."""
    noted, clock = [], {"now": 0.0}

    def sleep(seconds):
        noted.append(seconds)
        clock["now"] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    return noted


def polled(membership, patience=3, **pauses):
    foreign = ForeignGrid(Toy(has_query=False)(), membership, patience)
    return PolledGrid(foreign, **pauses), foreign


def request(node_id):
    return train_request(vector_model(), node_id)


def test_the_wall_clock_counts_seconds_from_its_making(pauses):
    clock = WallClock()
    assert clock.now == 0.0
    time.sleep(2.5)
    assert clock.now == 2.5


def test_a_polled_grid_is_an_eventful_one(pauses):
    grid, foreign = polled({0: [A]})
    assert isinstance(grid, EventfulGrid) and not isinstance(foreign, EventfulGrid)


def test_node_ids_come_in_ascending_order(pauses):
    grid, _ = polled({0: [A, B, C]})
    assert grid.get_node_ids() == sorted([A, B, C])


def test_replies_become_events_once_they_are_there(pauses):
    grid, _ = polled({0: [A, B]})
    grid.get_node_ids()
    ids = grid.push_messages([request(A), request(77), request(B)])
    assert ids == ["m0", None, "m1"], "a node that is not there is refused"
    events = [grid.next_event(None), grid.next_event(None)]
    assert [event.kind for event in events] == ["reply", "reply"]
    assert [event.message.metadata.reply_to_message_id for event in events] == ["m0", "m1"]
    assert [event.node_id for event in events] == [A, B]


def test_error_replies_are_events_too(pauses):
    foreign = ForeignGrid(Toy(fails=(0,))(), {0: [A]})
    grid = PolledGrid(foreign)
    grid.get_node_ids()
    grid.push_messages([request(A)])
    assert grid.next_event(None).message.has_error()


def test_pauses_grow_to_the_longest_and_start_short_again(pauses):
    grid, _ = polled({0: [A]}, patience=8, shortest_pause_s=0.1, longest_pause_s=0.5)
    grid.get_node_ids()
    grid.push_messages([request(A)])
    grid.next_event(None)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5])
    pauses.clear()
    grid.push_messages([request(A)])
    grid.next_event(None)
    assert pauses[0] == pytest.approx(0.1)


def test_the_asked_for_moment_comes_exactly_and_never_late(pauses):
    grid, _ = polled({0: [A]}, shortest_pause_s=0.1, longest_pause_s=10.0)
    grid.get_node_ids()
    event = grid.next_event(1.0)
    assert (event.kind, event.at) == ("time", 1.0) and grid.now == pytest.approx(1.0)
    assert grid.next_event(0.5).kind == "time", "a moment that has passed is here"


def test_nodes_that_come_and_go_become_events(pauses):
    grid, _ = polled({0: [A, B], 3: [B, C], 6: [A, B, C]})
    assert grid.get_node_ids() == [B, A]
    events = [grid.next_event(None) for _ in range(3)]
    assert [(event.kind, event.node_id) for event in events] == [("leave", A), ("join", C), ("join", A)]


def test_somebody_elses_question_swallows_no_news(pauses):
    grid, _ = polled({0: [A], 1: [A, B], 2: [B]})
    grid.get_node_ids()
    grid.get_node_ids()    # a strategy samples its nodes
    grid.get_node_ids()
    events = [grid.next_event(None) for _ in range(2)]
    assert [(event.kind, event.node_id) for event in events] == [("join", B), ("leave", A)]


def test_a_reply_to_nothing_is_passed_on_to_be_refused(pauses):
    grid, foreign = polled({0: [A]}, patience=1)
    grid.get_node_ids()
    grid.push_messages([request(A)])
    other = Message(request(A).content, reply_to=request(A))
    pull = foreign.pull_messages
    foreign.pull_messages = lambda ids: [other, *pull(ids)]
    assert grid.next_event(None).message is other
    assert grid.next_event(None).message.metadata.reply_to_message_id == "m0"


# ---- virtual time ---------------------------------------------------------------------------------------------------


plans = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 1.5]), st.integers(-1, 2), st.integers(0, 2)), max_size=30)


def drain(heap):
    order = []
    while heap.next_at() is not None:
        order.append(heap.pop().item)
    return order


@given(plans)
def test_events_come_by_time_then_priority_then_tie_then_in_the_order_of_their_making(plan):
    heap = EventHeap()
    for index, key in enumerate(plan):
        heap.push(*key, index)
    assert drain(heap) == sorted(range(len(plan)), key=lambda index: (*plan[index], index))


@given(plans, st.sets(st.integers(0, 29)))
def test_cancelled_events_never_come(plan, cancelled):
    heap = EventHeap()
    entries = [heap.push(*key, index) for index, key in enumerate(plan)]
    for index in cancelled & set(range(len(plan))):
        heap.cancel(entries[index])
        heap.cancel(entries[index])
    left = [index for index in range(len(plan)) if index not in cancelled]
    assert len(heap) == len(left)
    assert [item for _, item in heap.items()] == left, "in the order of their making"
    assert drain(heap) == sorted(left, key=lambda index: (*plan[index], index))


def test_many_cancelled_events_take_no_room():
    heap = EventHeap()
    keep = heap.push(1e9, 0, 0, "kept")
    for _ in range(20):
        for entry in [heap.push(5.0, 0, 0, None) for _ in range(COMPACT_ABOVE)]:
            heap.cancel(entry)
    assert len(heap) == 1 and len(heap._heap) < 3 * COMPACT_ABOVE
    assert heap.next_at() == 1e9 and heap.pop() is keep


def test_cancelling_what_has_happened_does_not_upset_the_count():
    heap = EventHeap()
    first = heap.push(0.0, 0, 0, "a")
    heap.push(1.0, 0, 0, "b")
    heap.pop()
    heap.cancel(first)
    assert len(heap) == 1 and heap.next_at() == 1.0
