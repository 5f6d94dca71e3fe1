"""Real peers over gRPC: the bits of virtual time, and strangers that get nowhere."""
import asyncio
import socket

import grpc
import pytest
import torch

from fedcore.authority import Authority
from fedcore.clients.peer_training import PeerTraining
from fedcore.errors import InvalidSetting, MalformedFrame
from fedcore.peers.envelope import ENVELOPE_BYTES, Envelope, payload_bytes
from fedcore.peers.packing import packing_for
from fedcore.registry import build
from fedcore.strategies.noloco import NoLoCo
from fedcore.tls import identity_of, load_credentials, node_host
from fedcore.transport.dial import open_channel
from fedcore.transport.loop import submit
from fedcore.transport.peer_link import SERVICE, TALK, hello_of
from fedcore.transport.peer_messages import Arriving, frame
from fedcore.transport.peer_roster import Roster
from fedcore.transport.peer_runner import PeerOptions
from fedcore.transport.roster_peer import RosterPeer
from fedcore.transport.wire import pack, unpack
from tests.fedcore.transport.kit import Pki
from tests.peer_lab import Script, models, play, prepare, same

PATIENCE_S = 60.0


def free_ports(count):
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def roster_of(count, pki=None, run="test"):
    rows = []
    for index, port in enumerate(free_ports(count)):
        print_ = identity_of(pki.node(index).cert).fingerprint if pki else ""
        rows.append({"name": f"node-{index}", "address": f"127.0.0.1:{port}", "fingerprint": print_})
    return Roster.of({"run": run, "peers": rows})


def real_peers(strategy, roster, pki, folder, rounds=4, options=None, run_seed=0, **settings):
    """Return peers over gRPC that do what `play` does in virtual time, and the rows that they write."""
    virtual = prepare(strategy, folder, len(roster.peers), stop={"rounds": rounds}, **settings)
    virtual.recorder.close()
    rows, peers = [], []
    for rank in range(len(roster.peers)):
        work = PeerTraining(virtual.task, virtual.train, 0).peer(rank)
        credentials = pki.node(rank) if pki else None
        peers.append(RosterPeer(
            strategy, roster, rank, credentials, virtual.model, work, options or PeerOptions(rounds), run_seed,
            on_row=lambda event, figures, rank=rank: rows.append((rank, event, figures)),
            packing=packing_for(virtual.settings, virtual.model.layout, rank)))
    return peers, rows


async def together(peers):
    return await asyncio.gather(*[peer.run() for peer in peers])


async def killed_and_back(peers, newcomer, after_step, is_noticed):
    """Run four peers; the last dies after a step, and comes back as `newcomer` once the others have noticed."""
    tasks = [asyncio.create_task(peer.run()) for peer in peers]
    while peers[0].peer.step < after_step:
        await asyncio.sleep(0.01)
    tasks[-1].cancel()
    await asyncio.gather(tasks[-1], return_exceptions=True)
    while not is_noticed():
        await asyncio.sleep(0.01)
    return await asyncio.gather(*tasks[:-1], newcomer.run(rejoin=True))


@pytest.mark.parametrize("name, secure, compressed", [
    *((name, secure, False) for name in ("noloco", "diloco", "co2") for secure in (False, True)),
    *((name, False, True) for name in ("noloco", "diloco", "co2", "gossip_sgd")),
])
def test_real_peers_end_with_the_bits_of_virtual_ones(name, secure, compressed, tmp_path):
    def strategy():
        return build("strategies", {"name": name, **({} if name == "gossip_sgd" else {"inner_steps": 3})})

    train: dict = {"train": {"dtype": "float32", "optimizer": {"name": "sgd", "momentum": 0.9}}}
    if compressed:
        train["compression"] = {"name": "top_k", "fraction": 0.3}
    virtual = play(strategy(), tmp_path / "virtual", 4, **train)
    pki = Pki(tmp_path / "pki", nodes=4) if secure else None
    peers, rows = real_peers(strategy(), roster_of(4, pki), pki, tmp_path / "real", **train)
    found = submit(together(peers)).result(PATIENCE_S)
    assert same(found, models(virtual)) and found[0].dtype == torch.float32
    assert not [row for row in rows if row[1] in ("refused", "incident")]
    # Both engines count the same bytes; real peers say that they are ready, and goodbye, besides.
    sent = sum(peer.peer.counters.bytes_sent for peer in peers)
    assert sent - 2 * 4 * 3 * ENVELOPE_BYTES == virtual.host.totals["bytes_sent"]


def test_a_model_larger_than_any_message_arrives_in_chunks(tmp_path):
    large = {"task": {"name": "quadratic", "dimension": 700_000, "examples": 2}, "train": {"batch_size": 2}}
    strategy = build("strategies", {"name": "noloco", "inner_steps": 1})
    virtual = play(strategy, tmp_path / "virtual", 2, stop={"rounds": 1}, **large)
    peers, _ = real_peers(strategy, roster_of(2), None, tmp_path / "real", rounds=1, **large)
    assert same(submit(together(peers)).result(PATIENCE_S), models(virtual))


def test_others_finish_when_a_peer_dies_and_it_rejoins_from_a_living_one(tmp_path):
    strategy = NoLoCo(inner_steps=2, pair_timeout_s=0.5)
    options = PeerOptions(120, lost_after_s=0.6, farewell_s=10.0)
    roster = roster_of(4)
    peers, rows = real_peers(strategy, roster, None, tmp_path / "a", options=options)
    again, new_rows = real_peers(strategy, roster, None, tmp_path / "b", options=options)

    lost = killed_and_back(peers, again[3], 5, lambda: [row for row in rows if row[1] == "lost"])
    found = submit(lost).result(PATIENCE_S)
    assert [figures for _, event, figures in new_rows if event == "rejoined"][0]["step"] >= 4
    assert {peer.peer.step for peer in peers[:3]} == {119} == {again[3].peer.step}
    start, optimum = torch.zeros(6, dtype=torch.float64), torch.stack(found).mean(0)
    assert all((model - optimum).norm() < 0.3 * (start - optimum).norm() for model in found)
    # Somebody met the peer that came back.
    assert again[3].peer.counters.exchanges > 0


def test_peers_talk_to_one_that_comes_back_also_where_its_own_words_have_not_reached_them(tmp_path, monkeypatch):
    strategy, options = NoLoCo(inner_steps=2), PeerOptions(60, lost_after_s=0.6, farewell_s=10.0)
    roster = roster_of(4)
    peers, rows = real_peers(strategy, roster, None, tmp_path / "a", options=options)
    again, new_rows = real_peers(strategy, roster, None, tmp_path / "b", options=options)
    for deaf in peers[1:3]:
        monkeypatch.setattr(deaf, "_on_ask", lambda envelope: None)
    lost = killed_and_back(peers, again[3], 5, lambda: len([row for row in rows if row[1] == "lost"]) == 3)
    submit(lost).result(PATIENCE_S)
    assert {peer.peer.step for peer in peers[:3]} == {59} == {again[3].peer.step}
    assert again[3].peer.counters.silent == 0 < again[3].peer.counters.exchanges


def averaging(held):
    """Return peers that average with a neighbour at random times, from different starts."""
    async def run(peer):
        held[peer.rank] = peer.params + peer.rank

        def apply(partner, mine, theirs, at):
            held[peer.rank] = held[peer.rank] - 0.5 * (mine - theirs)

        meeting = peer.meeting("average", lambda: held[peer.rank], apply, 0.5)

        async def edge(partner):
            async for _ in peer.ticks(20.0, "edge", partner):
                await meeting.with_(partner)

        async for _ in peer.steps():
            await asyncio.gather(*[edge(partner) for partner in peer.members if partner > peer.rank])
            await peer.safe_point(lambda: None)

    return Script(run, by_time=True)


def test_pairwise_meetings_keep_the_sum_over_real_connections(tmp_path):
    held = {}
    peers, _ = real_peers(averaging(held), roster_of(4), None, tmp_path, options=PeerOptions(1, stop_s=1.5))
    submit(together(peers)).result(PATIENCE_S)
    final = torch.stack([held[rank] for rank in range(4)])
    assert (final.mean(0) - 1.5).abs().max() < 1e-13 and final.std(0).max() < 0.1
    assert sum(peer.peer.counters.exchanges for peer in peers) > 20


async def call(roster, credentials, *messages):
    """Say something to peer 0 and return its answers."""
    entry, answers = roster.peers[0], []
    channel = open_channel(entry.address, credentials, node_host(entry.name) if credentials else None)
    talk = channel.stream_stream(f"/{SERVICE}/{TALK}")()
    try:
        for message in messages:
            await talk.write(message)
            answers.append(unpack(await talk.read()).facts)
    except (grpc.RpcError, MalformedFrame, asyncio.InvalidStateError) as error:
        answers.append(error)
    finally:
        talk.cancel()
        await channel.close()
    return answers


def listening(tmp_path, pki, act):
    """Run `act` against a peer that listens; returns its answer, the peer and the rows that it wrote."""
    roster = roster_of(2, pki)
    peers, rows = real_peers(build("strategies", "noloco"), roster, pki, tmp_path / "run")

    async def run():
        await peers[0].wire.start()
        try:
            return await act(roster)
        finally:
            await peers[0].wire.close()

    return submit(run()).result(PATIENCE_S), peers[0], rows


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


def incidents(rows):
    return [figures["reason"] for _, event, figures in rows if event == "incident"]


def test_a_certificate_that_the_roster_does_not_pin_is_refused_and_named(pki, tmp_path):
    answers, _, rows = listening(tmp_path, pki, lambda roster: call(
        roster, pki.node(2), pack(hello_of("test", 1, "node-1"))))
    assert answers[0]["kind"] == "refused" and "node-2" in answers[0]["reason"]
    assert "not the one that the roster pins for node-1" in incidents(rows)[0]


def test_another_certificate_of_the_right_name_is_refused(pki, tmp_path):
    roster_print = identity_of(pki.node(1).cert).fingerprint
    Authority(tmp_path / "pki" / "ca").issue_node("node-1", tmp_path / "again", renew=True)
    again = load_credentials(tmp_path / "again", "node")
    assert identity_of(again.cert).fingerprint != roster_print
    answers, _, rows = listening(tmp_path, pki, lambda roster: call(roster, again, pack(hello_of("test", 1, "node-1"))))
    assert answers[0]["kind"] == "refused" and len(incidents(rows)) == 1


def test_who_tries_again_and_again_fills_no_disk(pki, tmp_path):
    async def act(roster):
        return [await call(roster, pki.node(2), pack(hello_of("test", 1, "node-1"))) for _ in range(9)]

    _, _, rows = listening(tmp_path, pki, act)
    assert [figures["times"] for _, event, figures in rows if event == "incident"] == [1, 2, 4, 8]


def test_a_stranger_without_a_certificate_is_not_even_heard(pki, tmp_path):
    answers, _, rows = listening(tmp_path, pki, lambda roster: call(roster, None, pack(hello_of("test", 1, "node-1"))))
    assert isinstance(answers[0], Exception) and not rows


@pytest.mark.parametrize("hello, reason", [
    (hello_of("another", 1, "node-1"), "belong to the run 'another'"), (hello_of("test", 7, "node-1"), "rank is 7"),
    (hello_of("test", 0, "node-0"), "rank is 0"), (hello_of("test", 1, "node-2"), "call yourself 'node-2'"),
    ({**hello_of("test", 1, "node-1"), "protocol": 99}, "version 99"),
    (hello_of("test", 1, "node-1", {"class": "DiLoCo"}), "you have class='DiLoCo', and this peer has 'NoLoCo'"),
])
def test_who_does_not_belong_to_the_run_is_refused_and_told_why(hello, reason, tmp_path):
    answers, _, rows = listening(tmp_path, None, lambda roster: call(roster, None, pack(hello)))
    assert answers[0]["kind"] == "refused" and reason in answers[0]["reason"] and reason in incidents(rows)[0]


def envelope(**changes):
    data = {"slow": torch.ones(6, dtype=torch.float64)}
    fields = {"run": "test", "epoch": 0, "kind": "exchange", "tag": "exchange", "round": 0, "source": 1, "data": data,
              "meta": {}, "num_bytes": payload_bytes(data)}
    return Envelope(**{**fields, **changes})


@pytest.mark.parametrize("message", [
    pack({"n": 0, "inline": True}, frame(envelope(source=0))), pack({"n": 0, "inline": True}, frame(envelope(run="x"))),
    pack({"n": 0, "inline": True}, frame(envelope()))[:-8], pack({"inline": True}, frame(envelope())), b"garbage",
    pack({"n": 0, "inline": True}),
    pack({"n": 0, "inline": True}, frame(envelope(kind="accord"))),
    pack({"n": 0, "inline": True}, frame(envelope(kind="ask", meta={"incarnation": [1]}))),
    pack({"n": 0, "inline": False, "side": True}, frame(envelope())),
], ids=["another's name", "another run", "cut short", "no number", "garbage", "no head", "an accord on nothing",
        "a question that is none", "a side stream that was not opened"])
def test_a_corrupted_stream_ends_and_nothing_of_it_is_used(message, tmp_path):
    answers, peer, rows = listening(tmp_path, None, lambda roster: call(
        roster, None, pack(hello_of("test", 1, "node-1")), message))
    assert answers[0]["kind"] == "welcome" and isinstance(answers[1], Exception)
    assert len(incidents(rows)) == 1 and not peer.peer.mailbox._early


@pytest.mark.parametrize("other, words", [
    ({"run_seed": 7}, "seed"), ({"rounds": 5}, "steps"), ({"strategy": NoLoCo(inner_steps=3)}, "inner_steps"),
    ({"task": {"name": "logistic", "dimension": 9}}, "parameters"),
    ({"compression": {"name": "top_k", "fraction": 0.5}}, "compressed"),
])
def test_a_peer_with_another_experiment_is_told_what_differs(other, words, tmp_path):
    roster, same = roster_of(2), {"strategy": NoLoCo(), "rounds": 4, "run_seed": 0}
    ours, rows = real_peers(roster=roster, pki=None, folder=tmp_path / "a", **same)
    theirs, _ = real_peers(roster=roster, pki=None, folder=tmp_path / "b", **{**same, **other})

    async def run():
        tasks = [asyncio.create_task(peer.run()) for peer in (ours[0], theirs[1])]
        while not (rows and theirs[1].wire.refusal(0)):
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return theirs[1].wire.refusal(0)

    reason = submit(run()).result(PATIENCE_S)
    assert f"you have {words}=" in reason and "the same experiment" in reason and reason in incidents(rows)


def test_values_that_are_not_finite_are_refused_with_their_senders_rank(tmp_path):
    bad = envelope(data={"slow": torch.full((6,), float("nan"), dtype=torch.float64)})
    answers, peer, rows = listening(tmp_path, None, lambda roster: call(
        roster, None, pack(hello_of("test", 1, "node-1")), pack({"n": 0, "inline": True}, frame(bad))))
    assert answers[1] == {"n": 0}    # it has arrived, and is not used
    assert [row for row in rows if row[1] == "refused"][0][2]["refused_from"] == 1 and not peer.peer.mailbox._early


def test_an_envelope_survives_its_frame():
    data = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.zeros(0, dtype=torch.float64)}
    sent = envelope(data=data, meta={"weights": {"1": 2.0}}, num_bytes=payload_bytes(data))
    framed = frame(sent)
    arriving = Arriving(framed.head)
    came = arriving.build(torch.frombuffer(bytearray(framed.joined()), dtype=torch.uint8).numpy())
    assert arriving.size == framed.size and came.meta == sent.meta and came.num_bytes == sent.num_bytes
    assert all(torch.equal(came.data[name], tensor) and came.data[name].dtype == tensor.dtype
               for name, tensor in data.items())


@pytest.mark.parametrize("roster, name", [
    ({}, "run"), ({"run": "r"}, "peers"), ({"run": "r", "peers": [{"name": "a"}]}, "peers[0]"),
    ({"run": "r", "peers": [{"name": "A!", "address": "h:1"}]}, "peers[0].name"),
    ({"run": "r", "peers": [{"name": "a", "address": "h"}]}, "peers[0].address"),
    ({"run": "r", "peers": [{"name": "a", "address": "h:1"}, {"name": "a", "address": "h:2"}]}, "peers.name"),
])
def test_a_wrong_roster_is_refused_by_the_name_of_what_is_wrong(roster, name):
    with pytest.raises(InvalidSetting) as caught:
        Roster.of(roster)
    assert caught.value.name == name

