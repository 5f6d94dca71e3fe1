"""From an experiment to its client."""
import pickle
import sys

import pytest
import torch

from fedcore.clients.build import VALIDATION_SHARE, build_client, build_task, train_settings
from fedcore.clients.partitions import Classes
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import PartitionedTask
from fedcore.config import load_experiment
from fedcore.errors import BadInput
from tests.clients.lab import node, request


def experiment(**settings: object):
    return load_experiment({"strategy": "fedavg", **settings})


def test_a_pool_is_divided_as_the_experiment_says():
    clients = {"count": 7, "partition": {"name": "classes", "classes_per_client": 5}}
    task = build_task(experiment(clients=clients, seed=3))
    assert isinstance(task, PartitionedTask)
    assert (task.num_clients, task.seed, task.partitioner) == (7, 3, Classes(5))


def test_a_task_with_data_of_its_own_is_told_how_many_clients_there_are():
    task = build_task(experiment(task={"name": "quadratic", "dimension": 3}, clients={"count": 4}, seed=9))
    assert (task.dimension, task.num_clients, task.seed) == (3, 4, 9)


@pytest.mark.parametrize(("settings", "share"), [
    ({}, 0.0), ({"evaluate": {"where": "clients"}}, VALIDATION_SHARE),
    ({"clients": {"validation_share": 0.4}}, 0.4),
    ({"clients": {"validation_share": 0.4}, "evaluate": {"where": "clients"}}, 0.4),
])
def test_examples_are_held_back_where_clients_evaluate(settings, share):
    assert build_task(experiment(**settings)).validation_share == share


def test_training_settings_are_those_of_the_experiment():
    found = train_settings(experiment(train={"lr": 0.3, "optimizer": {"name": "adam"}, "local_epochs": 2}))
    assert found == TrainSettings(lr=0.3, optimizer={"name": "adam"}, local_epochs=2)


def test_an_experiment_builds_a_client_in_any_process():
    settings = experiment(clients={"count": 3})
    app = build_client(pickle.loads(pickle.dumps(settings)))
    assert app(request("query"), node(2)).content["metrics"]["num-examples"] == 479


OWN_TASK = '''
import torch
from torch import nn

class Mine:
    def __init__(self, slope: float = 1.0, num_clients: int = 0):
        self.slope, self.num_clients = slope, num_clients
    def model(self):
        return nn.Linear(1, 1)
    def loss(self, model, inputs, targets):
        return (model(inputs) - targets).square().mean()
    def data(self, site):
        x = torch.arange(4.0)[:, None] + site
        return torch.utils.data.TensorDataset(x, self.slope * x)
    def validation_data(self, site):
        return None
    def metrics(self, model, data):
        inputs, targets = data.batch(torch.arange(len(data)))
        return {"loss": self.loss(model, inputs, targets)}

class Unfinished:
    def model(self):
        return nn.Linear(1, 1)
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_task", None)


def test_a_task_of_ones_own_is_named_by_its_class(own_module):
    settings = experiment(
        task={"name": "own_task:Mine", "slope": 2.0}, clients={"count": 2}, evaluate={"where": "none"}
    )
    assert build_task(settings).num_clients == 2
    app = build_client(settings)
    model = torch.nn.Linear(1, 1)
    from fedcore.vectors import Model

    reply = app(request("evaluate", Model.of(model)), node(1)).content["metrics"]
    x = torch.arange(4.0)[:, None] + 1
    assert reply["loss"] == pytest.approx((model(x) - 2 * x).square().mean().item(), rel=1e-5)
    assert app(request("train", Model.of(model)), node(1)).content["metrics"]["work-steps"] == 10


def test_a_class_that_is_no_task_is_refused(own_module):
    with pytest.raises(BadInput, match=r"Unfinished has no method loss\(\)"):
        build_task(experiment(task="own_task:Unfinished", evaluate={"where": "none"}))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "housing", "shakespeare"])
def test_only_whoever_needs_the_data_must_have_the_file(name):
    settings = {"strategy": "fedavg", "task": name, "evaluate": {"where": "clients"}}
    for part in ("server", "client"):
        build_task(load_experiment(settings, part=part)).model()
    with pytest.raises(BadInput, match="needs a local file"):
        load_experiment(settings)
    with pytest.raises(BadInput, match="needs a local file"):
        load_experiment({**settings, "evaluate": {"where": "server"}}, part="server")


@pytest.mark.parametrize(("settings", "words"), [
    ({"task": "digit"}, "Did you mean digits"),
    ({"task": {"name": "digits", "modell": "mlp"}}, "task.modell"),
    ({"task": {"name": "digits", "model": "cnnn"}}, "task.model.*Did you mean cnn"),
    ({"task": {"name": "digits", "model": {"name": "mlp", "hidden": [0]}}}, "task.model.hidden"),
    ({"task": {"name": "quadratic", "seed": 3}}, "fedcore fills it in itself"),
    ({"task": {"name": "quadratic", "condition": 0}}, "task.condition"),
    ({"task": "mnist"}, "needs a local file"),
    ({"task": {"name": "mnist", "path": "nowhere.npz"}}, "task.path.*nowhere.npz"),
    ({"clients": {"partition": {"name": "dirichlet"}}}, "clients.partition.alpha"),
    ({"clients": {"partition": {"name": "dirichlet", "alpha": -1}}}, "clients.partition.alpha"),
    ({"train": {"optimizer": {"name": "sgd", "momentun": 0.9}}}, "Did you mean momentum"),
    ({"train": {"schedule": {"name": "cosine"}}}, "train.schedule.total_steps"),
    ({"train": {"lr": 0}}, "train.lr"),
    ({"train": {"device": "toaster"}}, "train.device"),
])
def test_a_broken_experiment_is_refused_before_anything_starts(settings, words):
    with pytest.raises(BadInput, match=words):
        experiment(**settings)
