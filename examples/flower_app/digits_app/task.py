"""The model and the data: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TEST_EXAMPLES = 360


def make_model(seed: int) -> nn.Module:
    """Return a small network, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@cache
def load_examples() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 64), scaled to [0, 1], and their labels, in an order that mixes the writers."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def load_partition(partition: int, num_partitions: int) -> TensorDataset:
    """Return the training examples of one client."""
    images, labels = load_examples()
    return TensorDataset(images[TEST_EXAMPLES + partition::num_partitions],
                         labels[TEST_EXAMPLES + partition::num_partitions])


def load_test_set() -> TensorDataset:
    """Return the examples that no client trains on."""
    images, labels = load_examples()
    return TensorDataset(images[:TEST_EXAMPLES], labels[:TEST_EXAMPLES])


def train(
    model: nn.Module, data: TensorDataset, epochs: int, lr: float, batch_size: int, seed: int
) -> tuple[float, int]:
    """Train in place; returns the mean loss and the number of steps."""
    loader = DataLoader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total, steps = 0.0, 0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
    return total / steps, steps


def test(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return loss and accuracy."""
    images, labels = data.tensors
    with torch.no_grad():
        outputs = model(images)
    accuracy = (outputs.argmax(dim=1) == labels).float().mean()
    return nn.functional.cross_entropy(outputs, labels).item(), accuracy.item()
