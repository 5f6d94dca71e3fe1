"""Handwritten digits of 8 x 8 pixels, included in scikit-learn: real data, no download."""
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedcore.clients.data import Samples
from fedcore.clients.models import build_model, check_model
from fedcore.clients.partitions import Traits
from fedcore.clients.tasks.classification import Classification
from fedcore.errors import BadInput
from fedcore.seeds import numpy_generator

SHAPE = (1, 8, 8)
CLASSES = 10
TEST_SHARE = 0.2


class Digits(Classification):
    """1,797 digits, 1,438 to train on and 359 to test with; which is which never changes.

    Args:
        model: name of the model, alone or under `name` among its settings.

    Source: Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits, UCI (its test part).
    """

    def __init__(self, model: str | dict[str, Any] = "mlp"):
        check_model(model, SHAPE, CLASSES)
        self._model = model

    def model(self) -> nn.Module:
        """Return a fresh model of one image."""
        return build_model(self._model, SHAPE, CLASSES)

    def training_data(self, site: str | None = None) -> Samples:
        """Return the training examples."""
        _no_files(site)
        return _load()[0]

    def test_data(self, site: str | None = None) -> Samples:
        """Return the test examples."""
        _no_files(site)
        return _load()[1]

    def traits(self) -> Traits:
        """Return the training examples' classes."""
        labels = _load()[0].targets.numpy()
        return Traits(len(labels), labels=labels)


def _no_files(site: str | None) -> None:
    if site is not None:
        raise BadInput(f"The task digits has no file to read at {site!r}: its data come with scikit-learn.")


@lru_cache(maxsize=1)
def _load() -> tuple[Samples, Samples]:
    bunch = load_digits()
    # Pixels are counts from 0 to 16; centred and scaled to about unit range.
    images = torch.from_numpy((bunch.images.astype(np.float32) - 8) / 8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(numpy_generator(0, "digits").permutation(len(labels)))
    num_test = round(TEST_SHARE * len(labels))
    test, train = order[:num_test], order[num_test:]
    return Samples(images[train], labels[train]), Samples(images[test], labels[test])
