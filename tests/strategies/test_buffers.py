"""Blending of values that are not trained."""
import torch
from hypothesis import given
from hypothesis.strategies import floats, lists
from torch import Tensor

from fedcore.strategies.buffers import blend_buffers


def statistics(mean: float, count: int) -> dict[str, Tensor]:
    return {"mean": torch.tensor([mean], dtype=torch.float64), "count": torch.tensor(count)}


def test_weights_that_sum_to_one_give_the_weighted_mean():
    blended = blend_buffers(statistics(9.0, 1), [statistics(1.0, 5), statistics(3.0, 4)], [0.25, 0.75])
    assert blended["mean"].item() == 2.5


def test_a_small_weight_moves_that_share_of_the_way():
    assert blend_buffers(statistics(0.0, 1), [statistics(8.0, 2)], [0.25])["mean"].item() == 2.0


def test_weights_above_one_do_not_overshoot():
    assert blend_buffers(statistics(0.0, 1), [statistics(8.0, 2), statistics(4.0, 2)], [3.0, 1.0])["mean"].item() == 7.0


def test_counters_keep_the_largest_value_and_their_type():
    count = blend_buffers(statistics(0.0, 7), [statistics(1.0, 5), statistics(1.0, 6)], [0.5, 0.5])["count"]
    assert count.item() == 7 and count.dtype == torch.int64


def test_without_any_weight_the_old_values_stay():
    assert blend_buffers(statistics(2.0, 1), [statistics(8.0, 2)], [0.0])["mean"].item() == 2.0
    assert blend_buffers(statistics(2.0, 1), [], [])["mean"].item() == 2.0


@given(lists(floats(0.0, 5.0), min_size=1, max_size=6), floats(-10, 10), floats(-10, 10))
def test_a_blend_lies_between_the_old_and_the_new_value(weights, old, new):
    before = statistics(old, 1)
    blended = blend_buffers(before, [statistics(new, 1)] * len(weights), weights)["mean"].item()
    assert min(old, new) - 1e-9 <= blended <= max(old, new) + 1e-9
    assert before["mean"].item() == old
