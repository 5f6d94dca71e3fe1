"""What tests share: small models, clients that train by arithmetic alone, a table of device times, runs in two lines.

Import it as `from tests.support import ...`; worker processes can import it too.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedcore.checkpoint import Checkpoints
from fedcore.events import EventStrategy
from fedcore.hub import Hub
from fedcore.options import RunOptions
from fedcore.payload import Estimate, VectorRecord, read_arrays, wire_bytes
from fedcore.recorder import Recorder
from fedcore.seeds import torch_generator
from fedcore.session import Session
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategy import HubStrategy
from fedcore.vectors import Layout, Model

DIMENSION = 6


def small_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Return a net with a trained and a frozen layer, BatchNorm statistics and an integer counter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    net[0].bias.requires_grad_(False)
    net[1].running_mean.add_(0.25)
    net[1].num_batches_tracked.add_(7)
    return net


def vector_model(dimension: int = DIMENSION, dtype: torch.dtype = torch.float32) -> Model:
    """Return a model that is one vector of zeros."""
    return Model.of(nn.ParameterDict({"params": nn.Parameter(torch.zeros(dimension, dtype=dtype))}))


VECTOR_LAYOUT = vector_model().layout


def toy_step(params: Tensor, partition: int, steps: int, noise: Tensor) -> Tensor:
    """Return `params` after `steps` steps towards the client's own centre, and some noise."""
    for _ in range(steps):
        params = params + 0.1 * ((partition + 1) - params)
    return params + noise


@dataclass(frozen=True)
class Toy:
    """Builds a ClientApp that trains by arithmetic alone: picklable, so worker processes build their own.

    Args:
        lazy: it says beforehand what a reply will cost (`app.estimate`).
        keeps_state: it counts its tasks and remembers its last update in `Context.state`, and both count.
        steps: optimizer steps of a task that does not say.
        fails: partitions that raise an exception in every training task.
        has_query: it knows the action `query`.
        num_examples: of partition i; the last one for all others.
    """

    lazy: bool = True
    keeps_state: bool = False
    steps: int = 2
    fails: tuple[int, ...] = ()
    has_query: bool = True
    num_examples: tuple[int, ...] = (10,)
    layout: Layout = VECTOR_LAYOUT

    def __call__(self) -> ClientApp:
        app = ClientApp()
        app.train()(self.train)
        app.evaluate()(self.evaluate)
        if self.has_query:
            app.query()(self.query)
        if self.lazy:
            app.estimate = self.estimate  # type: ignore[attr-defined]
        return app

    def _examples(self, partition: int) -> int:
        return self.num_examples[min(partition, len(self.num_examples) - 1)]

    def train(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if partition in self.fails:
            raise RuntimeError(f"partition {partition} is out of order")
        config = message.content["config"]
        steps, kind = int(config.get("local-steps", self.steps)), config.get("reply", "model")
        params, buffers = read_arrays(message.content["arrays"], self.layout)
        draw = int(config.get("draw", int(config.get("server-round", 1)) - 1))
        generator = torch_generator(int(config.get("seed", context.run_config.get("seed", 0))), partition, "toy", draw)
        noise = 0.01 * torch.randn(params.shape, generator=generator, dtype=params.dtype)
        trained = toy_step(params, partition, steps, noise)
        if self.keeps_state:
            trained = self._remember(context, trained, params)
        values = trained - params if kind == "update" else trained
        metrics = MetricRecord({"num-examples": self._examples(partition), "work-steps": steps,
                                "train-seconds": 0.5, "loss": float(trained.square().mean())})
        content = RecordDict({"arrays": VectorRecord.of(values, buffers, self.layout), "metrics": metrics})
        if "task-id" in config or "reply" in config:
            content["reply"] = ConfigRecord({"kind": str(kind), "task-id": config.get("task-id", 0),
                                             "version": config.get("version", 0)})
        return Message(content, reply_to=message)

    def _remember(self, context: Context, trained: Tensor, params: Tensor) -> Tensor:
        if "memory" in context.state:
            earlier = torch.from_numpy(context.state["memory"]["update"].numpy())
            trained = trained + 0.5 * earlier
        tasks = int(context.state["count"]["tasks"]) if "count" in context.state else 0
        context.state["count"] = MetricRecord({"tasks": tasks + 1})
        context.state["memory"] = ArrayRecord({"update": trained - params})
        return trained + 0.001 * tasks

    def evaluate(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        params, _ = read_arrays(message.content["arrays"], self.layout)
        loss = float((params - (partition + 1)).square().mean())
        metrics = MetricRecord({"num-examples": self._examples(partition), "work-steps": 1, "loss": loss,
                                "accuracy": 1 / (1 + loss)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def query(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": self._examples(partition), "partition-id": partition})
        content = RecordDict({"metrics": metrics, "info": ConfigRecord({"kinds": "update,model"})})
        return Message(content, reply_to=message)

    def estimate(self, message: Message, context: Context) -> Estimate | None:
        action, config = message.metadata.message_type, message.content.get("config") or {}
        if action == "query":
            return Estimate(0, wire_bytes(self.query(message, context).content))
        if action != "train":
            return None
        reply = RecordDict({"arrays": message.content["arrays"],
                            "metrics": MetricRecord(dict.fromkeys(("num-examples", "work-steps", "a", "b"), 0))})
        if "task-id" in config or "reply" in config:
            kind = str(config.get("reply", "model"))
            reply["reply"] = ConfigRecord({"kind": kind, "task-id": 0, "version": 0})
        return Estimate(int(config.get("local-steps", self.steps)), wire_bytes(reply))


class TableDevices:
    """Devices whose task times stand in a table: seconds per training task, by partition; other work takes no time."""

    def __init__(self, times_s: Sequence[float]):
        self.times_s = times_s

    def compute_seconds(self, partition: int, task_index: int, work_steps: float | None) -> float:
        return 0.0 if work_steps == 0 else self.times_s[partition % len(self.times_s)]


class Notes(Recorder):
    """Keeps all rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        super().__init__(listeners=(self.rows.append,))

    def task(self, row: dict[str, Any]) -> None:
        self.tasks.append(row)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == event]


class Adding(EventStrategy):
    """Adds every update as it comes: the smallest asynchronous strategy, and a diary of what happened."""

    def __init__(self) -> None:
        self.diary: list[tuple[Any, ...]] = []

    def on_reply(self, hub: Hub, reply: Any) -> None:
        self.diary.append(("reply", hub.now, reply.node.partition, reply.staleness))
        hub.publish(hub.model.params + 0.5 * reply.update, [reply])
        self.hand_out(hub, reply.node)

    def on_failure(self, hub: Hub, failure: Any) -> None:
        self.diary.append(("failure", hub.now, failure.node.partition, failure.code))
        super().on_failure(hub, failure)

    def on_timer(self, hub: Hub, name: str) -> None:
        self.diary.append(("timer", hub.now, name))

    def on_join(self, hub: Hub, node: Any) -> None:
        self.diary.append(("join", hub.now, node.partition))
        super().on_join(hub, node)

    def on_leave(self, hub: Hub, node: Any) -> None:
        self.diary.append(("leave", hub.now, node.partition))


@dataclass
class Federation:
    """All the parts of a run in virtual time; `run` plays it to its end."""

    strategy: HubStrategy
    clients: int = 3
    options: RunOptions = field(default_factory=RunOptions)
    app: Any = field(default_factory=Toy)
    model: Model = field(default_factory=vector_model)
    recorder: Recorder = field(default_factory=Notes)
    checkpoints: Checkpoints | None = None
    interrupted: Callable[[], bool] = lambda: False
    grid: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = {"devices": TableDevices([1.0, 2.0, 3.0]), **self.grid}
        self.virtual = VirtualGrid(self.app, self.clients, seed=self.options.seed, **settings)
        self.hub = Hub(self.virtual, self.model, self.options, self.recorder)
        self.session = Session(self.hub, self.strategy, self.checkpoints, 0.0, self.interrupted)

    def run(self, resume: bool = False) -> "Federation":
        try:
            if resume:
                self.session.restore()
            self.strategy.drive(self.session)
        finally:
            self.virtual.close()
            self.recorder.close()
        return self

    @property
    def notes(self) -> Notes:
        assert isinstance(self.recorder, Notes)
        return self.recorder


def train_request(model: Model, node_id: int = 1000, ttl: float | None = None, **config: Any) -> Message:
    """Return a training request to a node."""
    content = RecordDict({"arrays": VectorRecord(model), "config": ConfigRecord(config)})
    return Message(content, node_id, "train", ttl=ttl)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return a run folder's rows as they lie on the disk."""
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
