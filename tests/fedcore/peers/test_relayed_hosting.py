"""Peers that nobody can dial: the server relays between them, and the run has the bits of a simulation."""
import pytest
from flwr.app import ArrayRecord

from fedcore.clients.build import build_client, build_task
from fedcore.clients.modules import initial_model
from fedcore.clock import PolledGrid
from fedcore.errors import BadInput
from fedcore.payload import VectorRecord
from fedcore.peers.host_rules import HostRules
from fedcore.peers.relaying import Relaying
from fedcore.simulations.run import simulate
from fedcore.strategies.noloco import NoLoCo
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.peer_wire import PeerWire
from fedcore.transport.relay import Relay
from tests.fedcore.peers.test_hosting import experiment, hosted, node_configs, same
from tests.fedcore.transport.kit import Pki
from tests.support import ForeignGrid


def without_address(count, hidden, folder=None):
    configs = node_configs(count, folder)
    for index in hidden:
        del configs[index]["peer-listen"]
    return configs


@pytest.mark.parametrize("secure, hidden", [(True, [1]), (True, [0, 2]), (False, [0, 1])])
def test_peers_without_an_address_end_with_the_bits_of_a_simulation(secure, hidden, tmp_path):
    settings = experiment(clients={"count": 3})
    pki = Pki(tmp_path / "pki", nodes=3) if secure else None
    configs = without_address(3, hidden, pki and pki.folder)
    result = hosted(settings, pki, HostRules(segment=3, relay=True), configs=configs)
    assert same(result, simulate(settings, out=tmp_path / "virtual"))


def test_without_relaying_a_node_without_an_address_is_told_the_way_out():
    with pytest.raises(BadInput, match="Node 1 cannot take part: This node gives no address .* peers.relay: true"):
        hosted(experiment(clients={"count": 3}), configs=without_address(3, [1]))


def test_grids_that_cannot_relay_and_servers_that_must_not_say_so():
    settings = experiment()
    model = initial_model(build_task(settings), settings.seed)
    grid = PolledGrid(ForeignGrid(build_client(settings), {0: [11, 12]}))
    with pytest.raises(BadInput, match="only `fedcore server` relays"):
        Relaying(True).check(grid)
    Relaying(False).check(grid)
    with GrpcGrid("0.0.0.0:0", insecure_anywhere=True) as anywhere, pytest.raises(BadInput, match="--tls DIR"):
        NoLoCo().start(anywhere, ArrayRecord(dict(VectorRecord(model))), rules=HostRules(relay=True))


@pytest.mark.parametrize("secure", [True, False])
def test_the_server_sees_what_peers_say_only_in_clear(secure, tmp_path, monkeypatch):
    """The link to the server is in clear here, so that all that hides the peers' words is their own TLS."""
    passed, sent, carry, post = {}, [], Relay._pass, PeerWire.post

    class Ear:
        def __init__(self, context):
            self.context = context

        async def read(self):
            data = await self.context.read()
            if isinstance(data, bytes):
                passed[self.context] = passed.get(self.context, b"") + data
            return data

    def noted(self, to, envelope):
        sent.extend(tensor.numpy().tobytes() for tensor in envelope.data.values() if tensor.numel() > 8)
        return post(self, to, envelope)

    monkeypatch.setattr(Relay, "_pass", lambda self, tunnel, source, sink: carry(self, tunnel, Ear(source), sink))
    monkeypatch.setattr(PeerWire, "post", noted)
    folder = Pki(tmp_path / "pki", nodes=3).folder if secure else None
    hosted(experiment(clients={"count": 3}, rounds=3), None, HostRules(segment=3, relay=True),
           configs=without_address(3, [0, 1, 2], folder))
    assert len(sent) > 3 and sum(map(len, passed.values())) > 10_000
    seen = sum(any(tensor in said for said in passed.values()) for tensor in sent)
    assert seen == 0 if secure else seen > 3
