"""Exchanges with a group: who is late, silent, lost or wrong is left out, and everybody else goes on."""
import pytest
import torch

from fedcore.errors import NothingCanHappen, PeerLost
from fedcore.peers.envelope import Envelope
from fedcore.peers.groups import draw_groups, group_of
from tests.peer_lab import Script, play, prepare


def vector(value):
    return torch.full((3,), float(value), dtype=torch.float64)


def exchange_once(found, **options):
    async def run(peer):
        async for _ in peer.steps():
            await peer.train(1)
            found[peer.rank] = await peer.exchange(peer.members, vector(peer.rank), **options)
    return run


def test_everybody_gets_everybodys_payload_in_ascending_order(tmp_path):
    found = {}
    play(Script(exchange_once(found)), tmp_path, 4, stop={"rounds": 1})
    for offers in found.values():
        assert list(offers) == [0, 1, 2, 3] and offers.missing == ()
        assert all(torch.equal(offers[rank], vector(rank)) for rank in range(4))


class Silent:
    """Nothing that peer 2 sends arrives."""

    def crash_point(self, rank, index):
        return None

    def loses_request(self, rank, index):
        return rank == 2

    def loses_reply(self, rank, index):
        return False


def test_a_silent_partner_is_left_out_after_the_timeout(tmp_path):
    found = {}
    simulation = prepare(Script(exchange_once(found, timeout_s=5.0)), tmp_path, 4, stop={"rounds": 1})
    simulation.wire._failures = Silent()
    simulation.play()
    assert all(list(found[rank]) == [0, 1, 3] and found[rank].missing == (2,) for rank in (0, 1, 3))
    # It hears the others, but they do not acknowledge what they never got: using them would be one-sided.
    assert list(found[2]) == [2] and found[2].missing == (0, 1, 3)
    assert simulation.host.totals["silent"] == 6 and simulation.host.totals["asymmetric_exchanges"] == 3


def test_without_a_timeout_a_lost_message_is_told_of_instead_of_waiting_forever(tmp_path):
    simulation = prepare(Script(exchange_once({})), tmp_path, 3, stop={"rounds": 1})
    simulation.wire._failures = Silent()
    with pytest.raises(NothingCanHappen, match="peer"):
        simulation.play()


def test_need_all_raises_when_somebody_is_missing(tmp_path):
    simulation = prepare(Script(exchange_once({}, timeout_s=1.0, need_all=True)), tmp_path, 4, stop={"rounds": 1})
    simulation.wire._failures = Silent()
    with pytest.raises(PeerLost):
        simulation.play()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_payload_that_is_not_finite_is_refused_and_its_sender_named(value, tmp_path):
    found = {}

    async def run(peer):
        async for _ in peer.steps():
            payload = torch.tensor([0.0, value if peer.rank == 1 else 1.0])
            found[peer.rank] = await peer.exchange(peer.members, payload)

    simulation = play(Script(run), tmp_path, 3, stop={"rounds": 1})
    assert found[0].missing == found[2].missing == (1,) and found[1].missing == ()
    assert simulation.host.counts["refused"] == 2


def test_messages_of_other_runs_second_and_late_ones_are_not_used(tmp_path):
    answers = []

    async def run(peer):
        async for step in peer.steps():
            if peer.rank == 0:
                data = {"vector": vector(step)}
                for name in ("another", peer.run, peer.run):
                    answers.append(peer.take(Envelope(name, 0, "message", "t", 0, 1, data, {}, 0)))
                await peer.receive(1, "t", 0)
                answers.append(peer.take(Envelope(peer.run, 0, "message", "t", 0, 1, data, {}, 0)))

    play(Script(run), tmp_path, 2, stop={"rounds": 1})
    assert answers == ["another run", None, "second or late", "second or late"]


def test_what_comes_early_waits_for_its_round(tmp_path):
    found = {}

    async def run(peer):
        async for step in peer.steps():
            await peer.train(1 + 20 * peer.rank)
            found[peer.rank, step] = await peer.exchange((0, 1), vector(10 * step + peer.rank), timeout_s=None)

    play(Script(run), tmp_path, 2, stop={"rounds": 3})
    for step in range(3):
        assert torch.equal(found[0, step][1], vector(10 * step + 1))
        assert torch.equal(found[1, step][0], vector(10 * step))


def test_every_peer_is_in_exactly_one_group_and_all_draw_alike():
    members = (0, 2, 3, 5, 7, 8, 11)
    groups = draw_groups(members, 3, seed=4, step=6)
    assert sorted(rank for group in set(groups.values()) for rank in group) == list(members)
    assert sorted(map(len, set(groups.values()))) == [1, 3, 3]
    for rank in members:
        assert rank in groups[rank] and group_of(rank, members, 3, 4, 6) == groups[rank]
    assert draw_groups(members, 3, seed=4, step=7) != groups
