"""What every test stands on: Flower quiet and offline, its messages usable, one thread per process."""
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from fedcore.flower import adopt_identity

# How long an example takes depends on the machine, and no test asserts time.
settings.register_profile("fedcore", deadline=None, max_examples=60)
settings.load_profile("fedcore")


@pytest.fixture(autouse=True, scope="session")
def identity() -> None:
    """Let messages be made, and results not depend on the machine's cores."""
    adopt_identity()
    torch.set_num_threads(1)
