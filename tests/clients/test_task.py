"""A pool of data as a task with sites."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clients.partitions import Dirichlet, Iid
from fedcore.clients.task import PartitionedTask, Task
from fedcore.clients.tasks.analytic import Logistic, Quadratic
from fedcore.clients.tasks.digits import Digits
from fedcore.clients.tasks.simulated import Simulated
from fedcore.errors import BadInput, InvalidSetting
from tests.clients.lab import LineTask


@pytest.mark.parametrize("task", [
    PartitionedTask(Digits(), Iid(), 3), Quadratic(), Logistic(), Simulated(), LineTask(),
])
def test_every_task_has_the_methods_of_a_task(task):
    assert isinstance(task, Task)


def rows(samples) -> list[int]:
    return [] if samples is None else samples.indices.tolist()


@given(num_clients=st.integers(1, 60), share=st.sampled_from([0.0, 0.1, 0.5, 0.9]), seed=st.integers(0, 2**40))
def test_what_is_held_back_is_not_trained_on_and_nothing_is_lost(num_clients, share, seed):
    task = PartitionedTask(Digits(), Dirichlet(0.3), num_clients, seed, share)
    everything = []
    for site in range(num_clients):
        trained, held_back = rows(task.data(site)), rows(task.validation_data(site))
        size = len(trained) + len(held_back)
        assert len(trained) >= 1
        if share and size > 1:
            assert len(held_back) == min(size - 1, max(1, round(share * size)))
        else:
            assert not held_back
        everything += trained + held_back
    assert sorted(everything) == list(range(1438))


def test_what_is_held_back_is_not_all_of_one_class():
    task = PartitionedTask(Digits(), Iid(), num_clients=2, validation_share=0.1)
    assert len(task.validation_data(0).all_targets().unique()) == 10


def test_a_site_is_a_view_of_the_shared_pool():
    task = PartitionedTask(Digits(), Iid(), num_clients=100)
    assert task.data(3).inputs is task.data(97).inputs is task.pool.training_data().inputs


def test_labels_count_what_is_trained_on():
    task = PartitionedTask(Digits(), Dirichlet(0.3), 10, validation_share=0.5)
    for site in range(10):
        assert sum(task.labels(site)) == len(task.data(site))


def test_the_partition_is_that_of_the_seed():
    one, same, other = (PartitionedTask(Digits(), Iid(), 5, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.partition.order, same.partition.order)
    assert not np.array_equal(one.partition.order, other.partition.order)


@pytest.mark.parametrize("site", [-1, 5])
def test_there_are_only_so_many_sites(site):
    with pytest.raises(BadInput, match=f"no client {site}.*clients.count=5"):
        PartitionedTask(Digits(), Iid(), 5).data(site)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_validation_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidSetting, match="validation_share"):
        PartitionedTask(Digits(), Iid(), 5, validation_share=share)


def test_a_site_with_a_path_has_its_own_file(tmp_path):
    from fedcore.clients.tasks.images import Mnist

    images = np.zeros((9, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=np.arange(9), x_test=images[:2], y_test=np.arange(2))
    own_labels = {"y_train": np.array([1, 1, 4]), "y_test": np.arange(0)}
    np.savez(tmp_path / "own.npz", x_train=images[:3], x_test=images[:0], **own_labels)
    task = PartitionedTask(Mnist(tmp_path / "all.npz"), Iid(), num_clients=3)
    own = str(tmp_path / "own.npz")
    assert len(task.data(own)) == 3 and task.labels(own) == [0, 2, 0, 0, 1]
    assert task.validation_data(own) is None
    assert torch.equal(task.validation_data(str(tmp_path / "all.npz")).all_targets(), torch.arange(2))
