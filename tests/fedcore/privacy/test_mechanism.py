"""Clipping and noise: how far one record can move a mean, and that the noise is what it is said to be."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists, sampled_from

from fedcore.errors import InvalidSetting
from fedcore.privacy.mechanism import (
    CENTRAL,
    DISTRIBUTED,
    LOCAL,
    NEIGHBOURING,
    Tally,
    clipped_sum,
    mean_std,
    message_std,
    noise,
    secure_normal,
    sensitivity,
)
from fedcore.seeds import torch_generator

SLACK = 1 + 1e-5    # float32


@given(seed=integers(0, 10**6), size=integers(1, 20), clip=floats(0.01, 10), scale=floats(0.001, 1000))
def test_replacing_a_record_moves_the_sum_by_at_most_twice_the_clip_norm(seed, size, clip, scale):
    vectors = scale * torch.randn(size, 5, generator=torch_generator(seed))
    other = vectors.clone()
    other[seed % size] = 100 * torch.randn(5, generator=torch_generator(seed, "other"))
    moved = (clipped_sum(vectors, clip) - clipped_sum(other, clip)).norm()
    assert moved <= sensitivity(clip, 1, "replace-one") * SLACK + 1e-6 * size * clip


@given(value=sampled_from([math.nan, math.inf, -math.inf]), seed=integers(0, 100))
def test_a_record_that_is_not_finite_counts_as_zero(value, seed):
    vectors = torch.randn(6, 4, generator=torch_generator(seed))
    spoiled, without = vectors.clone(), vectors.clone()
    spoiled[3, 1] = value
    without[3] = 0
    tally = Tally()
    assert torch.equal(clipped_sum(spoiled, 0.5, tally), clipped_sum(without, 0.5))
    assert tally.dropped == 1 and tally.records == 6


def test_short_vectors_are_left_as_they_are():
    vectors = torch.randn(8, 3, dtype=torch.float64, generator=torch_generator(1))
    tally = Tally()
    assert torch.allclose(clipped_sum(vectors, 100.0, tally), vectors.sum(0), atol=1e-14)
    assert tally == Tally(8, 0, 0)


def test_the_relation_makes_a_factor_of_two():
    assert sensitivity(3.0, 10, "replace-one") == 2 * sensitivity(3.0, 10, "add-remove") == 0.6
    with pytest.raises(InvalidSetting, match="neighbouring"):
        sensitivity(1.0, 1, "swap")


@given(sizes=lists(integers(1, 500), min_size=1, max_size=9), neighbouring=sampled_from(NEIGHBOURING))
def test_shares_of_noise_add_up_to_the_central_law(sizes, neighbouring):
    shares = [message_std(DISTRIBUTED, 4.0, 2.0, size, sizes, neighbouring) for size in sizes]
    on_the_mean = math.sqrt(sum(share**2 for share in shares)) / len(sizes)
    assert on_the_mean == pytest.approx(mean_std(CENTRAL, 4.0, 2.0, sizes, neighbouring))


def test_colluding_clients_raise_everybodys_share():
    honest = message_std(DISTRIBUTED, 4.0, 2.0, 10, [10] * 8, "replace-one", colluding=2)
    assert honest**2 * 6 == pytest.approx(message_std(DISTRIBUTED, 4.0, 2.0, 10, [10] * 8, "replace-one") ** 2 * 8)


def test_local_noise_is_worse_by_the_root_of_the_clients():
    sizes = [50] * 16
    ratio = mean_std(LOCAL, 1.0, 1.0, sizes, "replace-one") / mean_std(CENTRAL, 1.0, 1.0, sizes, "replace-one")
    assert ratio == pytest.approx(4)
    assert message_std(CENTRAL, 1.0, 1.0, 50, sizes, "replace-one") == 0


@pytest.mark.parametrize("generator", [torch_generator(5), None], ids=["seeded", "secure"])
def test_noise_has_the_deviation_asked_for(generator):
    drawn = noise(0.3, torch.zeros(200_000), generator)
    assert drawn.std().item() == pytest.approx(0.3, rel=0.01)
    assert abs(drawn.mean().item()) < 0.01 and drawn.dtype is torch.float32


def test_secure_numbers_are_normal_and_never_the_same():
    first, second = secure_normal(100_000), secure_normal(100_000)
    assert (first != second).all()
    assert abs(first**3).mean() == pytest.approx(math.sqrt(8 / math.pi), rel=0.05)
    assert (first**4).mean() == pytest.approx(3, rel=0.08)
    assert abs((first[1:] * first[:-1]).mean()) < 0.02
