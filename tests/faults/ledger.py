"""A federation that keeps count: whatever is lost or applied twice shows in the figures.

Each client counts its tasks in its state, and sends the count with an update of 1 at its own place; the server adds all
updates up and writes down every count.
"""
import time
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedcore.clients.requests import Request
from fedcore.clients.settings import TrainSettings
from fedcore.events import EventStrategy
from fedcore.flower import record_of
from fedcore.hub import Hub
from fedcore.payload import ARRAYS, INFO, METRICS, VectorRecord
from fedcore.tasks import Reply
from fedcore.vectors import Model

COUNTER = "count"


class Places(nn.Module):
    """A vector with one place for each client, and ballast that makes transfers take a while."""

    def __init__(self, clients: int, ballast: int):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(clients, dtype=torch.float64))
        self.ballast = nn.Parameter(torch.zeros(ballast, dtype=torch.float64))


class CountingTask:
    """A task without data whose client counts what it does.

    Args:
        work_s: how long a training task takes.
        ballast: numbers in the model beside the counts.
    """

    def __init__(self, num_clients: int, work_s: float = 0.05, ballast: int = 1000):
        self.num_clients, self.work_s, self.ballast = num_clients, work_s, ballast

    def model(self) -> nn.Module:
        return Places(self.num_clients, self.ballast)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError("nothing is trained here")

    def data(self, site: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 1), torch.zeros(1)

    def validation_data(self, site: Any) -> None:
        return None

    def metrics(self, model: nn.Module, data: Any) -> dict[str, float]:
        return {"loss": 0.0}

    def client_app(self, settings: TrainSettings) -> ClientApp:
        app = ClientApp()
        layout = Model.of(self.model()).layout

        @app.train()
        def train(message: Message, context: Context) -> Message:
            request = Request.of(message, context)
            before = context.state.get(COUNTER)
            count = (int(before[COUNTER]) if isinstance(before, MetricRecord) else 0) + 1
            time.sleep(self.work_s)
            context.state[COUNTER] = MetricRecord({COUNTER: count})
            update = torch.zeros(layout.num_params, dtype=torch.float64)
            update[int(request.partition)] = 1.0
            metrics = {"num-examples": 1, "work-steps": 1, "loss": 0.0, COUNTER: count}
            reply = RecordDict({ARRAYS: VectorRecord.of(update, {}, layout), METRICS: MetricRecord(metrics)})
            from fedcore.clients.apps import echo

            for name, record in echo(request).items():
                reply[name] = record
            return Message(reply, reply_to=message)

        @app.query()
        def query(message: Message, context: Context) -> Message:
            from flwr.app import ConfigRecord

            partition = int(context.node_config["partition-id"])
            return Message(RecordDict({
                METRICS: record_of(MetricRecord, {"num-examples": 1, "partition-id": partition}),
                INFO: record_of(ConfigRecord, {"kinds": "update,model"}),
            }), reply_to=message)

        return app


class Ledger(EventStrategy):
    """Adds up all updates; every version names the client and its count."""

    def on_reply(self, hub: Hub, reply: Reply) -> None:
        hub.publish(hub.model.params + reply.update, [reply], count=int(reply.metrics[COUNTER]), task=reply.task_id)
        self.hand_out(hub, reply.node)
