"""Flower's own strategies under our driver: the identities that tie them to each other and to ours."""
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, FedYogi

from fedcore.rounds import FlowerRounds
from fedcore.strategies.fedbuff import FedBuff
from fedcore.strategies.fedfix import FedFix

TIMES_S = [1.0, 2.2, 4.0]


@pytest.fixture
def run(federate, noisy):
    centers = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def start(strategy, times_s=TIMES_S, rounds=4, **options):
        strategy = strategy if isinstance(strategy, (FedFix, FedBuff)) else FlowerRounds(strategy)
        return federate(strategy, times_s, task=noisy(centers), rounds=rounds, **options)

    return start


def same(first, second):
    return len(first.trajectory) == 4 and all(
        torch.equal(*pair) for pair in zip(first.trajectory, second.trajectory, strict=True))


def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(run):
    assert same(run(FedAvgM(server_learning_rate=1.0, server_momentum=0.0)), run(FedAvg()))


def test_fedprox_without_a_pull_is_fedavg_bit_for_bit(run):
    assert same(run(FedProx(proximal_mu=0.0)), run(FedAvg()))
    assert not same(run(FedProx(proximal_mu=1.0)), run(FedAvg()))


def test_fedavg_of_one_client_is_sequential_training(federate, quadratic):
    task = quadratic(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    strategy = FlowerRounds(FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1))
    outcome = federate(strategy, [1.0], task=task, local_steps=3, lr=0.1, rounds=10)
    assert torch.allclose(outcome.params, task.centers[0] * (1 - 0.9**30), rtol=1e-12)


def test_fedfix_with_a_long_interval_is_flowers_fedavg(run):
    fixed, averaged = run(FedFix(4.0)), run(FedAvg())
    for pair in zip(fixed.trajectory, averaged.trajectory, strict=True):
        assert torch.allclose(*pair, rtol=1e-12, atol=1e-14)


def test_fedbuff_of_all_equal_clients_is_flowers_fedavg(run):
    buffered, averaged = run(FedBuff(3), [1.0] * 3), run(FedAvg(), [1.0] * 3)
    for pair in zip(buffered.trajectory, averaged.trajectory, strict=True):
        assert torch.allclose(*pair, rtol=1e-12, atol=1e-14)


def first_step(run, strategy):
    """Return the mean client movement of the first round, and the first step of a server optimizer on it."""
    movement = run(FedAvg(), rounds=1).params
    return movement, run(strategy, rounds=1).params


def test_fedadams_first_step_starts_from_zero_moments_and_corrects_them(run):
    # Flower's convention: V starts at 0 (the paper: tau^2), the correction's exponent at 2.
    g, step = first_step(run, FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3))
    rate = 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
    assert torch.allclose(step, rate * 0.1 * g / ((0.01 * g**2).sqrt() + 1e-3), rtol=1e-9)


def test_fedyogis_first_step_is_not_corrected(run):
    g, step = first_step(run, FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3))
    assert torch.allclose(step, 0.1 * 0.1 * g / ((0.01 * g**2).sqrt() + 1e-3), rtol=1e-9)
