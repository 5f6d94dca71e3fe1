"""Random numbers that follow from names alone."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.seeds import derive_seed, numpy_generator, torch_generator

tricky = st.sampled_from(["\x1f", "1", "i1", "s1", "a\x1fsb", "\x1b2"])
parts = st.lists(st.integers(-5, 5) | st.text(max_size=4) | tricky, max_size=4)


@given(st.integers(-2**70, 2**70), parts)
def test_a_seed_is_a_whole_number_of_63_bits(seed, names):
    assert 0 <= derive_seed(seed, *names) < 2**63


@given(st.integers(0, 3), parts, st.integers(0, 3), parts)
def test_other_names_give_other_seeds(seed, names, other_seed, other_names):
    same = (seed, [(type(part), part) for part in names]) == (
        other_seed, [(type(part), part) for part in other_names]
    )
    assert (derive_seed(seed, *names) == derive_seed(other_seed, *other_names)) == same


def test_a_name_with_the_separator_is_not_two_names():
    assert derive_seed(0, "a\x1fsb") != derive_seed(0, "a", "b")
    assert derive_seed(0, "a\x1b2sb") != derive_seed(0, "a\x1fsb")


def test_seeds_never_change():
    assert derive_seed(0) == 4761921975702974394
    assert derive_seed(7, 3, "train", 12) == 7540970715649387161


def test_numpy_numbers_name_what_their_values_name():
    assert derive_seed(np.int64(7), np.int64(3), "train") == derive_seed(7, 3, "train")


def test_generators_draw_the_same_in_another_process():
    code = (
        "from fedcore.seeds import numpy_generator, torch_generator; import torch\n"
        "drawn = torch.randn(3, generator=torch_generator(1, 'a', 2)).tolist()\n"
        "print(drawn, numpy_generator(1, 'a', 2).random(3).tolist())"
    )
    here = torch.randn(3, generator=torch_generator(1, "a", 2)).tolist(), numpy_generator(1, "a", 2).random(3).tolist()
    there = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert there.stdout.strip() == f"{here[0]} {here[1]}"


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.randn(3, generator=torch_generator(0, "x"))
    numpy_generator(0, "x").random()
    assert torch.equal(torch.get_rng_state(), before)
