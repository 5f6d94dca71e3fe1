"""Identities of the private methods, and what becomes of them when clients are missing."""
import logging
import math

import pytest
import torch

from fedcore.errors import BadExperiment, InvalidSetting, UnsupportedModel
from fedcore.privacy.accounting import mu_of
from fedcore.privacy.mechanism import mean_std
from fedcore.privacy.wire import PRIVATE
from fedcore.registry import build
from fedcore.seeds import torch_generator
from fedcore.simulations.availability import Availability
from fedcore.strategies.diff2 import Diff2
from fedcore.strategies.dp_baselines import DpGd, DpSgd, DpSrm
from fedcore.strategies.private import mean_of, next_estimate
from tests.strategies.private_world import RECORDS, Records, client_of

CLIENTS = 4
TIMES_S = [1.0 + 0.1 * client for client in range(CLIENTS)]
BASE = {"noise_multiplier": 6.0, "delta": 1e-3, "server_lr": 0.2, "clip_gradient": 0.5}


@pytest.fixture
def run(federate):
    def start(strategy, rounds=7, **options):
        task = options.pop("task", Records())
        return federate(strategy, TIMES_S, task=task, app=client_of(task), rounds=rounds, **options)

    return start


def same(one, other):
    return len(one.trajectory) == len(other.trajectory) > 0 and all(
        torch.equal(first, second) for first, second in zip(one.trajectory, other.trajectory, strict=True))


@pytest.mark.parametrize("mode", ["local", "central"])
def test_a_restart_in_every_round_is_dp_gd_bit_for_bit(run, mode):
    assert same(run(Diff2(**BASE, restart_interval=1, noise_mode=mode)), run(DpGd(**BASE, noise_mode=mode)))


def test_the_budget_split_does_not_matter_where_every_round_is_a_restart(run):
    budget = {"epsilon": 3.0, "delta": 1e-3}
    assert same(run(Diff2(**budget, restart_interval=1, budget_split=0.3)), run(DpGd(**budget)))


def test_one_local_step_is_the_gd_routine_bit_for_bit(run):
    routine = {**BASE, "restart_interval": 3, "routine": "bvr_l_sgd"}
    assert same(run(Diff2(**routine, local_steps=1)), run(Diff2(**BASE, restart_interval=3)))


def test_recursive_momentum_that_forgets_everything_is_dp_gd_bit_for_bit(run):
    assert same(run(DpSrm(**BASE, gradient_weight=1)), run(DpGd(**BASE)))


def test_recursive_momentum_that_forgets_nothing_is_diff2_with_one_restart(run):
    assert same(run(DpSrm(**BASE, gradient_weight=0, clip_difference=2)),
                run(Diff2(**BASE, restart_interval=7, clip_difference=2)))


def test_a_sample_of_everybody_is_dp_gd_bit_for_bit(run):
    relation = {**BASE, "neighbouring": "add-remove"}
    assert same(run(DpSgd(**relation, sample_rate=1)), run(DpGd(**relation)))


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_without_clipping_and_noise_the_estimate_is_the_full_gradient(interval):
    task, params = Records(), 0.1 * torch.ones(5, dtype=torch.float64)

    def gradient(at, client):
        inputs, targets = task.data(client)
        return torch.func.grad(lambda p: 0.5 * (torch.tanh(inputs @ p) - targets).square().mean())(at)

    previous, estimate = params, None
    for index in range(20):
        full = index % interval == 0
        messages = [gradient(params, client) - (0 if full else gradient(previous, client)) for client in range(CLIENTS)]
        estimate = next_estimate(None if full else estimate, mean_of(messages), 0.0)
        exact = mean_of([gradient(params, client) for client in range(CLIENTS)])
        assert (estimate - exact).abs().max() < 1e-14
        previous, params = params, params - 0.3 * estimate


@pytest.mark.parametrize("strategy, releases", [
    (Diff2(epsilon=2.0, delta=1e-3, restart_interval=3), 7), (DpGd(epsilon=2.0, delta=1e-3), 7),
    (DpSrm(epsilon=2.0, delta=1e-3), 7),
])
def test_a_whole_run_spends_its_budget_exactly(run, strategy, releases):
    outcome = run(strategy)
    assert [row["epsilon"] for row in outcome.of("update")][-1] == pytest.approx(2.0, rel=1e-9)
    for spending in strategy.spent.values():
        assert spending.mu_squared == pytest.approx(mu_of(2.0, 1e-3) ** 2, rel=1e-9)
    assert len(strategy.ledger.entries) == releases
    assert strategy.summary_figures() == {"epsilon": pytest.approx(2.0), "delta": 1e-3, "epsilon_budget": 2.0}


def test_more_rounds_than_planned_are_not_run(run):
    outcome = run(DpGd(epsilon=2.0, delta=1e-3, rounds=3), rounds=9)
    assert outcome.hub.version == 3 and outcome.hub.stop_reason == "budget"


def test_a_run_with_sampled_releases_keeps_its_budget(run):
    strategy = DpSgd(epsilon=2.0, delta=1e-3, sample_rate=0.3)
    outcome = run(strategy, rounds=4)
    assert outcome.hub.version == 4 and 1.9 < strategy.spent_epsilon() <= 2.0


@pytest.mark.parametrize("local_steps, batch, times", [(4, 4, 1), (5, 12, 4), (9, 3, 2)])
def test_local_steps_are_charged_to_the_clients_that_made_them(run, local_steps, batch, times):
    strategy = Diff2(epsilon=2.0, delta=1e-3, restart_interval=4, routine="bvr_l_sgd", local_steps=local_steps,
                     local_batch_size=batch)
    outcome = run(strategy, rounds=8)    # two turns of all
    local = [entry for entry in strategy.ledger.entries if entry["kind"] == "local steps"]
    assert len(local) == 8 and {entry["times"] for entry in local} == {times}
    visits = [entry["clients"][0] for entry in local]
    assert sorted(visits[:4]) == sorted(visits[4:]) == list(range(CLIENTS))
    assert strategy.spent_epsilon() == pytest.approx(2.0, rel=1e-6) and outcome.hub.version == 8


def test_central_noise_has_its_deviation(run):
    strategy = {**BASE, "noise_mode": "central", "server_lr": 1.0}
    outcomes = [run(DpGd(**strategy), rounds=1, seed=seed) for seed in range(60)]
    steps = torch.stack([outcome.params for outcome in outcomes])
    std = mean_std("central", 6.0, 0.5, [RECORDS] * CLIENTS, "replace-one")
    assert (steps - steps.mean(0)).std().item() == pytest.approx(std, rel=0.15)


class Missing:
    """Node 2 misses one round, node 1 another."""

    def crash_point(self, partition, task_index):
        return None

    def loses_request(self, partition, task_index):
        return (partition, task_index) == (2, 3)

    def loses_reply(self, partition, task_index):
        return (partition, task_index) == (1, 6)


def test_a_client_that_misses_a_difference_forces_a_restart(run):
    strategy = Diff2(epsilon=2.0, delta=1e-3, restart_interval=5, rounds=10)
    outcome = run(strategy, failures=Missing(), rounds=12)
    kinds = [entry["kind"] for entry in strategy.ledger.entries]
    assert kinds[:4] == ["full", "between", "between", "full"]
    # Its round was dropped whole: the mean of the others' differences would not fit the estimate.
    assert outcome.logged("failed_round") and outcome.of("update")[2]["restart"] == 1
    assert strategy.spent_epsilon() <= 2.0 * (1 + 1e-9) and outcome.hub.stop_reason == "budget"
    assert max(entry["mu_squared"] for entry in strategy.ledger.entries) <= mu_of(2.0, 1e-3) ** 2 * (1 + 1e-9)


class Absent(Availability):
    """Node 3 is away for a while."""

    def is_on(self, partition, at_s):
        return partition != 3 or not 2.5 <= at_s < 9

    def next_change(self, partition, at_s):
        return next((at for at in (2.5, 9.0) if partition == 3 and at > at_s), math.inf)


def test_a_client_that_left_comes_back_at_the_next_restart(run):
    strategy = Diff2(epsilon=2.0, delta=1e-3, restart_interval=4, rounds=30)
    outcome = run(strategy, rounds=14, availability=Absent())
    clients = [(entry["kind"], entry["clients"]) for entry in strategy.ledger.entries]
    away = [index for index, (kind, here) in enumerate(clients) if 3 not in here]
    assert away and all(clients[index][0] == "full" or clients[index - 1][1] == clients[index][1] for index in away)
    back = next(index for index in range(away[-1], len(clients)) if 3 in clients[index][1])
    assert clients[back][0] == "full" and outcome.hub.version > 6


def test_exchanges_of_a_round_are_billed_as_work(run):
    outcome = run(Diff2(**BASE, restart_interval=3), rounds=2)
    steps = [task["local_steps"] for task in outcome.tasks if task["kind"] == PRIVATE]
    assert steps == [3] * CLIENTS + [6] * CLIENTS    # 12 records in batches of 4, at one point and at two


@pytest.mark.parametrize("name", ["diff2", "dp_gd", "dp_sgd", "dp_srm"])
@pytest.mark.parametrize("settings, setting", [
    ({"epsilon": 0.0}, "epsilon"), ({"epsilon": -1.0}, "epsilon"), ({}, "epsilon"),
    ({"epsilon": 3.0, "noise_multiplier": 1.0}, "epsilon"), ({"noise_multiplier": 0.0}, "noise_multiplier"),
    ({"epsilon": 3.0, "delta": 1.0}, "delta"), ({"epsilon": 3.0, "delta": 0.0}, "delta"),
    ({"epsilon": 3.0, "rounds": 0}, "rounds"), ({"epsilon": 3.0, "clip_gradient": 0.0}, "clip_gradient"),
    ({"epsilon": 3.0, "server_lr": -1.0}, "server_lr"), ({"epsilon": 3.0, "noise_mode": "distributed"}, "noise_mode"),
    ({"epsilon": 3.0, "noise_mode": "x"}, "noise_mode"), ({"epsilon": 3.0, "neighbouring": "x"}, "neighbouring"),
])
def test_settings_out_of_range_are_refused_by_their_full_name(name, settings, setting):
    with pytest.raises(InvalidSetting, match=f"^strategy.{setting}="):
        build("strategies", {"name": name, **settings})


@pytest.mark.parametrize("name, settings", [
    ("diff2", {"restart_interval": 0}), ("diff2", {"clip_difference": 0.0}), ("diff2", {"budget_split": 1.0}),
    ("diff2", {"routine": "x"}), ("diff2", {"local_steps": 0}), ("diff2", {"local_batch_size": 0}),
    ("diff2", {"clip_local": -1.0}), ("diff2", {"local_budget": 0.0}), ("dp_srm", {"gradient_weight": 1.5}),
    ("dp_srm", {"clip_difference": 0.0}), ("dp_sgd", {"sample_rate": 0.0}), ("dp_sgd", {"sample_rate": 1.1}),
    ("dp_sgd", {"neighbouring": "replace-one"}),
])
def test_settings_of_one_method_are_refused_by_their_full_name(name, settings):
    with pytest.raises(InvalidSetting, match=f"^strategy.{next(iter(settings))}="):
        build("strategies", {"name": name, "epsilon": 3.0, **settings})


def test_distributed_noise_says_what_is_missing():
    with pytest.raises(InvalidSetting, match="secure sum"):
        DpGd(epsilon=1.0, noise_mode="distributed")


def test_an_interval_longer_than_the_run_is_the_run(caplog):
    with caplog.at_level(logging.WARNING, "fedcore"):
        assert Diff2(epsilon=1.0, rounds=5, restart_interval=9).schedule.interval == 5
    assert "restart_interval=9" in caplog.text


def test_a_delta_that_promises_nothing_is_refused_before_anything_is_asked(run):
    with pytest.raises(InvalidSetting, match="below 1/48"):
        run(DpGd(epsilon=1.0, delta=1 / 48))


def test_a_model_with_batchnorm_is_refused_before_anything_is_asked(run):
    class Mixing(Records):
        def model(self):
            return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()

    with pytest.raises(UnsupportedModel, match="BatchNorm"):
        run(DpGd(epsilon=1.0, delta=1e-3), task=Mixing())


@pytest.mark.parametrize("change, words", [
    ({"strategy": {"name": "diff2", "epsilon": 3.0, "delta": 1e-3}}, "strategy.delta=0.001"),
    ({"evaluate": {"where": "clients"}}, "evaluate.where"),
    ({"stop": {"seconds": 5.0}}, "strategy.rounds"),
])
def test_an_experiment_that_would_break_its_promise_is_refused_before_it_starts(change, words):
    from fedcore.config import load_experiment

    experiment = {"strategy": {"name": "diff2", "epsilon": 3.0}, "stop": {"rounds": 5}, **change}
    with pytest.raises(BadExperiment, match=words):
        load_experiment(experiment)


def test_visits_follow_from_the_seed():
    order = torch.randperm(4, generator=torch_generator(0, "visits", 0)).tolist()
    assert sorted(order) == [0, 1, 2, 3]
