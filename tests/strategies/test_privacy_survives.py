"""Whoever is killed, and whenever: what left the clients is never more than the ledgers show, nor past the budget."""
from collections import Counter

import pytest
import torch

from fedcore.checkpoint import Checkpoints
from fedcore.clients.books import ledger_at
from fedcore.clients.settings import TrainSettings
from fedcore.clients.torch_client import torch_client
from fedcore.hub import Hub
from fedcore.options import RunOptions, StopRule
from fedcore.payload import ARRAYS
from fedcore.privacy.accounting import Release, Spending
from fedcore.privacy.ledger import LEDGER_FILE, Ledger
from fedcore.recorder import Recorder
from fedcore.session import Session
from fedcore.simulations.grid import VirtualGrid
from fedcore.strategies.diff2 import Diff2
from fedcore.vectors import Model
from tests.strategies.private_world import TERMS, Records

CLIENTS, ROUNDS = 3, 8
BUDGET = {"epsilon": TERMS.epsilon, "delta": TERMS.delta, "restart_interval": 3, "rounds": ROUNDS}


class Killed(Exception):
    """Stands for kill -9."""


class RealGrid(VirtualGrid):
    """Says that it is no simulation: noise comes from the system's source, and what was done cannot be repeated."""

    simulated = False


class World:
    """A federation whose server and clients can be killed, and which remembers what really left the clients."""

    def __init__(self, folder, **settings):
        self.folder, self.settings = folder, {**BUDGET, **settings}
        self.left = {client: set() for client in range(CLIENTS)}    # distinct vectors, by client
        self.until_killed = None

    def ledger_of(self, client):
        return self.folder / f"client-{client}.jsonl"

    def moment(self):
        """Count a moment at which somebody may be killed."""
        if self.until_killed is not None:
            self.until_killed -= 1
            if self.until_killed < 0:
                self.until_killed = None
                raise Killed

    def _watching(self, message, context, call_next):
        client = int(context.node_config["partition-id"])
        del context.node_config["simulated"]
        context.node_config |= {"privacy-ledger": str(self.ledger_of(client)), "trust-server": True}
        self.moment()
        reply = call_next(message, context)
        self.moment()
        if ARRAYS in reply.content:
            self.left[client].add(reply.content[ARRAYS]["params"].numpy().tobytes())
        return reply

    def run(self, resume):
        """Run from the start, or from the newest checkpoint; returns the strategy."""
        ledger_at.cache_clear()    # a new process
        task, strategy = Records(), Diff2(**self.settings)
        settings = TrainSettings(batch_size=4, dtype="float64", device="cpu")
        recorder = Recorder(self.folder)
        grid = RealGrid(torch_client(task, settings, mods=[self._watching]), CLIENTS)
        options = RunOptions(expected=CLIENTS, stop=StopRule(rounds=40))
        hub = Hub(grid, Model.of(task.model()), options, recorder)
        session = Session(hub, strategy, Checkpoints(self.folder / "checkpoints", keep=50), save_every_s=0.0)
        charge, publish = strategy.charge, hub.publish

        def charging(*args):
            self.moment()
            allowed = charge(*args)
            self.moment()
            return allowed

        def publishing(*args, **figures):
            self.moment()
            publish(*args, **figures)
            self.moment()

        strategy.charge, hub.publish = charging, publishing
        try:
            if resume:
                session.restore()
                hub.stop_reason = None
            strategy.drive(session)
        finally:
            recorder.close()
        return strategy

    def check(self):
        """Compare what left the clients with both ledgers and with the budget."""
        charged, spent = Counter(), {client: Spending() for client in range(CLIENTS)}
        for entry in Ledger(self.folder / LEDGER_FILE).entries:
            for client in entry["clients"]:
                charged[client] += 1
                spent[client] = spent[client].plus(Release(entry["noise_multiplier"], 1.0, entry["times"]))
        for client in range(CLIENTS):
            own = Ledger(self.ledger_of(client)).entries
            assert len(self.left[client]) <= len(own) <= charged[client]
            assert spent[client].within(TERMS.epsilon, TERMS.delta)


@pytest.mark.parametrize("settings", [{}, {"noise_mode": "central"}, {"routine": "bvr_l_sgd", "local_steps": 3}],
                         ids=["local", "central", "local steps"])
@pytest.mark.parametrize("moment", [1, 3, 8, 11, 15, 18, 29])
def test_killed_at_any_moment_and_resumed_nothing_is_spent_that_the_ledger_does_not_show(tmp_path, moment, settings):
    world = World(tmp_path, **settings)
    world.until_killed = moment
    try:
        world.run(resume=False)    # a client that is killed is a failure of its node's, and the run goes on
    except Killed:
        world.check()
        resumable = any((tmp_path / "checkpoints").glob("*"))
        strategy = world.run(resume=resumable)
        assert strategy.exchanges >= len({entry["exchange"] for entry in strategy.ledger.entries}) > 0
    world.check()


def test_an_old_checkpoint_does_not_bring_the_budget_back(tmp_path):
    world = World(tmp_path)
    world.run(resume=False)
    spent = {client: len(left) for client, left in world.left.items()}
    files = sorted((tmp_path / "checkpoints").iterdir())
    for newer in files[2:]:
        newer.unlink()
    strategy = world.run(resume=True)
    world.check()
    # The budget was spent before: not one more vector left a client.
    assert {client: len(left) for client, left in world.left.items()} == spent
    assert strategy.spent_epsilon() <= TERMS.epsilon * (1 + 1e-9)


def test_after_a_crash_the_next_round_is_a_full_one_and_says_why(tmp_path):
    world = World(tmp_path)
    world.until_killed = 18    # in the second round, before its model is published
    with pytest.raises(Killed):
        world.run(resume=False)
    known = len(Ledger(tmp_path / LEDGER_FILE).entries)
    world.run(resume=True)
    entries = Ledger(tmp_path / LEDGER_FILE).entries
    assert entries[known]["kind"] == "full"
    assert "releases that this checkpoint does not know of" in (tmp_path / "metrics.jsonl").read_text()


def test_a_simulation_that_resumes_repeats_its_releases_to_the_bit(tmp_path):
    import fedcore

    experiment = {"task": {"name": "digits", "model": "logistic"},
                  "strategy": {"name": "diff2", "epsilon": 3.0, "restart_interval": 3},
                  "clients": {"count": 3}, "stop": {"rounds": 4}, "checkpoint": {"every_s": 0, "keep": 9},
                  "evaluate": {"where": "none"}}
    whole = fedcore.simulate(experiment, out=tmp_path / "whole")
    ledger = (tmp_path / "whole" / LEDGER_FILE).read_bytes()
    for newer in sorted((tmp_path / "whole" / "checkpoints").iterdir())[2:]:
        newer.unlink()
    before = whole.model()
    again = fedcore.simulate(resume=tmp_path / "whole")
    assert all(torch.equal(values, again.model()[name]) for name, values in before.items())
    assert (tmp_path / "whole" / LEDGER_FILE).read_bytes() == ledger
    assert again.summary["epsilon"] == pytest.approx(3.0) and again.summary["delta"] == 1e-5
    assert all(row["labels"] is None for row in again.clients)
