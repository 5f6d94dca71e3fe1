"""A member dies at every moment of a ring all-reduce: the survivors end with the same result, or redo it alike."""
import asyncio

import pytest
import torch

from tests.peer_lab import Script, play

NETWORK = {"latency_s": {"name": "exponential", "mean": 0.2}}
# A member sends so many messages in a ring of four.
MESSAGES = 6


class Killer:
    """Kills a peer when it has sent so many messages; the others learn of it one after another."""

    def __init__(self, deaths):
        self.deaths = dict(deaths)
        self.dead = set()

    def watch(self, peer, peers):
        post, left = peer.wire.post, self.deaths.get(peer.rank)
        if left is None:
            return
        sent = [0]

        def counting(to, envelope):
            if envelope.source == peer.rank:
                if sent[0] >= left and peer.rank not in self.dead:
                    self.dead.add(peer.rank)
                    loop = asyncio.get_running_loop()
                    for place, other in enumerate(sorted(set(peers) - {peer.rank})):
                        loop.call_later(1.0 + 0.3 * place, peers[other].lose, peer.rank)
                sent[0] += 1
            if envelope.source in self.dead:
                return loop_future()
            return post(to, envelope)

        peer.wire.post = counting


def loop_future():
    return asyncio.get_running_loop().create_future()


def survivors(deaths, folder, count=4, rounds=2):
    """Return by rank what those who live got, round by round."""
    killer, peers, found = Killer(deaths), {}, {}

    async def run(peer):
        peers[peer.rank] = peer
        killer.watch(peer, peers)
        async for _ in peer.steps():
            if peer.step >= 1:
                continue
            results = [await peer.means.start(torch.full((7,), 10.0**peer.rank, dtype=torch.float64) + index,
                                                   "mean", index, 1.0) for index in range(rounds)]
            found[peer.rank] = results

    async def until_the_living_are_done(peer):
        task = asyncio.get_running_loop().create_task(run(peer))
        while not task.done() and peer.rank not in killer.dead:
            await peer.sleep(0.05)
        task.cancel()
        if peer.rank not in killer.dead:
            # Those who are done still answer the others.
            while len(found) < count - len(killer.dead):
                await peer.sleep(0.05)

    play(Script(until_the_living_are_done), folder, count, stop={"rounds": 1}, simulation={"network": NETWORK})
    return {rank: results for rank, results in found.items() if rank not in killer.dead}, killer


def check(found, killer, count, rounds):
    assert sorted(found) == sorted(set(range(count)) - killer.dead)
    for index in range(rounds):
        results = [results[index] for results in found.values()]
        assert all(torch.equal(result.mean, results[0].mean) for result in results)
        assert len({result.contributors for result in results}) == 1
        members = results[0].contributors
        assert set(found) <= set(members)
        expected = sum(10.0**rank + index for rank in members) / len(members)
        assert torch.allclose(results[0].mean, torch.full((7,), expected, dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("victim", range(4))
def test_survivors_agree_whichever_message_was_a_members_last(victim, tmp_path):
    with_it = set()
    for message in range(2 * MESSAGES):
        found, killer = survivors({victim: message}, tmp_path / str(message))
        check(found, killer, 4, 2)
        assert killer.dead == {victim}
        with_it |= {victim in result.contributors for results in found.values() for result in results}
    assert with_it == {True, False}    # sometimes a survivor had the result already, and sometimes nobody had


@pytest.mark.parametrize("first", [0, 3, 5])
def test_a_second_death_while_the_first_is_dealt_with_changes_nothing(first, tmp_path):
    for second in range(MESSAGES + 3):
        found, killer = survivors({1: first, 2: second}, tmp_path / str(second))
        check(found, killer, 4, 2)
        assert 1 in killer.dead
