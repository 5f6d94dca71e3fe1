"""A small federation in virtual time for FedCompass: exact arithmetic, and clients that are slow, absent or crash."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import ConfigRecord
from torch import nn

from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.recorder import Recorder
from fedcore.session import Session
from fedcore.simulations.grid import VirtualGrid
from fedcore.vectors import Model

# Binary fractions and a step size of 1/2: every sum and product below is exact in float64, so equal means equal.
TARGETS = [[8.0, -4.0, 1.0], [0.0, 6.0, -3.0], [-2.0, 2.0, 5.0], [4.0, 0.0, -1.0]]


class Point(nn.Module):
    """A point in space."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3))

    def forward(self, inputs):
        return self.position.expand(len(inputs), -1)


class CountingPoint(Point):
    """A point that keeps a sum and a count of what it sees, which are no parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        if self.training:
            self.seen += inputs.mean()
            self.batches += 1
        return super().forward(inputs)


@dataclass
class Pull:
    """Each client pulls the point towards targets of its own: 1/2 |x - c|^2."""

    targets: list
    examples: list[int] = field(default_factory=list)    # per client; 1 each when empty
    model: type[Point] = Point

    def loss(self, model, inputs, targets):
        return 0.5 * ((model(inputs) - targets) ** 2).sum(1).mean()

    def data(self, site):
        count = self.examples[site] if self.examples else 1
        targets = torch.tensor(self.targets[site], dtype=torch.float64).expand(count, -1)
        return torch.full((count, 1), float(site)), targets.clone()

    def validation_data(self, site):
        return None

    def metrics(self, model, data):
        return {"loss": 0.0}


@dataclass
class StepTimes:
    """Seconds per step of each client; `slower` multiplies single tasks: {(client, task index): factor}."""

    seconds: list[float]
    slower: dict = field(default_factory=dict)

    def compute_seconds(self, partition, task_index, work_steps):
        return self.seconds[partition] * work_steps * self.slower.get((partition, task_index), 1.0)


@dataclass
class Presence:
    """When each client is there: {client: [times of change]}, all there at first unless `absent_at_first`."""

    changes: dict
    absent_at_first: tuple = ()

    def is_on(self, partition, at_s):
        passed = sum(at <= at_s for at in self.changes.get(partition, []))
        return (passed % 2 == 0) != (partition in self.absent_at_first)

    def next_change(self, partition, at_s):
        return min((at for at in self.changes.get(partition, []) if at > at_s), default=float("inf"))


@dataclass
class Crashes:
    """Tasks that die half-way: {(client, task index)}."""

    tasks: set

    def crash_point(self, partition, task_index):
        return 0.5 if (partition, task_index) in self.tasks else None

    def loses_request(self, partition, task_index):
        return False

    def loses_reply(self, partition, task_index):
        return False


@dataclass
class Outcome:
    """What a run leaves."""

    hub: Hub
    metrics: list
    timeline: list
    models: list
    configs: list

    @property
    def updates(self):
        return [row for row in self.metrics if row["event"] == "update"]

    def tasks_of(self, node):
        return [row for row in self.timeline if row["node"] == node]


def run(strategy, step_times, folder, *, task=None, updates=None, expected=None, mods=(), grid=None, **limits):
    """Run a strategy over clients with these step times."""
    task = task or Pull(TARGETS)
    setup, models, configs = build(strategy, step_times, folder, task, updates, expected, mods, grid or {}, limits)
    session = Session(setup, strategy)
    strategy.drive(session)
    setup.recorder.close()
    return Outcome(setup, rows(folder / "metrics.jsonl"), rows(folder / "timeline.jsonl"), models, configs)


def build(strategy, step_times, folder, task, updates, expected, mods, grid, limits):
    models, configs = [], []

    def note_config(message, context, call_next):
        configs.append((context.node_config["partition-id"], dict(message.content.get("config", ConfigRecord()))))
        return call_next(message, context)

    devices = step_times if isinstance(step_times, StepTimes) else StepTimes(step_times)
    app = torch_client(task, TrainSettings(lr=0.5, batch_size=1, dtype="float64"), mods=[note_config, *mods])
    world = VirtualGrid(app, len(devices.seconds), devices=devices, **grid)

    def keep(model):
        models.append(model)
        return {}

    options = RunOptions(
        expected=expected or len(devices.seconds), stop=StopRule(client_updates=updates, **limits),
        evaluation=Evaluation("server", fn=keep),
    )
    module = task.model().double()
    return Hub(world, Model.of(module), options, Recorder(Path(folder))), models, configs


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
