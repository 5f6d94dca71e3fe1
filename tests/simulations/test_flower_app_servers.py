"""What ServerApps may do with the grid: nothing of it may hang."""
import json

import pytest

from fedcore.errors import NothingCanHappen
from fedcore.simulations.flower_app import simulate_app


def test_pushing_and_pulling_by_hand_with_pauses(make_app, out):
    server = """
        ids = list(grid.push_messages(ask(grid)))
        assert len(ids) == 3 and all(ids)
        arrived = []
        while len(arrived) < 3:
            replies = list(grid.pull_messages(ids))
            assert replies, "a pull in virtual time waits for the first reply"
            arrived += [reply.metadata.reply_to_message_id for reply in replies]
            ids = [name for name in ids if name not in arrived]
            time.sleep(0.01)
        assert arrived == sorted(arrived, key=int)
        assert grid.pull_messages([]) == []
        [again] = grid.pull_messages(arrived[:1])
        assert again.has_error() and again.error.code == 4
        assert grid.push_messages(ask(grid, nodes=[99]))[0] is None
    """
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "trace", "values": [1, 2, 3]}}}}
    run = simulate_app(make_app.echoing(server), settings, num_nodes=3, out=out)
    assert run.summary["time_s"] == 3.0


def test_asking_for_answered_messages_again_and_again_does_not_stop_the_clock(make_app, out):
    server = """
        ids, good = list(grid.push_messages(ask(grid))), set()
        while len(good) < len(ids):
            good |= {r.metadata.reply_to_message_id for r in grid.pull_messages(ids) if not r.has_error()}
    """
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "exponential", "mean": 1}}}}
    run = simulate_app(make_app.echoing(server), settings, num_nodes=5, out=out)
    assert run.summary["client_updates"] == 5


@pytest.mark.parametrize("pause", ["time.sleep(0.15)", "pass"])
def test_waiting_for_nodes_moves_the_clock_to_their_coming(make_app, out, tmp_path, pause):
    (tmp_path / "trace.csv").write_text("partition,start_s,end_s\n0,0,1000\n1,50,1000\n2,70,1000\n")
    server = f"""
        while len(list(grid.get_node_ids())) < 3:
            {pause}
        assert len(grid.send_and_receive(ask(grid))) == 3
    """
    settings = {"simulation": {"availability": {"name": "trace", "path": str(tmp_path / "trace.csv")}}}
    run = simulate_app(make_app.echoing(server), settings, num_nodes=3, out=out)
    assert run.summary["time_s"] == 71.0


@pytest.mark.parametrize(
    "body",
    [
        "while len(list(grid.get_node_ids())) < 3:\n    pass",
        "while not grid.send_and_receive(ask(grid, nodes=[77])):\n    pass",
    ],
)
def test_waiting_for_what_cannot_come_is_an_error_and_no_hang(make_app, out, body):
    with pytest.raises(NothingCanHappen, match="than the 2 that are online"):
        simulate_app(make_app(make_app.main_of(body)), num_nodes=2, out=out)
    assert json.loads((out / "summary.json").read_text())["stop_reason"] == "error"


def test_messages_expire_after_their_time_to_live(make_app, out):
    server = """
        replies = grid.send_and_receive(ask(grid, ttl=5.0))
        assert [reply.has_error() for reply in replies] == [False, True]
        assert replies[1].error.code == 3
    """
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "trace", "values": [4, 6]}}}}
    run = simulate_app(make_app.echoing(server), settings, num_nodes=2, out=out)
    assert run.summary["time_s"] == 5.0
    assert [(row["node"], row["outcome"]) for row in run.timeline] == [(0, "ok"), (1, "lost")]
    assert (run.summary["lost"], run.summary["failures"]) == (1, 0)


def test_a_message_can_expire_while_it_waits_for_its_turn(make_app, out):
    server = """
        waiting = list(grid.push_messages([*ask(grid, ttl=100), *ask(grid, ttl=1.5), *ask(grid, ttl=100)]))
        order = []
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.remove(reply.metadata.reply_to_message_id)
                order.append((reply.metadata.reply_to_message_id, reply.has_error()))
        assert order == [("1", True), ("0", False), ("2", False)], order
    """
    settings = {"simulation": {"devices": {"seconds_per_task": 2}}}
    run = simulate_app(make_app.echoing(server), settings, num_nodes=1, out=out)
    # The expired message is never worked on: two tasks of 2 s.
    assert run.summary["time_s"] == 4.0


def test_replies_beyond_a_rounds_timeout_are_lost(make_app, out):
    server = """
        assert len(grid.send_and_receive(ask(grid), timeout=5)) == 1
        assert len(grid.send_and_receive(ask(grid, nodes=[list(grid.get_node_ids())[0]]))) == 1
    """
    settings = {"simulation": {"devices": {"seconds_per_task": {"name": "trace", "values": [4, 6]}}}}
    run = simulate_app(make_app.echoing(server), settings, num_nodes=2, out=out)
    assert run.summary["time_s"] == 9.0
    assert {(row["node"], row["end_s"], row["outcome"]) for row in run.timeline} == {
        (0, 4.0, "ok"), (1, 6.0, "lost"), (0, 9.0, "ok")}


def test_work_under_way_at_the_end_is_in_the_timeline(make_app, out):
    run = simulate_app(make_app.echoing("grid.push_messages(ask(grid))"), num_nodes=2, out=out)
    assert [row["outcome"] for row in run.timeline] == ["cancelled"] * 2


def test_simulated_failures_reach_the_strategy_as_error_replies(make_app, out):
    settings = {"simulation": {"failures": {"crash_probability": 0.3}}, "seed": 1}
    run = simulate_app(make_app(), settings, num_nodes=8, out=out)
    assert run.summary["failures"] > 0 and run.summary["versions"] == 3
    assert {row["outcome"] for row in run.timeline} == {"ok", "failed"}
