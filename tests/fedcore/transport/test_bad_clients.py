"""Callers who mean harm, or are broken: bounded memory, a reason in the log, and the others go on."""
import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from grpc import aio

from fedcore.errors import MalformedFrame
from fedcore.transport.dial import open_channel
from fedcore.transport.frames import Framed
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.loop import submit
from fedcore.transport.records import encode
from fedcore.transport.settings import LinkSettings
from fedcore.transport.streams import Pace
from fedcore.transport.wire import Envelope, method, pack, unpack
from tests.fedcore.transport.kit import Client, Pki, Work, ask, seen, wait_for

HELLO = {"kind": "hello", "protocol": 1, "version": "x", "name": "mallory", "instance": "1", "config": {}, "holds": []}


class Mallory:
    """A client that speaks the protocol by hand, and says what it likes."""

    def __init__(self, address: str, credentials: Any = None):
        self.address, self.credentials = address, credentials

    def run(self, scenario: Any) -> Any:
        async def scene() -> Any:
            async with open_channel(self.address, self.credentials) as channel:
                return await scenario(channel)

        return submit(scene()).result(30)

    @staticmethod
    async def enter(channel: aio.Channel, **changes: Any) -> tuple[Any, Envelope]:
        call = channel.stream_stream(method("Control"))()
        await call.write(pack({**HELLO, **changes}))
        return call, unpack(await call.read())

    @staticmethod
    async def work(call: Any) -> Envelope:
        while (envelope := unpack(await call.read())).facts["kind"] != "work":
            continue
        return envelope


class Watched:
    """A server with an honest client, and what it noted of the others."""

    def __init__(self, **settings: Any):
        self.incidents: list[tuple[str, str]] = []
        self.grid = GrpcGrid(settings=LinkSettings(linger_s=0.0, **settings),
                             on_incident=lambda *who: self.incidents.append(who))
        self.grid.start()
        self.honest = Client(Work()(), self.grid.address, 0)
        wait_for(self.grid.get_node_ids, "the honest client connecting")
        self.node = self.grid.get_node_ids()[0]
        self.mallory = Mallory(self.grid.address)

    def noted(self, words: str) -> bool:
        return any(words in reason for _, reason in self.incidents)

    def goes_on(self) -> bool:
        (reply,) = self.grid.send_and_receive([ask(self.node, 1, 100_000)])
        return seen(reply)[-1] == 1

    def other(self) -> int:
        """Return the number of the client that is not honest."""
        wait_for(lambda: len(self.grid.get_node_ids()) == 2, "the other client connecting")
        return next(node for node in self.grid.get_node_ids() if node != self.node)


@pytest.fixture
def watched() -> Iterator[Watched]:
    found = Watched(pace=Pace(min_bytes_per_s=1000, grace_s=0.5))
    yield found
    found.grid.close()
    found.honest.join()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000), b"\x16\x03\x01" + os.urandom(500)],
                         ids=["http", "noise", "half a handshake"])
def test_garbage_on_the_port_disturbs_nobody(watched, garbage):
    for _ in range(20):
        with socket.create_connection(watched.grid.address.split(":")) as connection:
            try:
                connection.sendall(garbage)
                connection.settimeout(0.2)
                while connection.recv(1 << 16):
                    continue
            except (TimeoutError, ConnectionError):
                continue
    assert watched.goes_on()


def test_plain_text_on_a_port_that_wants_tls_is_not_answered_and_without_a_certificate_nobody_gets_in(tmp_path):
    pki = Pki(tmp_path, 1)
    with GrpcGrid("127.0.0.1:0", pki.server) as grid:
        for credentials in (None, grpc.ssl_channel_credentials((tmp_path / "ca" / "ca.crt").read_bytes())):
            async def knock(credentials: Any = credentials) -> aio.AioRpcError:
                channel = aio.insecure_channel(grid.address) if credentials is None else \
                    aio.secure_channel(grid.address, credentials)
                async with channel:
                    with pytest.raises(aio.AioRpcError) as caught:
                        await channel.unary_unary(method("Status"))(b"", timeout=5)
                return caught.value

            assert submit(knock()).result(30).code() == grpc.StatusCode.UNAVAILABLE
        assert grid.get_node_ids() == []


@pytest.mark.parametrize("changes, word", [
    ({"name": "x" * 100_000}, "is not 1 to 63"), ({"name": "../../etc"}, "is not 1 to 63"), ({"name": 7}, "'name'"),
    ({"protocol": 99}, "protocol"), ({"config": "x"}, "configuration"), ({"config": {"a": []}}, "configuration"),
    ({"config": {"partition-id": -1}}, "partition-id"), ({"holds": "x"}, "tasks"),
    ({"instance": "i" * 999}, "instance"),
    ({"config": {str(index): index for index in range(1000)}}, "configuration"),
], ids=lambda value: str(value)[:30])
def test_a_caller_that_introduces_itself_absurdly_is_refused_with_a_reason(watched, changes, word):
    async def scene(channel: aio.Channel) -> Envelope:
        return (await watched.mallory.enter(channel, **changes))[1]

    answer = watched.mallory.run(scene).facts
    assert answer["kind"] == "refused" and len(answer["reason"]) < 500
    assert word in answer["reason"] or "'name'" in answer["reason"]
    wait_for(lambda: watched.incidents, "the note")
    assert all(len(reason) < 1000 for _, reason in watched.incidents)
    assert watched.grid.get_node_ids() == [watched.node] and watched.goes_on()


def test_a_caller_with_megabytes_to_say_of_itself_is_refused(watched):
    async def scene(channel: aio.Channel) -> Envelope:
        call = channel.stream_stream(method("Control"))()
        body = memoryview(bytes(2 << 20))
        await call.write(pack(HELLO, Framed(b'{"records": []}', (body,), len(body))))
        return unpack(await call.read())

    assert "bytes" in watched.mallory.run(scene).facts["reason"] and watched.goes_on()


def answer_to_work(watched: Watched, answer: Any) -> Any:
    """Let Mallory in, give it a task, and let it answer; returns the task's reply."""
    done = threading.Event()

    async def scene(channel: aio.Channel) -> None:
        call, welcome = await watched.mallory.enter(channel)
        work = await watched.mallory.work(call)
        try:
            await answer(channel, call, welcome.facts["session"], work.facts["id"])
        except (aio.AioRpcError, asyncio.InvalidStateError):
            pass    # it was cut off, as it should be
        while not done.is_set():
            await asyncio.sleep(0.01)

    attack = threading.Thread(target=watched.mallory.run, args=(scene,), daemon=True)
    attack.start()
    try:
        (reply,) = watched.grid.send_and_receive([ask(watched.other(), 0, ttl=3.0)])
        return reply
    finally:
        done.set()
        attack.join(30)


async def upload(channel: aio.Channel, session: str, task: str, framed: Framed) -> Any:
    call = channel.stream_stream(method("Send"))()
    await call.write(pack({"session": session, "id": task}, Framed(framed.head, (), 0)))
    return call, unpack(await call.read())


def test_a_claim_of_a_hundred_gigabytes_is_refused_before_memory_is_taken(watched):
    async def claim(channel: aio.Channel, call: Any, session: str, task: str) -> None:
        head = b'{"records": [["a", "arrays", [["x", "float32", [25000000000]]]]]}'
        await upload(channel, session, task, Framed(head, (), 0))

    before = watched.grid._server.pool.idle_bytes
    reply = answer_to_work(watched, claim)
    assert "100000000000 bytes" in reply.error.reason and watched.noted("100000000000 bytes")
    assert watched.grid._server.pool.idle_bytes == before and watched.goes_on()


def test_a_reply_that_trickles_is_cut_off_and_its_place_given_to_others(watched):
    async def trickle(channel: aio.Channel, call: Any, session: str, task: str) -> None:
        framed = encode(RecordDict({"a": ArrayRecord({"x": Array(np.zeros(1_000_000, np.float32))})}))
        send, _ = await upload(channel, session, task, framed)
        for chunk in framed.chunks(checked=True, chunk_bytes=1):
            await send.write(chunk)
            await asyncio.sleep(0.05)

    reply = answer_to_work(watched, trickle)
    assert reply.error.code == 3, "nothing usable came in time"
    assert watched.noted("too slowly")
    assert watched.grid.snapshot()["uploads_admitted"] == 0 and watched.goes_on()


@pytest.mark.parametrize("body", [b"", b"\0" * 64, b"\xff" * 500_000], ids=["empty", "wrong checksum", "too much"])
def test_a_reply_with_other_bytes_than_it_announced_is_refused_by_name(watched, body):
    async def lie(channel: aio.Channel, call: Any, session: str, task: str) -> None:
        framed = encode(RecordDict({"a": ArrayRecord({"x": Array(np.zeros(100_000, np.float32))})}))
        send, _ = await upload(channel, session, task, framed)
        await send.write(body)
        await send.read()

    reply = answer_to_work(watched, lie)
    assert "cannot be read" in reply.error.reason and watched.goes_on()


@pytest.mark.parametrize("framed", [
    Framed(b'{"records": [["a", "metrics", [["x", "text"]]]]}', (), 0), Framed(b"no json", (), 0),
    Framed(b'{"records": [["a", "arrays", [["x", "float32", [100]]]]]}', (), 0),
], ids=["no number", "no head", "no body"])
def test_a_small_reply_that_makes_no_sense_is_refused_by_name(watched, framed):
    async def lie(channel: aio.Channel, call: Any, session: str, task: str) -> None:
        await call.write(pack({"kind": "reply", "id": task}, framed))

    reply = answer_to_work(watched, lie)
    assert "cannot be read" in reply.error.reason
    assert any(name == "mallory" for name, _ in watched.incidents) and watched.goes_on()


def test_old_results_are_not_used_again_and_other_clients_tasks_cannot_be_answered(watched):
    (name,) = watched.grid.push_messages([ask(watched.node, 1)])
    wait_for(lambda: watched.grid.pull_messages([name]), "the honest reply")
    gate = Work()
    gate.gate.clear()
    victim = Client(gate(), watched.grid.address, 7)
    wait_for(lambda: len(watched.grid.get_node_ids()) == 2, "the victim connecting")
    other = next(node for node in watched.grid.get_node_ids() if node != watched.node)
    (open_task,) = watched.grid.push_messages([ask(other, 5)])

    async def scene(channel: aio.Channel) -> None:
        call, _ = await watched.mallory.enter(channel)
        forged = encode(RecordDict({"seen": ConfigRecord({"numbers": [666]})}))
        for task in (name, open_task, open_task, "nobody-1"):
            await call.write(pack({"kind": "reply", "id": task}, forged))
            assert unpack(await call.read()).facts["kind"] in ("taken", "marks")

    watched.mallory.run(scene)
    assert watched.noted("a task of another client") and watched.grid.snapshot()["replays"] == 4
    gate.gate.set()
    (reply,) = wait_for_reply(watched.grid, open_task)
    assert seen(reply) == [5], "only the client that was asked has answered"
    victim.stop()


def wait_for_reply(grid: GrpcGrid, name: str) -> list[Any]:
    found: list[Any] = []
    wait_for(lambda: found.extend(grid.pull_messages([name])) or found, "the reply")
    return found


def test_calls_without_a_session_or_with_anothers_are_turned_away(watched):
    async def scene(channel: aio.Channel) -> list[grpc.StatusCode]:
        codes = []
        for request in (b"", b"\xff" * 50, pack({"id": "a-1"}), pack({"session": "0" * 32, "id": "a-1"})):
            call = channel.unary_stream(method("Fetch"))(request)
            try:
                await call.read()
            except aio.AioRpcError as error:
                codes.append(error.code())
        return codes

    codes = watched.mallory.run(scene)
    assert len(codes) == 4 and grpc.StatusCode.OK not in codes and watched.goes_on()


def test_a_client_cannot_use_the_session_of_another(tmp_path):
    pki = Pki(tmp_path, 2)
    with GrpcGrid("127.0.0.1:0", pki.server) as grid:
        client = Client(Work()(), grid.address, 0, credentials=pki.node(0))
        wait_for(grid.get_node_ids, "the client connecting")
        (member,) = grid._board.members.values()
        wait_for(lambda: member.session, "the client being connected")
        session = member.session

        async def scene(channel: aio.Channel) -> grpc.StatusCode:
            with pytest.raises(aio.AioRpcError) as caught:
                await channel.unary_stream(method("Fetch"))(pack({"session": session, "id": "a-1"})).read()
            return caught.value.code()

        assert Mallory(grid.address, pki.node(1)).run(scene) == grpc.StatusCode.UNAUTHENTICATED
        client.stop()


def test_a_flood_of_connections_is_bounded_and_ends_with_the_flood():
    watched = Watched(max_nodes=20)
    host, port = watched.grid.address.split(":")
    flood = []
    for _ in range(400):
        try:
            flood.append(socket.create_connection((host, int(port)), timeout=1))
        except OSError:
            break
    served = 0
    for connection in flood:
        connection.settimeout(0.005)
        try:
            served += bool(connection.recv(100))
        except OSError:
            continue
    assert served <= 40 + 16
    assert watched.goes_on(), "who was connected already does not notice"
    for connection in flood:
        connection.close()
    late = Client(Work()(), watched.grid.address, 3)
    wait_for(lambda: len(watched.grid.get_node_ids()) == 2, "a new client getting in afterwards")
    late.stop()
    watched.grid.close()
    watched.honest.join()


def test_no_more_clients_are_admitted_than_the_operator_allows():
    watched = Watched(max_nodes=1)
    other = Client(Work()(), watched.grid.address, 1, give_up_s=0.1)
    assert "has its 1 clients already" in str(other.join())
    watched.grid.close()
    watched.honest.join()


@pytest.mark.parametrize("message", [b"", b"\x05", b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x01\0\0\0{", None, 7])
def test_a_message_that_is_none_is_a_named_error(message):
    with pytest.raises(MalformedFrame):
        unpack(message)
