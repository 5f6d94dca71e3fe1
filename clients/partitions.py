"""Who holds which examples: ways to split one pool of data among the clients of a simulation.

Every example goes to exactly one client, and every client gets at least one. A partition follows from the seed alone.
"""
import heapq
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedcore.errors import InvalidSetting
from fedcore.seeds import numpy_generator

PARTITION, COUNT = "clients.partition", "clients.count"


@dataclass(frozen=True, eq=False)
class Traits:
    """What a pool tells about its examples before they are split.

    Attributes:
        labels: class of each example, shape (num_examples,), from 0; None for regression.
        keys: number of the natural owner of each example (a speaker, a region), shape (num_examples,), from 0; None
            when the pool knows no owners.
    """

    num_examples: int
    labels: np.ndarray | None = None
    keys: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Partition:
    """The examples of each client.

    Attributes:
        order: example indices, those of client 0 first, ascending within a client, shape (num_examples,).
        starts: client `i` owns `order[starts[i]:starts[i + 1]]`, shape (clients + 1,).
    """

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, owner: np.ndarray, num_clients: int) -> "Partition":
        """Return the partition in which example `j` belongs to client `owner[j]`."""
        sizes = np.bincount(owner, minlength=num_clients)
        return cls(np.argsort(owner, kind="stable"), np.concatenate(([0], np.cumsum(sizes))))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        return self.order[self.starts[client]:self.starts[client + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, shape (clients,)."""
        return np.diff(self.starts)


class Partitioner(Protocol):
    """A way to split; its constructor's arguments are its settings in the experiment file."""

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition: ...


@dataclass(frozen=True)
class Iid:
    """Equal shares of the shuffled pool; sizes differ by one at most."""

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition:
        _check_count(traits, num_clients, 1)
        owner = np.arange(traits.num_examples) % num_clients
        return Partition.of(numpy_generator(seed, "partition").permutation(owner), num_clients)


@dataclass(frozen=True)
class Contiguous:
    """Equal shares of the pool as it lies, in one piece each: chapters of a text, days of a log."""

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition:
        _check_count(traits, num_clients, 1)
        return Partition.of(np.arange(traits.num_examples) * num_clients // traits.num_examples, num_clients)


@dataclass(frozen=True)
class Dirichlet:
    """Each class is divided in proportions drawn from a symmetric Dirichlet distribution over the clients.

    A large `alpha` gives everybody the same mix, a small one gives each class to few clients. Sizes differ too. Clients
    left with fewer than `min_examples` get some from the largest ones (the sources redraw everything until nobody is
    short, which never ends with many clients and a small `alpha`).

    Source: Hsu et al., 2019, arXiv:1909.06335, section 3; Li et al., 2021, arXiv:2102.02079, section IV.
    """

    alpha: float
    min_examples: int = 1

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)
        _check_min_examples(self.min_examples)

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition:
        labels = _labels(traits, "dirichlet")
        _check_count(traits, num_clients, self.min_examples)
        generator = numpy_generator(seed, "partition")
        owner = np.empty(traits.num_examples, dtype=np.int64)
        for label in range(labels.max() + 1):
            proportions = generator.dirichlet(np.full(num_clients, self.alpha))
            members = generator.permutation(np.flatnonzero(labels == label))
            owner[members] = _divide(len(members), proportions)
        return Partition.of(_feed(owner, num_clients, self.min_examples, generator), num_clients)


@dataclass(frozen=True)
class DualDirichlet:
    """Sizes and class mixes are drawn separately.

    A client's size is drawn from Dirichlet(`size_alpha`) over the clients, its class mix from
    Dirichlet(`class_alpha` x classes x prior) over the classes; each class is divided in proportion to size x mix.
    Large values: equal sizes, equal mixes. Clients left with fewer than `min_examples` get some from the largest ones.

    Source: Li et al., 2023, arXiv:2309.14675 (FedCompass), the dual Dirichlet partition of its experiments.
    """

    class_alpha: float
    size_alpha: float
    min_examples: int = 1

    def __post_init__(self) -> None:
        _check_positive("class_alpha", self.class_alpha)
        _check_positive("size_alpha", self.size_alpha)
        _check_min_examples(self.min_examples)

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition:
        labels = _labels(traits, "dual_dirichlet")
        _check_count(traits, num_clients, self.min_examples)
        generator = numpy_generator(seed, "partition")
        counts = np.bincount(labels)
        sizes = generator.dirichlet(np.full(num_clients, self.size_alpha))
        # A class without examples has no prior; the distribution is over those that exist.
        present = np.flatnonzero(counts)
        prior = counts[present] / counts.sum()
        mixes = generator.dirichlet(self.class_alpha * len(present) * prior, size=num_clients)
        owner = np.empty(traits.num_examples, dtype=np.int64)
        for column, label in enumerate(present):
            weights = sizes * mixes[:, column]
            total = weights.sum()
            proportions = weights / total if total > 0 else sizes
            members = generator.permutation(np.flatnonzero(labels == label))
            owner[members] = _divide(len(members), proportions)
        return Partition.of(_feed(owner, num_clients, self.min_examples, generator), num_clients)


@dataclass(frozen=True)
class Classes:
    """Each client holds `classes_per_client` classes; a class is shared equally by those who hold it.

    Classes are dealt out so that each is held equally often, give or take one.
    """

    classes_per_client: int

    def __post_init__(self) -> None:
        if self.classes_per_client < 1:
            raise InvalidSetting("classes_per_client", self.classes_per_client, "at least 1")

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition:
        labels = _labels(traits, "classes")
        present = np.unique(labels)
        held = self.classes_per_client
        if held > len(present):
            raise InvalidSetting(
                f"{PARTITION}.classes_per_client", held, f"at most {len(present)}", "The data has no more classes."
            )
        if held * num_clients < len(present):
            raise InvalidSetting(
                f"{PARTITION}.classes_per_client", held, f"at least {-(-len(present) // num_clients)}",
                f"{num_clients} clients with {held} each cannot hold all {len(present)} classes; or raise {COUNT}.",
            )
        _check_count(traits, num_clients, 1)
        generator = numpy_generator(seed, "partition")
        holders = self._deal(len(present), num_clients, generator)
        owner = np.empty(traits.num_examples, dtype=np.int64)
        for number, label in enumerate(present):
            members = generator.permutation(np.flatnonzero(labels == label))
            owner[members] = holders[number][np.arange(len(members)) % len(holders[number])]
        empty = np.flatnonzero(np.bincount(owner, minlength=num_clients) == 0)
        if len(empty):
            raise InvalidSetting(
                COUNT, num_clients, "small enough for the rarest class",
                f"Client {empty[0]} would get no example. Take fewer clients or more classes_per_client.",
            )
        return Partition.of(owner, num_clients)

    def _deal(self, num_classes: int, num_clients: int, generator: np.random.Generator) -> list[np.ndarray]:
        """Return the clients that hold each class."""
        times_held = np.zeros(num_classes, dtype=np.int64)
        hands = np.empty((num_clients, self.classes_per_client), dtype=np.int64)
        for client in range(num_clients):
            # The classes held least often so far, ties broken at random, keep the deal even.
            ranking = np.lexsort((generator.random(num_classes), times_held))
            hands[client] = ranking[:self.classes_per_client]
            times_held[hands[client]] += 1
        return [generator.permutation(np.flatnonzero((hands == number).any(axis=1))) for number in range(num_classes)]


@dataclass(frozen=True)
class ByKey:
    """Examples stay with their natural owner (a speaker, a region).

    With more owners than clients a client takes several, the largest owner always going to the client that has least.
    """

    def split(self, traits: Traits, num_clients: int, seed: int) -> Partition:
        if traits.keys is None:
            raise InvalidSetting(
                PARTITION, "by_key", "another one for this task",
                "Its examples have no natural owner. Use iid, dirichlet or classes.",
            )
        sizes = np.bincount(traits.keys)
        owners = np.flatnonzero(sizes)
        if len(owners) < num_clients:
            raise InvalidSetting(
                COUNT, num_clients, f"at most {len(owners)}", f"by_key finds {len(owners)} owners in the data."
            )
        owners = numpy_generator(seed, "partition").permutation(owners)
        owners = owners[np.argsort(-sizes[owners], kind="stable")]
        loads = [(0, client) for client in range(num_clients)]
        client_of = np.empty(len(sizes), dtype=np.int64)
        for key in owners:
            load, client = heapq.heappop(loads)
            client_of[key] = client
            heapq.heappush(loads, (load + int(sizes[key]), client))
        return Partition.of(client_of[traits.keys], num_clients)


def _divide(num_examples: int, proportions: np.ndarray) -> np.ndarray:
    """Return the owner of each of `num_examples` examples, shares rounded so that their sum is exact."""
    bounds = np.floor(np.cumsum(proportions) * num_examples + 1e-9).astype(np.int64)
    bounds[-1] = num_examples
    return np.searchsorted(bounds, np.arange(num_examples), side="right")


def _feed(owner: np.ndarray, num_clients: int, min_examples: int, generator: np.random.Generator) -> np.ndarray:
    """Return owners such that each client has `min_examples`, moving examples from whoever has most."""
    sizes = np.bincount(owner, minlength=num_clients)
    short = np.flatnonzero(sizes < min_examples)
    if not len(short):
        return owner
    owner = owner.copy()
    partition = Partition.of(owner, num_clients)
    hoards: dict[int, list[int]] = {}
    rich = [(-int(size), client) for client, size in enumerate(sizes) if size > min_examples]
    heapq.heapify(rich)
    for client in short:
        for _ in range(min_examples - sizes[client]):
            size, giver = heapq.heappop(rich)
            if giver not in hoards:
                hoards[giver] = generator.permutation(partition[giver]).tolist()
            owner[hoards[giver].pop()] = client
            if -size - 1 > min_examples:
                heapq.heappush(rich, (size + 1, giver))
    return owner


def _labels(traits: Traits, name: str) -> np.ndarray:
    if traits.labels is None:
        raise InvalidSetting(
            PARTITION, name, "another one for this task", "Its examples have no classes. Use iid, contiguous or by_key."
        )
    return traits.labels


def _check_count(traits: Traits, num_clients: int, min_examples: int) -> None:
    if num_clients < 1:
        raise InvalidSetting(COUNT, num_clients, "at least 1")
    if num_clients * min_examples > traits.num_examples:
        raise InvalidSetting(
            COUNT, num_clients, f"at most {traits.num_examples // min_examples}",
            f"There are {traits.num_examples} training examples, and each client needs {min_examples} or more.",
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InvalidSetting(name, value, "a finite number above 0", "0.1 is very uneven, 100 nearly even.")


def _check_min_examples(value: int) -> None:
    if value < 1:
        raise InvalidSetting("min_examples", value, "at least 1", "A client without data cannot train.")
