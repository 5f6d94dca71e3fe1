"""Training that takes time but does no arithmetic: to try schedules, devices and networks at any scale."""
from collections.abc import Mapping
from functools import cached_property

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedcore.clients.apps import EVALUATE_METRICS, OFFER, EstimatingApp, echo, echo_bytes, evaluation_steps
from fedcore.clients.data import Dataset, Samples, batches_per_pass
from fedcore.clients.peer_training import IdlePeers
from fedcore.clients.requests import Request
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import Site
from fedcore.errors import InvalidSetting
from fedcore.flower import record_of, reply_to
from fedcore.payload import ARRAYS, INFO, METRICS, Estimate, VectorRecord, single_record, wire_bytes
from fedcore.vectors import Model

TRAIN_METRICS = ("num-examples", "work-steps", "train-seconds")


class Blank(nn.Module):
    """As many parameters as wanted, all zero; returns its inputs."""

    def __init__(self, num_params: int):
        super().__init__()
        self.parameters_alone = nn.Parameter(torch.zeros(num_params))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class Simulated:
    """Clients that answer every training request with an update of zero, billed like a real one.

    Args:
        num_params: size of the model; at least 1.
        examples: of each client; at least 1.
    """

    metric_names: tuple[str, ...] = ("loss",)

    def __init__(self, num_params: int = 1000, examples: int = 100):
        for name, value in (("num_params", num_params), ("examples", examples)):
            if value < 1:
                raise InvalidSetting(name, value, "at least 1")
        self.num_params, self.examples = num_params, examples

    def model(self) -> nn.Module:
        """Return a model of zeros."""
        return Blank(self.num_params)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return zero."""
        return model(inputs).sum() * 0.0

    def data(self, site: Site) -> Samples:
        """Return as many empty examples as the site is said to have."""
        return Samples(torch.empty(self.examples, 0), torch.empty(self.examples, 0))

    def validation_data(self, site: Site) -> None:
        """Nothing is held back: there is nothing to measure."""

    def test_data(self) -> Samples:
        """Return empty examples."""
        return self.data(0)

    def metrics(self, model: nn.Module, data: Dataset) -> Mapping[str, float]:
        """Return a loss of zero."""
        return {"loss": 0.0}

    def client_app(self, settings: TrainSettings) -> EstimatingApp:
        """Return clients that compute nothing."""
        return EstimatingApp(SimulatedClient(self, settings))

    def peer_training(self, settings: TrainSettings, seed: int) -> IdlePeers:
        """Return peers that compute nothing."""
        return IdlePeers(self.examples)


class SimulatedClient:
    """Replies of the right shape and size, without training; all of them share their zeros."""

    def __init__(self, task: Simulated, settings: TrainSettings):
        self.task, self.settings = task, settings

    def train(self, message: Message, context: Context) -> Message:
        """Reply with an update of zero, or with the model that was received."""
        request = Request.of(message, context)
        arrays = self._zeros if request.kind == "update" else _received(message)
        figures = (self.task.examples, self._steps(request), 0.0)
        metrics = record_of(MetricRecord, dict(zip(TRAIN_METRICS, figures, strict=True)))
        content = record_of(RecordDict, {ARRAYS: arrays, METRICS: metrics, **echo(request)})
        return reply_to(message, content)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Reply with a loss of zero."""
        counts = zip(EVALUATE_METRICS, (self.task.examples, self._evaluation_steps), strict=True)
        return Message(RecordDict({METRICS: MetricRecord({**dict(counts), "loss": 0.0})}), reply_to=message)

    def query(self, message: Message, context: Context) -> Message:
        """Say how many examples the client is said to have."""
        return Message(self.describe(context), reply_to=message)

    def describe(self, context: Context) -> RecordDict:
        """Return what this node answers to a query."""
        entries = {"num-examples": self.task.examples}
        if isinstance(partition := context.node_config.get("partition-id"), int):
            entries["partition-id"] = partition
        records = {METRICS: record_of(MetricRecord, entries), INFO: record_of(ConfigRecord, {"kinds": OFFER})}
        return record_of(RecordDict, records)

    def estimate(self, message: Message, context: Context) -> Estimate | None:
        """Return what the reply will cost, exactly."""
        action, request = message.metadata.message_type, Request.of(message, context)
        if action == "train":
            return Estimate(self._steps(request), self._train_bytes + echo_bytes(request))
        if action == "evaluate":
            return Estimate(self._evaluation_steps, self._evaluate_bytes)
        return Estimate(0, wire_bytes(self.describe(context))) if action == "query" else None

    def _steps(self, request: Request) -> int:
        if request.local_steps is not None:
            return request.local_steps
        return self.settings.steps_for(batches_per_pass(self.task.examples, self.settings.batch_size))

    @cached_property
    def _evaluation_steps(self) -> int:
        return evaluation_steps(self.task.examples, self.settings.batch_size)

    @cached_property
    def _zeros(self) -> VectorRecord:
        blank = Model.of(self.task.model().to(self.settings.torch_dtype))
        return VectorRecord.of(blank.params, {}, blank.layout)

    @cached_property
    def _train_bytes(self) -> int:
        metrics = MetricRecord(dict.fromkeys(TRAIN_METRICS, 0))
        return wire_bytes(RecordDict({ARRAYS: self._zeros, METRICS: metrics}))

    @cached_property
    def _evaluate_bytes(self) -> int:
        return wire_bytes(RecordDict({METRICS: MetricRecord(dict.fromkeys((*EVALUATE_METRICS, "loss"), 0))}))


def _received(message: Message) -> ArrayRecord:
    return single_record(message.content, ArrayRecord, ARRAYS).copy()
