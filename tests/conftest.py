"""What every test stands on: Flower quiet and offline, its messages usable, one thread per process."""
import os
from pathlib import Path

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


# Where real processes, sockets and clocks take part, a machine that is busy with something else can be too slow: there
# a failure has to repeat to count. The bad nights of tests/faults are not among them: each of their failures counts.
REAL = tuple(Path(__file__).parent / folder for folder in (
    "deploy", "docs", "fedcore/superlink", "fedcore/tls", "fedcore/transport"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests with real processes fail twice before they fail."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in REAL):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True, scope="session")
def identity() -> None:
    """Let messages be made, and results not depend on the machine's cores."""
    adopt_identity()
    torch.set_num_threads(1)
