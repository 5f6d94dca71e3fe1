"""What a client refuses, by name."""

import pytest
from flwr.app import ConfigRecord, MetricRecord
from torch import nn

from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.errors import EmptyClient, InvalidSetting, MalformedRequest, UnknownSite
from fedcore.vectors import Model
from tests.clients.lab import TASK, LineTask, lab, node, request


def test_a_client_without_data_says_so():
    task = LineTask(sizes=(0,))
    for action in ("train", "evaluate"):
        with pytest.raises(EmptyClient, match="Client 0 has no example"):
            lab(task).app(request(action, lab().model), node())


@pytest.mark.parametrize("config", [
    {"local_steps": 0}, {"local_steps": 2.5}, {"local_steps": True}, {"draw": -1}, {"reply": "gradient"},
    {"lr_scale": -1.0}, {"lr_scale": float("nan")}, {"proximal_mu": float("inf")}, {"seed": "x"},
])
def test_a_request_that_makes_no_sense_is_refused(config):
    with pytest.raises(MalformedRequest, match=next(iter(config)).replace("_", "-")):
        lab().train(**config)


def test_a_request_for_another_model_is_refused():
    other = Model.of(nn.Linear(3, 1))
    with pytest.raises(MalformedRequest, match="does not fit this client's model"):
        lab().app(request("train", other), node())
    with pytest.raises(MalformedRequest, match="one record of arrays"):
        lab().app(request("train"), node())


def test_a_configuration_of_the_wrong_kind_is_refused():
    message = request("train", lab().model)
    message.content["config"] = MetricRecord({"local-steps": 3})
    with pytest.raises(MalformedRequest, match="MetricRecord"):
        lab().app(message, node())


def test_a_node_that_does_not_know_its_data_says_so():
    with pytest.raises(UnknownSite, match="partition-id=0"):
        lab().train(node(None))


def test_a_site_of_its_own_wins_over_the_partition_number():
    class ByName(LineTask):
        def data(self, site):
            return super().data({"clinic": 1}[site])

    bench = lab(ByName())
    assert bench.train(node(0, site="clinic"))["metrics"]["num-examples"] == 7
    assert bench.train(node(None, site="clinic"))["metrics"]["num-examples"] == 7


@pytest.mark.parametrize(("setting", "value"), [
    ("lr", 0.0), ("lr", float("nan")), ("batch_size", 0), ("local_steps", 0), ("clip_norm", 0.0),
    ("clip_norm", float("nan")), ("dtype", "float16"), ("device", "toaster"),
])
def test_training_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(InvalidSetting, match=f"train.{setting}"):
        torch_client(TASK, TrainSettings(**{setting: value}))


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(InvalidSetting, match="train.local_epochs"):
        TrainSettings(local_steps=3, local_epochs=1)


def test_a_task_may_bring_its_own_client():
    class Stranger(LineTask):
        def client_app(self, settings: TrainSettings):
            return f"mine, with lr={settings.lr}"

    assert torch_client(Stranger(), TrainSettings(lr=0.5)) == "mine, with lr=0.5"


def test_configuration_records_are_not_changed():
    message = request("train", lab().model, local_steps=2, task_id=1)
    before = dict(message.content["config"])
    lab().app(message, node())
    assert dict(message.content["config"]) == before and isinstance(message.content["config"], ConfigRecord)
