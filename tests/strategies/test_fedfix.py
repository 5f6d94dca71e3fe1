"""FedFix: ticks, weights, identities, who is here, its settings."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import dictionaries, floats, integers, lists

from fedcore.errors import InvalidSetting
from fedcore.rounds import RoundStrategy, train_all
from fedcore.strategies.fedfix import (
    FedFix,
    Pace,
    due_tick,
    measured,
    next_tick,
    server_step,
    shares,
    tick_time,
    ticks_of,
)

BAD = [
    ("interval_s", {"interval_s": 0}, "above 0"),
    ("interval_s", {"interval_s": -0.5}, "above 0"),
    ("interval_s", {"interval_s": float("nan")}, "finite"),
    ("interval_s", {"interval_s": "half"}, "auto"),
    ("server_lr", {"server_lr": 0.0}, "above 0"),
    ("weights", {"weights": "equal"}, "corrected, identical"),
    ("importance", {"importance": "examples"}, "uniform, num_examples"),
    ("importance[1]", {"importance": [0.5, -0.1]}, "at least 0"),
    ("importance[0]", {"importance": [float("nan")]}, "finite"),
    ("importance", {"importance": [0.0, 0.0]}, "positive sum"),
    ("importance", {"importance": []}, "positive sum"),
    ("task_times_s[1]", {"task_times_s": [1.0, 0.0]}, "above 0"),
    ("task_times_s[0]", {"task_times_s": [-1.0]}, "above 0"),
    ("task_times_s", {"task_times_s": []}, "one time per client"),
    ("max_weight_ratio", {"max_weight_ratio": 0.5}, "at least 1"),
    ("drop_after", {"drop_after": 0}, "at least 1"),
    ("drop_after", {"drop_after": 1.5}, "whole number"),
    ("drop_after", {"drop_after": 3, "interval_s": 1.0, "task_times_s": [1.0, 3.5]}, "at least 4"),
    ("drop_after", {"drop_after": 1, "task_times_s": [1.0, 3.5]}, "at least 2"),
]


@pytest.mark.parametrize(("setting", "arguments", "hint"), BAD)
def test_a_bad_setting_is_refused_with_its_name_and_what_is_allowed(setting, arguments, hint):
    with pytest.raises(InvalidSetting) as caught:
        FedFix(**arguments)
    assert caught.value.name == setting and hint in str(caught.value)


@pytest.mark.parametrize("arguments", [{"importance": [1.0]}, {"task_times_s": [1.0], "interval_s": 1.0}])
def test_a_list_that_lacks_clients_is_refused_before_any_work(federate, arguments):
    with pytest.raises(InvalidSetting, match="2 clients") as caught:
        federate(FedFix(**arguments), [1.0, 1.0], rounds=1)
    assert caught.value.name in arguments


# ---- the equations --------------------------------------------------------------------------------------------------


def test_a_ratio_that_rounds_up_is_still_that_many_ticks():
    assert 0.3 / 0.1 < 3 and ticks_of(0.3, 0.1) == 3
    assert (0.1 + 0.2) / 0.1 > 3 and ticks_of(0.1 + 0.2, 0.1) == 3


@given(integers(1, 10_000), floats(1e-3, 1e3))
def test_a_whole_number_of_intervals_takes_that_many_ticks(ticks, interval):
    assert ticks_of(ticks * interval, interval) == ticks
    assert ticks_of((ticks + 0.01) * interval, interval) == ticks + 1


@given(integers(0, 100_000), integers(1, 1000), floats(1e-3, 1e3), floats(0, 1e3))
def test_an_upload_stamped_exactly_at_a_tick_belongs_to_it(start, ticks, interval, origin):
    sent_at = tick_time(origin, interval, start)
    arrived_at = sent_at + ticks * interval
    assert next_tick(arrived_at, origin, interval, start) == start + ticks
    assert arrived_at <= tick_time(origin, interval, start + ticks)


@given(integers(0, 10_000), floats(1e-3, 1e3))
def test_a_server_on_time_does_the_tick_that_is_due(last, interval):
    assert due_tick(tick_time(0.0, interval, last + 1), 0.0, interval, last) == last + 1


def test_a_server_that_is_late_counts_the_ticks_it_missed():
    assert due_tick(tick_time(0.0, 2.0, 3) + 5.0, 0.0, 2.0, 2) == 5


@given(integers(1, 100_000), floats(1e-2, 10))
def test_the_period_does_not_drift(tick, interval):
    assert tick_time(0.0, interval, tick) == pytest.approx(tick * interval, rel=2e-9)


@given(dictionaries(integers(0, 20), floats(1e-3, 1e3), min_size=1), lists(integers(0, 20)))
def test_shares_sum_to_one_over_the_members(importance, members):
    present = set(members) & set(importance)
    found = shares(importance, present)
    assert set(found) == present
    assert not present or sum(found.values()) == pytest.approx(1.0)


def test_a_pace_counts_from_when_the_task_was_sent():
    pace = measured(measured(Pace(sent_tick=4), tick=6), tick=5)
    assert pace.mean_ticks == 1.5    # two ticks, then one


def test_a_step_is_not_divided_by_anything_and_leaves_its_inputs_alone():
    params, update = torch.zeros(2), torch.ones(2)
    assert torch.equal(server_step(params, [update, update], [1.0, 2.0], 0.5), torch.full((2,), 1.5))
    assert torch.equal(params, torch.zeros(2)) and torch.equal(update, torch.ones(2))


# ---- identities -----------------------------------------------------------------------------------------------------


class MeanUpdate(RoundStrategy):
    """Federated averaging, uniform, written with updates in partition order."""

    def __init__(self, server_lr=1.0):
        self.server_lr = server_lr

    def round(self, hub, round_index):
        replies = train_all(hub, hub.nodes)
        step = torch.zeros_like(hub.model.params)
        for reply in replies:
            step.add_(reply.update, alpha=1.0 / len(replies))
        hub.publish(hub.model.params + self.server_lr * step, replies)


def same(first, second):
    return all(torch.equal(*pair) for pair in zip(first.trajectory, second.trajectory, strict=True))


@pytest.mark.parametrize("interval", [4.0, 4.5, 100.0])
def test_an_interval_of_the_slowest_client_or_more_is_federated_averaging_bit_for_bit(federate, interval):
    times = [1.0, 2.2, 4.0]
    fixed = federate(FedFix(interval), times, rounds=5)
    assert len(fixed.trajectory) == 5 and same(fixed, federate(MeanUpdate(), times, rounds=5))
    assert any("this is FedAvg" in text for text in fixed.logged("warning"))


@pytest.mark.parametrize("parts", [2, 4])
def test_equal_clients_and_a_part_of_their_time_are_averaging_with_a_larger_rate(federate, parts):
    fixed = federate(FedFix(2.0 / parts), [2.0] * 4, rounds=5)
    assert same(fixed, federate(MeanUpdate(server_lr=parts), [2.0] * 4, rounds=5))
    assert [row["tick"] for row in fixed.of("update")] == [parts * (n + 1) for n in range(5)]
    assert any("smaller server_lr" in text for text in fixed.logged("warning"))


def test_one_client_is_sequential_training(federate, quadratic):
    task = quadratic(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    outcome = federate(FedFix(1.0), [0.7], task=task, local_steps=1, lr=0.1, client_updates=30)
    assert torch.allclose(outcome.params, task.centers[0] * (1 - 0.9**30), rtol=1e-12)


def test_measured_and_given_times_agree_when_times_are_constant(federate):
    times = [0.3, 0.9, 1.7, 0.6]
    given_times = federate(FedFix(0.3, task_times_s=times), times, client_updates=40)
    assert same(federate(FedFix(0.3), times, client_updates=40), given_times)


@settings(deadline=None, max_examples=15)
@given(lists(integers(1, 6), min_size=1, max_size=4), integers(0, 3))
def test_over_a_common_period_every_client_weighs_its_share(federate, ticks, shift):
    period = math.lcm(*ticks)
    importance = [1.0 + client for client in range(len(ticks))]
    outcome = federate(FedFix(1.0, importance=importance), [float(c) for c in ticks], seconds=3.0 * period + 9.5)
    total = dict.fromkeys(range(len(ticks)), 0.0)
    for row in outcome.of("update"):
        if 6 + shift < row["tick"] <= 6 + shift + period:
            for node, weight in zip(row["nodes"], row["weights"], strict=True):
                total[node] += weight
    expected = [period * value / sum(importance) for value in importance]
    assert list(total.values()) == pytest.approx(expected)


def test_with_jitter_the_mean_of_the_ticks_counts_not_the_ticks_of_the_mean(federate):
    outcome = federate(FedFix(1.0), [[0.5, 1.5], 1.0], client_updates=60)
    weights = [weight for row in outcome.of("update") for node, weight in zip(row["nodes"], row["weights"], strict=True)
               if node == 0]
    assert weights[-1] == pytest.approx(0.5 * 1.5, rel=0.03)


# ---- the limit ------------------------------------------------------------------------------------------------------


def mean_of_last(outcome, ticks):
    """Return the model's mean over the last so many ticks, the model between two steps counted at each."""
    rows = outcome.of("update")
    last, values = rows[-1]["tick"], []
    for tick in range(last - ticks, last):
        index = max(i for i, row in enumerate(rows) if row["tick"] <= tick)
        values.append(outcome.trajectory[index])
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("importance", ["uniform", [3.0, 1.0, 2.0]])
@pytest.mark.parametrize("local_steps", [1, 5])
def test_with_equal_curvature_the_limit_is_the_weighted_mean_of_the_optima(federate, importance, local_steps):
    centers = torch.tensor([[0.0, 2.0], [3.0, -1.0], [6.0, 5.0]], dtype=torch.float64)
    outcome = federate(FedFix(1.0, importance=importance), [0.8, 2.0, 2.7], centers=centers, local_steps=local_steps,
                       lr=0.02 / local_steps, seconds=600)
    p = torch.tensor([1.0, 1.0, 1.0] if importance == "uniform" else importance, dtype=torch.float64)
    assert torch.allclose(mean_of_last(outcome, 6), (p / p.sum()) @ centers, rtol=5e-3)    # up to O(lr)


def test_corrected_weights_reach_the_federated_optimum_and_identical_ones_a_biased_one(federate):
    centers = torch.tensor([[1.0], [5.0], [9.0]], dtype=torch.float64)
    curvatures, times = [1.0, 3.0, 2.0], [1.0, 2.0, 4.0]

    def limit(weights):
        outcome = federate(FedFix(1.0, weights=weights), times, centers=centers, curvatures=curvatures,
                           local_steps=1, lr=0.005, seconds=1000)
        return mean_of_last(outcome, 4).item()

    def optimum(p):
        return sum(q * a * m for q, a, m in zip(p, curvatures, [1.0, 5.0, 9.0], strict=True)) / sum(
            q * a for q, a in zip(p, curvatures, strict=True))

    true, biased = optimum([1, 1, 1]), optimum([1, 1 / 2, 1 / 4])
    assert limit("corrected") == pytest.approx(true, rel=0.01)
    assert limit("identical") == pytest.approx(biased, rel=0.01)
    assert abs(true - biased) / true > 0.1


# ---- ticks ----------------------------------------------------------------------------------------------------------


def test_only_those_who_answered_get_the_new_model(federate):
    outcome = federate(FedFix(1.0), [0.5, 2.5], seconds=6.5)
    slow = [task for task in outcome.tasks if task["node"] == 1 and task["outcome"] == "ok"]
    assert [task["start_s"] for task in slow] == pytest.approx([0.0, 3.0], rel=1e-8)
    assert [task["staleness"] for task in slow] == [2, 2]


def test_steps_come_at_multiples_of_the_interval_and_empty_ticks_change_nothing(federate):
    outcome = federate(FedFix(0.5), [1.7], client_updates=5)
    assert [row["tick"] for row in outcome.of("update")] == [4, 8, 12, 16, 20]
    assert [row["time_s"] for row in outcome.of("update")] == pytest.approx(
        [2.0, 4.0, 6.0, 8.0, 9.7], rel=1e-8)    # the run ends with the fifth update, whose tick is brought forward


def test_auto_makes_the_first_round_synchronous_and_takes_half_the_slowest_time(federate):
    times = [1.0, 2.2, 4.0]
    outcome = federate(FedFix(), times, client_updates=30)
    first, second = outcome.of("update")[:2]
    assert first["time_s"] == 4.0 and first["nodes"] == [0, 1, 2]
    assert outcome.logged("interval_s") == [2.0]
    assert (second["tick"], second["nodes"]) == (1, [0])
    assert second["weights"] == pytest.approx([1 / 3]) and second["time_s"] == pytest.approx(6.0)
    # The first tasks were the first measurement: client 1 takes two ticks, and weighs twice its share at once.
    assert outcome.of("update")[2]["weights"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert torch.equal(outcome.trajectory[0], federate(MeanUpdate(), times, rounds=1).params)


def test_auto_with_given_times_needs_no_first_round(federate):
    outcome = federate(FedFix(task_times_s=[1.0, 4.0]), [1.0, 4.0], client_updates=6)
    assert outcome.of("update")[0]["time_s"] == pytest.approx(2.0)


def test_auto_refuses_clients_that_take_no_time(federate):
    with pytest.raises(InvalidSetting, match="take no time"):
        federate(FedFix(), [0.0, 0.0], rounds=2)


def test_auto_does_not_wait_for_ever_for_one_client(federate):
    outcome = federate(FedFix(), [1.0, 2.0, 500.0], seconds=60)
    assert outcome.of("update")[0]["nodes"] == [0, 1]
    assert outcome.of("update")[0]["time_s"] == pytest.approx(20.0)


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_a_large_weight_is_warned_of_once_and_not_clipped(federate):
    outcome = federate(FedFix(1.0, max_weight_ratio=3.0), [0.5, 5.0], seconds=40)
    assert len([text for text in outcome.logged("warning") if "max_weight_ratio=3" in text]) == 1
    assert max(max(row["weights"]) for row in outcome.of("update")) == pytest.approx(0.5 * 5)


def test_identical_weights_are_announced_as_biased(federate):
    outcome = federate(FedFix(1.0, weights="identical"), [0.5, 5.0], seconds=20)
    assert "biased towards fast clients" in outcome.logged("warning")[0]
    assert {weight for row in outcome.of("update") for weight in row["weights"]} == {0.5}


# ---- who is here ----------------------------------------------------------------------------------------------------


class Away:
    """Client `partition` is away from `start_s` to `end_s`."""

    def __init__(self, partition, start_s, end_s):
        self.partition, self.start_s, self.end_s = partition, start_s, end_s

    def is_on(self, partition, at_s):
        return partition != self.partition or not self.start_s <= at_s < self.end_s

    def next_change(self, partition, at_s):
        later = [at for at in (self.start_s, self.end_s) if at > at_s]
        return min(later) if partition == self.partition and later else math.inf


def test_a_client_that_leaves_gives_its_share_to_the_others_until_it_is_back(federate):
    outcome = federate(FedFix(1.0), [0.5, 0.5, 0.5], availability=Away(2, 3.2, 8.1), seconds=12)
    weights = {row["tick"]: dict(zip(row["nodes"], row["weights"], strict=True)) for row in outcome.of("update")}
    assert weights[3] == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert weights[6] == pytest.approx({0: 1 / 2, 1: 1 / 2})
    assert weights[11] == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert outcome.logged("nodes") == [[0, 1], [0, 1, 2]]
    assert "node 2 left" in outcome.logged("objective")[0]


def test_an_update_of_a_client_that_left_meanwhile_is_used(federate):
    outcome = federate(FedFix(2.0), [0.5, 0.5], availability=Away(1, 1.0, 1e6), seconds=7)
    assert outcome.of("update")[0]["nodes"] == [0, 1]
    assert outcome.of("update")[0]["weights"] == pytest.approx([0.5, 0.5])
    assert outcome.of("update")[1]["weights"] == pytest.approx([1.0])


def test_a_silent_client_is_dropped_and_welcomed_back(federate):
    slow = [[1.0, 1.0, 30.0], 1.0]
    outcome = federate(FedFix(1.0, drop_after=5), slow, seconds=40)
    assert ["gave no answer" in text for text in outcome.logged("objective")] == [True, False]
    alone = [row for row in outcome.of("update") if 10 < row["time_s"] < 30]
    assert all(row["weights"] == pytest.approx([1.0]) for row in alone)


class Crashes:
    """Every other task of client 0 crashes half-way."""

    def crash_point(self, partition, task_index):
        return 0.5 if partition == 0 and task_index % 2 else None

    def loses_request(self, partition, task_index):
        return False

    def loses_reply(self, partition, task_index):
        return False


def test_repeated_work_makes_a_client_slower_and_its_updates_weigh_more(federate):
    outcome = federate(FedFix(1.0), [1.0, 1.0], failures=Crashes(), seconds=60)
    row = outcome.of("update")[-1] if 0 in outcome.of("update")[-1]["nodes"] else outcome.of("update")[-2]
    weight = dict(zip(row["nodes"], row["weights"], strict=True))[0]
    assert weight == pytest.approx(0.5 * 2)    # 0.5 s lost, 1 s done again: two ticks per update


class AlwaysCrashes(Crashes):
    """Client 0 never finishes anything."""

    def crash_point(self, partition, task_index):
        return 0.5 if partition == 0 and task_index else None


def test_a_client_that_fails_again_and_again_does_not_hold_up_the_first_round(federate):
    outcome = federate(FedFix(), [1.0, 2.0, 3.0], failures=AlwaysCrashes(), seconds=20)
    assert outcome.of("update")[0]["nodes"] == [1, 2]
    assert outcome.of("update")[0]["weights"] == pytest.approx([0.5, 0.5])
    assert "failed again and again" in outcome.logged("objective")[0]


def test_importance_by_examples_follows_what_nodes_hold(federate, quadratic):
    task = quadratic(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    sizes = [1, 3]
    task.data = lambda site: (task.centers[site].repeat(sizes[site], 1), torch.ones(sizes[site], dtype=torch.float64))
    outcome = federate(FedFix(1.0, importance="num_examples"), [0.5, 0.5], task=task, rounds=1)
    assert outcome.of("update")[0]["weights"] == pytest.approx([0.25, 0.75])
