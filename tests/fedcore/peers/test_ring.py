"""The ring all-reduce: worked out at once, or message by message, it is the same to the bit and to the second."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.peers.all_reduce import ring_all_gather, ring_all_reduce
from fedcore.peers.packing import Packed
from fedcore.peers.ring import LONG_CHUNK, chunk_bounds, ring_sum
from fedcore.registry import build
from tests.peer_lab import Script, play

NETWORK = {"latency_s": {"name": "exponential", "mean": 0.2},
           "uplink_mbps": {"name": "uniform", "low": 0.01, "high": 0.1}}


def reference(vectors):
    """Add chunk c in ring order, beginning with member c."""
    count, total = len(vectors), torch.empty_like(vectors[0])
    for chunk, (start, end) in enumerate(chunk_bounds(len(total), count)):
        part = vectors[chunk][start:end]
        for hop in range(1, count):
            part = part + vectors[(chunk + hop) % count][start:end]
        total[start:end] = part
    return total


@given(count=st.integers(1, 9), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_sums_run_in_ring_order_for_every_length(count, size, seed):
    vectors = list(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))
    before = [vector.clone() for vector in vectors]
    assert torch.equal(ring_sum(vectors), reference(vectors))
    assert all(torch.equal(*pair) for pair in zip(vectors, before, strict=True))


@given(count=st.integers(1, 9), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_payloads_are_added_in_the_order_of_the_ring(count, size, seed):
    codec = build("compressors", "identity").codec([(size,)], torch.float32)
    vectors = list(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))
    payloads = [codec.encode(vector, torch.Generator()) for vector in vectors]
    mean = Packed(payloads[0], codec).mean(payloads, [1.0] * count)
    assert torch.equal(mean, ring_sum(vectors) / count)


def test_long_vectors_are_added_in_the_same_order():
    vectors = list(torch.randn(3, 3 * LONG_CHUNK + 2, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(ring_sum(vectors), reference(vectors))


@given(size=st.integers(0, 100), count=st.integers(1, 20))
def test_chunks_cover_a_vector_once_in_order(size, count):
    bounds = chunk_bounds(size, count)
    assert bounds[0][0] == 0 and bounds[-1][1] == size and len(bounds) == count
    assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))
    assert max(end - start for start, end in bounds) - min(end - start for start, end in bounds) <= 1


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "compressed"])
@pytest.mark.parametrize("count, weights", [(1, False), (2, False), (5, False), (5, True)])
def test_messages_give_the_bits_and_the_times_that_are_worked_out(count, weights, packed, tmp_path):
    results = {}

    def script(by_messages):
        async def run(peer):
            async for _ in peer.steps():
                await peer.train(1 + peer.rank)
                weight = 1.0 + peer.rank if weights else 1.0
                started = peer.counters.bytes_sent, peer.counters.bytes_received
                if by_messages and packed:
                    own = Packed(peer.packing.pack(peer.params, "mean", peer.step), peer.packing.codec)
                    reduced = await ring_all_gather(peer, own, "mean", peer.step, weight)
                elif by_messages:
                    reduced = await ring_all_reduce(peer, peer.params, "mean", peer.step, weight)
                else:
                    reduced = await peer.all_reduce(peer.params, weight=weight)
                results.setdefault(("bytes", by_messages), []).append(
                    (peer.rank, peer.counters.bytes_sent - started[0], peer.counters.bytes_received - started[1]))
                results.setdefault((by_messages, peer.rank), []).append((reduced.mean, reduced.contributors, peer.now))
                peer.params = reduced.mean
        return run

    # Steps long enough that every uplink is free again when the next reduction begins.
    world = {"network": NETWORK, "devices": {"seconds_per_step": 9.0}}
    sections = {"simulation": world, "stop": {"rounds": 3}, "task": {"dimension": 7}}
    if packed:
        sections["compression"] = {"name": "top_k", "fraction": 0.3}
    for by_messages in (False, True):
        play(Script(script(by_messages)), tmp_path / str(by_messages), count, **sections)
    for rank in range(count):
        for whole, steps in zip(results[False, rank], results[True, rank], strict=True):
            assert torch.equal(whole[0], steps[0])
            assert whole[1] == steps[1] == tuple(range(count))
            assert whole[2] == pytest.approx(steps[2], rel=1e-12)
    assert sorted(results["bytes", False]) == sorted(results["bytes", True])


def test_a_member_whose_vector_is_not_finite_is_left_out_and_named(tmp_path):
    found = {}

    async def run(peer):
        async for _ in peer.steps():
            bad = torch.full_like(peer.params, float("nan"))
            found[peer.rank] = await peer.all_reduce(bad if peer.rank == 1 else torch.ones_like(bad) * peer.rank)

    simulation = play(Script(run), tmp_path, 3, stop={"rounds": 1})
    assert all(result.contributors == (0, 2) and torch.equal(result.mean, torch.ones_like(result.mean))
               for result in found.values())
    assert simulation.host.counts["refused"] == 1


@pytest.mark.parametrize("size, count", [(6, 4), (3, 5), (8, 2), (5, 1)])
def test_every_member_is_billed_what_its_messages_take(size, count, tmp_path):
    async def worked_out(peer):
        async for _ in peer.steps():
            await peer.all_reduce(peer.params)

    async def by_messages(peer):
        async for _ in peer.steps():
            await ring_all_reduce(peer, peer.params, "mean", peer.step, 1.0)

    counted = []
    for name, run in (("a", worked_out), ("b", by_messages)):
        simulation = play(Script(run), tmp_path / name, count, stop={"rounds": 2}, task={"dimension": size})
        counted.append([(peer.counters.bytes_sent, peer.counters.bytes_received)
                        for peer in simulation.peers.values()])
    assert counted[0] == counted[1] and (counted[0][0][0] > 0) == (count > 1)
