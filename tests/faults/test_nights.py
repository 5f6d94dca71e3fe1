"""Bad nights: processes that are killed, held and restarted, links that drop; nothing may be lost or used twice."""
from collections.abc import Iterator

import pytest
from campaign import FAULTS, Night, Nursery, scenario
from delivery import RepeatingLink

from tests.fedcore.transport.kit import Work, ask, deployed, seen, wait_for

# Chosen so that together they contain every kind of fault.
SEEDS = (4, 5, 9, 10, 13, 16, 22, 26, 33, 42)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_night_loses_nothing_and_repeats_nothing(nursery, tmp_path, seed):
    scenario(nursery, tmp_path, seed)


def test_every_fault_can_happen():
    assert all(callable(getattr(Night, fault)) for fault in FAULTS)


@pytest.mark.parametrize("size", [10, 1_500_000], ids=["small", "large"])
def test_replies_that_come_twice_and_again_long_after_are_counted_and_dropped(monkeypatch, size):
    monkeypatch.setattr("fedcore.transport.agent.Link", RepeatingLink)
    monkeypatch.setattr(RepeatingLink, "recorded", RepeatingLink.recorded.__class__(maxlen=8))
    with deployed(Work(), 2) as (grid, _):
        for number in range(3):
            replies = grid.send_and_receive([ask(node, number, size) for node in grid.get_node_ids()])
            assert [seen(reply) for reply in replies] == [list(range(number + 1))] * 2
        wait_for(lambda: grid.snapshot()["replays"] >= 3, "replays being noticed")
        assert grid.snapshot()["incidents"] == 0
