"""What every test stands on: Flower quiet and offline, its messages usable, one thread per process."""
import ast
import gc
import os
from functools import wraps
from pathlib import Path
from typing import Any

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


def quietly(parse: Any) -> Any:
    """Return `ast.parse` without the garbage collector in it.

    CPython 3.11 fails ("recursion depth mismatch") where a finalizer that the collector runs meanwhile parses too, as
    that of a task does whose error nobody asked for: it logs a traceback. pytest parses to show a failed test, and
    would end with an internal error instead.
    """
    @wraps(parse)
    def without_collector(*arguments: Any, **options: Any) -> ast.AST:
        collects = gc.isenabled()
        gc.disable()
        try:
            return parse(*arguments, **options)
        finally:
            if collects:
                gc.enable()

    return without_collector


ast.parse = quietly(ast.parse)

# Where real processes, sockets and clocks take part, a machine that is busy with something else can be too slow: there
# a failure has to repeat to count; each is shown in the end, and worth a look: some were no slowness. The bad nights of
# tests/faults are not among them: each of their failures counts.
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
