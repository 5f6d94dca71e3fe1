"""What peers send each other, compressed: identities, convergence, and what averaging keeps."""
import json

import pytest
import torch

from fedcore.checkpoint import Checkpoints
from fedcore.config import Experiment, load_experiment
from fedcore.errors import BadExperiment
from fedcore.peers.packing import packing_for
from fedcore.registry import build
from fedcore.simulations.run import simulate
from fedcore.strategies.noloco import MOVED, SLOW, coordinates, largest_gossip_lr, opened, room_for
from tests.peer_lab import Script, models, play, prepare, same

TOP = {"name": "top_k", "fraction": 0.1}
EVERY = ["noloco", "diloco", "co2", "local_sgd", "slowmo", "all_reduce_sgd", "gossip_sgd"]
TASK = {"name": "quadratic", "noise": 0.5, "dimension": 40, "examples": 8}


def make(name, **settings):
    steps = {} if name in ("gossip_sgd", "all_reduce_sgd") else {"inner_steps": 2}
    return build("strategies", {"name": name, **steps, **settings})


def run(name, folder, compression=None, count=6, rounds=6, task=None, **settings):
    sections = {} if compression is None else {"compression": compression}
    return play(make(name, **settings), folder, count, stop={"rounds": rounds}, task=task or TASK, **sections)


@pytest.mark.parametrize("compressor", ["identity", {"name": "top_k", "fraction": 1.0}])
@pytest.mark.parametrize("name, settings", [
    *((name, {}) for name in EVERY), ("gossip_sgd", {"order": "combine_then_adapt"}), ("co2", {"averaging": "samples"}),
    ("noloco", {"group_size": 3}),
])
def test_a_compressor_that_changes_nothing_changes_no_bit(name, settings, compressor, tmp_path):
    plain = run(name, tmp_path / "plain", **settings)
    packed = run(name, tmp_path / "packed", compressor, **settings)
    assert same(models(plain), models(packed)) and not same(models(plain), [plain.model.params] * 6)


@pytest.mark.parametrize("name", EVERY)
def test_a_tenth_of_the_values_ends_near_where_all_of_them_do(name, tmp_path):
    """Without noise, in a seventh of the bytes: the mean model is as good as without compression."""
    task = {"name": "quadratic", "noise": 0.0, "dimension": 200, "examples": 8}
    ends = {}
    for words, compression in (("whole", None), ("tenth", TOP)):
        simulation = run(name, tmp_path / words, compression, count=4, rounds=80, task=task)
        ends[words] = torch.stack(models(simulation)).mean(0), simulation.host.totals["bytes_sent"]
    start = simulation.model.params
    moved = (ends["whole"][0] - start).norm()
    assert (ends["tenth"][0] - ends["whole"][0]).norm() < 0.2 * moved
    assert ends["tenth"][1] < ends["whole"][1] / 2


@pytest.mark.parametrize("compressor", [TOP, "sign", {"name": "qsgd", "levels": 3}])
def test_gossip_with_compression_keeps_the_mean_of_all_peers(compressor, tmp_path):
    """Nobody trains: peers that begin apart agree, and nothing is created or lost."""
    found = []

    async def script(peer):
        peer.params = peer.params + torch.randn(40, dtype=torch.float64, generator=peer.rng("start"))
        strategy = make("gossip_sgd", consensus_lr=0.3)
        strategy.check_clients(6)
        async for _ in peer.steps():
            found.append((peer.step, peer.params))
            peer.params = await strategy._average(peer)

    rounds = 60
    play(Script(script), tmp_path, 6, stop={"rounds": rounds}, task=TASK, compression=compressor)
    first, last = (torch.stack([params for step, params in found if step == at]) for at in (0, rounds - 1))
    assert torch.allclose(first.mean(0), last.mean(0), rtol=0, atol=1e-12)
    assert last.std(0).norm() < 0.3 * first.std(0).norm()


def test_noloco_with_compression_moves_the_mean_by_what_was_sent_alone(tmp_path):
    """The pull on a few coordinates adds up to nothing over a group."""
    plain = run("noloco", tmp_path / "a", TOP, rounds=5, gossip_lr=0.8)
    pulled = run("noloco", tmp_path / "b", TOP, rounds=1, gossip_lr=0.4)
    again = run("noloco", tmp_path / "c", TOP, rounds=1, gossip_lr=0.8)
    means = [torch.stack(models(one)).mean(0) for one in (pulled, again)]
    assert torch.allclose(*means, rtol=0, atol=1e-14) and not same(models(plain), models(again))


def test_what_is_not_sent_is_kept(tmp_path):
    """Payloads and memory add up to all that was given."""
    packing = packing_for(Experiment(task="digits", strategy="noloco", compression=TOP),
                          prepare(make("noloco"), tmp_path, 2, task=TASK).model.layout, 0)
    given, sent = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for number in range(20):
        vector = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        given += vector
        sent += packing.codec.decode(packing.pack(vector, "mean", number))
    assert torch.allclose(given, sent + packing.state_dict()["errors"]["mean"], rtol=0, atol=1e-12)
    assert (given - sent).norm() > 0.1


def test_without_error_feedback_nothing_is_remembered(tmp_path):
    simulation = run("diloco", tmp_path, {"name": "qsgd", "scaling": "unbiased", "error_feedback": False})
    assert simulation.peers[0].packing.state_dict() == {"errors": {}, "copies": {}}


def test_a_member_whose_vector_is_not_finite_brings_nothing_and_keeps_its_memory(tmp_path):
    found = {}

    async def script(peer):
        async for step in peer.steps():
            bad = peer.rank == 1 and step == 1
            vector = torch.full_like(peer.params, float("nan") if bad else 1.0 + peer.rank)
            found[peer.rank, step] = await peer.all_reduce(vector)

    simulation = play(Script(script), tmp_path, 3, stop={"rounds": 2}, task=TASK, compression=TOP)
    assert {found[rank, 1].contributors for rank in range(3)} == {(0, 2)}
    assert all(torch.equal(found[rank, 1].mean, found[0, 1].mean) for rank in range(3))
    assert bool(found[0, 1].mean.isfinite().all()) and simulation.host.counts["refused"] == 1


@pytest.mark.parametrize("name", ["noloco", "gossip_sgd"])
def test_with_lost_messages_peers_still_agree(name, tmp_path):
    """Copies that two ends no longer share are replaced by the whole vector."""
    task = {"name": "quadratic", "noise": 0.0, "dimension": 40, "examples": 8}
    timeout = {"pair_timeout_s" if name == "noloco" else "timeout_s": 3.0}
    world = {"simulation": {"failures": {"request_loss": 0.1, "reply_loss": 0.1}}}
    ends = []
    for folder, lossy in (("calm", {}), ("lossy", world)):
        simulation = play(make(name, **timeout), tmp_path / folder, 4, stop={"rounds": 60}, task=task, compression=TOP,
                          **lossy)
        ends.append(torch.stack(models(simulation)))
    start = simulation.model.params
    assert simulation.host.totals["silent"] > 10
    assert (ends[1].mean(0) - ends[0].mean(0)).norm() < 0.1 * (ends[0].mean(0) - start).norm()
    assert ends[1].std(0).norm() < 3 * ends[0].std(0).norm()


def test_an_offer_that_cannot_be_read_is_left_out_and_named(tmp_path):
    simulation = prepare(make("noloco"), tmp_path, 2, task=TASK, compression=TOP)
    packing = packing_for(simulation.settings, simulation.model.layout, 0)
    good = {SLOW: torch.zeros(room_for(packing.codec), dtype=torch.float64),
            MOVED: packing.pack(torch.ones(40, dtype=torch.float64), MOVED, 0)}
    refused = []

    class Listener:
        def refuse(self, source, reason, tag):
            refused.append((source, reason))

    bad = [{**good, MOVED: good[MOVED][:-1]}, {**good, SLOW: good[SLOW][:1]}, {SLOW: good[SLOW]}]
    found = opened(Listener(), packing.codec, {0: good, **dict(enumerate(bad, 1))})
    assert found.keys() == {0} and found[0][MOVED].count_nonzero() == 4
    assert [source for source, _ in refused] == [1, 2, 3] and "bytes" in refused[0][1]


def test_all_peers_draw_the_same_coordinates_and_others_at_the_next_step():
    drawn = [coordinates(1000, 10, 7, step) for step in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert bool((drawn[0].diff() > 0).all()) and len(drawn[0]) == 10


@pytest.mark.parametrize("momentum, share", [(0.5, 0.1), (0.8, 0.3)])
def test_the_bound_on_the_pull_is_where_disagreement_stops_decaying(momentum, share):
    """The recursion of the second moments, with the pull on a share of the coordinates, has spectral radius 1 there."""
    bound, agreement = largest_gossip_lr(momentum, 2, 10, share), share * 0.5 * 10 / 9
    for factor, grows in ((0.98, False), (1.02, True)):
        pull = factor * bound
        # Of E|delta|^2, E<x, delta + delta'> and E|x|^2 after a step, in terms of D, C and X before it.
        step = torch.tensor([[momentum**2, -2 * momentum * pull * agreement, pull**2 * agreement],
                             [momentum**2, momentum - 2 * momentum * pull * agreement, (pull**2 - pull) * agreement],
                             [momentum**2, 2 * momentum - 2 * momentum * pull * agreement,
                              1 - 2 * pull * agreement + pull**2 * agreement]], dtype=torch.float64)
        assert (torch.linalg.eigvals(step).abs().max() > 1) == grows


@pytest.mark.parametrize("strategy, compression, message", [
    ("gradient_tracking", TOP, "mean of what peers track"),
    ("dadao", TOP, "sums of dual variables"),
    ("a2cid2", TOP, "meet at random"),
    ({"name": "gossip_sgd", "mode": "asynchronous"}, TOP, "mode: synchronous"),
    ("gossip_sgd", {**TOP, "error_feedback": False}, "compression.error_feedback=False"),
    ({"name": "noloco", "gossip_lr": 1.2}, TOP, "strategy.gossip_lr=1.2.*below 1.0"),
    ({"name": "gossip_sgd", "consensus_lr": 1.5}, TOP, "consensus_lr=1.5"),
])
def test_what_does_not_compress_is_refused_with_the_reason(strategy, compression, message):
    with pytest.raises(BadExperiment, match=message):
        load_experiment({"strategy": strategy, "compression": compression, "clients": {"count": 10}})


def test_an_experiment_file_is_all_it_takes(tmp_path):
    experiment = {"task": "digits", "strategy": {"name": "diloco", "inner_steps": 5}, "clients": {"count": 3},
                  "stop": {"rounds": 4}, "checkpoint": {"every_s": 0}}
    bytes_up = {}
    for words, compression in (("whole", {}), ("packed", {"compression": {"name": "top_k", "fraction": 0.01}})):
        run = simulate({**experiment, **compression}, out=tmp_path / words)
        bytes_up[words] = run.summary["bytes_up"]
        assert run.summary["final_accuracy"] > 0.5
    assert bytes_up["packed"] < bytes_up["whole"] / 30
    saved, _ = Checkpoints(tmp_path / "packed" / "checkpoints").load_newest()
    assert saved["peers"][0]["packing"]["errors"]["mean"].norm() > 0
    assert json.loads((tmp_path / "packed" / "summary.json").read_text())["refused"] == 0
