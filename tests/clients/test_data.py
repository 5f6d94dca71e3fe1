"""Examples, views of them, and the order in which they are visited."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from fedcore.clients.data import Samples, as_dataset, batches_per_pass, in_order, shuffled_batches
from fedcore.errors import BadInput


@given(num_examples=st.integers(1, 200), batch_size=st.integers(1, 64), seed=st.integers(0, 2**40))
def test_every_pass_visits_each_example_once(num_examples, batch_size, seed):
    batches = shuffled_batches(num_examples, batch_size, torch.Generator().manual_seed(seed))
    for _ in range(3):
        visited = torch.cat([next(batches) for _ in range(batches_per_pass(num_examples, batch_size))])
        assert visited.sort().values.tolist() == list(range(num_examples))


def test_passes_differ_in_their_order():
    batches = shuffled_batches(100, 100 - 1, torch.Generator().manual_seed(0))
    first, _, second = (next(batches) for _ in range(3))
    assert not torch.equal(first, second)


def test_a_dataset_of_one_batch_is_visited_as_it_lies():
    batches = shuffled_batches(5, 8, torch.Generator().manual_seed(0))
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2, 3, 4]] * 2


def test_a_view_of_a_view_is_a_view_of_the_whole():
    samples = Samples(torch.arange(10.0), torch.arange(10))
    view = samples.subset(torch.tensor([9, 3, 5, 7])).subset(torch.tensor([2, 0]))
    assert len(view) == 2 and view.inputs is samples.inputs
    assert view.batch(torch.tensor([0, 1]))[1].tolist() == [5, 9]
    assert view.all_targets().tolist() == [5, 9]


def test_a_transform_meets_the_inputs_of_a_batch_only():
    samples = Samples(torch.arange(4, dtype=torch.uint8), torch.arange(4), transform=lambda inputs: inputs.float() / 2)
    inputs, targets = samples.subset(torch.tensor([3, 1])).batch(torch.tensor([0]))
    assert inputs.tolist() == [1.5] and targets.tolist() == [3]


@pytest.mark.parametrize("bring", [
    lambda inputs, targets: Samples(inputs, targets),
    lambda inputs, targets: TensorDataset(inputs, targets),
    lambda inputs, targets: (inputs, targets),
    lambda inputs, targets: list(zip(inputs, targets, strict=True)),
])
def test_data_may_be_samples_a_torch_dataset_a_pair_of_tensors_or_a_list(bring):
    inputs, targets = torch.randn(7, 3), torch.arange(7)
    data = as_dataset(bring(inputs, targets))
    batches = list(in_order(data, batch_size=3))
    assert len(data) == 7 and [len(batch[0]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch[0] for batch in batches]), inputs)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), targets)


def test_something_else_is_refused():
    with pytest.raises(BadInput, match="int, which is no dataset"):
        as_dataset(7)


def test_inputs_without_targets_are_refused():
    with pytest.raises(BadInput, match="3 inputs but 2 targets"):
        Samples(torch.zeros(3), torch.zeros(2))
