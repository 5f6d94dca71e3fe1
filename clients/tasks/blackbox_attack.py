"""Black-box adversarial examples: one image, changed a little, against the classifiers of several clients."""
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.blackbox import BlackBoxTask
from fedcore.clients.data import Samples
from fedcore.clients.models import check_model
from fedcore.clients.modules import seeded_torch
from fedcore.clients.task import Site
from fedcore.clients.tasks.files import existing
from fedcore.clients.tasks.images import CLASSES, Mnist
from fedcore.errors import BadInput, InvalidSetting
from fedcore.seeds import derive_seed, numpy_generator, torch_generator

BATCH_SIZE, LEARNING_RATE = 64, 2e-3
BRIGHTEST = 255.0
SHAPE = (1, 28, 28)
# Test images that are looked through for some that the clients together classify rightly.
SCREENED = 1000


class Attack(BlackBoxTask):
    """Minimise the mean over the clients of the margin by which the true class wins.

    Every client has a classifier of its own, trained on the spot on some of the classes, and answers a query with its
    margin for the changed image: true class less best other (untargeted), or best other less target (targeted). The
    attack succeeds where the mean margin is below zero. Nobody sees a gradient.

    Args:
        path: MNIST, an `.npz` archive or a folder with the four IDX files.
        image: which of the test images that the unchanged clients together classify rightly; from 0.
        size: at most so much is added to or taken from a pixel between 0 and 1.
        classes_per_client: classes that each client's training images are of, from 2 to 10.
        train_steps: batches of 64 that each classifier is trained on.
        model: name of the classifier, alone or under `name` among its settings.
        targeted: make it the next class rather than any other.
        budget, retries, timeout_s: as for every black box.

    Source: Shu, Lin, Dai and Low, 2023, arXiv:2308.04077, section 6.2.
    """

    metric_names = ("loss", "success", "fooled_share")
    batched = True

    def __init__(
        self, path: Path | None = None, image: int = 0, size: float = 0.3, classes_per_client: int = 8,
        train_steps: int = 200, model: str | dict[str, Any] = "cnn", targeted: bool = False, budget: int | None = None,
        retries: int = 0, timeout_s: float | None = None, num_clients: int = 5, seed: int = 0,
    ):
        if not 0 < size <= 1:
            raise InvalidSetting("size", size, "above 0 and at most 1")
        if not 2 <= classes_per_client <= CLASSES:
            raise InvalidSetting("classes_per_client", classes_per_client, f"from 2 to {CLASSES}")
        for name, value, least in (("image", image, 0), ("train_steps", train_steps, 1)):
            if value < least:
                raise InvalidSetting(name, value, f"at least {least}")
        super().__init__(int(np.prod(SHAPE)), (-size, size), budget, retries, timeout_s)
        check_model(model, SHAPE, CLASSES)
        self.mnist = Mnist(existing(path, "blackbox_attack", Mnist.advice), model)
        self.image, self.targeted, self.num_clients, self.seed = image, targeted, num_clients, seed
        self._training = (classes_per_client, train_steps)

    def evaluate_many(self, points: np.ndarray, site: Site) -> np.ndarray:
        if not isinstance(site, int) or not 0 <= site < self.num_clients:
            raise BadInput(f"The classifiers are those of clients 0 to {self.num_clients - 1}; there is no {site!r}.")
        return self._margins(self.classifiers[site], self._changed(points))

    def figures(self, point: np.ndarray) -> dict[str, float]:
        """Return whether the attack succeeds, and the share of the clients that it fools one by one."""
        images = self._changed(point[None])
        margins = [float(self._margins(net, images)[0]) for net in self.classifiers]
        return {"success": float(np.mean(margins) < 0), "fooled_share": float(np.mean([m < 0 for m in margins]))}

    @property
    def classifiers(self) -> list[nn.Module]:
        """The clients' networks, trained at first use and shared by all tasks of a process."""
        return trained(self.mnist, *self._training, self.num_clients, self.seed)

    @cached_property
    def original(self) -> tuple[Tensor, int]:
        """The image, pixels from 0 to 1, shape (1, 28, 28), and its class."""
        test = self.mnist.test_data()
        images, labels = test.inputs[:SCREENED], test.targets[:SCREENED]
        rescaled = self.mnist.rescale(images)
        margins = torch.stack([margin(scores(net, rescaled), labels, targeted=False) for net in self.classifiers])
        right = torch.nonzero(margins.mean(0) > 0)[:, 0]
        if self.image >= len(right):
            raise InvalidSetting("image", self.image, f"below {len(right)}",
                                 "So many test images are classified rightly before they are changed.")
        chosen = int(right[self.image])
        return images[chosen].double() / BRIGHTEST, int(labels[chosen])

    def _changed(self, points: np.ndarray) -> Tensor:
        pixels = self.original[0] + torch.from_numpy(points).reshape(-1, *SHAPE)
        return self.mnist.rescale((BRIGHTEST * pixels.clamp(0, 1)).float())

    def _margins(self, net: nn.Module, images: Tensor) -> np.ndarray:
        label = self.original[1]
        label = (label + 1) % CLASSES if self.targeted else label
        return margin(scores(net, images), torch.full((len(images),), label), self.targeted).double().numpy()


def scores(net: nn.Module, images: Tensor) -> Tensor:
    """Return a network's scores, shape (images, classes)."""
    with torch.no_grad():
        return net(images)


def margin(scores: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Return by how much the label wins over the best other class, or with `targeted` loses; shape (images,)."""
    rows = torch.arange(len(labels))
    own = scores[rows, labels]
    others = scores.clone()
    others[rows, labels] = -torch.inf
    lead = own - others.max(1).values
    return -lead if targeted else lead


_trained: dict[tuple[Any, ...], list[nn.Module]] = {}


def trained(mnist: Mnist, classes: int, steps: int, count: int, seed: int) -> list[nn.Module]:
    """Return the classifiers of `count` clients; the same ones when it is asked again."""
    key = (str(mnist._path), str(mnist._model), classes, steps, count, seed)
    if key not in _trained:
        _trained.clear()
        pool = mnist.training_data()
        _trained[key] = [train(mnist, pool, classes, steps, seed, client) for client in range(count)]
    return _trained[key]


@torch.enable_grad()    # whoever evaluates has switched gradients off
def train(mnist: Mnist, pool: Samples, classes: int, steps: int, seed: int, client: int) -> nn.Module:
    """Return one client's classifier, trained on images of some classes."""
    # Every class is somebody's: clients take turns in one shuffled row of classes.
    order = numpy_generator(seed, "attack classes").permutation(CLASSES)
    mine = torch.from_numpy(order[(client * classes + np.arange(classes)) % CLASSES])
    rows = torch.nonzero(torch.isin(pool.targets, mine))[:, 0]
    with seeded_torch(derive_seed(seed, client, "classifier"), torch.device("cpu")):
        net = mnist.model()
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    draws = torch_generator(seed, client, "classifier batches")
    for _ in range(steps):
        inputs, targets = pool.batch(rows[torch.randint(len(rows), (BATCH_SIZE,), generator=draws)])
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net.eval()
