"""What every registered strategy keeps, whoever wrote it.

Same seed, same bits. Saved, loaded and continued equals never stopped. A reply that comes twice, late, from a stranger,
not at all, or not finite never changes the model.
"""
from collections import deque

import numpy as np
import pytest
import torch
from flwr.app import Array, MetricRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

from fedcore.checkpoint import Checkpoints
from fedcore.clients.settings import TrainSettings
from fedcore.clients.tasks.blackbox_quadratics import BlackBoxQuadratics
from fedcore.clients.torch_client import torch_client
from fedcore.clock import Event
from fedcore.feedback import ACTION
from fedcore.hub import Hub
from fedcore.payload import ARRAYS, METRICS
from fedcore.peers.strategy import PeerStrategy
from fedcore.privacy.wire import ACTION as PRIVATE_ACTION
from fedcore.registry import build, names, resolve
from fedcore.rounds import FlowerRounds
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategies.black_box import ACTIONS as BLACK_BOX_ACTIONS
from fedcore.strategy import HubStrategy

CLIENTS = 8    # one more than Bulyan needs, so that one may fail
TIMES_S = [1.0 + 0.37 * client for client in range(CLIENTS)]
PRIVATE = {"epsilon": 8.0, "delta": 1e-3}
DP = {"strategy": "fedavg", "noise_multiplier": 0.1, "num_sampled_clients": CLIENTS}
# Settings without which a strategy cannot be built, or would not do anything special.
SETTINGS = {
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "bulyan": {"num_malicious_nodes": 1},
    "fedavg": {"fraction_train": 0.6},
    "fedcompass": {"min_local_steps": 2, "max_local_steps": 6},
    "fedbuff": {"concurrency": 4},
    "ef21": {"downlink": {"name": "top_k", "fraction": 0.34}, "schedule": {"name": "cosine", "total_steps": 6}},
    "qfedavg": {"client_learning_rate": 0.1, "train_loss_key": "loss"},
    "diff2": {**PRIVATE, "restart_interval": 3},
    "dp_gd": PRIVATE,
    "dp_sgd": {**PRIVATE, "sample_rate": 0.5},
    "dp_srm": {**PRIVATE, "noise_mode": "central"},
    "dp_server_fixed_clipping": {**DP, "clipping_norm": 1.0},
    "dp_client_fixed_clipping": {**DP, "clipping_norm": 1.0},
    "dp_server_adaptive_clipping": DP,
    "dp_client_adaptive_clipping": DP,
    **dict.fromkeys(("fedzo", "fedprox_zo", "scaffold_zo_1", "scaffold_zo_2"),
                    {"directions": 2, "local_iterations": 2}),
    "fzoos": {"local_iterations": 2, "features": 20, "nearest": 6, "feature_queries": 8, "initial_queries": 3,
              "active_queries": 1, "active_candidates": 3, "end_queries": 2, "end_candidates": 4, "memory": 40},
}
# Flower's mods without which clients do not send what a strategy expects.
MODS = {"dp_client_fixed_clipping": [fixedclipping_mod], "dp_client_adaptive_clipping": [adaptiveclipping_mod]}
# Those without a server have a contract of their own: tests/strategies/test_peer_contract.py.
STRATEGIES = [name for name in names("strategies") if not issubclass(resolve("strategies", name), PeerStrategy)]
TRAINING = TrainSettings(lr=0.1, batch_size=4, local_steps=2, device="cpu")


def make(name):
    strategy = build("strategies", {"name": name, **SETTINGS.get(name, {})})
    return strategy if isinstance(strategy, HubStrategy) else FlowerRounds(strategy)


@pytest.fixture
def run(federate, noisy):
    """Run a registered strategy over clients that draw batches."""
    centers = torch.randn(CLIENTS, 3, generator=torch.Generator().manual_seed(1))

    def start(name, fault=None, **options):
        only_evaluates = getattr(make(name), "needs_black_box", False)
        task = BlackBoxQuadratics(3, 0.5, num_clients=CLIENTS) if only_evaluates else noisy(centers)
        app = torch_client(task, TRAINING)
        if fault is not None or name in MODS:
            app = modified(app, ([spoiling(fault)] if fault else []) + MODS.get(name, []))
        return federate(make(name), TIMES_S, task=task, app=app, rounds=4, **options)

    return start


def without_wall(rows):
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in rows]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run, name):
    first, second, other = run(name, seed=3), run(name, seed=3), run(name, seed=4)
    assert torch.equal(first.params, second.params)
    assert without_wall(first.rows) == without_wall(second.rows) and first.tasks == second.tasks
    assert first.hub.version > 0 and not torch.equal(first.params, other.params)


@pytest.mark.parametrize("stop_after", [1, 3, 11])
@pytest.mark.parametrize("name", STRATEGIES)
def test_saved_loaded_and_continued_equals_never_stopped(run, name, stop_after, tmp_path):
    whole = run(name)
    points = iter(range(1, 10_000))
    before = run(name, checkpoints=Checkpoints(tmp_path), interrupted=lambda: next(points) == stop_after)
    if before.hub.stop_reason != "interrupted":
        assert stop_after >= len(whole.trajectory)    # it had ended before
        return
    after = run(name, checkpoints=Checkpoints(tmp_path), resume=True)
    assert torch.equal(after.params, whole.params)
    assert (after.hub.version, after.hub.now) == (whole.hub.version, whole.hub.now)
    assert after.hub.totals == whole.hub.totals
    updates = whole.of("update")[-len(after.of("update")):] if after.of("update") else []
    assert without_wall(after.of("update")) == without_wall(updates)


class Echoing(VirtualGrid):
    """Delivers every reply twice, and the first of all once more, late."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.again, self.first, self.seen = deque(), None, 0

    def next_event(self, until):
        if self.again:
            return self.again.popleft()
        event = super().next_event(until)
        if event is not None and event.kind == "reply":
            self.seen += 1
            self.first = self.first or event
            self.again.append(event)
            if self.seen == 12:
                self.again.append(Event("reply", event.at, self.first.node_id, self.first.message))
        return event


@pytest.mark.parametrize("name", STRATEGIES)
def test_second_and_late_replies_change_nothing(run, name):
    clean, echoing = run(name), run(name, grid_class=Echoing)
    assert torch.equal(clean.params, echoing.params) and clean.hub.version == echoing.hub.version
    assert echoing.hub.counts["refused"] > clean.hub.counts["refused"]


class Lossy:
    """Some requests and some replies never arrive."""

    def crash_point(self, partition, task_index):
        return None

    def loses_request(self, partition, task_index):
        return task_index == 2 and partition == 1

    def loses_reply(self, partition, task_index):
        return task_index == 2 and partition == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_run_goes_on_when_messages_are_lost(run, name):
    outcome = run(name, failures=Lossy())
    assert torch.isfinite(outcome.params).all() and outcome.hub.version > 0
    missing = {task["node"] for task in outcome.tasks if task["outcome"] in ("lost", "cancelled")}
    assert missing >= {1, 3} and outcome.hub.counts["refused"] == 0


def modified(inner, mods):
    """Return a client app that applies mods to training."""
    app = ClientApp()
    app.train(mods=mods)(lambda message, context: inner(message, context))
    for action in (ACTION, PRIVATE_ACTION, *BLACK_BOX_ACTIONS):
        app.train(action, mods=mods)(lambda message, context: inner(message, context))
    app.evaluate()(lambda message, context: inner(message, context))
    app.query()(lambda message, context: inner(message, context))
    return app


def spoiling(fault):
    """Return a mod by which node 2 spoils every reply in one way."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            fault(reply)
        return reply

    return mod


def spoil_one_value(reply, value):
    if "params" not in reply.content[ARRAYS]:
        spoil_payload(reply, value)
        return
    values = reply.content[ARRAYS]["params"].numpy()
    values[1] = value
    reply.content[ARRAYS]["params"] = Array(values)


def spoil_payload(reply, value):
    """Spoil the last value of every compressed vector in a reply."""
    for name, array in list(reply.content[ARRAYS].items()):
        payload = array.numpy()
        payload[-4:] = np.frombuffer(np.float32(value).tobytes(), np.uint8)
        reply.content[ARRAYS][name] = Array(payload)


def not_a_number(reply):
    spoil_one_value(reply, float("nan"))


def infinite(reply):
    spoil_one_value(reply, float("inf"))


def no_examples(reply):
    reply.content[METRICS] = MetricRecord({**reply.content[METRICS], "num-examples": 0})


def no_metrics(reply):
    del reply.content[METRICS]


@pytest.mark.parametrize("fault", [not_a_number, infinite, no_examples, no_metrics])
@pytest.mark.parametrize("name", STRATEGIES)
def test_replies_that_cannot_be_used_are_refused_and_leave_no_trace(run, name, fault, monkeypatch):
    published, publish = [], Hub.publish
    monkeypatch.setattr(Hub, "publish", lambda hub, params, used=(), *args, **kwargs: (
        published.append([reply.node.partition for reply in used]), publish(hub, params, used, *args, **kwargs))[1])
    outcome = run(name, fault)
    assert torch.isfinite(outcome.params).all()
    assert published and all(2 not in nodes for nodes in published)
    assert outcome.hub.counts["refused"] > 0
    assert {row["node"] for row in outcome.of("refused")} == {2}
