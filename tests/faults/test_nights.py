"""Bad nights: processes that are killed, held and restarted, links that drop; nothing may be lost or used twice."""
from collections.abc import Iterator

import pytest
from campaign import FAULTS, Night, Nursery, scenario

# Chosen so that together they contain every kind of fault.
SEEDS = (3, 5, 8, 9, 10, 11, 12, 15, 16, 22)


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
