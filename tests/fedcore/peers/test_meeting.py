"""Pairwise exchanges in two phases: whatever is lost, both ends apply them or neither does."""
import asyncio

import pytest
import torch

from fedcore.checkpoint import Checkpoints
from tests.peer_lab import Script, models, play, prepare, same

LATENCY = {"latency_s": 0.02}
# Nobody trains here: a peer's vector changes in meetings alone, so its sum tells whether each happened at both ends.
TIME = {"stop": {"seconds": 40, "rounds": None}}


def averaging(rate=2.0, exclusive=True, timeout_s=0.3):
    """Return peers on a ring that average with a neighbour at random times."""

    async def run(peer):
        saved = peer.restore(dict)
        held = [peer.params + peer.rank if saved is None else saved["held"]]
        peer.params = held[0]

        def apply(partner, mine, theirs, at):
            held[0] = held[0] - 0.5 * (mine - theirs)
            peer.params = held[0]

        meeting = peer.meeting("average", lambda: held[0], apply, timeout_s, exclusive)

        async def edge(partner):
            async for _ in peer.ticks(rate, "edge", partner):
                await meeting.with_(partner)

        async for _ in peer.steps():
            count = len(peer.members)
            partners = [other for other in ((peer.rank + 1) % count, (peer.rank - 1) % count) if other > peer.rank]
            await asyncio.gather(*[edge(partner) for partner in sorted(set(partners))])
            await peer.safe_point(lambda: {"held": held[0]})

    return Script(run, by_time=True)


@pytest.mark.parametrize("loss", [0.0, 0.2])
@pytest.mark.parametrize("exclusive", [True, False])
def test_the_sum_over_all_peers_is_kept_whatever_is_lost(loss, exclusive, tmp_path):
    simulation = play(averaging(exclusive=exclusive), tmp_path, 8, **TIME, simulation={
        "network": LATENCY, "failures": {"request_loss": loss}})
    held = torch.stack(models(simulation))
    assert (held.mean(0) - 3.5).abs().max() < 1e-13
    assert (held - 3.5).abs().max() < 0.5
    totals = simulation.host.totals
    # Both ends count a meeting. Clocks tick 640 times on average, and no tick is lost while losses are dealt with,
    # except where a peer that is in doubt holds its turn.
    attempted = totals["exchanges"] / 2 + totals["failed_meetings"]
    assert attempted > (400 if loss and exclusive else 560) and (totals["failed_meetings"] > 50) == (loss > 0)
    assert totals["exchanges"] % 2 == 0


def test_a_peer_takes_part_in_one_exclusive_meeting_at_a_time(tmp_path):
    # With latency and many meetings, offers that overlap would be based on values that change in between.
    simulation = play(averaging(rate=20.0), tmp_path, 6, stop={"seconds": 5, "rounds": None},
                      simulation={"network": {"latency_s": 0.1}})
    assert (torch.stack(models(simulation)).mean(0) - 2.5).abs().max() < 1e-13


def test_the_lower_rank_proposes(tmp_path):
    async def run(peer):
        meeting = peer.meeting("m", lambda: peer.params, lambda *_: None, 1.0)
        async for _ in peer.steps():
            if peer.rank == 1:
                await meeting.with_(0)

    with pytest.raises(ValueError, match="lower rank proposes"):
        play(Script(run), tmp_path, 2, stop={"rounds": 1})


def test_both_ends_learn_the_same_moment(tmp_path):
    moments = {0: [], 1: []}

    async def run(peer):
        meeting = peer.meeting("m", lambda: peer.params,
                               lambda partner, mine, theirs, at: moments[peer.rank].append(at), 1.0)
        async for _ in peer.steps():
            async for _ in peer.ticks(3.0, "t"):
                if peer.rank == 0:
                    await meeting.with_(1)
            await peer.safe_point()

    play(Script(run, by_time=True), tmp_path, 2, stop={"seconds": 60, "rounds": None},
         simulation={"network": LATENCY, "failures": {"request_loss": 0.2}})
    assert len(moments[0]) > 5 and sorted(moments[0]) == sorted(moments[1])


def test_a_run_that_stops_by_time_continues_to_the_same_bits(tmp_path):
    world = {"network": LATENCY, "failures": {"request_loss": 0.1}}
    whole = play(averaging(), tmp_path / "whole", 5, stop={"seconds": 30, "rounds": None}, simulation=world)
    # Time that a run has not reached yet must not matter to what it does until then.
    first = prepare(averaging(), tmp_path / "parts", 5, stop={"seconds": 30, "rounds": None}, simulation=world,
                    checkpoint={"every_s": 0, "keep": 1})
    closed = first.host.close_step

    def close(step, reports):
        closed(step, reports)
        if step == 9:
            first.board.stop("interrupted")

    first.host.close_step = close
    first.play()
    assert first.board.stop_reason == "interrupted"
    again = prepare(averaging(), tmp_path / "parts", 5, stop={"seconds": 30, "rounds": None}, simulation=world)
    again.play(resuming=True)
    assert same(models(again), models(whole)) and again.host.totals == whole.host.totals
    assert isinstance(again.checkpoints, Checkpoints)


def test_ticks_are_a_poisson_process_and_none_is_lost_while_the_peer_is_busy(tmp_path):
    seen = []

    async def run(peer):
        async for _ in peer.steps():
            async for at in peer.ticks(5.0, "clock"):
                seen.append(at)
                await peer.sleep(0.15)
            await peer.safe_point()

    play(Script(run, by_time=True), tmp_path, 1, stop={"seconds": 200, "rounds": None})
    gaps = torch.tensor(seen).diff()
    assert abs(len(seen) - 1000) < 4 * 1000**0.5
    assert gaps.min() < 0.01 and abs(gaps.std() / gaps.mean() - 1) < 0.15
