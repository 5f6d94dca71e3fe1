"""How good a model is."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcore.clients.data import Samples
from fedcore.clients.evaluation import (
    classification_metrics,
    evaluate_model,
    regression_metrics,
    server_evaluation,
)
from fedcore.clients.modules import initial_model
from fedcore.clients.partitions import Iid
from fedcore.clients.task import PartitionedTask
from fedcore.clients.tasks.digits import Digits
from fedcore.errors import BadInput
from fedcore.vectors import Model
from tests.clients.lab import LineTask


def test_batches_do_not_change_the_figures_of_a_classifier():
    inputs, targets = torch.randn(2500, 4), torch.randint(0, 3, (2500,))
    model = nn.Linear(4, 3)
    found = classification_metrics(model, Samples(inputs, targets))
    assert found["loss"] == pytest.approx(functional.cross_entropy(model(inputs), targets).item(), rel=1e-5)
    assert found["accuracy"] == (model(inputs).argmax(1) == targets).double().mean().item()


def test_every_position_of_a_text_counts():
    class Copy(nn.Module):
        def forward(self, tokens):
            return 10 * functional.one_hot(tokens, 5).float()

    tokens = torch.randint(0, 5, (30, 7))
    targets = tokens.clone()
    targets[:, :2] = (targets[:, :2] + 1) % 5
    assert classification_metrics(Copy(), Samples(tokens, targets))["accuracy"] == pytest.approx(5 / 7)


def test_batches_do_not_change_the_figures_of_a_regression():
    inputs, targets = torch.randn(2500, 4), torch.randn(2500)
    model = nn.Linear(4, 1)
    errors = model(inputs).squeeze(1) - targets
    found = regression_metrics(model, Samples(inputs, targets))
    assert found["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-5)
    assert found["mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)


def test_the_server_measures_on_the_test_data_again_and_again():
    task = PartitionedTask(Digits(), Iid(), 2)
    evaluate, model = server_evaluation(task), initial_model(task, 0)
    first = evaluate(model)
    other = evaluate(model.replace(-model.params))
    assert evaluate(model) == first == evaluate_model(task, model)
    assert other != first and all(type(value) is float for value in first.values())


def test_models_of_either_precision_can_be_measured():
    task = PartitionedTask(Digits(), Iid(), 2)
    single, double = (initial_model(task, 0, dtype) for dtype in (torch.float32, torch.float64))
    evaluate = server_evaluation(task)
    assert evaluate(double)["loss"] == pytest.approx(evaluate(single)["loss"], rel=1e-5)


def test_a_task_without_test_data_says_who_else_can_evaluate():
    with pytest.raises(BadInput, match="LineTask has no test data.*where: clients"):
        server_evaluation(LineTask())


def test_the_initial_model_follows_from_the_seed_alone():
    task = PartitionedTask(Digits(), Iid(), 2)
    torch.manual_seed(1)
    first = initial_model(task, 0)
    torch.manual_seed(2)
    assert torch.equal(initial_model(task, 0).params, first.params)
    assert not torch.equal(initial_model(task, 1).params, first.params)
    assert math.isclose(torch.rand(1).item(), torch.rand(1, generator=torch.Generator().manual_seed(2)).item())


def test_a_model_may_be_a_batch_norm_network():
    class Normed(LineTask):
        def model(self):
            return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def test_data(self):
            return self.data(0)

    task = Normed()
    model = initial_model(task, 0)
    module = task.model()
    model.load_into(module)
    data = task.data(0)
    expected = task.loss(module.eval(), data.inputs, data.targets).item()
    assert evaluate_model(task, model)["loss"] == pytest.approx(expected, rel=1e-5)
    assert isinstance(model, Model) and "1.running_mean" in model.buffers
