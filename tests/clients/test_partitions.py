"""Who gets which examples."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.clients.partitions import ByKey, Classes, Contiguous, Dirichlet, DualDirichlet, Iid, Partition, Traits
from fedcore.errors import InvalidSetting


def traits_of(num_examples: int = 400, num_classes: int = 10, num_keys: int = 25, seed: int = 0) -> Traits:
    generator = np.random.default_rng(seed)
    return Traits(
        num_examples,
        labels=generator.permutation(np.arange(num_examples) % num_classes),
        keys=generator.permutation(np.arange(num_examples) % num_keys),
    )


PARTITIONERS = st.one_of(
    st.just(Iid()),
    st.just(Contiguous()),
    st.just(ByKey()),
    st.builds(Dirichlet, alpha=st.floats(1e-3, 1e3), min_examples=st.integers(1, 5)),
    st.builds(DualDirichlet, class_alpha=st.floats(1e-3, 1e3), size_alpha=st.floats(1e-2, 1e3)),
    st.builds(Classes, classes_per_client=st.integers(4, 10)),
)


@given(partitioner=PARTITIONERS, num_clients=st.integers(3, 25), seed=st.integers(0, 2**40))
def test_every_example_goes_to_exactly_one_client_and_nobody_is_left_without(partitioner, num_clients, seed):
    partition = partitioner.split(traits_of(), num_clients, seed)
    assert len(partition) == num_clients
    assert np.array_equal(np.sort(np.concatenate([partition[client] for client in range(num_clients)])), np.arange(400))
    assert partition.sizes.min() >= getattr(partitioner, "min_examples", 1)
    assert partition.sizes.tolist() == [len(partition[client]) for client in range(num_clients)]


@given(partitioner=PARTITIONERS, seed=st.integers(0, 2**40))
def test_a_partition_follows_from_the_seed(partitioner, seed):
    first, second = (partitioner.split(traits_of(), 8, seed) for _ in range(2))
    assert np.array_equal(first.order, second.order) and np.array_equal(first.starts, second.starts)


@pytest.mark.parametrize("partitioner", [Iid(), Dirichlet(0.5), DualDirichlet(1.0, 1.0), Classes(5)])
def test_another_seed_gives_another_partition(partitioner):
    assert not np.array_equal(partitioner.split(traits_of(), 8, 0).order, partitioner.split(traits_of(), 8, 1).order)


@given(num_examples=st.integers(1, 300), num_clients=st.integers(1, 300))
def test_equal_shares_differ_by_one_at_most(num_examples, num_clients):
    traits = Traits(num_examples)
    if num_clients > num_examples:
        with pytest.raises(InvalidSetting, match=f"at most {num_examples}"):
            Iid().split(traits, num_clients, 0)
        return
    for partitioner in (Iid(), Contiguous()):
        sizes = partitioner.split(traits, num_clients, 0).sizes
        assert sizes.max() - sizes.min() <= 1


def test_contiguous_shares_are_stretches_of_the_pool():
    assert np.array_equal(Contiguous().split(Traits(100), 7, 0).order, np.arange(100))


def shares(partition: Partition, labels: np.ndarray, num_classes: int = 10) -> np.ndarray:
    """Return each client's class frequencies, shape (clients, classes)."""
    rows = [np.bincount(labels[partition[client]], minlength=num_classes) for client in range(len(partition))]
    counts = np.stack(rows)
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("partitioner", [Dirichlet(1e6), DualDirichlet(1e6, 1e6)])
def test_a_huge_alpha_gives_everybody_the_same_mix_and_size(partitioner):
    traits = traits_of(10_000)
    partition = partitioner.split(traits, 10, 0)
    assert np.abs(shares(partition, traits.labels) - 0.1).max() < 0.01
    assert np.abs(partition.sizes - 1000).max() <= 20


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-300])
def test_a_tiny_alpha_gives_each_class_to_one_client(alpha):
    traits = traits_of(1000)
    partition = Dirichlet(alpha).split(traits, 5, 0)
    owners = [np.bincount(np.repeat(np.arange(5), partition.sizes)[np.argsort(partition.order)][traits.labels == label])
              for label in range(10)]
    # Clients that would have nothing are fed one example each: a class loses a handful at most.
    assert all(counts.max() >= 95 for counts in owners)


def test_a_tiny_class_alpha_leaves_sizes_to_the_size_alpha():
    traits = traits_of(10_000)
    mixed = shares(DualDirichlet(1e3, 1e3).split(traits, 10, 0), traits.labels)
    pure = shares(DualDirichlet(1e-2, 1e3).split(traits, 10, 0), traits.labels)
    assert mixed.max() < 0.2 and np.median(pure.max(axis=1)) > 0.5


@given(held=st.integers(1, 10), num_clients=st.integers(1, 30), seed=st.integers(0, 1000))
def test_each_client_holds_so_many_classes_and_each_class_is_held_equally_often(held, num_clients, seed):
    traits = traits_of(3000)
    if held * num_clients < 10:
        with pytest.raises(InvalidSetting, match="classes_per_client"):
            Classes(held).split(traits, num_clients, seed)
        return
    found = shares(Classes(held).split(traits, num_clients, seed), traits.labels) > 0
    assert (found.sum(axis=1) == held).all()
    times_held = found.sum(axis=0)
    assert times_held.max() - times_held.min() <= 1


@given(num_clients=st.integers(1, 25), seed=st.integers(0, 1000))
def test_an_owners_examples_stay_together_and_loads_are_even(num_clients, seed):
    traits = traits_of(1000, num_keys=25)
    partition = ByKey().split(traits, num_clients, seed)
    holders = np.repeat(np.arange(num_clients), partition.sizes)[np.argsort(partition.order)]
    assert all(len(set(holders[traits.keys == key])) == 1 for key in range(25))
    assert partition.sizes.max() - partition.sizes.min() <= 40


def test_as_many_clients_as_owners_get_one_each():
    traits = traits_of(1000, num_keys=25)
    partition = ByKey().split(traits, 25, 0)
    assert all(len(set(traits.keys[partition[client]])) == 1 for client in range(25))


@pytest.mark.parametrize(("partitioner", "traits", "num_clients", "words"), [
    (Iid(), Traits(3), 4, "clients.count=4, but it must be at most 3"),
    (Iid(), Traits(3), 0, "clients.count=0, but it must be at least 1"),
    (Dirichlet(0.1, min_examples=50), traits_of(400), 9, "at most 8"),
    (Dirichlet(0.1), Traits(10), 2, "have no classes"),
    (DualDirichlet(1.0, 1.0), Traits(10), 2, "have no classes"),
    (Classes(2), Traits(10), 2, "have no classes"),
    (Classes(11), traits_of(), 2, "at most 10"),
    (Classes(1), traits_of(), 9, "at least 2"),
    (ByKey(), Traits(10), 2, "no natural owner"),
    (ByKey(), traits_of(num_keys=5), 6, "at most 5"),
])
def test_a_partition_that_cannot_be_made_is_refused(partitioner, traits, num_clients, words):
    with pytest.raises(InvalidSetting, match=words):
        partitioner.split(traits, num_clients, 0)


def test_a_class_too_rare_for_its_holders_is_refused():
    labels = np.concatenate((np.zeros(100, dtype=int), [1]))
    with pytest.raises(InvalidSetting, match="would get no example"):
        Classes(1).split(Traits(101, labels=labels), 10, 0)


@pytest.mark.parametrize("make", [
    lambda: Dirichlet(0.0), lambda: Dirichlet(float("nan")), lambda: Dirichlet(float("inf")), lambda: Dirichlet(1.0, 0),
    lambda: DualDirichlet(-1.0, 1.0), lambda: DualDirichlet(1.0, 0.0), lambda: DualDirichlet(1.0, 1.0, 0),
    lambda: Classes(0),
])
def test_a_setting_out_of_range_is_refused(make):
    with pytest.raises(InvalidSetting):
        make()


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_an_empty_class_is_no_obstacle(seed):
    labels = 2 * (np.arange(200) % 4)      # classes 1, 3 and 5 have no example
    for partitioner in (Dirichlet(0.3), DualDirichlet(0.3, 1.0), Classes(2)):
        partition = partitioner.split(Traits(200, labels=labels), 6, seed)
        assert np.array_equal(np.sort(partition.order), np.arange(200)) and partition.sizes.min() >= 1


def test_a_hundred_thousand_clients_are_split_in_seconds():
    labels = np.arange(200_000) % 10
    partition = Dirichlet(0.3).split(Traits(200_000, labels=labels), 100_000, 0)
    assert partition.sizes.min() == 1 and partition.sizes.sum() == 200_000
