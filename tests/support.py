"""What tests share: small models, clients that train by arithmetic alone, a table of device times, runs in two lines.

Import it as `from tests.support import ...`; worker processes can import it too.
"""
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedcore.checkpoint import Checkpoints
from fedcore.clock import Event
from fedcore.events import EventStrategy
from fedcore.flower import with_id
from fedcore.hub import Hub
from fedcore.options import RunOptions
from fedcore.payload import Estimate, VectorRecord, clone_content, read_arrays, wire_bytes
from fedcore.recorder import Recorder
from fedcore.rounds import in_model_dtypes
from fedcore.seeds import torch_generator
from fedcore.session import Session
from fedcore.simulations.availability import Availability
from fedcore.simulations.failures import Failures
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
        # As a module would: it loads arrays of any dtype.
        params, buffers = read_arrays(in_model_dtypes(message.content["arrays"], self.layout), self.layout)
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


class Intervals(Availability):
    """Nodes that are online in the intervals of a table; those that it does not mention always are."""

    def __init__(self, table: Mapping[int, Sequence[tuple[float, float]]]):
        self.table = table

    def is_on(self, partition: int, at_s: float) -> bool:
        return any(start <= at_s < end for start, end in self.table.get(partition, [(0.0, math.inf)]))

    def next_change(self, partition: int, at_s: float) -> float:
        moments = [moment for interval in self.table.get(partition, []) for moment in interval if moment > at_s]
        return min(moments, default=math.inf)


class Fates(Failures):
    """What goes wrong, by (partition, index of the node's task)."""

    def __init__(self, crashes: Mapping[tuple[int, int], float] | None = None,
                 requests: Iterable[tuple[int, int]] = (), replies: Iterable[tuple[int, int]] = ()):
        self.crashes, self.requests, self.replies = dict(crashes or {}), set(requests), set(replies)

    def crash_point(self, partition: int, task_index: int) -> float | None:
        return self.crashes.get((partition, task_index))

    def loses_request(self, partition: int, task_index: int) -> bool:
        return (partition, task_index) in self.requests

    def loses_reply(self, partition: int, task_index: int) -> bool:
        return (partition, task_index) in self.replies


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
    save_every_s: float = 0.0    # at every safe point
    interrupted: Callable[[], bool] = lambda: False
    grid: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = {"devices": TableDevices([1.0, 2.0, 3.0]), **self.grid}
        self.virtual = VirtualGrid(self.app, self.clients, seed=self.options.seed, **settings)
        self.hub = Hub(self.virtual, self.model, self.options, self.recorder)
        self.session = Session(self.hub, self.strategy, self.checkpoints, self.save_every_s, self.interrupted)

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


class ScriptedGrid:
    """A grid on which nothing happens but what a test plans; queries are answered at once."""

    def __init__(self, nodes: int = 3) -> None:
        self.now = 0.0
        self.online = list(range(1000, 1000 + nodes))
        self.refusing: set[int] = set()           # nodes to which nothing can be sent
        self.sent: list[Message] = []             # as delivered, with their ids; queries apart
        self._plans: list[tuple[float, int, Event]] = []
        self._pushed = self._planned = 0

    def get_node_ids(self) -> list[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            if message.metadata.dst_node_id in self.refusing:
                ids.append(None)
                continue
            self._pushed += 1
            name = str(self._pushed)
            ids.append(name)
            delivered = with_id(message, message.content, name)
            if message.metadata.message_type == "query":
                partition = message.metadata.dst_node_id - 1000
                metrics = MetricRecord({"num-examples": 10, "partition-id": partition})
                content = RecordDict({"metrics": metrics, "info": ConfigRecord({"kinds": "update,model"})})
                self.answer(delivered, content, self.now)
            else:
                self.sent.append(delivered)
        return ids

    def answer(self, request: Message, outcome: RecordDict | Error, at: float) -> None:
        """Let a request be answered at a time, as often as this is called."""
        node_id = request.metadata.dst_node_id
        self.plan(Event("reply", at, node_id, Message(outcome, reply_to=request)))

    def plan(self, event: Event) -> None:
        self._planned += 1
        self._plans.append((event.at, self._planned, event))
        self._plans.sort(key=lambda plan: plan[:2])

    def next_event(self, until: float | None) -> Event | None:
        if self._plans and (until is None or self._plans[0][0] <= until):
            at, _, event = self._plans.pop(0)
            self.now = max(self.now, at)
            return event
        if until is None:
            return None
        self.now = max(self.now, until)
        return Event("time", self.now)


class ForeignGrid(Grid):
    """Somebody else's grid: it knows no time and no events, and a reply is there once it was asked for often enough.

    Args:
        patience: questions until a reply is there.
        membership: who is online from the n-th question about it; node ids as Flower's, random and large.
    """

    def __init__(self, app: ClientApp, membership: Mapping[int, Sequence[int]], patience: int = 3) -> None:
        self.app, self.membership, self.patience = app, dict(membership), patience
        self.partitions: dict[int, int] = {}
        self.questions = 0
        self._online: list[int] = []
        self._pushed: dict[str, tuple[Message, int]] = {}
        self._states: dict[int, RecordDict] = {}

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        self._online = list(self.membership.get(self.questions, self._online))
        self.questions += 1
        for node_id in self._online:
            self.partitions.setdefault(node_id, len(self.partitions))
        return self._online

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:  # type: ignore[override]
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str | None:
        if message.metadata.dst_node_id not in self._online:
            return None
        name = f"m{len(self._pushed)}"
        self._pushed[name] = with_id(message, clone_content(message.content), name), self.patience
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for name in message_ids:
            message, left = self._pushed[name]
            self._pushed[name] = message, left - 1
            if left == 1:
                replies.append(self._answer(message))
        return replies

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        state = self._states.setdefault(node_id, RecordDict())
        partition = {"partition-id": self.partitions[node_id], "num-partitions": 3}
        try:
            return self.app(message, Context(1, node_id, partition, state, {"seed": 0}))
        except (ValueError, RuntimeError) as error:
            return Message(Error(2, repr(error)), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting = [name for name in self.push_messages(messages) if name is not None]
        replies: list[Message] = []
        while len(replies) < len(waiting):
            replies += self.pull_messages(waiting)
        return replies


def train_request(model: Model, node_id: int = 1000, ttl: float | None = None, **config: Any) -> Message:
    """Return a training request to a node."""
    content = RecordDict({"arrays": VectorRecord(model), "config": ConfigRecord(config)})
    return Message(content, node_id, "train", ttl=ttl)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return a run folder's rows as they lie on the disk."""
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
