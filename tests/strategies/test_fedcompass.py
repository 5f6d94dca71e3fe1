"""FedCompass through the simulator: exact traces, identities, weights and what is sent."""
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

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
from tests.strategies.compass_world import TARGETS, CountingPoint, Pull, StepTimes, run


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


@pytest.mark.parametrize("asked, slow_messages, speed, link", [
    (False, True, 1.4, 0.0), (True, False, 1.0, 8.0), (None, False, 1.4, 0.0), (None, True, 1.0, 8.0),
])
def test_link_times_are_kept_out_of_the_speed_when_asked_or_when_messages_are_slow(
    tmp_path, monkeypatch, asked, slow_messages, speed, link
):
    class Links:
        server_uplink_mbps = server_downlink_mbps = None

        def download_seconds(self, partition, task_index, num_bytes):
            return 5.0

        def upload_seconds(self, partition, task_index, num_bytes):
            return 3.0

    monkeypatch.setattr(VirtualGrid, "slow_messages", slow_messages, raising=False)
    strategy = FedCompass(link_estimate=asked)
    run(strategy, [1.0], tmp_path, task=Pull(TARGETS[:1]), updates=1, grid={"network": Links()})
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
