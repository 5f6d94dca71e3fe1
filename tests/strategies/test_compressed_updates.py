"""Any strategy can compress: what its clients send, what the server makes of it, and what becomes of lost messages."""
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from torch import nn

from fedcore.checkpoint import Checkpoints
from fedcore.clients.compression import ERROR, MEMORY
from fedcore.clients.memory import after_key
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.compressed import ASKED, PAYLOAD, Compression
from fedcore.config import load_experiment
from fedcore.errors import BadExperiment, BadInput
from fedcore.payload import ARRAY_HEADER_BYTES, ARRAYS, METRICS, VectorRecord
from fedcore.registry import build
from fedcore.rounds import FlowerRounds
from fedcore.strategies.econtrol import EControl
from fedcore.strategy import HubStrategy

CLIENTS, DIMENSION = 4, 12
TIMES_S = [1.0 + 0.37 * client for client in range(CLIENTS)]
SETTINGS = {"fedcompass": {"min_local_steps": 2, "max_local_steps": 6}, "fedbuff": {"buffer_size": 2}}
STRATEGIES = ["fedavg", "fedadam", "fedmedian", "fedcompass", "fedfix", "fedasync", "fedbuff"]
TRAINING = TrainSettings(lr=0.1, batch_size=4, local_steps=2, device="cpu")
TOP = Compression({"name": "top_k", "fraction": 0.25})
RANDOM = Compression({"name": "rand_k", "fraction": 0.25})
IDENTITY = Compression({"name": "identity"})


def make(name):
    strategy = build("strategies", {"name": name, **SETTINGS.get(name, {})})
    return strategy if isinstance(strategy, HubStrategy) else FlowerRounds(strategy)


@pytest.fixture
def run(federate, noisy):
    """Run a registered strategy over clients that draw batches, and compress."""
    centers = torch.randn(CLIENTS, DIMENSION, generator=torch.Generator().manual_seed(1))

    def start(name, compression=TOP, fault=None, rounds=4, **options):
        task = noisy(centers)
        app = torch_client(task, TRAINING)
        if fault is not None:
            app = spoiled(app, fault)
        return federate(make(name), TIMES_S, task=task, app=app, rounds=rounds, compression=compression, **options)

    return start


def without_wall(rows):
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in rows]


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_of_an_update_is_as_good_as_no_compression(run, name):
    packed, plain = run(name, IDENTITY), run(name, None)
    # Flower's strategies and FedAsync mix models: the server adds to its own what the client subtracted.
    assert torch.allclose(packed.params, plain.params, rtol=0, atol=1e-6)
    assert packed.of("update")[-1]["compression_error"] == 0.0
    if name in ("fedcompass", "fedfix", "fedbuff"):
        assert torch.equal(packed.params, plain.params)


@pytest.mark.parametrize("name", STRATEGIES)
def test_compressed_runs_are_deterministic_and_learn(run, name):
    first, second = run(name, RANDOM, rounds=12), run(name, RANDOM, rounds=12)
    assert torch.equal(first.params, second.params)
    assert without_wall(first.rows) == without_wall(second.rows) and first.tasks == second.tasks
    assert first.params.norm() > 0.1 and first.hub.counts["refused"] == first.hub.counts["failures"] == 0
    assert 0 < first.of("update")[-1]["compression_error"] < 1


@pytest.mark.parametrize("stop_after", range(1, 12))
@pytest.mark.parametrize("name", ["fedavg", "fedcompass", "fedbuff"])
def test_saved_after_any_round_and_continued_equals_never_stopped(run, name, stop_after, tmp_path):
    whole, points = run(name), iter(range(1, 10_000))
    before = run(name, checkpoints=Checkpoints(tmp_path), interrupted=lambda: next(points) == stop_after)
    if before.hub.stop_reason != "interrupted":
        assert stop_after >= len(whole.trajectory)    # it had ended before
        return
    after = run(name, checkpoints=Checkpoints(tmp_path), resume=True)
    assert torch.equal(after.params, whole.params)
    assert (after.hub.version, after.hub.now, after.hub.totals) == (whole.hub.version, whole.hub.now, whole.hub.totals)
    assert memories(after) == memories(whole)


def memories(outcome):
    states = outcome.hub.grid.engine.labour.states
    return {partition: state[after_key(MEMORY)][ERROR].numpy().tolist() for partition, state in states.items()}


@pytest.mark.parametrize("name", ["fedavg", "fedfix"])
def test_bytes_up_are_those_of_the_payloads(run, name):
    outcome = run(name)
    layout = outcome.hub.model.layout
    echoed = {"fedavg": 0, "fedfix": 8 + len("update") + 8 + 8}[name]    # kind, task, version
    metrics, number = 8 * 5, 8
    expected = TOP.codec(layout).num_bytes + ARRAY_HEADER_BYTES + metrics + number + echoed
    trained = [task for task in outcome.tasks if task["kind"] == "train" and task["outcome"] == "ok"]
    assert {task["bytes_up"] for task in trained} == {expected}


class Lossy:
    """Requests and replies are lost now and then, the first ones among them."""

    def crash_point(self, partition, task_index):
        return 0.5 if (partition, task_index) == (0, 5) else None

    def loses_request(self, partition, task_index):
        return (partition, task_index) in ((1, 1), (2, 4))

    def loses_reply(self, partition, task_index):
        return (partition, task_index) in ((3, 1), (3, 4), (2, 6), (1, 7), (1, 8))


@pytest.mark.parametrize("name", ["fedavg", "fedcompass", "fedbuff"])
def test_a_client_goes_on_from_the_last_task_that_was_used(run, name, monkeypatch):
    asked, ask = [], Compression.ask

    def listening(self, content, number, after, *rest):
        asked.append((number, after))
        return ask(self, content, number, after, *rest)

    monkeypatch.setattr(Compression, "ask", listening)
    outcome = run(name, failures=Lossy(), rounds=10)
    used = {task["task"]: task["node"] for task in outcome.tasks if task["outcome"] == "ok"}
    node_of = {task["task"]: task["node"] for task in outcome.tasks}
    unused = {task["outcome"] for task in outcome.tasks} & {"lost", "failed"}
    latest = {}
    for number, after in asked:
        if number not in node_of:
            continue    # under way when the run ended
        assert after == latest.get(node_of[number], -1)
        if number in used:
            latest[node_of[number]] = number
    assert unused and outcome.hub.counts["refused"] == 0


def spoiled(inner, fault):
    """Return an app in which node 2 spoils every compressed reply in one way."""

    def train(message, context):
        reply = inner(message, context)
        if context.node_config["partition-id"] == 2:
            fault(reply.content)
        return reply

    app = ClientApp()
    app.train()(train)
    app.evaluate()(inner)
    app.query()(inner)
    return app


def with_payload(change):
    def fault(content):
        payload = change(content[ARRAYS][PAYLOAD].numpy())
        content[ARRAYS][PAYLOAD] = Array(payload)

    return fault


def not_a_number(payload):
    payload[-4:] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    return payload


def of_another_task(content):
    content[ASKED] = ConfigRecord({"number": 77})


def not_compressed(content):
    del content[ASKED]


def with_an_entry_more(content):
    content[ARRAYS]["more"] = Array(np.zeros(3, np.float32))


def without_metrics(content):
    del content[METRICS]


FAULTS = {
    "short": with_payload(lambda payload: payload[:-1]), "long": with_payload(lambda payload: np.append(payload, 0)),
    "nan": with_payload(not_a_number), "bits": with_payload(lambda payload: np.full_like(payload, 255)),
    "other": of_another_task, "plain": not_compressed, "more": with_an_entry_more, "metrics": without_metrics,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["fedavg", "fedbuff"])
def test_replies_that_cannot_be_decoded_are_refused_and_leave_no_trace(run, name, fault):
    outcome = run(name, fault=FAULTS[fault])
    assert torch.isfinite(outcome.params).all() and outcome.hub.version > 0
    assert all(2 not in row["nodes"] for row in outcome.of("update"))
    assert outcome.hub.counts["refused"] > 0 and {row["node"] for row in outcome.of("refused")} == {2}
    assert 2 not in outcome.hub._used or not outcome.hub._used[2]


class Normalised(nn.Module):
    """A model with BatchNorm statistics and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.last.bias.requires_grad_(False)

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


@pytest.mark.parametrize("name", ["fedavg", "fedbuff"])
def test_buffers_travel_as_they_are(federate, name):
    torch.manual_seed(0)
    outcome = federate(make(name), TIMES_S, task=Regression(), rounds=8, compression=TOP)
    buffers = outcome.hub.model.buffers
    assert buffers["norm.running_mean"].abs().max() > 0.1 and buffers["norm.num_batches_tracked"] > 0
    assert outcome.hub.counts["refused"] == outcome.hub.counts["failures"] == 0


def test_a_strategy_that_does_not_train_models_says_so(federate, noisy):
    task = noisy(torch.zeros(CLIENTS, DIMENSION, dtype=torch.float64))
    with pytest.raises(BadInput, match="train.gradient"):
        federate(EControl(), TIMES_S, task=task, rounds=2, compression=TOP)


@pytest.mark.parametrize("strategy, compression, message", [
    ("fedavg", {"name": "top_k", "fraction": 2}, "compression.fraction=2"),
    ("fedavg", "topk", "compression='topk'"),
    ("fedavg", {"name": "top_k", "share": 0.1}, "compression.share"),
    ("fedavg", {"name": "top_k", "error_feedback": "often"}, "compression.error_feedback='often'"),
    ("fedavg", {"name": "qsgd", "scaling": "unbiased"}, "error_feedback: false"),
    ("fedavg", "fedcore.compression.sparse:TopK", "Clients import nothing"),
    ("econtrol", "top_k", "strategy.compressor"),
    ("dp_client_fixed_clipping", "top_k", "not clipped"),
])
def test_settings_that_do_not_fit_are_refused_with_what_to_do(strategy, compression, message):
    spec = {"name": strategy}
    if strategy.startswith("dp_"):
        spec |= {"strategy": "fedavg", "noise_multiplier": 0.1, "num_sampled_clients": 4, "clipping_norm": 1.0}
    with pytest.raises(BadExperiment, match=message):
        load_experiment({"strategy": spec, "compression": compression})


def test_without_error_feedback_nothing_is_remembered(run):
    outcome = run("fedavg", Compression({"name": "qsgd", "scaling": "unbiased"}, error_feedback=False))
    assert not outcome.hub.grid.engine.labour.states


def test_records_of_the_server_stay_as_they_were(run):
    outcome = run("fedavg")
    record = outcome.hub.model_record()
    assert isinstance(record, VectorRecord) and isinstance(record, ArrayRecord) and record.model is outcome.hub.model
