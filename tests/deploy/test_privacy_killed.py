"""Real processes that train privately and are killed: nothing is spent that the ledgers do not show."""
import json
import signal
import time
from collections import Counter

import pytest

from fedcore.privacy.accounting import Release, Spending
from fedcore.privacy.ledger import LEDGER_FILE, Ledger

BUDGET = {"epsilon": 8.0, "delta": 1e-5}
EXPERIMENT = {
    "task": "digits", "clients": {"count": 2}, "checkpoint": {"every_s": 0.1}, "evaluate": {"where": "none"},
    "strategy": {"name": "diff2", **BUDGET, "clip_gradient": 1.0, "rounds": 25, "restart_interval": 5},
    "stop": {"rounds": 25},
}


@pytest.mark.slow
def test_a_killed_server_and_a_killed_client_spend_no_more_than_the_ledgers_show(machines, tmp_path):
    machines.write(EXPERIMENT)

    def client(index):
        return machines.client(index, "--node-config", f"privacy-ledger=ledger-{index}.jsonl")

    def released():
        file = tmp_path / "ledger-0.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def wait_for(count):
        until = time.monotonic() + 60
        while released() < count:
            assert time.monotonic() < until, machines.said(server)
            time.sleep(0.005)

    server, clients = machines.server(), [client(0), client(1)]
    wait_for(3)
    machines.send(server, signal.SIGKILL)
    machines.wait(server)
    begun = any((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert begun, "the server was killed before its first checkpoint: make the rounds longer"
    server = machines.server("--resume", "run")
    wait_for(8)
    machines.send(clients[0], signal.SIGKILL)
    machines.wait(clients[0])
    clients[0] = client(0)
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0, 0]

    charged, spent = Counter(), {index: Spending() for index in range(2)}
    for entry in Ledger(tmp_path / "run" / LEDGER_FILE).entries:
        for index in entry["clients"]:
            charged[index] += 1
            spent[index] = spent[index].plus(Release(entry["noise_multiplier"], 1.0, entry["times"]))
    for index, kills in ((0, 1), (1, 0)):
        own = Ledger(tmp_path / f"ledger-{index}.jsonl").entries
        # A client that died between its ledger and its reply has written down a release that never left it.
        assert 0 < len(own) <= charged[index] + kills and spent[index].within(**BUDGET)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epsilon"] <= BUDGET["epsilon"] * (1 + 1e-9)
