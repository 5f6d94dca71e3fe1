"""What all tests of clients need."""
import pytest
import torch
from hypothesis import settings

from fedcore.flower import adopt_identity

# The first use of a part of torch takes as long as a thousand later ones: no deadline per example.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True, scope="session")
def outside_a_flower_run() -> None:
    """One thread, as clients have, and messages that need no SuperLink."""
    torch.set_num_threads(1)
    adopt_identity()
