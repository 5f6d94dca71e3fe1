"""Random numbers that follow from (seed, who, what for, how many before).

Nothing here has a state that must be saved: a run that is resumed asks for the same names and gets the same numbers,
on whichever process the work happens to land.
"""
from hashlib import blake2b

import numpy as np
import torch

# A name that contains the separator must not read as two names.
ESCAPES = {0x1B: "\x1b1", 0x1F: "\x1b2"}


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed for the purpose named by `parts`; equal on every machine and in every process."""
    names = [str(seed), *[f"{type(part).__name__[0]}{part}" for part in parts]]
    text = "\x1f".join(names)
    if text.count("\x1f") > len(parts) or "\x1b" in text:
        text = "\x1f".join(name.translate(ESCAPES) for name in names)
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded for the purpose named by `parts`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def numpy_generator(seed: int, *parts: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded for the purpose named by `parts`."""
    return np.random.default_rng(derive_seed(seed, *parts))
