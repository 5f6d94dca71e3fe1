"""What the server of a gradient method sends, whole models or their changes, and its step size by round."""
import math

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedcore.arrays import LazyArray
from fedcore.clients.gradient import HELD, MODEL
from fedcore.clients.memory import after_key
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.errors import InvalidSetting, MalformedRequest
from fedcore.feedback import GRADIENT, PAYLOAD
from fedcore.payload import ARRAY_HEADER_BYTES, ARRAYS, CONFIG, VectorRecord
from fedcore.registry import build
from fedcore.vectors import Model

CLIENTS, DIMENSION, ROUNDS = 4, 40, 12
TIMES_S = [1.0 + 0.1 * client for client in range(CLIENTS)]
TOP = {"name": "top_k", "fraction": 0.1}
METHODS = ["econtrol", "ef21", "ef21_sgdm", "ef14", "compressed_sgd", "distributed_sgd"]


@pytest.fixture
def run(federate, noisy):
    """Run a method on noisy quadratics in float64."""
    centers = torch.randn(CLIENTS, DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def start(name, rounds=ROUNDS, app=None, **options):
        settings = {key: options.pop(key) for key in ("downlink", "schedule", "server_lr", "compressor", "init")
                    if key in options}
        task = noisy(centers)
        given = {"app": app(task)} if app else {}
        return federate(build("strategies", {"name": name, **settings}), TIMES_S, task=task, rounds=rounds, **given,
                        **options)

    return start


def bytes_down(outcome):
    """Return what each gradient request took, by partition, in the order of rounds."""
    rows = [task for task in outcome.tasks if task["kind"] == GRADIENT]
    return {node: [task["bytes_down"] for task in rows if task["node"] == node] for node in range(CLIENTS)}


def client_for(task, mods=None):
    return torch_client(task, TrainSettings(batch_size=4, dtype="float64", device="cpu"), mods=mods)


@pytest.mark.parametrize("downlink", [{"name": "identity"}, {"name": "top_k", "fraction": 1.0}])
@pytest.mark.parametrize("name", METHODS)
def test_a_compressor_that_changes_nothing_changes_no_bit(run, name, downlink):
    full, same = run(name), run(name, downlink=downlink)
    assert all(torch.equal(one, other) for one, other in zip(full.trajectory, same.trajectory, strict=True))
    assert len(same.trajectory) == ROUNDS


def test_the_first_model_comes_whole_and_then_its_changes_do(run):
    whole, sparse = run("econtrol"), run("econtrol", downlink=TOP)
    for partition in range(CLIENTS):
        full, changes = bytes_down(whole)[partition], bytes_down(sparse)[partition]
        words = changes[0] - full[0]    # that the model is to be kept, and how changes are compressed
        payload = sparse.strategy.codec(sparse.hub).num_bytes + ARRAY_HEADER_BYTES
        assert words > 0 and len(set(changes[1:])) == 1
        assert 0 < changes[1] - (full[1] - 8 * DIMENSION - ARRAY_HEADER_BYTES + payload + words) < 40


def test_server_and_clients_hold_the_same_model_and_it_follows_the_servers(run):
    outcome = run("econtrol", downlink=TOP, rounds=60, server_lr=0.05)
    held = outcome.strategy.downlink.state_dict()["held"]
    for partition in range(CLIENTS):
        state = outcome.hub.grid.engine.labour.states[partition]
        assert torch.equal(torch.from_numpy(state[after_key(MODEL)][HELD].numpy()), held)
    assert (held - outcome.params).norm() < 0.15 * outcome.params.norm()
    full = run("econtrol", rounds=60, server_lr=0.05)
    assert (outcome.params - full.params).norm() < 0.25 * full.params.norm()


class Lossy:
    """Requests and replies are lost now and then."""

    def crash_point(self, partition, task_index):
        return None

    def loses_request(self, partition, task_index):
        return (partition, task_index) in ((1, 1), (2, 4))

    def loses_reply(self, partition, task_index):
        return (partition, task_index) == (3, 6)


def test_who_missed_a_round_gets_the_whole_model_once(run):
    outcome = run("econtrol", downlink=TOP, failures=Lossy())
    most = max(bytes_down(outcome)[0])
    whole = {node: [index for index, size in enumerate(sizes) if size == most]
             for node, sizes in bytes_down(outcome).items()}
    assert whole == {0: [0], 1: [0, 1], 2: [0, 4], 3: [0, 6]}
    assert set(outcome.strategy.used_rounds.values()) == {ROUNDS - 1} and outcome.hub.counts["failures"] == 0


def test_who_has_forgotten_misses_one_round_and_gets_the_whole_model(run):
    def forgetting(message, context, call_next):
        config = message.content.get(CONFIG)
        if config is not None and config.get("round") == 5 and context.node_config["partition-id"] == 2:
            context.state.clear()
        return call_next(message, context)

    outcome = run("econtrol", downlink=TOP, app=lambda task: client_for(task, [forgetting]))
    sizes = bytes_down(outcome)[2]
    assert [index for index, size in enumerate(sizes) if size == max(sizes)] == [0, 6]
    assert outcome.hub.totals["client_updates"] == CLIENTS * ROUNDS - 1
    assert outcome.strategy.used_rounds[2] == ROUNDS - 1
    assert "needs all of it" in outcome.of("failure")[0]["reason"]


@pytest.fixture
def node(noisy):
    """Return a client, its context, and the model that it starts with."""
    task = noisy(torch.zeros(1, DIMENSION, dtype=torch.float64))
    return client_for(task), Context(0, 1000, {"partition-id": 0}, RecordDict(), {}), Model.of(task.model())


def request(arrays, **changed):
    config = {"seed": 0, "draw": 0, "round": 0, "after": -1, "init": "zero", "estimates": True, "feedback": 0.1,
              "compressor": '{"name": "top_k", "fraction": 0.25}', "downlink": '{"name": "top_k", "fraction": 0.1}',
              **changed}
    return Message(RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(config)}), 1000, GRADIENT)


def change_of(vector):
    codec = build("compressors", TOP).codec([(DIMENSION,)], torch.float64)
    record = ArrayRecord()
    record[PAYLOAD] = LazyArray(codec.encode(vector, torch.Generator()).numpy())
    return record


def test_a_change_that_comes_twice_is_made_once(node):
    client, context, model = node
    client(request(VectorRecord(model)), context)
    change = change_of(torch.arange(DIMENSION, dtype=torch.float64))
    answers = [client(request(change, round=1, draw=1, after=0, **{"base-round": 0}), context).content
               for _ in range(2)]
    held = context.state[after_key(MODEL)][HELD].numpy()
    assert held.tolist()[-5:] == [0.0, 36.0, 37.0, 38.0, 39.0]
    assert answers[0][ARRAYS][PAYLOAD].numpy().tolist() == answers[1][ARRAYS][PAYLOAD].numpy().tolist()


@pytest.mark.parametrize("arrays, changed", [
    (change_of(torch.ones(DIMENSION, dtype=torch.float64)), {"base-round": 3}),
    (change_of(torch.ones(DIMENSION, dtype=torch.float64)), {}),
    (None, {"base-round": 0}),
    (change_of(torch.ones(DIMENSION, dtype=torch.float64)), {"base-round": 0, "downlink": '{"name": "sign"}'}),
    (change_of(torch.ones(DIMENSION, dtype=torch.float64)), {"base-round": 0, "downlink": 3}),
    (change_of(torch.ones(DIMENSION, dtype=torch.float64)), {"base-round": "x"}),
])
def test_a_change_that_cannot_be_made_is_refused_and_leaves_the_model_as_it_was(node, arrays, changed):
    client, context, model = node
    client(request(VectorRecord(model)), context)
    with pytest.raises(MalformedRequest):
        client(request(arrays or VectorRecord(model), round=1, draw=1, after=0, **changed), context)
    assert context.state[after_key(MODEL)][HELD].numpy().tolist() == [0.0] * DIMENSION


@pytest.mark.parametrize("settings, message", [
    ({"downlink": "half"}, "strategy.downlink='half'"),
    ({"downlink": {"name": "qsgd", "scaling": "unbiased"}}, "strategy.downlink.*contractive"),
    ({"downlink": {"name": "top_k", "fraction": 3}}, "strategy.downlink.fraction=3"),
    ({"downlink": {"name": "os:system"}}, "strategy.downlink"),
    ({"schedule": "cosin"}, "strategy.schedule='cosin'"),
    ({"schedule": {"name": "cosine", "total_steps": 0}}, "strategy.schedule.total_steps=0"),
    ({"schedule": {"name": "cosine", "total_steps": 5, "unit": "steps"}}, "strategy.schedule.unit"),
])
def test_settings_out_of_range_are_refused_by_their_full_name(settings, message):
    with pytest.raises(InvalidSetting, match=message):
        build("strategies", {"name": "econtrol", **settings})


def test_a_schedule_sets_the_step_of_every_round(run):
    constant = run("distributed_sgd", rounds=1, server_lr=0.1)
    falling = run("distributed_sgd", rounds=4, server_lr=0.1, schedule={"name": "cosine", "total_steps": 4})
    assert torch.equal(constant.trajectory[0], falling.trajectory[0])
    steps = [falling.trajectory[0], *(after - before for before, after in
                                      zip(falling.trajectory, falling.trajectory[1:], strict=False))]
    factors = [(1 + math.cos(math.pi * index / 4)) / 2 for index in range(4)]
    plain = run("distributed_sgd", rounds=4, server_lr=0.1)
    gradient = (plain.trajectory[1] - plain.trajectory[0]) / 0.1
    assert torch.allclose(steps[1], 0.1 * factors[1] * gradient, rtol=0, atol=1e-14)
    assert steps[3].norm() < 0.3 * steps[0].norm()
