"""Servers and clients that die at bad moments: nothing is lost once acknowledged, and nothing takes effect twice."""
from typing import Any

import pytest

from fedcore.checkpoint import load_tree, save_tree
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.settings import LinkSettings
from tests.fedcore.transport.kit import PATIENCE_S, Client, Proxy, Work, ask, crash, seen, wait_for

LARGE = 1_000_000


def next_reply(grid: GrpcGrid) -> Any:
    """Return the next reply, and what happened before it is passed over."""
    while True:
        event = grid.next_event(grid.now + PATIENCE_S)
        assert event.kind != "time", "no reply came"
        if event.kind == "reply":
            return event.message


class Server:
    """A server that can be killed and started again from its checkpoint, on the same port."""

    def __init__(self, folder) -> None:
        self.folder, self.saved = folder, 0
        self.grid = GrpcGrid(settings=LinkSettings(grace_s=20.0, resume_grace_s=20.0, linger_s=0.0))
        self.address = self.grid.address
        self.grid.start()

    def checkpoint(self, durable: bool = True) -> None:
        """Take a checkpoint of now, through a file as the real ones."""
        save_tree(self.folder / "checkpoint", self.grid.state_dict())
        if durable:
            self.grid.saved()

    def kill(self) -> None:
        crash(self.grid)

    def resume(self) -> GrpcGrid:
        self.grid = GrpcGrid(self.address, settings=self.grid.settings)
        self.grid.load_state_dict(load_tree(self.folder / "checkpoint"))
        self.grid.start()
        return self.grid


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.grid.close()


@pytest.fixture
def work() -> Work:
    return Work()


def connected(server: Server, work: Work, address: str | None = None, **settings: Any) -> tuple[Client, int]:
    client = Client(work(), address or server.address, 0, **settings)
    wait_for(lambda: any(row["connected"] for row in server.grid.snapshot()["nodes"]), "the client connecting")
    return client, server.grid.get_node_ids()[0]


@pytest.mark.parametrize("values", [0, LARGE], ids=["small", "large"])
def test_work_under_way_when_the_server_dies_is_delivered_to_the_restored_one_and_done_once(server, work, values):
    client, node = connected(server, work)
    work.gate.clear()
    (name,) = server.grid.push_messages([ask(node, 0, values)])
    wait_for(lambda: work.begun, "the task beginning")
    server.checkpoint()
    server.kill()
    work.gate.set()
    wait_for(lambda: work.done, "the task ending")
    reply = next_reply(server.resume())
    assert reply.metadata.reply_to_message_id == name and seen(reply) == [0]
    assert work.done == [0]
    client.stop()


def test_a_reply_that_the_checkpoint_does_not_hold_is_sent_again_without_computing_it_again(server, work):
    client, node = connected(server, work)
    work.gate.clear()
    server.grid.push_messages([ask(node, 0, LARGE)])
    wait_for(lambda: work.begun, "the task beginning")
    server.checkpoint()
    work.gate.set()
    assert seen(next_reply(server.grid)) == [0]
    server.grid.next_event(server.grid.now)    # it was used, but no checkpoint holds it
    server.kill()
    grid = server.resume()
    assert seen(next_reply(grid)) == [0] and work.done == [0]
    grid.push_messages([ask(node, 1)])
    assert seen(next_reply(grid)) == [0, 1], "the client's state goes on from there"
    client.stop()


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_client_goes_back_with_a_server_that_was_restored_to_an_earlier_moment(server, work, on_disk, tmp_path):
    client, node = connected(server, work, state=tmp_path / "client" if on_disk else None)
    grid = server.grid
    grid.push_messages([ask(node, 0)])
    assert seen(next_reply(grid)) == [0]
    server.checkpoint()
    for number in (1, 2, 3):
        grid.push_messages([ask(node, number)])
        assert seen(next_reply(grid)) == [*range(number), number]
    server.kill()
    grid = server.resume()
    wait_for(lambda: any(row["connected"] for row in grid.snapshot()["nodes"]), "the client coming back")
    grid.push_messages([ask(node, 9)])
    assert seen(next_reply(grid)) == [0, 9], "what the server has forgotten has not happened here either"
    client.stop()


def test_a_checkpoint_that_was_never_reported_saved_can_still_be_continued_from(server, work):
    client, node = connected(server, work)
    server.grid.push_messages([ask(node, 0)])
    assert seen(next_reply(server.grid)) == [0]
    server.checkpoint(durable=False)    # it died between writing and saying so
    server.grid.push_messages([ask(node, 1)])
    assert seen(next_reply(server.grid)) == [0, 1]
    server.kill()
    grid = server.resume()
    grid.push_messages([ask(node, 2)])
    assert seen(next_reply(grid)) == [0, 2]
    client.stop()


def test_a_request_that_no_client_had_yet_is_sent_by_the_restored_server(server, work):
    client, node = connected(server, work)
    work.gate.clear()
    names = server.grid.push_messages([ask(node, 0), ask(node, 1, LARGE)])
    wait_for(lambda: work.begun, "the first task beginning")
    server.checkpoint()    # the second request is still with the server
    client.agent.stop()
    server.kill()
    work.gate.set()
    client.join()
    grid = server.resume()
    other = Client(work(), server.address, 0)    # it remembers nothing
    replies = {reply.metadata.reply_to_message_id: reply for reply in (next_reply(grid), next_reply(grid))}
    assert set(replies) == set(names)
    assert seen(replies[names[1]])[-1] == 1
    other.stop()


def test_a_finished_task_survives_the_death_of_its_client_and_is_delivered_by_the_next(server, work, tmp_path):
    with Proxy(server.address) as proxy:
        client, node = connected(server, work, proxy.address, state=tmp_path / "client", drain_s=0.1)
        work.gate.clear()
        (name,) = server.grid.push_messages([ask(node, 0, LARGE)])
        wait_for(lambda: work.begun, "the task beginning")
        proxy.refusing = True
        proxy.cut()
        work.gate.set()
        wait_for(lambda: list((tmp_path / "client").rglob("entry-*")), "the reply being written down")
        client.stop()    # it cannot deliver
        again = Client(work(), server.address, 0, state=tmp_path / "client")
        reply = next_reply(server.grid)
        assert reply.metadata.reply_to_message_id == name and seen(reply) == [0] and work.done == [0]
        server.grid.push_messages([ask(node, 1)])
        assert seen(next_reply(server.grid)) == [0, 1]
        again.stop()


def test_a_client_that_is_stopped_does_not_wait_for_a_request_from_a_server_out_of_reach(server, work):
    with Proxy(server.address) as proxy:
        said: list[str] = []
        client, node = connected(server, work, proxy.address, on_status=said.append)
        proxy.bytes_per_s = 500_000
        server.grid.push_messages([ask(node, 0, LARGE)])
        wait_for(lambda: "downloading" in said, "the request being fetched")
        proxy.refusing = True
        proxy.cut()
        client.stop()
        assert not work.done


def test_a_task_that_died_with_its_client_is_given_again_unless_its_model_is_too_old(server, work):
    with Proxy(server.address) as proxy:
        client, node = connected(server, work, proxy.address, drain_s=0.1)
        work.gate.clear()
        server.grid.push_messages([ask(node, 0, LARGE)])
        wait_for(lambda: work.begun, "the task beginning")
        proxy.refusing = True
        proxy.cut()
        client.agent.stop()
        server.grid.push_messages([ask(node, 1, LARGE)])    # another model: the server keeps one
        again = Client(Work()(), server.address, 0)
        assert next_reply(server.grid).error.code == 8
        assert seen(next_reply(server.grid)) == [1]
        work.gate.set()
        client.join()
        again.stop()


def test_a_task_whose_model_the_server_still_has_is_given_to_the_client_again(server, work):
    with Proxy(server.address) as proxy:
        client, node = connected(server, work, proxy.address, drain_s=0.1)
        work.gate.clear()
        (name,) = server.grid.push_messages([ask(node, 0, LARGE)])
        wait_for(lambda: work.begun, "the task beginning")
        proxy.refusing = True
        proxy.cut()
        client.agent.stop()
        again = Client(Work()(), server.address, 0)
        reply = next_reply(server.grid)
        assert reply.metadata.reply_to_message_id == name and seen(reply) == [0]
        work.gate.set()
        client.join()
        again.stop()


def test_a_restored_server_gives_up_clients_that_do_not_come_back(tmp_path, work):
    server = Server(tmp_path)
    client, node = connected(server, work)
    work.gate.clear()
    server.grid.push_messages([ask(node, 0)])
    wait_for(lambda: work.begun, "the task beginning")
    assert server.grid.next_event(None).kind == "join"
    server.checkpoint()
    server.kill()
    client.agent.stop()
    server.grid.settings = LinkSettings(resume_grace_s=0.05, linger_s=0.0)
    grid = server.resume()
    assert grid.get_node_ids() == [node], "it is waited for"
    assert grid.next_event(None).kind == "leave"
    assert grid.next_event(None).message.error.code == 5
    work.gate.set()
    grid.close()
    client.join()


def test_a_new_run_begins_with_an_empty_state_at_the_same_clients(server, work, tmp_path):
    client, node = connected(server, work, state=tmp_path / "client")
    server.grid.push_messages([ask(node, 0)])
    assert seen(next_reply(server.grid)) == [0]
    server.kill()
    server.grid = GrpcGrid(server.address)
    wait_for(server.grid.get_node_ids, "the client coming back")
    server.grid.push_messages([ask(node, 5)])
    assert seen(next_reply(server.grid)) == [5]
    client.stop()


def test_an_outcome_that_nobody_had_taken_note_of_is_reported_after_a_restart(server, work):
    client, node = connected(server, work)
    work.gate.clear()
    server.grid.push_messages([ask(node, 0, ttl=0.05)])
    wait_for(lambda: server.grid.snapshot()["nodes"][0]["doing"] == "idle", "the task expiring")
    server.checkpoint()
    server.kill()
    work.gate.set()
    assert next_reply(server.resume()).error.code == 3
    client.stop()
