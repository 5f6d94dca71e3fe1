"""A task as a ClientApp: what it answers, and that it is the same wherever and whenever it runs."""
import math

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.payload import read_arrays, read_train_reply
from fedcore.seeds import torch_generator
from fedcore.vectors import Model
from tests.clients.lab import TASK, Lab, LineTask, Normed, lab, node


def values(content: RecordDict, model: Model) -> torch.Tensor:
    return read_arrays(content["arrays"], model.layout)[0]


def by_hand(model: Model, site: int, steps: int, batch_size: int, lr: float, draw: int, seed: int) -> torch.Tensor:
    """Train with nothing but torch: the same batches, one step after the other."""
    module = TASK.model()
    model.load_into(module)
    data, optimizer = TASK.data(site), torch.optim.SGD(module.parameters(), lr=lr)
    generator, waiting = torch_generator(seed, site, "train", draw), []
    for _ in range(steps):
        if not waiting:
            order = torch.arange(len(data))
            if len(data) > batch_size:
                order = torch.randperm(len(data), generator=generator)
            waiting = list(order.split(batch_size))
        optimizer.zero_grad()
        TASK.loss(module, *data.batch(waiting.pop(0))).backward()
        optimizer.step()
    return Model.of(module).params


@settings(max_examples=30)
@given(
    site=st.integers(0, 2), steps=st.integers(1, 30), batch_size=st.integers(1, 20), draw=st.integers(0, 5),
    seed=st.integers(0, 2**40),
)
def test_a_client_takes_exactly_the_steps_of_a_plain_loop(site, steps, batch_size, draw, seed):
    bench = lab(batch_size=batch_size, lr=0.1)
    content = bench.train(node(site), local_steps=steps, draw=draw, seed=seed)
    expected = by_hand(bench.model, site, steps, batch_size, 0.1, draw, seed)
    assert torch.equal(values(content, bench.model), expected)
    assert content["metrics"]["work-steps"] == steps
    assert content["metrics"]["num-examples"] == TASK.sizes[site]


def test_a_plain_flower_request_is_answered_like_fedavgs_client():
    content = lab().train(server_round=3)
    assert list(content) == ["arrays", "metrics"]
    assert isinstance(content["arrays"], ArrayRecord) and isinstance(content["metrics"], MetricRecord)
    assert set(content["metrics"]) == {"num-examples", "work-steps", "train-seconds", "loss"}
    module = TASK.model()
    module.load_state_dict(content["arrays"].to_torch_state_dict())


def test_the_stock_array_record_of_a_state_dict_is_understood():
    bench = lab()
    stock = Message(RecordDict({"arrays": ArrayRecord(bench.model.state_dict())}), dst_node_id=7, message_type="train")
    assert torch.equal(values(bench.app(stock, node()).content, bench.model), values(bench.train(), bench.model))


def test_the_reply_echoes_task_and_version_when_they_were_sent():
    content = lab().train(task_id=12, version=4, reply="update")
    assert dict(content["reply"]) == {"kind": "update", "task-id": 12, "version": 4}
    reply = read_train_reply(content, lab().model.layout)
    assert (reply.kind, reply.task_id, reply.version) == ("update", 12, 4)


def test_received_plus_update_is_the_model():
    bench = lab(lr=0.1)
    update, model = (values(bench.train(reply=kind), bench.model) for kind in ("update", "model"))
    assert torch.allclose(bench.model.params + update, model, rtol=0, atol=1e-7)
    assert torch.equal(update, model - bench.model.params)


def test_training_changes_neither_the_request_nor_earlier_replies():
    bench = lab(lr=0.1)
    before = bench.model.params.clone()
    first = values(bench.train(), bench.model)
    kept = first.clone()
    bench.train(node(1))
    assert torch.equal(bench.model.params, before) and torch.equal(first, kept)


def test_the_same_work_gives_the_same_bits_in_any_order_and_in_another_app():
    one, other = lab(LineTask(dropout=0.3), lr=0.1), lab(LineTask(dropout=0.3), lr=0.1)
    jobs = [(site, draw) for site in range(3) for draw in range(3)]
    first = {job: values(one.train(node(job[0]), draw=job[1]), one.model) for job in jobs}
    torch.rand(17)      # whoever else uses the global generator changes nothing
    second = {job: values(other.train(node(job[0]), draw=job[1]), other.model) for job in reversed(jobs)}
    assert all(torch.equal(first[job], second[job]) for job in jobs)


def test_the_global_generator_is_left_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lab(LineTask(dropout=0.3)).train()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("changed", [{"draw": 1}, {"seed": 1}])
def test_another_draw_or_seed_visits_other_batches(changed):
    bench = lab(lr=0.1)
    assert not torch.equal(values(bench.train(draw=0, seed=0), bench.model),
                           values(bench.train(**{"draw": 0, "seed": 0, **changed}), bench.model))


def test_the_draw_falls_back_to_flowers_round_and_the_seed_to_the_run_configuration():
    bench = lab(lr=0.1)
    context = node()
    context.run_config["seed"] = 9
    found = bench.train(context, server_round=4)
    assert torch.equal(values(found, bench.model), values(bench.train(draw=3, seed=9), bench.model))


def test_fedprox_without_pull_is_plain_training_bit_for_bit():
    bench = lab(lr=0.1)
    assert torch.equal(values(bench.train(proximal_mu=0.0), bench.model), values(bench.train(), bench.model))


def test_fedprox_pulls_each_step_towards_the_received_model():
    bench, pull, lr = lab(batch_size=64), 0.7, 0.05
    found = values(bench.train(local_steps=3, proximal_mu=pull), bench.model)
    module = TASK.model()
    bench.model.load_into(module)
    received = [parameter.detach().clone() for parameter in module.parameters()]
    for _ in range(3):
        module.zero_grad()
        TASK.loss(module, *TASK.data(0).batch(torch.arange(50))).backward()
        with torch.no_grad():
            for value, start in zip(module.parameters(), received, strict=True):
                value -= lr * (value.grad + pull * (value - start))
    assert torch.allclose(found, Model.of(module).params, atol=1e-7)


def test_full_batches_make_local_steps_additive():
    bench = lab(batch_size=64, lr=0.1)
    at_once = values(bench.train(local_steps=9), bench.model)
    halfway = Lab(bench.app, bench.model.replace(values(bench.train(local_steps=4), bench.model)))
    assert torch.equal(values(halfway.train(local_steps=5, draw=1), bench.model), at_once)


def test_the_server_may_scale_the_learning_rate():
    bench, halved = lab(lr=0.25), lab(lr=0.125)
    assert torch.equal(values(bench.train(lr_scale=0.5), bench.model), values(halved.train(), bench.model))
    assert torch.equal(values(bench.train(lr_scale=0.0), bench.model), bench.model.params)


def test_a_long_gradient_is_scaled_to_the_limit_and_a_short_one_left_alone():
    bench = lab(batch_size=64, local_steps=1, lr=1.0, clip_norm=0.01)
    assert math.isclose(values(bench.train(reply="update"), bench.model).norm(), 0.01, rel_tol=1e-4)
    loose, free = lab(lr=0.1, clip_norm=1e6), lab(lr=0.1)
    assert torch.equal(values(loose.train(), bench.model), values(free.train(), bench.model))


def test_float64_trains_in_float64():
    bench = lab(dtype="float64", lr=0.1)
    trained = values(bench.train(), bench.model)
    assert trained.dtype is torch.float64
    assert torch.allclose(trained.float(), values(lab(lr=0.1).train(), lab().model), atol=1e-5)


def test_epochs_become_steps_by_the_size_of_the_data():
    bench = lab(local_steps=None, local_epochs=2, batch_size=16)
    assert [bench.train(node(site))["metrics"]["work-steps"] for site in range(3)] == [8, 2, 2]


def test_ten_steps_are_the_default():
    assert lab(local_steps=None).train()["metrics"]["work-steps"] == 10


def test_a_diverged_model_is_sent_as_it_is():
    content = lab(lr=1e30, local_steps=20).train()
    assert not torch.isfinite(values(content, lab().model)).all()


def test_the_loss_is_the_mean_over_the_steps_before_each_step():
    bench = lab(batch_size=64, lr=0.1)
    single = [Lab(bench.app, bench.model.replace(values(bench.train(local_steps=steps), bench.model)))
              .train(local_steps=1)["metrics"]["loss"] for steps in (1, 2)]
    first = bench.train(local_steps=1)["metrics"]["loss"]
    assert math.isclose(bench.train(local_steps=3)["metrics"]["loss"], (first + sum(single)) / 3, rel_tol=1e-6)


def test_buffers_come_back_as_values_also_beside_an_update():
    task = Normed(sizes=(50,))
    bench = lab(task, batch_size=25)
    content = bench.train(reply="update", local_steps=3)
    buffers = read_arrays(content["arrays"], bench.model.layout)[1]
    assert buffers["1.num_batches_tracked"] == 3
    assert not torch.equal(buffers["1.running_mean"], torch.zeros(4))
    again = bench.train(reply="update", local_steps=3)
    assert torch.equal(read_arrays(again["arrays"], bench.model.layout)[1]["1.running_mean"], buffers["1.running_mean"])


# ---- schedules ------------------------------------------------------------------------------------------------------

STEP = {"name": "step", "step_size": 5, "gamma": 0.5}


def test_a_schedule_counts_the_steps_of_earlier_tasks():
    scheduled, context = lab(batch_size=64, lr=0.25, schedule=STEP), node()
    first = values(scheduled.train(context), scheduled.model)
    second = values(scheduled.train(context, draw=1), scheduled.model)
    assert torch.equal(first, values(lab(batch_size=64, lr=0.25).train(), scheduled.model))
    assert torch.equal(second, values(lab(batch_size=64, lr=0.125).train(draw=1), scheduled.model))
    assert context.state["fedcore.progress"]["steps-done"] == 10


def test_a_schedule_may_follow_the_servers_versions_instead():
    scheduled, context = lab(lr=0.25, schedule={**STEP, "unit": "versions"}), node()
    found = values(scheduled.train(context, version=5), scheduled.model)
    assert torch.equal(found, values(lab(lr=0.125).train(version=5), scheduled.model))
    assert not context.state


def test_without_a_schedule_a_client_keeps_nothing():
    context = node()
    lab().train(context)
    assert not context.state
