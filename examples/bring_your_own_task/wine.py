"""A task that a user could have written: four wineries classify their wines together.

A task is a plain class with the methods below; nothing needs to be inherited. The data are scikit-learn's wine table
(178 wines, 13 chemical measurements, 3 cultivars).
"""
from collections.abc import Mapping

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset


class Wine:
    """Which cultivar is it?

    Args:
        hidden: width of the hidden layer.
        wineries: how many sites the data are split into, round robin; `clients.count` must not be more.
    """

    def __init__(self, hidden: int = 32, wineries: int = 4):
        self.hidden, self.wineries = hidden, wineries
        table = load_wine()
        parts = train_test_split(table.data, table.target, test_size=0.3, random_state=0, stratify=table.target)
        scaler = StandardScaler().fit(parts[0])
        self.train_set = tensors(scaler.transform(parts[0]), parts[2])
        self.test_set = tensors(scaler.transform(parts[1]), parts[3])

    def model(self) -> nn.Module:
        """Return a fresh model."""
        return nn.Sequential(nn.Linear(13, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 3))

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return nn.functional.cross_entropy(model(inputs), targets)

    def data(self, site: int) -> Dataset[tuple[Tensor, ...]]:
        """Return what one winery trains on: any map-style torch dataset will do."""
        return Subset(self.train_set, range(site, len(self.train_set), self.wineries))

    def validation_data(self, site: int) -> None:
        """Nothing is held back at the wineries: the server has test data."""

    def test_data(self) -> TensorDataset:
        """Return what the server evaluates on."""
        return self.test_set

    def metrics(self, model: nn.Module, data) -> Mapping[str, float]:  # type: ignore[no-untyped-def]
        """Return figures about a model, `loss` among them."""
        inputs, targets = data.batch(torch.arange(len(data)))
        scores = model(inputs)
        loss = nn.functional.cross_entropy(scores, targets)
        return {"loss": loss.item(), "accuracy": (scores.argmax(1) == targets).float().mean().item()}


def tensors(inputs: object, targets: object) -> TensorDataset:
    """Return a dataset of float32 inputs and integer targets."""
    return TensorDataset(torch.as_tensor(inputs, dtype=torch.float32), torch.as_tensor(targets, dtype=torch.int64))
