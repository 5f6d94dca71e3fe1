"""`fedcore peer` refuses what cannot work, by name, before it connects to anybody."""
import pytest

from fedcore.config import load_experiment
from fedcore.errors import BadInput, InvalidSetting
from fedcore.peer_commands import credentials_for, peer_options, peer_parts, run_peer
from fedcore.strategies.noloco import NoLoCo
from fedcore.tls import identity_of
from fedcore.transport.peer_roster import Roster
from tests.fedcore.transport.kit import Pki

PEERS = {"task": "quadratic", "strategy": {"name": "noloco", "inner_steps": 2}, "clients": {"count": 2},
         "evaluate": {"where": "none"}}


def roster(**second):
    rows = [{"name": "node-0", "address": "127.0.0.1:9444"}, {"name": "node-1", "address": "127.0.0.1:9445", **second}]
    return Roster.of({"run": "r", "peers": rows})


def test_a_strategy_that_needs_a_server_is_refused():
    with pytest.raises(InvalidSetting, match="needs a server"):
        peer_parts(load_experiment({"strategy": "fedavg", "clients": {"count": 2}}), 0)


def test_all_peers_must_know_when_to_stop():
    strategy = NoLoCo()
    with pytest.raises(InvalidSetting, match="stop.rounds"):
        peer_options(load_experiment({**PEERS, "stop": {"seconds": 5}}), strategy)
    assert peer_options(load_experiment({**PEERS, "stop": {"rounds": 7}}), strategy).num_steps == 7


def test_peers_in_clear_stay_on_one_machine():
    with pytest.raises(BadInput, match="--tls"):
        credentials_for(None, False, roster(), 0)
    with pytest.raises(BadInput, match="10.0.0.1:1 is not this machine"):
        credentials_for(None, True, roster(address="10.0.0.1:1"), 0)
    assert credentials_for(None, True, roster(), 0) is None


def test_a_certificate_must_be_this_peers_and_all_must_be_pinned(tmp_path):
    pki = Pki(tmp_path, nodes=2)
    with pytest.raises(BadInput, match="is node-1's, but this peer is node-0"):
        credentials_for(tmp_path / "node-1", False, roster(), 0)
    with pytest.raises(BadInput, match="no fingerprint of node-0"):
        credentials_for(tmp_path / "node-0", False, roster(), 0)
    pinned = Roster.of({"run": "r", "peers": [
        {"name": f"node-{index}", "address": f"127.0.0.1:{9444 + index}",
         "fingerprint": identity_of(pki.node(index).cert).fingerprint} for index in range(2)]})
    assert credentials_for(tmp_path / "node-0", False, pinned, 0).name == "node-0"


def test_who_is_not_in_the_roster_is_told_who_is(tmp_path):
    file = tmp_path / "roster.yaml"
    file.write_text("run: r\npeers:\n- {name: node-0, address: '127.0.0.1:9444'}\n")
    with pytest.raises(InvalidSetting, match="one of node-0"):
        run_peer(tmp_path / "none.yaml", (), file, "node-7", None, True, None, None, False, False)
