"""A server with large models holds as few of them as it can: one step takes the memory of one model more."""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fedcore.strategies.fedasync import add_update, mix_model
from fedcore.strategies.fedbuff import Buffer, add, server_step
from fedcore.strategies.fedcompass import weighted_sum

SIZE = 100_000


def vectors(count: int) -> list[Tensor]:
    return [torch.full((SIZE,), 0.5 + index) for index in range(count)]


STEPS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "mix_model": lambda params, other: mix_model(params, other, 0.3),
    "add_update": lambda params, other: add_update(params, other, 0.3),
    "add to a buffer": lambda total, update: add(Buffer(total, 1), update, 0.5),
    "server_step": lambda params, total: server_step(params, total, 4, 0.7),
    "weighted_sum": lambda first, second: weighted_sum([first, second], [0.5, 0.25]).add_(first),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_the_memory_of_one_model_more_and_changes_nothing_it_was_given(name):
    first, second = vectors(2)
    before = first.clone(), second.clone()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        STEPS[name](first, second)
    taken = sum(size for event in watched.events() if (size := event.self_cpu_memory_usage) >= SIZE)
    assert abs(taken - 4 * SIZE) < 1000
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
