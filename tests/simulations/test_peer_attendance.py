"""Virtual peers that go, die, come back and join later: runs end, all agree on who takes part, sums are kept."""
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcore.registry import build
from fedcore.runs import Run
from fedcore.strategies.dadao_equations import Z_COPY, Z
from tests.peer_lab import models, play, prepare, same
from tests.strategies.test_peer_contract import SETTINGS, STRATEGIES

PEERS = 4
ALWAYS = (0.0, 1e9)
NETWORK = {"latency_s": 0.01, "uplink_mbps": 1.0, "jitter": 0.1}


def trace(folder, intervals):
    """Write when each peer is online; returns the setting."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{rank},{start},{end}" for rank, spans in enumerate(intervals) for start, end in spans]
    (folder / "trace.csv").write_text("\n".join(["partition,start_s,end_s", *rows]) + "\n")
    return {"name": "trace", "path": str(folder / "trace.csv")}


def world(name, folder, intervals, lost_after_s=0.3, **more):
    strategy = build("strategies", {"name": name, **SETTINGS.get(name, {})})
    stop = {"seconds": 8, "rounds": None} if strategy.by_time else {"rounds": 30}
    return strategy, {
        "task": {"name": "logistic", "dimension": 6, "examples": 30, "l2": 0.1}, "stop": stop,
        "peers": {"lost_after_s": lost_after_s}, **more,
        "simulation": {"network": NETWORK, "devices": {"seconds_per_step": {"name": "uniform", "low": 0.08,
                                                                            "high": 0.12}},
                       "availability": trace(folder, intervals)}}


def watch(simulation):
    """Note which epoch and members every peer had in every step, and its state at the end of it."""
    begun, ended, made = {}, {}, simulation._make

    def make(rank):
        peer = made(rank)
        board = peer.board
        if not hasattr(board, "watched"):
            board.watched, begin, report = True, board.begin, board.report

            async def watched_begin(one, step):
                found = await begin(one, step)
                if found is not None:
                    begun.setdefault(step, {})[one.rank] = (found.epoch, found.members)
                return found

            async def watched_report(one, state):
                def kept():
                    plain = state()
                    ended.setdefault(one.step, {})[one.rank] = plain
                    return plain
                await report(one, kept)

            board.begin, board.report = watched_begin, watched_report
        return peer

    simulation._make = make
    return begun, ended


def run(name, folder, intervals, **more):
    strategy, sections = world(name, folder, intervals, **more)
    simulation = prepare(strategy, folder / "run", len(intervals), **sections)
    begun, ended = watch(simulation)
    simulation.play()
    simulation.recorder.close()
    return simulation, begun, ended


def check(simulation, begun, ended):
    for step, found in begun.items():
        assert len(set(found.values())) == 1, f"peers disagree on who takes part in step {step}"
        ((_, members),) = set(found.values())
        assert set(found) <= set(members)
    epochs = [next(iter(found.values()))[0] for _, found in sorted(begun.items())]
    assert epochs == sorted(epochs)
    assert simulation.board.stop_reason is not None
    for step, states in ended.items():
        ((_, members),) = set(begun[step].values())
        rows = [state["rows"] for state in states.values() if state is not None and "rows" in state]
        if rows and set(states) == set(members):
            rows = torch.stack(rows)
            for row in (Z, Z_COPY):
                assert rows[:, row].sum(0).abs().max() <= 1e-12 * max(1e-3, rows[:, row].abs().max())


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_dies_and_comes_back_and_another_joins_later(name, tmp_path):
    intervals = [[ALWAYS], [ALWAYS], [(0.0, 1.0), (3.0, 1e9)], [(2.0, 1e9)]]
    simulation, begun, ended = run(name, tmp_path, intervals)
    check(simulation, begun, ended)
    seen = [members for members, _ in itertools.groupby(
        next(iter(found.values()))[1] for _, found in sorted(begun.items()))]
    assert seen[0] == (0, 1, 2) and seen[-1] == (0, 1, 2, 3) and (0, 1) in seen
    found = models(simulation)
    assert all(torch.isfinite(model).all() for model in found)
    assert simulation._ended == {0, 1, 2, 3}
    rows = Run(tmp_path / "run").metrics
    assert [row["members"] for row in rows if "members" in row][-1] == [0, 1, 2, 3]
    if name in ("diloco", "local_sgd", "slowmo", "co2", "all_reduce_sgd"):
        assert all(torch.equal(found[0], other) for other in found)


def check_stopped_and_continued(name, folder, intervals, stop_after):
    """Check that a run which is stopped after a step and continued equals one that never stopped."""
    strategy, sections = world(name, folder, intervals, checkpoint={"every_s": 0, "keep": 2},
                               evaluate={"where": "server"})
    whole = play(strategy, folder / "whole", PEERS, **sections)
    parted = prepare(strategy, folder / "parts", PEERS, **sections)
    closed = parted.host.close_step

    def close(step, reports):
        closed(step, reports)
        if step >= stop_after:
            parted.host.stop_run("interrupted")

    parted.host.close_step = close
    parted.play()
    parted.recorder.close()
    again = prepare(strategy, folder / "parts", PEERS, **sections)
    again.play(resuming=True)
    again.recorder.close()
    assert same(models(again), models(whole)) and again.host.totals == whole.host.totals
    assert Run(folder / "parts").metrics == Run(folder / "whole").metrics


@pytest.mark.slow
@pytest.mark.parametrize("name, stop_after", [
    ("noloco", 2), ("noloco", 9), ("co2", 5), ("all_reduce_sgd", 7), ("dadao", 4), ("a2cid2", 9)])
def test_saved_loaded_and_continued_equals_never_stopped_though_peers_go_and_come(name, stop_after, tmp_path):
    intervals = [[ALWAYS], [(0.0, 2.0), (4.0, 1e9)], [(0.0, 1.0), (2.5, 1e9)], [(1.5, 1e9)]]
    check_stopped_and_continued(name, tmp_path, intervals, stop_after)


def test_a_run_may_stop_where_the_members_change(tmp_path):
    # A peer that goes on drifts as the earlier members did until all have agreed; so must one that was stopped there.
    intervals = [[ALWAYS], [(0.545, 1.071), (2.542, 4.172), (5.754, 7.623)], [(0.0, 1.372), (3.227, 5.387)],
                 [(0.0, 1.515)]]
    check_stopped_and_continued("a2cid2", tmp_path, intervals, 3)


spans = st.lists(st.floats(0.05, 2.5), min_size=0, max_size=6)


def intervals_of(gaps, starts_on):
    times = list(itertools.accumulate([0.0, *gaps, 1e9]))
    pairs = list(zip(times, times[1:], strict=False))
    return pairs[0 if starts_on else 1::2]


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(gaps=st.lists(spans, min_size=3, max_size=3), on=st.lists(st.booleans(), min_size=3, max_size=3),
       name=st.sampled_from(STRATEGIES))
def test_whatever_they_do_the_run_ends_and_all_agree(gaps, on, name, tmp_path_factory):
    intervals = [intervals_of(one, is_on) for one, is_on in zip(gaps, on, strict=True)]
    intervals[0] = intervals[0] if any(on) else [ALWAYS]
    simulation, begun, ended = run(name, tmp_path_factory.mktemp("run"), intervals)
    check(simulation, begun, ended)


def test_who_is_away_for_a_short_time_only_stands_still(tmp_path):
    intervals = [[ALWAYS], [(0.0, 1.0), (1.2, 1e9)], [ALWAYS]]
    simulation, begun, ended = run("diloco", tmp_path, intervals)
    assert {found for one in begun.values() for found in one.values()} == {(0, (0, 1, 2))}


def test_when_nobody_is_left_the_run_ends_and_says_so(tmp_path):
    simulation, _, _ = run("noloco", tmp_path, [[(0.0, 1.0)], [(0.0, 1.5)]])
    assert simulation.board.stop_reason == "nobody is left" and simulation.host.version > 0


def test_who_comes_back_to_nobody_goes_on_from_the_latest_that_anybody_had(tmp_path):
    simulation, begun, ended = run("diloco", tmp_path, [[(0.0, 2.0), (5.0, 1e9)], [(0.0, 1.5)]])
    check(simulation, begun, ended)
    assert simulation.board.stop_reason == "rounds" and simulation.board.closed == 29
