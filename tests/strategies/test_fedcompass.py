"""FedCompass through the simulator: exact traces, identities, late and absent clients, resuming."""
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedcore.checkpoint import Checkpoints
from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.simulated import Simulated
from fedcore.clients.torch_client import torch_client
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.recorder import Recorder
from fedcore.rounds import FlowerRounds
from fedcore.session import Session
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategies.fedcompass import FedCompass
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


def test_two_clients_follow_the_worked_example_in_virtual_time(tmp_path):
    """Step times of 1 and 4 seconds, Qmin 20, Qmax 100, lambda 1.5, worked through by hand."""
    outcome = run(FedCompass(), [1.0, 4.0], tmp_path, task=Simulated(num_params=3), updates=8)
    columns = ("node", "start_s", "end_s", "local_steps", "group")
    tasks = [tuple(row.get(column) for column in columns) for row in outcome.timeline]
    assert [task for task in tasks if task[2] <= 268] == [
        (0, 0, 20, 20, None),
        (1, 0, 80, 20, None),
        (0, 20, 120, 100, 0),
        (0, 120, 220, 100, 2),
        (0, 220, 268, 48, 1),
        (1, 80, 268, 47, 1),
    ]
    updates = [(row["time_s"], row["nodes"], row["staleness"], row.get("group")) for row in outcome.updates]
    assert updates[:5] == [
        (20, [0], [0], None), (80, [1], [1], None), (120, [0], [1], 0), (220, [0], [0], 2), (268, [0, 1], [0, 2], 1),
    ]


def test_a_client_that_waits_for_its_group_starts_its_next_task_when_the_group_is_aggregated(tmp_path):
    devices = StepTimes([1.0, 1.0], {(1, 2): 1.3})    # of the query, the first task and the second, the last is slow
    outcome = run(FedCompass(), devices, tmp_path, updates=6)
    ends = [row["end_s"] for row in outcome.tasks_of(0)]
    starts = [row["start_s"] for row in outcome.tasks_of(0)]
    assert (ends[1], starts[2]) == (120.0, 150.0)


def test_equal_clients_and_fixed_steps_are_fedavg_bit_for_bit(tmp_path):
    """After the first tasks, with Qmin = Qmax and server_lr = 1, every aggregation is one round of Flower's FedAvg."""
    steps, clients, rounds = 2, len(TARGETS), 6
    compass = FedCompass(min_local_steps=steps, max_local_steps=steps, server_lr=1.0, staleness="constant")
    ours = run(compass, [1.0] * clients, tmp_path / "ours", updates=clients * (rounds + 2))
    assert [row["staleness"] for row in ours.updates[clients + 1:]] == [[0] * clients] * rounds
    start = ours.models[clients + 1]
    flower = run_fedavg(start, steps, rounds, tmp_path / "flower")
    assert [model.params.tolist() for model in flower[1:]] == [m.params.tolist() for m in ours.models[clients + 2:]]


def run_fedavg(start, steps, rounds, folder):
    """Flower's own FedAvg under our driver; returns the model before the first round and after each."""
    models = []
    app = torch_client(Pull(TARGETS), TrainSettings(lr=0.5, batch_size=1, local_steps=steps, dtype="float64"))
    options = RunOptions(
        expected=len(TARGETS), stop=StopRule(rounds=rounds),
        evaluation=Evaluation("server", fn=lambda model: models.append(model) or {}),
    )
    strategy = FlowerRounds(FedAvg(fraction_evaluate=0.0, min_available_nodes=len(TARGETS)))
    hub = Hub(VirtualGrid(app, len(TARGETS)), start, options, Recorder(folder))
    strategy.drive(Session(hub, strategy))
    return models


def test_one_client_is_sequential_sgd_bit_for_bit(tmp_path):
    compass = FedCompass(min_local_steps=2, max_local_steps=5, server_lr=1.0)
    outcome = run(compass, [1.0], tmp_path, task=Pull([[3.0, -1.0, 7.0]]), updates=7)
    target, position, expected = torch.tensor([3.0, -1.0, 7.0], dtype=torch.float64), torch.zeros(3), []
    position = position.double()
    for steps in [2] + [5] * 6:
        for _ in range(steps):
            position = position - 0.5 * (position - target)
        expected.append(position.tolist())
    assert [model.params.tolist() for model in outcome.models[1:]] == expected
    assert [row["staleness"] for row in outcome.updates] == [[0]] * 7


def test_a_late_update_is_kept_and_applied_with_the_next_group(tmp_path):
    devices = StepTimes([1.0, 1.0], {(1, 2): 2.0})    # client 1 needs 200 s for its second task; the limit is 150 s
    outcome = run(FedCompass(), devices, tmp_path, updates=8)
    late = next(row for row in outcome.tasks_of(1) if row["end_s"] == 220)
    assert late["base_version"] == 2 and late["group"] == 0
    assert not [row for row in outcome.updates if row["time_s"] == 220]    # a late upload changes nothing by itself
    assert [row["start_s"] for row in outcome.tasks_of(1)][2] == 220       # and its client does not wait
    used = next(row for row in outcome.updates if row.get("late") == 1)
    assert used["time_s"] > 220
    assert used["staleness"][used["nodes"].index(1)] == used["version"] - 1 - late["base_version"]


def test_a_client_that_is_late_twice_has_both_updates_applied(tmp_path):
    devices = StepTimes([1.0, 50.0], {(0, index): 2.0 for index in range(2, 6)})
    outcome = run(FedCompass(min_local_steps=5, max_local_steps=5), devices, tmp_path, updates=12)
    both = [row for row in outcome.updates if row["nodes"].count(0) > 1]
    assert both and all(len(row["nodes"]) == len(row["staleness"]) == len(row["weights"]) for row in both)
    assert sum(len(row["nodes"]) for row in outcome.updates) == outcome.hub.totals["client_updates"]


def test_stopping_applies_what_is_buffered_in_one_last_update(tmp_path):
    outcome = run(FedCompass(), [1.0, 1.0, 1.0, 1.1], tmp_path, updates=6)    # stops while two wait for two others
    assert [len(row["nodes"]) for row in outcome.updates] == [1, 1, 1, 1, 2]
    assert outcome.updates[-1]["nodes"] == [0, 3]
    assert outcome.metrics[-1]["event"] == "stop"


def test_a_run_that_stops_with_empty_buffers_publishes_nothing_more(tmp_path):
    outcome = run(FedCompass(), [1.0], tmp_path, task=Pull([[1.0, 1.0, 1.0]]), updates=3)
    assert [row["version"] for row in outcome.updates] == [1, 2, 3]


def test_a_group_is_released_when_the_client_it_waits_for_leaves(tmp_path):
    presence = Presence({1: [130.0]})
    devices = StepTimes([1.0, 1.25], {(1, 2): 1.3})
    outcome = run(FedCompass(), devices, tmp_path, updates=5, grid={"availability": presence})
    group = outcome.updates[2]
    assert (group["time_s"], group["nodes"]) == (130.0, [0])    # in group 0 since 20 s, and waiting from 120 s
    assert [row["start_s"] for row in outcome.tasks_of(0)][2] == 130.0


def test_the_update_of_a_client_that_leaves_while_it_waits_is_applied_with_the_next_group(tmp_path):
    presence = Presence({0: [122.0]})
    devices = StepTimes([1.0, 1.0, 1.05], {(2, 2): 1.3})
    outcome = run(FedCompass(), devices, tmp_path, updates=8, grid={"availability": presence})
    group = outcome.updates[3]
    assert group["nodes"] == [0, 1, 2] and group["late"] == 1
    assert all(0 not in row["nodes"] for row in outcome.updates[4:])


def test_a_client_that_returns_gets_a_first_task_and_its_upload_is_applied_at_once(tmp_path):
    presence = Presence({1: [50.0, 300.0]})
    outcome = run(FedCompass(), [1.0, 1.0], tmp_path, updates=9, grid={"availability": presence})
    back = [row for row in outcome.tasks_of(1) if row["start_s"] >= 300.0][0]
    assert (back["start_s"], back["local_steps"], back.get("group"), back["outcome"]) == (300.0, 20, None, "ok")
    assert any(row["time_s"] == back["end_s"] and row["nodes"] == [1] for row in outcome.updates)


def test_a_client_whose_task_failed_gets_other_work_and_nobody_waits_for_it(tmp_path):
    crashes = Crashes({(1, 2)})
    outcome = run(FedCompass(), [1.0, 1.0], tmp_path, updates=6, grid={"failures": crashes})
    failed = next(row for row in outcome.tasks_of(1) if row["outcome"] != "ok")
    following = next(row for row in outcome.tasks_of(1) if row["start_s"] >= failed["end_s"])
    assert failed["end_s"] == 70.0 and following["start_s"] == 70.0
    # What is left of its group's time suffices for half the work.
    assert (failed["group"], following["group"], following["local_steps"]) == (0, 0, 50)
    assert outcome.updates[2]["nodes"] == [0, 1] and outcome.updates[2]["time_s"] == 120.0


def test_a_first_task_that_failed_is_given_again(tmp_path):
    outcome = run(FedCompass(), [1.0, 1.0], tmp_path, updates=4, grid={"failures": Crashes({(1, 1)})})
    first, second = outcome.tasks_of(1)[:2]
    assert (first["outcome"], second["outcome"]) != ("ok", "failed")
    assert (second["start_s"], second["local_steps"], second.get("group")) == (10.0, 20, None)


def test_a_client_beyond_the_expected_ones_is_turned_away(tmp_path):
    presence = Presence({2: [30.0]}, absent_at_first=(2,))
    outcome = run(FedCompass(), [1.0, 1.0, 1.0], tmp_path, updates=6, expected=2, grid={"availability": presence})
    assert [row["turned_away"] for row in outcome.metrics if "turned_away" in row] == [2]
    assert outcome.tasks_of(2) == []


def test_weights_are_the_server_rate_times_share_times_staleness_factor(tmp_path):
    outcome = run(FedCompass(server_lr=2.0), [1.0, 4.0], tmp_path, updates=8)
    group = outcome.updates[4]
    assert group["staleness"] == [0, 2]
    assert group["weights"] == pytest.approx([2.0 * 0.5, 2.0 * 0.5 * 3 ** -0.5])


def test_clients_can_weigh_by_their_examples(tmp_path):
    task = Pull(TARGETS[:2], examples=[3, 1])
    outcome = run(FedCompass(weights="num_examples", staleness="constant", server_lr=1.0), [1.0, 1.0], tmp_path,
                  task=task, updates=4)
    assert outcome.updates[-1]["weights"] == [0.75, 0.25]


def test_normalised_steps_scale_every_update_to_the_mean_number_of_steps(tmp_path):
    compass = FedCompass(normalise_steps=True, staleness="constant", server_lr=1.0)
    outcome = run(compass, [1.0, 4.0], tmp_path, updates=8)
    group = outcome.updates[4]
    steps = [48, 47]
    assert group["weights"] == pytest.approx([0.5 * 47.5 / count for count in steps])
    assert outcome.updates[0]["weights"] == [0.5]    # first tasks are equally long: nothing to normalise


def test_the_local_learning_rate_decays_once_per_longest_task(tmp_path):
    compass = FedCompass(min_local_steps=2, max_local_steps=4, lr_decay=0.5)
    outcome = run(compass, [1.0], tmp_path, task=Pull([[1.0, 0.0, 0.0]]), updates=5)
    scales = [config["lr-scale"] for _, config in outcome.configs if "lr-scale" in config]
    assert scales == [1.0, 1.0, 0.5, 0.25, 0.125]    # after 0, 2, 6, 10 and 14 steps


def test_no_learning_rate_is_sent_unless_it_decays(tmp_path):
    outcome = run(FedCompass(), [1.0], tmp_path, task=Pull([[1.0, 0.0, 0.0]]), updates=3)
    assert not [config for _, config in outcome.configs if "lr-scale" in config]


def test_link_times_are_kept_out_of_the_speed_when_asked(tmp_path):
    class Links:
        server_uplink_mbps = server_downlink_mbps = None

        def download_seconds(self, partition, task_index, num_bytes):
            return 5.0

        def upload_seconds(self, partition, task_index, num_bytes):
            return 3.0

    for separate, speed, link in ((False, 1.4, 0.0), (True, 1.0, 8.0)):
        strategy = FedCompass(link_estimate=separate)
        run(strategy, [1.0], tmp_path / str(separate), task=Pull(TARGETS[:1]), updates=1, grid={"network": Links()})
        record = strategy.schedule.clients[0]
        assert (record.seconds_per_step, record.link_s) == pytest.approx((speed, link))


def test_buffers_become_the_mean_of_the_group_s(tmp_path):
    compass = FedCompass(min_local_steps=2, max_local_steps=2)
    outcome = run(compass, [1.0] * 4, tmp_path, task=Pull(TARGETS, model=CountingPoint), updates=12)
    before, after = outcome.models[-2], outcome.models[-1]
    # Client i adds its number once per step.
    assert after.buffers["seen"].item() == before.buffers["seen"].item() + 2 * (0 + 1 + 2 + 3) / 4
    assert after.buffers["batches"].item() == before.buffers["batches"].item() + 2


def test_nothing_is_kept_once_it_is_applied(tmp_path):
    strategy = FedCompass()
    run(strategy, [1.0, 2.5, 4.0], tmp_path, updates=40)
    assert strategy.late == [] and strategy.buffers == {}
    assert len(strategy.schedule.groups) <= 3


EVENTFUL = {
    "availability": Presence({2: [250.0, 400.0], 0: [333.0, 350.0]}),
    "failures": Crashes({(1, 3)}),
}
EVENTFUL_TIMES = StepTimes([10.0, 40.0, 13.0], {(0, 3): 2.5, (2, 2): 2.0, (0, 5): 3.0})


def eventful(strategy, folder, saved):
    """A run with late, failing and returning clients that can be saved and continued."""
    setup, _, _ = build(strategy, EVENTFUL_TIMES, folder, Pull(TARGETS), 24, None, (), EVENTFUL, {})
    return Session(setup, strategy, Checkpoints(saved, keep=1000), save_every_s=0.0)


def finish(session, strategy):
    strategy.drive(session)
    session.hub.recorder.close()
    return session.hub.model


FEW_STEPS = {"min_local_steps": 2, "max_local_steps": 10}


@pytest.mark.parametrize(
    "options", [FEW_STEPS, {**FEW_STEPS, "normalise_steps": True, "link_estimate": True, "lr_decay": 0.9}]
)
def test_saving_at_any_event_and_continuing_equals_never_having_stopped(tmp_path, options):
    strategy, whole = FedCompass(**options), tmp_path / "whole"
    expected = finish(eventful(strategy, whole, tmp_path / "saved"), strategy)
    checkpoints = sorted((tmp_path / "saved").iterdir())
    assert len(checkpoints) > 30
    for checkpoint in checkpoints:
        again = tmp_path / checkpoint.stem
        shutil.copytree(whole, again)
        (again / "saved").mkdir()
        shutil.copy(checkpoint, again / "saved")
        strategy = FedCompass(**options)
        session = eventful(strategy, again, again / "saved")
        session.save_every_s = 1e9
        assert session.restore() == []
        assert torch.equal(finish(session, strategy).params, expected.params), checkpoint.stem
        for name in ("metrics.jsonl", "timeline.jsonl"):
            assert (again / name).read_text() == (whole / name).read_text(), (name, checkpoint.stem)


def test_a_run_is_the_same_every_time(tmp_path):
    files = []
    for attempt in ("first", "second"):
        strategy = FedCompass(**FEW_STEPS)
        finish(eventful(strategy, tmp_path / attempt, tmp_path / f"{attempt}-saved"), strategy)
        files.append([(tmp_path / attempt / name).read_text() for name in ("metrics.jsonl", "timeline.jsonl")])
    assert files[0] == files[1]
