"""Instances of a task's model, and the random numbers that they draw from torch's global generators."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedcore.clients.task import Task
from fedcore.seeds import derive_seed
from fedcore.vectors import FlatModule, Model

# The generators are the process's: two clients in one process would draw each other's numbers.
_turn = threading.RLock()


@contextmanager
def seeded_torch(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators (dropout, initial values) inside the block; outside nothing changes.

    Other threads wait before a block of theirs until this one ends.
    """
    on_gpu = device.type == "cuda"
    with _turn:
        before, before_on_gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        try:
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            yield
        finally:
            torch.set_rng_state(before)
            if before_on_gpu is not None:
                torch.cuda.set_rng_state(before_on_gpu, device)


def flat_module(task: Task, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> FlatModule:
    """Return a module of a task's, to load models into; its own initial values are the same in every process."""
    device = device or torch.device("cpu")
    with seeded_torch(derive_seed(0, "module"), torch.device("cpu")):
        return FlatModule(task.model().to(dtype).to(device))


def initial_model(task: Task, seed: int, dtype: torch.dtype = torch.float32) -> Model:
    """Return the model that a run starts from; it follows from the task and the seed."""
    with seeded_torch(derive_seed(seed, "initial model"), torch.device("cpu")):
        return Model.of(task.model().to(dtype))
