"""Real peers over sockets: who dies, who comes back, and what the others make of it."""
import asyncio

import pytest
import torch

from fedcore.registry import build
from fedcore.transport.loop import submit
from fedcore.transport.peer_runner import PeerOptions
from tests.fedcore.transport.test_peer_wire import PATIENCE_S, killed_and_back, real_peers, roster_of
from tests.peer_lab import Script

# So many messages does a member send in a ring of three.
MESSAGES = 4


async def ring_in_which_somebody_dies(folder, victim, message):
    """Return by rank what the survivors of three peers got in two reductions."""
    found = {}

    async def run(peer):
        async for step in peer.steps():
            vector = torch.full((5,), 10.0**peer.rank + step, dtype=torch.float64)
            found.setdefault(peer.rank, []).append(await peer.all_reduce(vector))

    options = PeerOptions(3, lost_after_s=1.0, farewell_s=20.0)
    peers, _ = real_peers(Script(run), roster_of(3), None, folder, rounds=3, options=options)
    tasks = [asyncio.create_task(peer.run()) for peer in peers]
    post, sent = peers[victim].wire.post, [0]

    def counting(to, envelope):
        if envelope.kind == "ring":
            sent[0] += 1
            if sent[0] > message:
                tasks[victim].cancel()
                return asyncio.get_running_loop().create_future()
        return post(to, envelope)

    peers[victim].wire.post = counting
    await asyncio.gather(*[task for rank, task in enumerate(tasks) if rank != victim])
    return {rank: results for rank, results in found.items() if rank != victim}


@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_of_a_ring_agree_whichever_message_was_a_members_last(victim, tmp_path):
    async def all_of_them():
        return await asyncio.gather(*[ring_in_which_somebody_dies(tmp_path / str(message), victim, message)
                                      for message in range(2 * MESSAGES)])

    for found in submit(all_of_them()).result(PATIENCE_S):
        assert len(found) == 2 and all(len(results) == 3 for results in found.values())
        for step, (one, other) in enumerate(zip(*found.values(), strict=True)):
            assert torch.equal(one.mean, other.mean) and one.contributors == other.contributors
            expected = sum(10.0**rank + step for rank in one.contributors) / len(one.contributors)
            assert set(found) <= set(one.contributors)
            assert torch.allclose(one.mean, torch.full((5,), expected, dtype=torch.float64), rtol=1e-14)
        assert len(next(iter(found.values()))[2].contributors) == 2


def spread_of(models):
    return (torch.stack(models) - torch.stack(models).mean(0)).norm() / torch.stack(models).mean(0).norm()


@pytest.mark.parametrize("name", ["diloco", "co2", "all_reduce_sgd"])
def test_who_was_killed_rejoins_those_who_average_over_everybody_at_a_step_that_all_agree_on(name, tmp_path):
    settings = {"train": {"optimizer": {"name": "sgd", "momentum": 0.5}}}
    more = {} if name == "all_reduce_sgd" else {"inner_steps": 2}
    options, roster = PeerOptions(80, lost_after_s=0.5, farewell_s=20.0), roster_of(4)
    strategy = build("strategies", {"name": name, **more})
    peers, rows = real_peers(strategy, roster, None, tmp_path / "a", options=options, **settings)
    again, new_rows = real_peers(strategy, roster, None, tmp_path / "b", options=options, **settings)

    found = submit(killed_and_back(peers, again[3], 5, lambda: peers[0].peer.epoch >= 1)).result(PATIENCE_S)
    # Nobody differs by a bit: it came with the others' model, and what was under way.
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert [row for row in new_rows if row[1] == "rejoined"] and again[3].peer.members == (0, 1, 2, 3)
    changes = [(figures["epoch"], figures["step"], tuple(figures["members"]))
               for rank, event, figures in rows if event == "members" and rank < 3]
    assert len(set(changes)) == 2 and len(changes) == 6    # both changes, at the same step at all three
