"""What a client answers beside training: evaluations, queries, and estimates of both."""
import math

import torch
from flwr.app import Context, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.payload import read_arrays, wire_bytes
from fedcore.vectors import Model
from tests.clients.lab import TASK, LineTask, Normed, lab, node, request


def values(content, model: Model) -> torch.Tensor:
    return read_arrays(content["arrays"], model.layout)[0]


def test_evaluation_measures_the_sites_validation_data():
    bench = lab(LineTask(validation=20))
    content = bench.app(request("evaluate", bench.model), node()).content
    module = bench.model
    loss = TASK.loss(_loaded(module), *TASK._points(100, 20).batch(torch.arange(20))).item()
    assert math.isclose(content["metrics"]["loss"], loss, rel_tol=1e-6)
    assert content["metrics"]["num-examples"] == 20
    assert content["metrics"]["work-steps"] == 2        # five batches of four, three of which cost one step


def test_evaluation_falls_back_to_the_training_data():
    bench = lab()
    assert bench.app(request("evaluate", bench.model), node()).content["metrics"]["num-examples"] == 50


def test_evaluation_switches_dropout_off_and_training_switches_it_on_again():
    bench = lab(LineTask(dropout=0.5), lr=0.1)
    trained = values(bench.train(), bench.model)
    figures = [bench.app(request("evaluate", bench.model), node()).content["metrics"]["loss"] for _ in range(2)]
    assert figures[0] == figures[1]
    assert torch.equal(values(bench.train(), bench.model), trained)


def test_a_query_tells_how_much_data_there_is():
    content = lab().app(request("query"), node(1)).content
    assert dict(content["metrics"]) == {"num-examples": 7, "partition-id": 1}
    assert dict(content["info"]) == {"kinds": "update,model"}


CONFIGS = st.fixed_dictionaries({}, optional={
    "local_steps": st.integers(1, 9), "draw": st.integers(0, 3), "task_id": st.integers(0, 9),
    "version": st.integers(0, 9), "reply": st.sampled_from(["update", "model"]), "proximal_mu": st.just(0.1),
})


@settings(max_examples=40)
@given(
    config=CONFIGS, site=st.integers(0, 2), action=st.sampled_from(["train", "evaluate", "query"]),
    epochs=st.booleans(), task=st.sampled_from([LineTask(), LineTask(validation=9), Normed(sizes=(50, 8, 4))]),
)
def test_the_estimate_is_exactly_what_the_reply_costs(config, site, action, epochs, task):
    bench = lab(task, **({"local_steps": None, "local_epochs": 2} if epochs else {}))
    message, context = request(action, None if action == "query" else bench.model, **config), node(site)
    estimate = bench.app.estimate(message, context)
    content = bench.app(message, context).content
    assert estimate is not None
    assert estimate.reply_bytes == wire_bytes(content)
    assert estimate.work_steps == content["metrics"].get("work-steps", 0)


def test_an_evaluation_of_unknown_figures_cannot_be_estimated():
    class Secretive(LineTask):
        metric_names = None

    assert lab(Secretive()).app.estimate(request("evaluate", lab().model), node()) is None


def test_an_unknown_action_cannot_be_estimated():
    assert lab().app.estimate(request("train.other", lab().model), node()) is None


def test_mods_wrap_training_alone():
    seen = []

    def mod(message: Message, context: Context, call) -> Message:
        seen.append(message.metadata.message_type)
        return call(message, context)

    app = torch_client(TASK, TrainSettings(local_steps=1), mods=[mod])
    for action in ("train", "evaluate", "query"):
        app(request(action, lab().model), node())
    assert seen == ["train"]


def _loaded(model: Model) -> nn.Module:
    module = TASK.model()
    model.load_into(module)
    return module.eval()
