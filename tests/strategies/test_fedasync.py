"""FedAsync: its equations, its identities, its settings."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from fedcore.errors import BadInput, InvalidSetting
from fedcore.strategies.fedasync import FedAsync, add_update, corrected_weight, mix_model, running_mean

BAD = [
    ("server_lr", {"server_lr": 0.0}, "above 0 and at most 1"),
    ("server_lr", {"server_lr": 1.5}, "extrapolate"),
    ("server_lr", {"server_lr": float("nan")}, "finite"),
    ("staleness", {"staleness": "linear"}, "constant, polynomial, hinge"),
    ("staleness.a", {"staleness": {"name": "polynomial", "a": -0.5}}, "stale updates count more"),
    ("staleness.a", {"staleness": {"name": "hinge", "a": -1}}, "at least 0"),
    ("staleness.b", {"staleness": {"name": "hinge", "b": -1}}, "at least 0"),
    ("mixing", {"mixing": "update"}, "model, delta"),
    ("weights", {"mixing": "delta", "weights": "fair"}, "identical, corrected"),
    ("weights", {"weights": "corrected"}, "mixing: delta"),
    ("max_staleness", {"max_staleness": -1}, "at least 0"),
    ("max_staleness", {"max_staleness": 2.5}, "whole number"),
    ("proximal_mu", {"proximal_mu": -0.1}, "at least 0"),
]


@pytest.mark.parametrize(("setting", "arguments", "hint"), BAD)
def test_a_bad_setting_is_refused_with_its_name_and_what_is_allowed(setting, arguments, hint):
    with pytest.raises(InvalidSetting) as caught:
        FedAsync(**arguments)
    assert caught.value.name == setting and hint in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, BadInput)


@given(lists(floats(-1e6, 1e6), min_size=1, max_size=5))
def test_a_mixing_weight_of_one_gives_the_clients_model(values):
    trained = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(mix_model(torch.ones_like(trained), trained, 1.0), trained)


@given(floats(0, 1), floats(-10, 10), floats(-10, 10))
def test_a_mixture_lies_between_the_two_models_and_leaves_them_alone(weight, old, new):
    params, trained = torch.tensor([old], dtype=torch.float64), torch.tensor([new], dtype=torch.float64)
    mixed = mix_model(params, trained, weight).item()
    assert min(old, new) - 1e-12 <= mixed <= max(old, new) + 1e-12
    assert params.item() == old and trained.item() == new


def test_only_the_model_rule_pulls_back_towards_the_version_that_was_sent():
    sent, now, update = torch.zeros(1), torch.full((1,), 10.0), torch.ones(1)
    assert mix_model(now, sent + update, 0.5).item() == 5.5
    assert add_update(now, update, 0.5).item() == 10.5


@given(lists(floats(1e-3, 1e3), min_size=1, max_size=20))
def test_corrected_weights_give_every_client_the_same_weight_per_second(times):
    per_second = [corrected_weight(time_s, times) / time_s for time_s in times]
    assert max(per_second) == pytest.approx(min(per_second))


def test_corrected_weights_of_clients_that_take_a_fifth_to_one_second():
    times = [1 - 0.8 * index / 9 for index in range(10)]
    weights = [corrected_weight(time_s, times) for time_s in times]
    assert (round(weights[-1], 2), round(weights[0], 2)) == (0.43, 2.13)


@given(lists(floats(-100, 100), min_size=1, max_size=20))
def test_a_running_mean_is_the_mean(values):
    mean = 0.0
    for count, value in enumerate(values):
        mean = running_mean(mean, count, value)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)


def sequential_sgd(task, steps, lr):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, *task.data(0)).backward()
        optimizer.step()
    return model.params.detach()


def test_one_client_that_replaces_the_model_is_sequential_sgd(federate, quadratic):
    task = quadratic(torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64), [1.7])
    outcome = federate(FedAsync(server_lr=1.0), [2.0], task=task, local_steps=3, client_updates=5)
    assert torch.equal(outcome.params, sequential_sgd(task, 15, lr=0.1))


def test_full_mixing_without_discount_leaves_the_last_uploaded_model(federate):
    uploads = []

    class Watched(FedAsync):
        def on_reply(self, hub, reply):
            uploads.append(reply.model.clone())
            super().on_reply(hub, reply)

    outcome = federate(Watched(server_lr=1.0, staleness="constant"), [1.0, 1.7, 2.9], client_updates=12)
    assert torch.equal(outcome.params, uploads[-1])
    assert len(uploads) == 12


@settings(deadline=None, max_examples=6)
@given(clients=integers(1, 6))
def test_equal_clients_are_each_one_round_stale(federate, clients):
    outcome = federate(FedAsync(), [1.0] * clients, client_updates=4 * clients)
    staleness = [row["staleness"][0] for row in outcome.of("update")]
    assert staleness[:clients] == list(range(clients))
    assert set(staleness[clients:]) == {clients - 1}


def test_the_weight_is_the_rate_times_the_discount(federate):
    outcome = federate(FedAsync(0.5, {"name": "polynomial", "a": 1.0}), [1.0, 3.1], client_updates=9)
    for row in outcome.of("update"):
        assert row["weights"] == [0.5 / (1 + row["staleness"][0])]


def test_every_upload_is_applied_or_dropped_and_the_client_goes_on(federate):
    outcome = federate(FedAsync(max_staleness=1), [1.0, 1.1, 1.2, 7.5], client_updates=60)
    applied, dropped = outcome.logged("applied")[-1], outcome.logged("dropped")[-1]
    assert applied + dropped == 60 and applied == outcome.hub.version and dropped > 0
    assert all(row["staleness"][0] <= 1 for row in outcome.of("update"))
    assert len([task for task in outcome.tasks if task["node"] == 3 and task["outcome"] == "ok"]) > 1


def test_the_proximal_term_reaches_the_clients(federate):
    centers = torch.tensor([[1.0]], dtype=torch.float64)
    outcome = federate(FedAsync(1.0, proximal_mu=2.0), [1.0], centers=centers, lr=0.1, client_updates=1)
    # Two steps: the first is not pulled; the second is pulled back from 0.1 towards the received 0.
    assert outcome.params.item() == pytest.approx(0.1 + 0.1 * (0.9 - 2.0 * 0.1))


def test_no_base_model_is_kept_for_clients_that_send_models(federate):
    outcome = federate(FedAsync(), [1.0, 2.5, 4.0], client_updates=20)
    assert all(task["base"] is None for task in outcome.hub.state_dict()["tasks"])


@pytest.mark.parametrize("mixing", ["model", "delta"])
def test_equal_data_have_one_fixed_point(federate, mixing):
    centers = torch.full((3, 2), 1.5, dtype=torch.float64)
    outcome = federate(FedAsync(mixing=mixing), [1.0, 2.3, 3.1], centers=centers, client_updates=300)
    assert torch.allclose(outcome.params, centers[0], atol=1e-6)


def mean_of_tail(outcome, share=0.5):
    tail = outcome.trajectory[int(len(outcome.trajectory) * (1 - share)):]
    return torch.stack(tail).mean(0).item()


def test_unequal_clients_pull_the_limit_towards_the_fast_one_unless_corrected(federate):
    centers = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    times, steps = [1.0, 4.0], {"lr": 0.02, "local_steps": 1, "client_updates": 1500}
    identical = federate(FedAsync(1.0, "constant", "delta"), times, centers=centers, **steps)
    corrected = federate(FedAsync(1.0, "constant", "delta", "corrected"), times, centers=centers, **steps)
    assert mean_of_tail(identical) == pytest.approx(0.2, rel=0.05)      # shares 1/tau: 4/5 and 1/5
    assert mean_of_tail(corrected) == pytest.approx(0.5, rel=0.02)
