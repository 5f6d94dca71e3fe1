"""A small task, and messages to clients outside a Flower run."""
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn
from torch.nn import functional

from fedcore.clients.apps import EstimatingApp
from fedcore.clients.data import Dataset, Samples
from fedcore.clients.evaluation import regression_metrics
from fedcore.clients.modules import initial_model
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.payload import ARRAYS, CONFIG, VectorRecord
from fedcore.vectors import Model


class LineTask:
    """Fit a plane to noisy points; site `i` has `sizes[i]` of them."""

    def __init__(self, sizes: tuple[int, ...] = (50, 7, 1), dropout: float = 0.0, validation: int = 0):
        self.sizes, self.dropout, self.validation = sizes, dropout, validation

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 1))

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(model(inputs).squeeze(1), targets)

    def data(self, site: int) -> Samples:
        return self._points(site, self.sizes[site])

    def validation_data(self, site: int) -> Samples | None:
        return self._points(100 + site, self.validation) if self.validation else None

    def metrics(self, model: nn.Module, data: Dataset) -> dict[str, float]:
        return dict(regression_metrics(model, data))

    metric_names = ("loss", "mae")

    def _points(self, seed: int, count: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, 3, generator=generator)
        noise = 0.1 * torch.randn(count, generator=generator)
        return Samples(inputs, inputs @ torch.tensor([1.0, -2.0, 0.5]) + noise)


def node(partition: int | None = 0, **config: Any) -> Context:
    """Return a fresh node's context."""
    number = {} if partition is None else {"partition-id": partition}
    return Context(1, 7, {**number, "num-partitions": 3, **config}, RecordDict(), {})


def request(action: str, model: Model | None = None, **config: Any) -> Message:
    """Return a request; underscores in the configuration's names stand for hyphens."""
    content = RecordDict()
    if model is not None:
        content[ARRAYS] = VectorRecord.of(model.params, model.buffers, model.layout)
    if config:
        content[CONFIG] = ConfigRecord({name.replace("_", "-"): value for name, value in config.items()})
    return Message(content, dst_node_id=7, message_type=action)


class Lab:
    """A client and a model to start from."""

    def __init__(self, app: EstimatingApp, model: Model):
        self.app, self.model = app, model

    def train(self, context: Context | None = None, **config: Any) -> RecordDict:
        """Return the content of a training reply."""
        return self.app(request("train", self.model, **config), context or node()).content


class Normed(LineTask):
    """Has buffers, one of them an integer."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


TASK = LineTask()


def lab(task: LineTask = TASK, **settings_: object) -> Lab:
    train = TrainSettings(**{"batch_size": 4, "local_steps": 5, **settings_})
    return Lab(torch_client(task, train), initial_model(task, 0, train.torch_dtype))
