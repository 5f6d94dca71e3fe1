"""Finds the neighbours of these tests, wherever pytest was started."""
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults")]

from campaign import Nursery  # noqa: E402 (found by the line above)
from machines import Machines  # noqa: E402


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def machines(nursery, tmp_path) -> Iterator[Machines]:
    made = Machines(nursery, tmp_path)
    yield made
    made.close()
