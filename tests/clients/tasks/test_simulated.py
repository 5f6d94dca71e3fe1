"""Training without arithmetic."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clients.evaluation import evaluate_model
from fedcore.clients.modules import initial_model
from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.simulated import Simulated
from fedcore.clients.torch_client import torch_client
from fedcore.errors import InvalidSetting
from fedcore.payload import read_arrays, read_train_reply, wire_bytes
from tests.clients.lab import Lab, node, request

TASK = Simulated(num_params=50, examples=70)


def lab(**settings: object) -> Lab:
    model = initial_model(TASK, 0)
    return Lab(torch_client(TASK, TrainSettings(**settings)), model.replace(torch.arange(50.0)))


def test_an_update_is_zero_and_a_model_is_the_one_received():
    bench = lab()
    update = read_train_reply(bench.train(reply="update", task_id=3), bench.model.layout)
    assert torch.equal(update.values, torch.zeros(50)) and update.task_id == 3
    model = read_train_reply(bench.train(reply="model"), bench.model.layout)
    assert torch.equal(model.values, bench.model.params)


def test_all_updates_share_their_zeros():
    bench = lab()
    first, second = (read_arrays(bench.train(reply="update")["arrays"], bench.model.layout)[0] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


@given(
    action=st.sampled_from(["train", "evaluate", "query"]),
    config=st.fixed_dictionaries({}, optional={
        "local_steps": st.integers(1, 90), "reply": st.sampled_from(["update", "model"]), "task_id": st.integers(0, 5),
        "version": st.integers(0, 5),
    }),
    epochs=st.sampled_from([None, 1, 3]),
)
def test_the_estimate_is_exactly_what_the_reply_costs(action, config, epochs):
    bench = lab(local_epochs=epochs)
    message = request(action, None if action == "query" else bench.model, **config)
    estimate, content = bench.app.estimate(message, node()), bench.app(message, node()).content
    assert (estimate.work_steps, estimate.reply_bytes) == (content["metrics"].get("work-steps", 0), wire_bytes(content))


def test_steps_are_those_that_training_would_take():
    assert lab().train()["metrics"]["work-steps"] == 10
    assert lab(local_epochs=2).train()["metrics"]["work-steps"] == 6        # 70 examples make three batches of 32
    assert lab().train(local_steps=44)["metrics"]["work-steps"] == 44


def test_nothing_is_estimated_for_other_actions():
    assert lab().app.estimate(request("train.other"), node()) is None


def test_the_loss_is_zero():
    assert evaluate_model(TASK, lab().model) == {"loss": 0.0}


@pytest.mark.parametrize("setting", ["num_params", "examples"])
def test_a_setting_out_of_range_is_refused(setting):
    with pytest.raises(InvalidSetting, match=f"{setting}=0"):
        Simulated(**{setting: 0})
