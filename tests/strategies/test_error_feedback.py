"""Identities of the error-feedback methods, and what becomes of them when messages and memories are lost."""
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from fedcore.clients.gradient import ROUNDS
from fedcore.clients.memory import after_key, before_key
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.errors import BadInput, InvalidSetting, MalformedRequest
from fedcore.feedback import GRADIENT, PAYLOAD, START
from fedcore.payload import ARRAY_HEADER_BYTES, ARRAYS, CONFIG, METRICS, REPLY, VectorRecord, wire_bytes
from fedcore.registry import build, names
from fedcore.seeds import torch_generator
from fedcore.strategies.econtrol import EControl
from fedcore.strategies.error_feedback import (
    CompressedSgd,
    DistributedSgd,
    Ef14,
    Ef21,
    Ef21Sgdm,
)
from fedcore.strategies.feedback_rule import Memory, Rule, mean, respond, server_step
from fedcore.vectors import Model

CLIENTS, DIMENSION = 4, 12
TIMES_S = [1.0 + 0.1 * client for client in range(CLIENTS)]
TOP = {"name": "top_k", "fraction": 0.25}
SLACK = 1e-12
METHODS = {"econtrol": EControl, "ef21": Ef21, "ef21_sgdm": Ef21Sgdm, "ef14": Ef14}


@pytest.fixture
def run(federate, noisy):
    """Run a method on noisy quadratics in float64."""
    centers = torch.randn(CLIENTS, DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def start(strategy, rounds=12, **options):
        return federate(strategy, TIMES_S, task=noisy(centers), rounds=rounds, **options)

    return start


def memory_of(outcome, partition):
    record = outcome.hub.grid.engine.labour.states[partition][after_key(ROUNDS)]
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


@pytest.mark.parametrize("feedback", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("compressor", names("compressors"))
def test_the_iterate_less_the_mean_error_moves_as_sgd_does(compressor, feedback):
    codec = build("compressors", compressor).codec([(5, 6), (10,)], torch.float64)
    gamma, rule = 0.3, Rule(feedback=feedback, estimates=True)
    draws = torch.Generator().manual_seed(3)

    def noise():
        return torch.randn(40, dtype=torch.float64, generator=draws)

    centers, params = [10 * noise() for _ in range(3)], noise()
    memories, estimates = {}, {}
    virtual = params.clone()
    for step in range(25):
        gradients = {client: params - center + noise() for client, center in enumerate(centers)}
        for client, gradient in gradients.items():
            memory = memories.get(client) or Memory.at(rule, gradient, torch.zeros_like(gradient))
            generator = torch_generator(0, client, step)

            def compress(vector, generator=generator):
                payload = codec.encode(vector, generator)
                return payload, codec.decode(payload)

            memories[client], payload = respond(rule, memory, gradient, compress)
            # The server adds what it decodes to what it had, and has the client's own estimate, bit for bit.
            estimates[client] = estimates.get(client, torch.zeros_like(gradient)) + codec.decode(payload)
            assert torch.equal(estimates[client], memories[client].estimate)
        params = server_step(params, mean(estimates, 3), gamma)
        virtual = virtual - gamma * mean(gradients, 3)
        error = mean({client: memory.error for client, memory in memories.items()}, 3)
        scale = max(1.0, float(params.abs().max()), gamma * float(error.abs().max()))
        assert (params - gamma * error - virtual).abs().max() <= SLACK * scale


@pytest.mark.parametrize("init", ["full", "compressed", "zero"])
def test_without_feedback_it_is_ef21_bit_for_bit(run, init):
    controlled, plain = run(EControl(0.1, TOP, feedback=0, init=init)), run(Ef21(0.1, TOP, init))
    assert all(torch.equal(one, other) for one, other in zip(controlled.trajectory, plain.trajectory, strict=True))


def test_a_gradient_weight_of_one_is_ef21_bit_for_bit(run):
    averaged, plain = run(Ef21Sgdm(0.1, TOP, gradient_weight=1)), run(Ef21(0.1, TOP))
    assert torch.equal(averaged.params, plain.params)


@pytest.mark.parametrize("init", ["full", "compressed", "zero"])
@pytest.mark.parametrize("method", [EControl, Ef21, Ef14, CompressedSgd])
def test_with_the_identity_it_is_distributed_sgd(run, method, init):
    extra = {"init": init} if method in (EControl, Ef21) else {}
    compressed, plain = run(method(0.1, "identity", **extra)), run(DistributedSgd(0.1))
    assert torch.allclose(compressed.params, plain.params, rtol=0, atol=1e-13)


def test_the_default_feedback_is_the_contraction(run):
    assert torch.equal(run(EControl(0.1, TOP)).params, run(EControl(0.1, TOP, feedback=0.25)).params)


def test_server_momentum_of_zero_is_none(run):
    without, slow = run(EControl(0.05, TOP)), run(EControl(0.05, TOP, server_momentum=0.5))
    assert without.strategy.momentum is None and not torch.equal(without.params, slow.params)


@pytest.mark.parametrize("init", ["full", "compressed", "zero"])
def test_bytes_up_are_those_of_the_payloads(run, init):
    rounds, full = 5, 8 * DIMENSION
    outcome = run(EControl(0.1, TOP, init=init), rounds=rounds)
    payload = outcome.strategy.codec(outcome.hub).num_bytes + ARRAY_HEADER_BYTES
    record = 8 * 5 + 8 * 2    # five metrics, whether it begins, and the fingerprint of h
    starts = {"full": full + ARRAY_HEADER_BYTES - payload, "compressed": payload, "zero": 0}
    expected = CLIENTS * (rounds * (payload + record) + starts[init])
    assert sum(task["bytes_up"] for task in outcome.tasks if task["kind"] == GRADIENT) == expected


class Lossy:
    """Requests and replies are lost now and then, the first ones among them."""

    def crash_point(self, partition, task_index):
        return 0.5 if (partition, task_index) == (0, 5) else None

    def loses_request(self, partition, task_index):
        return (partition, task_index) in ((1, 1), (2, 4))

    def loses_reply(self, partition, task_index):
        return (partition, task_index) in ((3, 1), (3, 4), (2, 6), (1, 7), (1, 8))


@pytest.mark.parametrize("failures", [None, Lossy()], ids=["reliable", "lossy"])
@pytest.mark.parametrize("method", ["econtrol", "ef21", "ef21_sgdm"])
def test_server_and_client_hold_the_same_estimate(run, method, failures):
    strategy = METHODS[method](0.1, TOP)
    outcome = run(strategy, failures=failures)
    if failures:
        assert outcome.hub.totals["client_updates"] < CLIENTS * 12
    for partition in range(CLIENTS):
        assert strategy.used_rounds[partition] == 11
        assert torch.equal(memory_of(outcome, partition)["estimate"], strategy.estimates[partition])


def request(model, **changed):
    config = {"seed": 0, "draw": 0, "round": 0, "after": -1, "init": "full", "estimates": True, "feedback": 0.25,
              "compressor": '{"name": "top_k", "fraction": 0.25}', **changed}
    content = RecordDict({ARRAYS: VectorRecord(model), CONFIG: ConfigRecord(config)})
    return Message(content, 1000, GRADIENT)


def ask(client, context, model, **changed):
    return client(request(model, **changed), context).content


@pytest.fixture
def node(noisy):
    """Return a client, its context and a model."""
    task = noisy(torch.zeros(1, DIMENSION, dtype=torch.float64))
    client = torch_client(task, TrainSettings(batch_size=4, dtype="float64", device="cpu"))
    return client, Context(0, 1000, {"partition-id": 0}, RecordDict(), {}), Model.of(task.model())


def payload_of(content, name=PAYLOAD):
    return content[ARRAYS][name].numpy().tolist()


def test_a_request_that_comes_twice_is_answered_with_the_same_bytes(node):
    first, again = ask(*node), ask(*node)
    assert payload_of(first, START) == payload_of(again, START)
    second = ask(*node, round=1, draw=1, after=0)
    assert payload_of(second) == payload_of(ask(*node, round=1, draw=1, after=0))
    assert not second[REPLY]["begins"]


def test_a_round_that_the_server_did_not_use_is_forgotten(node):
    ask(*node)
    ask(*node, round=1, draw=1, after=0)
    after_a_loss = ask(*node, round=2, draw=2, after=0)
    other = Context(0, 1000, {"partition-id": 0}, RecordDict(), {})
    ask(node[0], other, node[2])
    assert payload_of(after_a_loss) == payload_of(ask(node[0], other, node[2], round=2, draw=2, after=0))
    assert node[1].state[before_key(ROUNDS)]["estimate"].numpy().tolist() == \
        other.state[before_key(ROUNDS)]["estimate"].numpy().tolist()


@pytest.mark.parametrize("init", ["full", "compressed", "zero"])
@pytest.mark.parametrize("estimates", [True, False])
def test_the_size_of_an_answer_is_known_before_it_is_computed(node, init, estimates):
    client, context, model = node
    for changed in ({}, {"round": 1, "draw": 1, "after": 0}, {"round": 2, "draw": 2, "after": 77}):
        message = request(model, init=init, estimates=estimates, **changed)
        estimate = client.estimate(message, context)
        reply = client(message, context)
        assert estimate.reply_bytes == wire_bytes(reply.content)
        assert estimate.work_steps == reply.content[METRICS]["work-steps"] == 1


def test_a_client_whose_estimate_is_another_is_refused_and_begins_anew(run, monkeypatch):
    strategy, folded = EControl(0.1, TOP), EControl._contribution

    def drifting(self, partition, found):
        if partition == 1 and self.used_rounds.get(1) == 4 and not self.mismatches:
            self.estimates[1] = self.estimates[1] + 1e-12
        return folded(self, partition, found)

    monkeypatch.setattr(EControl, "_contribution", drifting)
    outcome = run(strategy)
    assert outcome.hub.counts["refused"] == 1 and strategy.summary_figures() == {"h_mismatch": 1}
    assert [row["h_mismatch"] for row in outcome.of("update")] == [0] * 5 + [1] + [0] * 6
    assert torch.equal(memory_of(outcome, 1)["estimate"], strategy.estimates[1])


def test_a_client_that_has_forgotten_says_that_it_begins(node):
    ask(*node)
    node[1].state.clear()
    reply = ask(*node, round=1, draw=1, after=0)
    assert reply[REPLY]["begins"] and START in reply[ARRAYS]


def test_a_client_that_forgets_is_taken_in_anew(federate, noisy):
    centers = torch.randn(CLIENTS, DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    task = noisy(centers)
    app = torch_client(task, TrainSettings(batch_size=4, dtype="float64", device="cpu"), mods=[forgetting])
    strategy = EControl(0.1, TOP)
    outcome = federate(strategy, TIMES_S, task=task, app=app, rounds=9)
    for partition in range(CLIENTS):
        assert torch.equal(memory_of(outcome, partition)["estimate"], strategy.estimates[partition])
    assert outcome.hub.totals["client_updates"] == CLIENTS * 9


def forgetting(message, context, call_next):
    config = message.content.get(CONFIG)
    if config is not None and config.get("round") == 5 and context.node_config["partition-id"] == 2:
        context.state.clear()
    return call_next(message, context)


class Normalised(nn.Module):
    """A model with BatchNorm statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, inputs):
        return self.last(self.norm(inputs))


class Regression:
    """Twelve examples for each client, of another mean for each."""

    metric_names = ("loss",)

    def model(self):
        return Normalised()

    def loss(self, model, inputs, targets):
        return (model(inputs) - targets).square().mean()

    def data(self, site):
        inputs = site + torch.randn(12, 3, generator=torch.Generator().manual_seed(site))
        return inputs, inputs.sum(1, keepdim=True)

    def validation_data(self, site):
        return None

    def metrics(self, model, data):
        return {"loss": self.loss(model, *data.batch(torch.arange(len(data)))).item()}


def test_batchnorm_statistics_are_averaged_and_never_compressed(federate):
    torch.manual_seed(0)
    outcome = federate(EControl(0.05, TOP), TIMES_S, task=Regression(), rounds=8)
    buffers = outcome.hub.model.buffers
    assert buffers["norm.num_batches_tracked"] == 8
    assert buffers["norm.running_mean"].abs().max() > 0.1 and outcome.hub.counts["refused"] == 0


@pytest.mark.parametrize("change", [
    {"round": "x"}, {"init": "other"}, {"feedback": 2.0}, {"compressor": "[]"}, {"compressor": "{"},
    {"compressor": '{"name": "os:system"}'}, {"compressor": '{"name": "top_k", "fraction": 7}'},
])
def test_a_request_without_meaning_is_refused_by_name(node, change):
    with pytest.raises(MalformedRequest):
        ask(*node, **change)


@pytest.mark.parametrize("settings, name", [
    ({"server_lr": 0}, "strategy.server_lr"), ({"feedback": 1.5}, "strategy.feedback"),
    ({"feedback": -0.1}, "strategy.feedback"), ({"init": "some"}, "strategy.init"),
    ({"server_momentum": 1.0}, "strategy.server_momentum"),
    ({"compressor": {"name": "rand_k", "scaling": "unbiased"}}, "strategy.compressor"),
    ({"compressor": {"name": "top_k", "fraction": 2}}, "strategy.compressor.fraction"),
    ({"compressor": "topk"}, "strategy.compressor"), ({"compressor": "os:system"}, "strategy.compressor"),
])
def test_settings_out_of_range_are_refused_by_their_full_name(settings, name):
    with pytest.raises(InvalidSetting, match=f"^{name}[^a-z]"):
        build("strategies", {"name": "econtrol", **settings})


def test_a_compressor_needs_a_name():
    with pytest.raises(BadInput, match="compressor.name"):
        EControl(compressor={"fraction": 0.1})


def test_metrics_carry_the_examples(node):
    assert ask(*node)[METRICS]["num-examples"] == 12
