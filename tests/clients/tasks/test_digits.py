"""The default task."""
import pytest
import torch

from fedcore.clients.evaluation import evaluate_model
from fedcore.clients.modules import initial_model
from fedcore.clients.partitions import Dirichlet, Iid
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import PartitionedTask
from fedcore.clients.tasks.digits import Digits
from fedcore.clients.torch_client import torch_client
from fedcore.errors import BadInput, InvalidSetting
from fedcore.payload import read_arrays
from tests.clients.lab import Lab, node


def test_no_test_digit_is_trained_on():
    task = Digits()
    train, test = task.training_data(), task.test_data()
    assert (len(train), len(test)) == (1438, 359)
    seen = {tuple(image.flatten().tolist()) for image in train.inputs}
    assert sum(tuple(image.flatten().tolist()) in seen for image in test.inputs) == 0
    assert task.traits().labels.tolist() == train.targets.tolist()


def test_every_class_is_in_both_parts():
    for part in (Digits().training_data(), Digits().test_data()):
        assert torch.bincount(part.targets, minlength=10).min() > len(part) / 20


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
def test_a_client_with_all_digits_learns_them(model):
    task = PartitionedTask(Digits(model), Iid(), num_clients=1)
    lab = Lab(torch_client(task, TrainSettings(lr=0.1, local_steps=400)), initial_model(task, 0))
    trained = read_arrays(lab.train(node(0))["arrays"], lab.model.layout)[0]
    assert evaluate_model(task, lab.model)["accuracy"] < 0.3
    assert evaluate_model(task, lab.model.replace(trained))["accuracy"] > 0.93


def test_labels_say_what_a_client_has():
    task = PartitionedTask(Digits(), Dirichlet(0.3), num_clients=10)
    for site in range(10):
        assert task.labels(site) == torch.bincount(task.data(site).all_targets(), minlength=10).tolist()


def test_there_is_no_file_to_read():
    with pytest.raises(BadInput, match="scikit-learn"):
        Digits().training_data("digits.npz")


def test_a_wrong_model_is_refused_when_the_task_is_built():
    with pytest.raises(InvalidSetting, match="task.model"):
        Digits("lstm")
