"""The generators that everybody shares: fedcore never draws from them, but other people's code does."""
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators; afterwards those on the CPU are where they were before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not `torch.manual_seed`: without a GPU in use it notes each call, with its stack, for the day when one is.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
