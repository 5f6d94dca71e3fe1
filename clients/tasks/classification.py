"""What tasks that predict a class have in common."""
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.data import Dataset
from fedcore.clients.evaluation import classification_metrics, flat_scores


class Classification:
    """Cross entropy and accuracy; outputs have shape (batch, ..., classes)."""

    metric_names: tuple[str, ...] = ("loss", "accuracy")

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of a batch."""
        return functional.cross_entropy(*flat_scores(model(inputs), targets))

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return loss and accuracy."""
        return classification_metrics(model, data)
