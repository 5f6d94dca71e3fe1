"""FedBuff: its equations, its identities, who trains when, its settings."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists, tuples

from fedcore.errors import InvalidSetting
from fedcore.rounds import RoundStrategy, train_all
from fedcore.strategies.fedasync import FedAsync
from fedcore.strategies.fedbuff import Buffer, FedBuff, add, server_step

BAD = [
    ("buffer_size", {"buffer_size": 0}, "at least 1"),
    ("buffer_size", {"buffer_size": 2.0}, "whole number"),
    ("server_lr", {"server_lr": 0}, "above 0"),
    ("server_lr", {"server_lr": float("inf")}, "finite"),
    ("staleness", {"staleness": "none"}, "constant, polynomial, hinge"),
    ("staleness.a", {"staleness": {"name": "polynomial", "a": -0.5}}, "stale updates count more"),
    ("staleness.b", {"staleness": {"name": "hinge", "b": -4}}, "at least 0"),
    ("wait", {"wait": "yes"}, "true or false"),
    ("max_staleness", {"max_staleness": -3}, "at least 0"),
    ("concurrency", {"concurrency": 0}, "at least 1"),
]


@pytest.mark.parametrize(("setting", "arguments", "hint"), BAD)
def test_a_bad_setting_is_refused_with_its_name_and_what_is_allowed(setting, arguments, hint):
    with pytest.raises(InvalidSetting) as caught:
        FedBuff(**arguments)
    assert caught.value.name == setting and hint in str(caught.value)


@given(lists(tuples(floats(-10, 10), floats(0, 1)), min_size=1, max_size=8), floats(0.1, 5))
def test_a_step_is_the_discounted_sum_over_the_buffer_size(entries, server_lr):
    buffer = Buffer()
    for value, factor in entries:
        buffer = add(buffer, torch.tensor([value], dtype=torch.float64), factor)
    moved = server_step(torch.zeros(1, dtype=torch.float64), buffer.total, len(entries), server_lr).item()
    assert moved == pytest.approx(server_lr * sum(v * f for v, f in entries) / len(entries), abs=1e-9)
    assert buffer.count == len(entries)


def test_adding_to_a_buffer_changes_neither_the_buffer_nor_the_update():
    before, update = add(Buffer(), torch.ones(2), 1.0), torch.ones(2)
    add(before, update, 0.5)
    assert torch.equal(before.total, torch.ones(2)) and before.count == 1 and torch.equal(update, torch.ones(2))


class MeanUpdate(RoundStrategy):
    """Federated averaging with uniform weights, written with updates."""

    def round(self, hub, round_index):
        replies = train_all(hub, hub.nodes)
        hub.publish(hub.model.params + sum(reply.update for reply in replies) / len(replies), replies)


def test_a_buffer_of_all_equal_clients_is_federated_averaging_bit_for_bit(federate):
    buffered = federate(FedBuff(buffer_size=4), [2.0] * 4, rounds=6)
    averaged = federate(MeanUpdate(), [2.0] * 4, rounds=6)
    assert len(buffered.trajectory) == 6
    assert all(torch.equal(*pair) for pair in zip(buffered.trajectory, averaged.trajectory, strict=True))
    assert all(row["staleness"] == [0] * 4 for row in buffered.of("update"))


def test_equal_clients_and_a_buffer_of_one_are_fedasync_too(federate):
    buffered = federate(FedBuff(1, staleness="constant"), [1.0] * 3, client_updates=12)
    mixed = federate(FedAsync(1.0, "constant", "delta"), [1.0] * 3, client_updates=12)
    assert all(torch.equal(*pair) for pair in zip(buffered.trajectory, mixed.trajectory, strict=True))


def test_a_buffer_of_one_is_fedasync_with_updates_bit_for_bit(federate):
    times = [1.0, 1.7, 2.9]
    buffered = federate(FedBuff(1, staleness="constant"), times, client_updates=20)
    mixed = federate(FedAsync(1.0, "constant", "delta"), times, client_updates=20)
    assert all(torch.equal(*pair) for pair in zip(buffered.trajectory, mixed.trajectory, strict=True))


@settings(deadline=None, max_examples=15)
@given(integers(1, 5), integers(1, 30))
def test_every_upload_is_counted_once(federate, buffer_size, updates):
    outcome = federate(FedBuff(buffer_size, max_staleness=2), [1.0, 1.3, 4.9, 6.1], client_updates=updates)
    applied, dropped, discarded = (outcome.logged(name)[-1] for name in ("applied", "dropped", "discarded"))
    assert applied + dropped + discarded == updates
    assert outcome.hub.version == applied // buffer_size and discarded < buffer_size


def test_a_fast_client_may_fill_the_buffer_alone(federate):
    outcome = federate(FedBuff(3), [1.0, 50.0], client_updates=6)
    assert outcome.of("update")[0]["nodes"] == [0, 0, 0]


def test_stale_updates_move_the_model_less(federate):
    outcome = federate(FedBuff(2, server_lr=0.5), [1.0, 1.3, 4.9], client_updates=20)
    for row in outcome.of("update"):
        assert row["weights"] == pytest.approx([0.25 / (1 + u) ** 0.5 for u in row["staleness"]])
    assert any(u > 0 for row in outcome.of("update") for u in row["staleness"])


def test_a_buffer_larger_than_what_trains_is_allowed_and_warned_of(federate):
    outcome = federate(FedBuff(5), [1.0, 1.0], client_updates=10)
    assert "several updates of one client" in outcome.logged("warning")[0] and outcome.hub.version == 2


def test_clients_that_wait_start_again_together(federate):
    outcome = federate(FedBuff(2, wait=True), [1.0, 2.0, 5.0], client_updates=12)
    steps = [row["time_s"] for row in outcome.of("update")]
    starts = {task["node"]: [] for task in outcome.tasks}
    for task in outcome.tasks:
        starts[task["node"]].append(task["start_s"])
    # Clients 0 and 1 fill the first buffer at 2 s: client 0 idled from 1 s on.
    assert steps[0] == 2.0 and starts[0][1] == starts[1][1] == 2.0
    assert all(start in [0.0, *steps] for times in starts.values() for start in times)


def test_a_buffer_that_waiting_clients_cannot_fill_is_refused(federate):
    with pytest.raises(InvalidSetting) as caught:
        federate(FedBuff(3, wait=True), [1.0, 1.0], rounds=1)
    assert caught.value.name == "buffer_size" and "at most 2" in str(caught.value)


class LosesAll:
    """Client 2 never gets its second task done."""

    def crash_point(self, partition, task_index):
        return 0.5 if partition == 2 and task_index >= 2 else None

    def loses_request(self, partition, task_index):
        return False

    def loses_reply(self, partition, task_index):
        return False


def test_clients_do_not_wait_for_one_that_failed(federate):
    outcome = federate(FedBuff(3, wait=True), [1.0, 1.0, 1.0], failures=LosesAll(), client_updates=13)
    assert outcome.hub.totals["client_updates"] == 13 and outcome.hub.version == 4


def busiest(outcome):
    """Return the most tasks that were under way at one time."""
    changes = [(task["start_s"], 1) for task in outcome.tasks] + [(task["end_s"], -1) for task in outcome.tasks]
    level = most = 0
    for _, change in sorted(changes):
        level += change
        most = max(most, level)
    return most


def test_concurrency_bounds_how_many_train_and_reaches_everybody(federate):
    outcome = federate(FedBuff(2, concurrency=3), [1.0 + 0.1 * i for i in range(12)], client_updates=150)
    assert busiest(outcome) == 3
    assert {task["node"] for task in outcome.tasks} == set(range(12))


def test_which_clients_are_drawn_follows_from_the_seed(federate):
    def drawn(seed):
        outcome = federate(FedBuff(2, concurrency=2), [1.0] * 9, client_updates=20, seed=seed)
        return [task["node"] for task in outcome.tasks]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_single_free_client_is_found_among_many(federate):
    outcome = federate(FedBuff(1, concurrency=40), [1.0 + 0.01 * i for i in range(41)], client_updates=100)
    assert busiest(outcome) == 40 and outcome.hub.version == 100


def test_the_limit_leans_towards_fast_clients(federate):
    centers = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    outcome = federate(
        FedBuff(1, staleness="constant"), [1.0, 4.0], centers=centers, lr=0.02, local_steps=1, client_updates=1500
    )
    assert torch.stack(outcome.trajectory[750:]).mean().item() == pytest.approx(0.2, rel=0.05)
