"""The virtual grid as Flower documents grids: ids, replies, errors, time to live, the client's context."""
import logging
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcore.clock import EventfulGrid
from fedcore.errors import NothingCanHappen
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from tests.support import Fates, Intervals, TableDevices, Toy, train_request, vector_model

MODEL = vector_model()
TIMES = [1.0, 2.0, 3.0]


def make(app=None, nodes=3, **settings):
    return VirtualGrid(app or Toy(), nodes, **{"devices": TableDevices(TIMES), **settings})


def requests(*nodes, **config):
    return [train_request(MODEL, 1000 + node, **config) for node in nodes]


def answering(function):
    """Return an app whose training is `function(message, context) -> RecordDict`."""
    app = ClientApp()
    app.train()(lambda message, context: Message(function(message, context), reply_to=message))
    return app


# ---- messages out, replies in ---------------------------------------------------------------------------------------


def test_it_is_a_flower_grid_that_knows_what_happens_next():
    grid = make()
    assert isinstance(grid, Grid) and isinstance(grid, EventfulGrid)
    assert grid.get_node_ids() == [1000, 1001, 1002] and grid.run.run_id == 1


def test_pushing_returns_ids_in_order_and_none_where_there_is_no_node():
    ids = make().push_messages(requests(2, 7, 0))
    assert ids[1] is None and len({ids[0], ids[2], None}) == 3
    assert all(isinstance(name, str) for name in (ids[0], ids[2]))


def test_nothing_is_pushed_to_a_node_that_is_offline():
    grid = make(availability=Intervals({1: [(5, 9)]}))
    assert grid.get_node_ids() == [1000, 1002]
    assert [name is None for name in grid.push_messages(requests(0, 1))] == [False, True]


def test_pulling_moves_the_clock_to_the_first_reply_and_hands_it_out_once():
    grid = make()
    ids = grid.push_messages(requests(2, 0, 1))
    (first,) = grid.pull_messages(ids)
    assert first.metadata.src_node_id == 1000 and first.metadata.reply_to_message_id == ids[1] and grid.now == 1.0
    (second,) = grid.pull_messages([ids[0], ids[2]])
    assert second.metadata.src_node_id == 1001 and grid.now == 2.0
    (again,) = grid.pull_messages([ids[1]])
    assert again.has_error() and again.error.code == 4 and grid.now == 2.0


def test_replies_of_one_moment_are_pulled_together():
    grid = make(devices=TableDevices([2.0]))
    ids = grid.push_messages(requests(2, 0, 1))
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [1002, 1000, 1001]


def test_pulling_what_nobody_pushed_gives_an_error_reply():
    (reply,) = make().pull_messages(["no such id"])
    assert reply.has_error() and reply.error.code == 4 and "no such id" in reply.error.reason


def test_pulling_nothing_does_nothing():
    grid = make()
    grid.push_messages(requests(0))
    assert grid.pull_messages([]) == [] and grid.now == 0.0


def test_a_reply_that_came_while_another_was_awaited_is_kept():
    grid = make()
    early, late = grid.push_messages(requests(0, 2))
    assert grid.pull_messages([late])[0].metadata.src_node_id == 1002 and grid.now == 3.0
    assert grid.pull_messages([early])[0].metadata.src_node_id == 1000 and grid.now == 3.0


def test_send_and_receive_keeps_the_order_of_the_messages():
    grid = make()
    replies = grid.send_and_receive(requests(2, 0, 5, 1))
    assert [reply.metadata.src_node_id for reply in replies] == [1002, 1000, 1001] and grid.now == 3.0


def test_the_timeout_of_send_and_receive_is_in_virtual_seconds(caplog):
    grid = make()
    with caplog.at_level(logging.WARNING, "fedcore"):
        replies = grid.send_and_receive(requests(0, 1, 2), timeout=2.0)
    assert [reply.metadata.src_node_id for reply in replies] == [1000, 1001] and grid.now == 2.0
    assert "1 of 3 replies" in caplog.text
    replies = grid.send_and_receive(requests(2))
    assert len(replies) == 1 and grid.now == 6.0, "its node finished the first task before"


def test_what_timed_out_leaves_nothing_behind():
    grid = make(app=Toy(lazy=False))
    for _ in range(50):
        grid.send_and_receive(requests(0, 1, 2), timeout=1.5)
    grid.send_and_receive(requests(0, 1, 2))
    assert not grid.engine.tasks and not grid.engine.forgotten and not grid._inbox
    assert len(grid.engine._times) == 0 and len(grid.engine.heap) == 0 and not grid.engine._lanes


def test_a_reply_names_its_request_and_keeps_its_type_and_group():
    grid = make(app=answering(lambda message, context: RecordDict()))
    message = Message(RecordDict(), 1001, "train", group_id="round 3")
    (reply,) = grid.send_and_receive([message])
    assert reply.metadata.message_type == "train" and reply.metadata.group_id == "round 3"
    assert reply.metadata.dst_node_id == message.metadata.src_node_id


def test_actions_reach_the_function_of_their_name():
    app = ClientApp()
    for action in ("alpha", "beta"):
        def answer(message, context, action=action):
            return Message(RecordDict({"who": ConfigRecord({"action": action})}), reply_to=message)
        app.train(action)(answer)
    grid = make(app=app)
    sent = [grid.create_message(RecordDict(), f"train.{action}", 1000, "") for action in ("beta", "alpha", "gamma")]
    replies = grid.send_and_receive(sent)
    assert [reply.content["who"]["action"] for reply in replies[:2]] == ["beta", "alpha"]
    assert replies[2].has_error() and "gamma" in replies[2].error.reason


def test_mods_wrap_the_clients_work():
    def mod(message, context, call):
        reply = call(message, context)
        reply.content["mod"] = ConfigRecord({"seen": True})
        return reply

    app = ClientApp(mods=[])
    app.train(mods=[mod])(lambda message, context: Message(RecordDict(), reply_to=message))
    (reply,) = make(app=app).send_and_receive(requests(0))
    assert reply.content["mod"]["seen"] is True


# ---- what a client sees ---------------------------------------------------------------------------------------------


def test_a_client_sees_its_node_and_the_run():
    seen = {}

    def look(message, context):
        seen[context.node_id] = dict(context.node_config), dict(context.run_config), context.run_id
        context.run_config["lr"] = -1.0
        return RecordDict()

    make(app=answering(look), run_config={"lr": 0.5}).send_and_receive(requests(0, 2, 0))
    assert seen == {
        1000: ({"partition-id": 0, "num-partitions": 3, "simulated": True}, {"lr": 0.5}, 1),
        1002: ({"partition-id": 2, "num-partitions": 3, "simulated": True}, {"lr": 0.5}, 1),
    }


@pytest.mark.parametrize("lazy", [True, False])
def test_the_records_are_what_they_were_when_they_were_pushed(lazy):
    grid = make(app=Toy(lazy=lazy))
    content = RecordDict({"arrays": ArrayRecord(MODEL.state_dict()), "config": ConfigRecord({"local-steps": 2})})
    names = grid.push_messages([Message(content, 1000, "train")])
    content["config"]["local-steps"] = 500
    content["arrays"]["params"].data = ArrayRecord([np.full(6, 1e9, np.float32)])["0"].data
    (reply,) = grid.pull_messages(names)
    assert reply.content["metrics"]["work-steps"] == 2
    assert np.abs(reply.content["arrays"]["params"].numpy()).max() < 10


def test_one_client_cannot_change_what_another_receives():
    def spoil(message, context):
        received = message.content["arrays"]["params"]
        found = float(received.numpy()[0])
        received.data = ArrayRecord([np.full(6, 99, np.float32)])["0"].data
        message.content["config"]["list"].append(1)
        return RecordDict({"found": MetricRecord({"value": found, "length": len(message.content["config"]["list"])})})

    grid = make(app=answering(spoil))
    for arrays in (train_request(MODEL).content["arrays"], ArrayRecord(MODEL.state_dict())):
        shared = RecordDict({"arrays": arrays, "config": ConfigRecord({"list": [0]})})
        replies = grid.send_and_receive([Message(shared, 1000 + node, "train") for node in (0, 1, 2)])
        assert [dict(reply.content["found"]) for reply in replies] == [{"value": 0.0, "length": 2}] * 3


def counting(message, context):
    counts = context.state.setdefault("counts", MetricRecord({"tasks": 0, "history": []}))
    counts["tasks"] += 1
    counts["history"].append(counts["tasks"])
    if message.content["config"].get("fail"):
        raise ValueError("after changing its state")
    if message.content["config"].get("forget"):
        del context.state["counts"]
    return RecordDict({"counts": MetricRecord(dict(counts))})


def count_on(grid, node=0, **config):
    (reply,) = grid.send_and_receive(requests(node, **config))
    return None if reply.has_error() else (reply.content["counts"]["tasks"], reply.content["counts"]["history"])


def test_a_clients_state_lives_from_message_to_message_and_is_its_own():
    grid = make(app=answering(counting))
    assert [count_on(grid), count_on(grid), count_on(grid, node=1), count_on(grid)] == [
        (1, [1]), (2, [1, 2]), (1, [1]), (3, [1, 2, 3])
    ]


def test_a_failed_task_leaves_no_trace_in_the_clients_state():
    grid = make(app=answering(counting))
    assert [count_on(grid), count_on(grid, fail=True), count_on(grid)] == [(1, [1]), None, (2, [1, 2])]


def test_a_client_may_empty_its_state():
    grid = make(app=answering(counting))
    assert [count_on(grid), count_on(grid, forget=True), count_on(grid)] == [(1, [1]), (2, [1, 2]), (1, [1])]


def test_a_crashed_device_forgets_the_task_it_was_doing():
    grid = make(app=answering(counting), failures=Fates(crashes={(0, 1): 0.5}))
    assert [count_on(grid), count_on(grid), count_on(grid)] == [(1, [1]), None, (2, [1, 2])]
    assert grid.now == 2.5


def test_a_lost_reply_does_not_undo_the_work():
    grid = make(app=answering(counting), failures=Fates(replies={(0, 0)}))
    assert [count_on(grid, ttl=9.0), count_on(grid)] == [None, (2, [1, 2])]


def test_a_reply_shares_nothing_with_the_clients_state():
    def same_record(message, context):
        record = context.state.setdefault("m", MetricRecord({"train-seconds": 123.0, "tasks": 0}))
        record["tasks"] += 1
        return RecordDict({"m": record, "before": MetricRecord({"seconds": record["train-seconds"]})})

    grid = make(app=answering(same_record))
    for _ in range(2):
        (reply,) = grid.send_and_receive(requests(0))
        assert reply.content["m"]["train-seconds"] == 1.0, "virtual time, not this machine's"
        assert reply.content["before"]["seconds"] == 123.0
        reply.content["m"]["train-seconds"] = -1.0


# ---- errors ---------------------------------------------------------------------------------------------------------


def outcome(app=None, nodes=1, ttl=None, **settings):
    grid = make(app=app, nodes=nodes, **settings)
    (reply,) = grid.send_and_receive([train_request(MODEL, ttl=ttl)])
    return reply.error.code if reply.has_error() else None, grid.now, reply


def test_a_clients_exception_is_an_error_reply_with_its_traceback():
    code, now, reply = outcome(Toy(fails=(0,)))
    assert code == 2 and now == 1.0
    assert "Traceback" in reply.error.reason and "partition 0 is out of order" in reply.error.reason


@pytest.mark.parametrize("leave", [SystemExit, KeyError])
def test_a_client_that_leaves_in_any_way_is_an_error_reply(leave):
    def function(message, context):
        raise leave("bye")

    assert outcome(answering(function))[0] == 2


def test_a_client_that_returns_no_message_is_an_error_reply():
    app = ClientApp()
    app.train()(lambda message, context: {"loss": 1.0})
    code, _, reply = outcome(app)
    assert code == 2 and "returned a dict" in reply.error.reason


def test_an_estimate_that_raises_is_an_error_of_the_client_and_not_of_the_run():
    class Broken(Toy):
        def estimate(self, message, context):
            raise KeyError("no data here")

    code, now, _ = outcome(Broken(fails=(0,)))
    assert code == 2 and now == 1.0


def test_a_crashed_device_is_an_error_when_it_crashes():
    code, now, _ = outcome(failures=Fates(crashes={(0, 0): 0.25}))
    assert (code, now) == (8, 0.25)


def test_a_node_that_goes_offline_takes_its_work_with_it():
    code, now, _ = outcome(availability=Intervals({0: [(0, 0.5)]}))
    assert (code, now) == (5, 0.5)


@pytest.mark.parametrize("failures", [Fates(requests={(0, 0)}), Fates(replies={(0, 0)})])
def test_a_lost_message_expires_with_its_time_to_live(failures):
    code, now, reply = outcome(ttl=7.5, failures=failures)
    assert (code, now) == (3, 7.5) and "7.5 s" in reply.error.reason
    assert outcome(failures=failures)[1] == 43_200.0, "twelve hours where none is given"


def test_a_reply_at_the_very_end_of_its_time_to_live_is_valid_and_a_later_one_is_not():
    assert outcome(ttl=1.0)[:2] == (None, 1.0)
    assert outcome(ttl=0.999)[:2] == (3, 0.999)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_time_to_live_shorter_than_this_machine_takes_is_counted_in_virtual_time(lazy):
    class Slow(Toy):
        def train(self, message, context):
            time.sleep(0.02)
            return super().train(message, context)

    code, now, reply = outcome(Slow(lazy=lazy), ttl=1.0, devices=TableDevices([0.001]))
    assert (code, now) == (None, 0.001)


def test_a_node_is_busy_until_it_is_done_even_when_nobody_waits_any_longer():
    grid = make(nodes=1)
    late, next_ = grid.push_messages([train_request(MODEL, ttl=0.5), train_request(MODEL)])
    assert grid.pull_messages([late])[0].error.code == 3 and grid.now == 0.5
    assert not grid.pull_messages([next_])[0].has_error() and grid.now == 2.0


def test_a_task_that_expires_in_its_nodes_queue_is_never_begun():
    grid = make(app=answering(counting), nodes=1)
    grid.push_messages(requests(0) + [train_request(MODEL, ttl=0.5)] + requests(0))
    kinds = [grid.next_event(None) for _ in range(3)]
    assert [(event.at, event.message.has_error()) for event in kinds] == [(0.5, True), (1.0, False), (2.0, False)]
    assert kinds[2].message.content["counts"]["tasks"] == 2


def test_all_losses_together_end_in_errors_and_never_in_a_hang():
    failures = Fates(crashes={(0, 0): 0.1}, requests={(1, 0)}, replies={(2, 0)})
    replies = make(failures=failures).send_and_receive([train_request(MODEL, 1000 + n, ttl=50.0) for n in range(3)])
    assert [reply.error.code for reply in replies] == [8, 3, 3]


# ---- waiting for nodes ----------------------------------------------------------------------------------------------


def test_an_app_that_polls_for_nodes_moves_the_clock_to_their_coming(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    grid = make(availability=Intervals({0: [(50, 99)], 1: [(70, 99)]}))
    polls = 0
    while len(grid.get_node_ids()) < 3:
        clock["now"] += 1.0    # the app sleeps between its questions
        polls += 1
        assert polls < 20
    assert grid.now == 70.0


def test_an_app_that_polls_without_a_pause_gets_there_too():
    grid = make(availability=Intervals({0: [(50, 99)]}))
    for _ in range(10_000):
        if len(grid.get_node_ids()) == 3:
            break
    assert grid.now == 50.0 and len(grid.get_node_ids()) == 3


def test_an_app_that_waits_for_nodes_that_will_never_come_gets_an_error():
    grid = make()
    with pytest.raises(NothingCanHappen, match="than the 3 that are online.*of 3"):
        while len(grid.get_node_ids()) < 4:
            pass


def test_asking_for_the_nodes_moves_no_clock_by_itself():
    grid = make(availability=Intervals({0: [(50, 99)]}))
    for _ in range(5):
        assert grid.get_node_ids() == [1001, 1002]
        grid.send_and_receive(requests(1))
    assert grid.now == 10.0


# ---- somebody else's ServerApp --------------------------------------------------------------------------------------


def test_a_strangers_server_app_that_pushes_and_pulls_runs_to_its_end():
    collected = []
    app = ServerApp()

    @app.main()
    def main(grid, context):
        ids = [name for name in grid.push_messages(requests(0, 1, 2)) if name]
        while ids:
            replies = grid.pull_messages(ids)
            collected.extend(reply.metadata.src_node_id for reply in replies)
            ids = [name for name in ids if name not in {reply.metadata.reply_to_message_id for reply in replies}]

    app(make(), None)
    assert collected == [1000, 1001, 1002]


# ---- time -----------------------------------------------------------------------------------------------------------


def test_time_is_download_plus_queue_plus_work_plus_upload():
    network = Network(latency_s=0.25, uplink_mbps=0.001, downlink_mbps=0.002)
    grid = make(nodes=1, network=network)
    grid.push_messages(requests(0) + requests(0))
    first, second = grid.next_event(None), grid.next_event(None)
    down, up = network.download_seconds(0, 0, 24 + 128), network.upload_seconds(0, 0, 24 + 128 + 32)
    times = [grid.task_times(event.message.metadata.reply_to_message_id) for event in (first, second)]
    assert times[0] == {"download_s": down, "queue_s": 0.0, "compute_s": 1.0, "upload_s": up}
    assert first.at == down + 1.0 + up
    assert second.at == pytest.approx(first.at + 1.0 + up)
    for event, parts in ((first, times[0]), (second, times[1])):
        assert sum(parts.values()) == pytest.approx(event.at)


def test_work_is_priced_by_steps_or_by_task():
    class Priced:
        def compute_seconds(self, partition, task_index, work_steps):
            return 100.0 if work_steps is None else 0.5 * work_steps

    silent = answering(lambda message, context: RecordDict())
    asking = ClientApp()
    asking.query()(lambda message, context: Message(RecordDict(), reply_to=message))
    for app, kind, steps, expected in ((Toy(), "train", 4, 2.0), (Toy(lazy=False), "train", 4, 2.0),
                                       (silent, "train", 4, 100.0), (asking, "query", 4, 0.0)):
        grid = make(app=app, nodes=1, devices=Priced())
        content = train_request(MODEL, **{"local-steps": steps}).content
        grid.send_and_receive([Message(content, 1000, kind)])
        assert grid.now == expected


@pytest.mark.parametrize("lazy", [True, False])
def test_the_servers_link_is_shared_first_come_first_served(lazy):
    # 152 bytes of arrays each way; the reply's metrics add 32.
    network = Network(latency_s=0.5, server_uplink_mbps=152 * 8e-6, server_downlink_mbps=184 * 8e-6)
    grid = make(app=Toy(lazy=lazy), network=network, devices=TableDevices([1.0]))
    grid.push_messages(requests(0, 1, 2))
    events = [grid.next_event(None) for _ in range(3)]
    times = [grid.task_times(event.message.metadata.reply_to_message_id) for event in events]
    assert [parts["download_s"] for parts in times] == pytest.approx([1.5, 2.5, 3.5])
    assert [parts["upload_s"] for parts in times] == pytest.approx([1.5, 1.5, 1.5])
    assert [event.at for event in events] == pytest.approx([4.0, 5.0, 6.0])


def test_uploads_wait_for_each_other_on_the_servers_link():
    network = Network(server_downlink_mbps=184 * 8e-6)
    grid = make(network=network, devices=TableDevices([1.0]))
    grid.push_messages(requests(2, 0, 1))
    events = [grid.next_event(None) for _ in range(3)]
    assert [event.node_id for event in events] == [1000, 1001, 1002], "at equal times by partition"
    assert [event.at for event in events] == pytest.approx([2.0, 3.0, 4.0])
