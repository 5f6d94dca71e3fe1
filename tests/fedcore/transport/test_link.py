"""What a server and its clients do for each other over a real connection, when nothing goes wrong or little does."""
import asyncio
import logging
import socket
import threading
import time

import pytest
import torch
from flwr.app import Message

from fedcore.errors import CannotListen, InvalidSetting, LinkRefused
from fedcore.tls import load_credentials
from fedcore.transport.agent import ClientAgent
from fedcore.transport.dial import Link, open_channel
from fedcore.transport.frames import Framed
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.loop import submit
from fedcore.transport.pool import BufferPool
from fedcore.transport.settings import Limits, LinkSettings
from fedcore.transport.streams import Pace
from fedcore.transport.wire import method
from tests.fedcore.transport.kit import Client, Pki, Proxy, Work, ask, deployed, seen, wait_for

LARGE = 1_500_000    # values: 6 MB, several chunks


def only(messages: list[Message]) -> Message:
    (message,) = messages
    return message


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mutual TLS"])
def test_small_and_large_messages_arrive_bit_for_bit_in_the_order_they_were_sent(secure, tmp_path):
    work = Work()
    with deployed(work, 2, Pki(tmp_path, 2) if secure else None) as (grid, _):
        first, second = grid.get_node_ids()
        sizes = [0, 10, LARGE, 100, LARGE]
        sent = [ask(node, number, size) for number, size in enumerate(sizes) for node in (second, first)]
        replies = grid.send_and_receive(sent)
        assert [reply.metadata.src_node_id for reply in replies] == [second, first] * len(sizes)
        for request, reply in zip(sent, replies, strict=True):
            if "arrays" in request.content:
                expected, found = request.content["arrays"].model.params, reply.content["arrays"].model.params
                assert torch.equal(expected, found)
        assert seen(replies[-1]) == [0, 1, 2, 3, 4], "a client does its tasks in order, and remembers"
    assert len(work.threads) == 2, "each client computes in one thread of its own"
    assert threading.get_ident() not in work.threads


def test_what_an_app_raises_is_reported_and_neither_its_state_nor_the_client_is_lost(caplog):
    with deployed(Work(), 1) as (grid, _):
        (node,) = grid.get_node_ids()
        failure = only(grid.send_and_receive([ask(node, 0, action="train.fail")]))
        assert failure.error.code == 2 and "this data is broken" in failure.error.reason
        assert seen(only(grid.send_and_receive([ask(node, 1)]))) == [1]


@pytest.mark.parametrize("limits, request_of, word", [
    (Limits(actions=frozenset(["evaluate"])), lambda node: ask(node, 0), "'train'"),
    (Limits(max_bytes=1_000_000), lambda node: ask(node, 0, LARGE), "bytes in a request"),
    (Limits(max_seconds=0.05), lambda node: ask(node, 0), "computing"),
], ids=["actions", "bytes", "seconds"])
def test_what_the_operator_does_not_allow_is_refused_by_name(limits, request_of, word):
    work = Work()
    if limits.max_seconds:
        work.gate.clear()
    with deployed(work, 1, limits=limits) as (grid, _):
        (node,) = grid.get_node_ids()
        refusal = only(grid.send_and_receive([request_of(node)]))
        work.gate.set()
        assert refusal.error.code == 6 and word in refusal.error.reason and "operator" in refusal.error.reason
        assert seen(only(grid.send_and_receive([ask(node, 7, action="evaluate")]))) == [7], "nothing else changed"


def test_steps_beyond_the_operators_limit_are_refused():
    assert Limits(max_steps=10).refuse_steps(11) is not None
    assert Limits(max_steps=10).refuse_steps(10) is None
    with pytest.raises(InvalidSetting, match="max_steps"):
        Limits(max_steps=0)


def test_a_pull_does_not_wait_and_hands_out_each_reply_once():
    work = Work()
    work.gate.clear()
    with deployed(work, 1) as (grid, _):
        (name,) = grid.push_messages([ask(grid.get_node_ids()[0], 3)])
        assert grid.pull_messages([name]) == []
        work.gate.set()
        found: list[Message] = []
        wait_for(lambda: found.extend(grid.pull_messages([name])) or found, "the reply")
        assert seen(only(found)) == [3] and found[0].metadata.reply_to_message_id == name
        assert only(grid.pull_messages([name])).error.code == 4
        assert only(grid.pull_messages(["nobody-0"])).error.code == 4


def test_a_node_that_is_not_there_is_refused_and_a_timeout_leaves_the_rest():
    work = Work()
    work.gate.clear()
    with deployed(work, 1) as (grid, _):
        (node,) = grid.get_node_ids()
        assert grid.push_messages([ask(12345, 0)]) == [None]
        assert grid.send_and_receive([ask(node, 1)], timeout=0.05) == []
        work.gate.set()
        assert seen(only(grid.send_and_receive([ask(node, 2)]))) == [1, 2]


def test_a_task_whose_time_is_over_fails_with_flowers_code():
    work = Work()
    work.gate.clear()
    with deployed(work, 1) as (grid, (client,)):
        (node,) = grid.get_node_ids()
        expired, dropped = grid.send_and_receive([ask(node, 0, ttl=0.1), ask(node, 1, ttl=0.1)])
        assert expired.error.code == dropped.error.code == 3
        wait_for(lambda: not client.agent._bench._queue, "the client hearing that its next task is off")
        work.gate.set()
        assert seen(only(grid.send_and_receive([ask(node, 2)]))) == [0, 2], "what was not begun was taken back"


def test_clients_that_come_and_go_are_events_and_their_work_is_reported_lost():
    work = Work()
    with GrpcGrid() as grid:
        client = Client(work(), grid.address, 4)
        join = grid.next_event(None)
        assert join.kind == "join" and grid.get_node_ids() == [join.node_id]
        assert grid.partition_of(join.node_id) == 4
        work.gate.clear()
        grid.push_messages([ask(join.node_id, 0), ask(join.node_id, 1)])
        wait_for(lambda: work.begun, "the task beginning")
        client.agent.stop("its operator stopped it")
        work.gate.set()
        kinds = [grid.next_event(None) for _ in range(3)]
        assert client.join() == "its operator stopped it"
        assert [event.kind for event in kinds] == ["reply", "leave", "reply"]
        assert seen(kinds[0].message) == [0], "the task under way was finished, and its reply delivered"
        assert kinds[2].message.error.code == 5
        assert grid.get_node_ids() == [] and grid.next_event(grid.now + 0.01).kind == "time"


def test_a_client_comes_back_under_the_same_number_and_one_without_a_partition_gets_a_free_one():
    with GrpcGrid() as grid:
        numbers = []
        for _ in range(2):
            client = Client(Work()(), grid.address, 0, name="hospital", node_config={"site": "data.csv"})
            wait_for(grid.get_node_ids, "the client connecting")
            numbers.append((grid.get_node_ids()[0], grid.partition_of(grid.get_node_ids()[0])))
            client.stop()
            wait_for(lambda: not grid.get_node_ids(), "the client leaving")
        assert numbers[0] == numbers[1] and numbers[0][1] == 0 and 0 < numbers[0][0] < 2**63


def test_of_two_living_processes_of_one_name_the_second_waits_and_takes_over_when_the_first_ends(caplog):
    with deployed(Work(), 1) as (grid, (first,)):
        caplog.set_level(logging.WARNING, "fedcore")
        second = Client(Work()(), grid.address, 0)
        wait_for(lambda: "another process that is node-0 is connected" in caplog.text, "the refusal")
        assert len(grid.get_node_ids()) == 1 and second.outcome is None
        first.stop()
        wait_for(grid.get_node_ids, "the second taking over")
        second.stop()


def test_a_partition_that_a_connected_client_holds_is_not_given_twice(caplog):
    with deployed(Work(), 1) as (grid, _):
        other = Client(Work()(), grid.address, 0, name="other")
        wait_for(lambda: "partition 0 is held by node-0" in caplog.text, "the refusal")
        assert len(grid.get_node_ids()) == 1
        other.stop()


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "mutual TLS"])
def test_transfers_that_are_cut_again_and_again_go_on_where_they_ended(secure, tmp_path):
    work, values, pki = Work(), 5_000_000, Pki(tmp_path, 1)
    pace = Pace(grace_s=5.0)
    grid = GrpcGrid("127.0.0.1:0", pki.server if secure else None, settings=LinkSettings(pace=pace, linger_s=0.0))
    with grid, Proxy(grid.address) as proxy:
        client = Client(work(), proxy.address, 0, credentials=pki.node(0) if secure else None, pace=pace)
        wait_for(grid.get_node_ids, "the client connecting")
        proxy.cut_after = 6_000_000    # of what a client sends: a reply of 20 MB needs several connections
        request = ask(grid.get_node_ids()[0], 1, values)
        reply = only(grid.send_and_receive([request], timeout=60))
        assert torch.equal(reply.content["arrays"].model.params, request.content["arrays"].model.params)
        assert work.done == [1], "nothing was computed twice"
        sent_up = proxy.passed
        assert sent_up < 1.5 * 4 * values, "what had arrived was not sent again"
        client.stop()


def test_a_connection_that_is_cut_is_made_anew_and_nothing_is_done_twice():
    work = Work()
    with GrpcGrid() as grid, Proxy(grid.address) as proxy:
        client = Client(work(), proxy.address, 0)
        wait_for(grid.get_node_ids, "the client connecting")
        (node,) = grid.get_node_ids()
        work.gate.clear()
        names = grid.push_messages([ask(node, 0), ask(node, 1, LARGE)])
        wait_for(lambda: work.begun, "the task beginning")
        proxy.cut()
        work.gate.set()
        events = [grid.next_event(grid.now + 30) for _ in range(3)]
        assert [event.kind for event in events] == ["join", "reply", "reply"], "a short cut is no leave"
        assert [event.message.metadata.reply_to_message_id for event in events[1:]] == names
        assert work.done == [0, 1]
        client.stop()


USES = pytest.mark.parametrize("use", [
    lambda link: link.send("a", Framed.of(b"{}", ())), lambda link: link.tell({"kind": "reply"}),
    lambda link: link.fetch("a", None, BufferPool(0), lambda plan: None),
], ids=["send", "tell", "fetch"])


def link_to(address):
    channel = open_channel(address, None)
    return Link(channel, channel.stream_stream(method("Control"))(), {"session": "a"}, Pace(), True)


@USES
def test_a_connection_that_was_closed_a_moment_ago_is_a_lost_one(use):
    async def run():
        link = link_to("127.0.0.1:9")
        await link.close()
        with pytest.raises(ConnectionError):
            await use(link)

    submit(run()).result(60)


@USES
@pytest.mark.parametrize("end, error", [
    (lambda link, using: link.close(), ConnectionError), (lambda link, using: using.cancel(), asyncio.CancelledError),
], ids=["a closed connection", "a cancelled task"])
def test_a_transfer_tells_a_connection_that_is_closed_under_it_from_its_own_cancellation(use, end, error):
    async def run(address):
        link = link_to(address)
        using = asyncio.create_task(use(link))
        await asyncio.sleep(0.1)
        assert not using.done()
        if asyncio.iscoroutine(ending := end(link, using)):
            await ending
        with pytest.raises(error):
            await using
        await link.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        submit(run(f"127.0.0.1:{silent.getsockname()[1]}")).result(60)


def test_a_client_whose_connection_ends_while_it_answers_a_ping_connects_again(monkeypatch):
    tell = Link.tell

    async def broken(link, facts, framed=None):
        if facts["kind"] == "pong":
            raise ConnectionError("the connection ended")
        await tell(link, facts, framed)

    async def ping(member):
        member.tell({"kind": "ping"})

    with deployed(Work(), 1) as (grid, clients):
        monkeypatch.setattr(Link, "tell", broken)
        (member,) = grid._server.board.members.values()
        before = member.session
        submit(ping(member)).result(10)
        wait_for(lambda: member.session not in (None, before), "a new connection")
        assert clients[0].outcome is None


def test_a_request_that_came_whole_is_used_where_the_connection_ends_before_that_can_be_said(monkeypatch):
    tell, broken = Link.tell, []

    async def breaking(link, facts, framed=None):
        await tell(link, facts, framed)
        if facts["kind"] == "got" and not broken:
            broken.append(facts["id"])
            raise ConnectionError("the connection ended")

    monkeypatch.setattr(Link, "tell", breaking)
    with deployed(Work(), 1) as (grid, _):
        (node,) = grid.get_node_ids()
        # Two models: the server keeps the older one for nobody who has it.
        names = grid.push_messages([ask(node, 0, LARGE), ask(node, 1, LARGE)])
        events = [grid.next_event(grid.now + 30) for _ in range(3)]
        assert [event.message.metadata.reply_to_message_id for event in events if event.kind == "reply"] == names
        assert broken == names[:1]


def test_a_client_that_does_not_come_back_in_time_has_left():
    with GrpcGrid(settings=LinkSettings(grace_s=0.1, linger_s=0.0)) as grid, Proxy(grid.address) as proxy:
        client = Client(Work()(), proxy.address, 0)
        wait_for(grid.get_node_ids, "the client connecting")
        proxy.refusing = True
        proxy.cut()
        wait_for(lambda: not grid.get_node_ids(), "the client being given up")
        proxy.refusing = False
        wait_for(grid.get_node_ids, "the client coming back")
        assert [grid.next_event(None).kind for _ in range(3)] == ["join", "leave", "join"]
        client.stop()


def test_a_silent_connection_counts_as_dead_at_both_ends():
    settings = LinkSettings(heartbeat_s=0.1, grace_s=0.1, linger_s=0.0)
    with GrpcGrid(settings=settings) as grid, Proxy(grid.address) as proxy:
        client = Client(Work()(), proxy.address, 0)
        wait_for(grid.get_node_ids, "the client connecting")
        proxy.holding = True
        wait_for(lambda: not grid.get_node_ids(), "the silence being noticed")
        proxy.holding = False
        wait_for(grid.get_node_ids, "the client coming back")
        client.stop()


def test_the_server_tells_its_clients_that_the_run_is_over():
    grid = GrpcGrid()
    client = Client(Work()(), grid.address, 0)
    wait_for(grid.get_node_ids, "the client connecting")
    grid.close("the target was reached")
    assert client.join() == "the target was reached"


def test_what_everybody_does_is_visible_and_says_where_the_time_went():
    work = Work()
    work.gate.clear()
    with deployed(work, 2) as (grid, _):
        first, second = grid.get_node_ids()
        (name,) = grid.push_messages([ask(first, 0, LARGE)])
        wait_for(lambda: work.begun, "the task beginning")
        state = grid.snapshot()
        rows = {row["node_id"]: row for row in state["nodes"]}
        assert rows[first]["doing"] == "working" and rows[first]["action"] == "train" and rows[first]["connected"]
        assert rows[second]["doing"] == "idle" and state["tasks"] == 1
        assert rows[first]["bytes_down"] >= 4 * LARGE and rows[first]["down_bytes_per_s"] > 0
        time.sleep(0.05)
        work.gate.set()
        wait_for(lambda: grid.next_event(None).kind == "reply", "the reply")
        times = grid.task_times(name)
        assert set(times) == {"download_s", "queue_s", "compute_s", "upload_s"}
        assert times["compute_s"] > 0 and all(value >= 0 for value in times.values())
        assert grid.task_times(name) is None


def test_a_waiting_server_can_be_woken():
    with GrpcGrid() as grid:
        threading.Timer(0.05, grid.wake).start()
        assert grid.next_event(None).kind == "wake"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "9200", "127.0.0.1:", ":1", "203.0.113.9:1"])
def test_a_server_refuses_to_listen_where_it_must_not_or_cannot(listen):
    with pytest.raises(CannotListen):
        GrpcGrid(listen, insecure_anywhere=listen.startswith("203"))


def test_a_port_in_use_is_a_named_error():
    with GrpcGrid() as grid, pytest.raises(CannotListen, match="in use"):
        GrpcGrid(grid.address)


def test_a_client_gives_up_on_a_server_that_is_out_of_reach_when_it_is_told_to():
    with pytest.raises(ConnectionError, match="out of reach"):
        ClientAgent(Work()(), "127.0.0.1:1", "node-0", give_up_s=0.1).run()


def test_a_server_of_another_authority_is_not_trusted_and_the_client_keeps_trying(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = Pki(tmp_path / "a", 1), Pki(tmp_path / "b", 1)
    with GrpcGrid("127.0.0.1:0", theirs.server) as grid:
        client = Client(Work()(), grid.address, 0, credentials=ours.node(0), give_up_s=0.3)
        assert isinstance(client.join(), ConnectionError)
        assert grid.get_node_ids() == []


def test_a_name_that_is_not_the_certificates_is_refused_for_good(tmp_path):
    pki = Pki(tmp_path, 2)
    with GrpcGrid("127.0.0.1:0", pki.server) as grid:
        client = Client(Work()(), grid.address, 0, name="node-1", credentials=load_credentials(
            tmp_path / "node-0", "node"))
        outcome = client.join()
        assert isinstance(outcome, LinkRefused) and "node-0's" in str(outcome)
        assert grid.get_node_ids() == []


def test_a_certificate_that_is_revoked_while_connected_ends_the_connection_with_a_reason(tmp_path):
    pki, revoked = Pki(tmp_path, 2), set()

    def refuse(identity):
        return "it was revoked" if identity.name in revoked else None

    grid = GrpcGrid("127.0.0.1:0", pki.server, refuse=refuse, settings=LinkSettings(check_s=0.05, linger_s=0.0))
    with deployed(Work(), 2, pki, grid) as (grid, clients):
        revoked.add("node-0")
        outcome = clients[0].join()
        assert isinstance(outcome, LinkRefused) and "it was revoked" in str(outcome)
        wait_for(lambda: len(grid.get_node_ids()) == 1, "the revoked client leaving")
        again = Client(Work()(), grid.address, 0, credentials=pki.node(0))
        assert isinstance(again.join(), LinkRefused)
        assert seen(only(grid.send_and_receive([ask(grid.get_node_ids()[0], 5)]))) == [5], "nothing else changed"
