"""Large bodies beside gRPC: the same bytes, only from and to those whom the roster names, and never in the way."""
import asyncio
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.authority import Authority
from fedcore.errors import BadCertificate, CannotListen, MalformedFrame, StreamCut, TooSlow
from fedcore.peers.envelope import Envelope, payload_bytes
from fedcore.tls import load_credentials, node_host
from fedcore.transport import peer_wire, side_streams
from fedcore.transport.frames import CHUNK_BYTES, Framed
from fedcore.transport.loop import submit
from fedcore.transport.peer_wire import PeerWire
from fedcore.transport.proof import NOT_PINNED
from fedcore.transport.side_door import STRANGERS, SideDoor
from fedcore.transport.side_streams import SIDE_BYTES, SideStream, dial
from fedcore.transport.streams import Pace
from tests.fedcore.transport.kit import Pki
from tests.fedcore.transport.test_peer_wire import PATIENCE_S, roster_of

QUICK = Pace(grace_s=0.3)
COUNT = 3 * SIDE_BYTES // 8 + 5


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path / "pki")


# ---- one stream ---------------------------------------------------------------------------------------------------


@contextmanager
def stream(pace=None, checked=True, pki=None):
    """Lend both ends of a stream."""
    links = socket.socketpair()
    if pki is not None:
        near, far = (side_streams._context(pki.node(index), server=index == 1) for index in range(2))
        links = [near.wrap_socket(links[0], server_hostname=node_host("node-1"), do_handshake_on_connect=False),
                 far.wrap_socket(links[1], server_side=True, do_handshake_on_connect=False)]
        assert at_once(*[link.do_handshake for link in links]) == [None, None]
    ends = [SideStream(link, pace or Pace(), checked) for link in links]
    yield ends
    for end in ends:
        end.close()


def at_once(*works):
    """Do things in a thread each; returns what they raised."""
    errors = [None] * len(works)

    def run(index):
        try:
            works[index]()
        except Exception as error:    # the test looks at it
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    return errors


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3 * CHUNK_BYTES // 2), max_size=5), st.booleans(), st.integers(0, 2**32))
def test_bodies_arrive_one_after_another_with_every_byte(sizes, checked, seed):
    buffers = [np.random.default_rng([seed, size]).integers(0, 256, size, np.uint8) for size in sizes]
    framed = Framed.of(b"", [buffer.data for buffer in buffers])
    assert b"".join(framed.blocks()) == framed.joined()
    bodies = [np.zeros(framed.size, np.uint8) for _ in range(2)]
    with stream(checked=checked) as (here, there):
        assert at_once(lambda: [here.send(framed) for _ in bodies],
                       lambda: [there.receive(body) for body in bodies]) == [None, None]
    assert all(body.tobytes() == framed.joined() for body in bodies)


def damaging(sender, at, by):
    """Return a sender on whose way one byte is changed."""
    push, passed = sender._push, 0

    def damaged(block, clock):
        nonlocal passed
        block, start, passed = bytearray(block), passed, passed + len(block)
        if start <= at < passed:
            block[at - start] ^= by
        push(memoryview(block), clock)

    sender._push = damaged
    return sender


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3 * CHUNK_BYTES), st.data())
def test_a_damaged_body_is_noticed(size, data):
    at, by = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))
    body = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    with stream() as (here, there):
        errors = at_once(lambda: damaging(here, at, by).send(Framed.of(b"", [body.data])),
                         lambda: there.receive(np.zeros(-(-size // 64) * 64, np.uint8)))
    assert errors[0] is None and type(errors[1]) is MalformedFrame and "damaged" in str(errors[1])


def test_blocks_that_changed_places_are_noticed():
    first, second = (bytes([value]) * CHUNK_BYTES for value in (1, 2))
    sums = [side_streams._added(side_streams._added(0, memoryview(a)), memoryview(b))
            for a, b in ((first, second), (second, first))]
    assert sums[0] != sums[1]


@pytest.mark.parametrize("secure", [False, True])
def test_who_sends_or_takes_too_little_is_broken_off(secure, pki):
    size = 64 << 20
    with stream(QUICK, pki=pki if secure else None) as (here, there):
        assert type(at_once(lambda: there.receive(np.zeros(size, np.uint8)))[0]) is TooSlow
        error = at_once(lambda: here.send(Framed.of(b"", [np.zeros(size, np.uint8).data])))[0]
        assert type(error) is TooSlow and "in 0.3 s" in str(error)


def test_a_trickle_is_too_slow():
    with stream(Pace(min_bytes_per_s=1000, grace_s=0.5)) as (here, there):
        stop = threading.Event()

        def trickle():
            while not stop.wait(0.02):
                here._link.send(b"x")

        errors = at_once(lambda: _then(lambda: there.receive(np.zeros(10_000, np.uint8)), stop.set), trickle)
    assert type(errors[0]) is TooSlow


def _then(work, last):
    try:
        work()
    finally:
        last()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("by_other", [True, False])
def test_closing_ends_what_is_under_way(by_other, secure, pki):
    body = np.zeros(64 << 20, np.uint8)
    with stream(pki=pki if secure else None) as (here, there):
        threading.Timer(0.1, (here if by_other else there).close).start()
        assert type(at_once(lambda: there.receive(body))[0]) is StreamCut
    with stream(pki=pki if secure else None) as (here, there):
        threading.Timer(0.1, (there if by_other else here).close).start()
        error = at_once(lambda: here.send(Framed.of(b"", [body.data])))[0]
        assert isinstance(error, ConnectionError)


# ---- between peers ------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(monkeypatch):
    """Count the bodies that are sent beside gRPC."""
    sent, send = [], SideStream.send

    def counted(self, framed):
        sent.append(framed.size)
        send(self, framed)

    monkeypatch.setattr(SideStream, "send", counted)
    return sent


def message(vector, number, source=0):
    data = {"vector": vector}
    return Envelope("test", 0, "message", "m", number, source, data, {}, payload_bytes(data))


def wires(roster, credentials):
    """Return two peers' wires, what each was delivered, and what each was told of others."""
    came, told = ([], []), ([], [])
    made = [PeerWire(roster, rank, credentials[rank], lambda envelope, rank=rank: came[rank].append(envelope),
                     lambda who, reason, rank=rank: told[rank].append((who, reason)), 1 << 26) for rank in range(2)]
    return made, came, told


async def opened(wire, to):
    """Wait until a wire has a stream of its own to another peer."""
    while (side := wire._links[to]._side) is None or side.stream is None:
        await asyncio.sleep(0.01)


def between(roster, credentials, act):
    """Start two peers' wires and do something with them; returns what came, and what was told."""
    async def run():
        made, came, told = wires(roster, credentials)
        for wire in made:
            await wire.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await act(made, came, told)
        finally:
            for wire in made:
                await wire.close()
        return came, told

    return submit(run()).result(PATIENCE_S)


@pytest.mark.parametrize("secure", [False, True])
def test_large_vectors_travel_beside_grpc_and_small_ones_on_it(secure, pki, beside):
    vectors = [torch.randn(size, dtype=torch.float64) for size in (COUNT, 4, COUNT, 50_000)]

    async def act(made, came, told):
        await opened(made[0], 1)
        assert all(await asyncio.gather(*[made[0].post(1, message(vector, number))
                                          for number, vector in enumerate(vectors)]))

    roster = roster_of(2, pki if secure else None)
    came, told = between(roster, [pki.node(0), pki.node(1)] if secure else [None, None], act)
    assert [envelope.round for envelope in came[1]] == [0, 1, 2, 3] and told == ([], [])
    assert all(torch.equal(envelope.data["vector"], vector)
               for envelope, vector in zip(came[1], vectors, strict=True))
    assert len(beside) == 2 and min(beside) > SIDE_BYTES


def test_vectors_arrive_where_the_second_port_cannot_be_reached(beside, monkeypatch):
    def shut(*args, **kwargs):
        raise ConnectionRefusedError("a firewall")

    monkeypatch.setattr("fedcore.transport.side_door.dial", shut)
    vector = torch.randn(COUNT, dtype=torch.float64)

    async def act(made, came, told):
        assert await made[0].post(1, message(vector, 0))

    came, told = between(roster_of(2), [None, None], act)
    assert torch.equal(came[1][0].data["vector"], vector) and told == ([], []) and not beside


def test_what_is_damaged_beside_grpc_is_named_and_arrives_on_grpc_at_last(monkeypatch):
    send = SideStream.send
    monkeypatch.setattr(SideStream, "send", lambda self, framed: send(damaging(self, 1000, 1), framed))
    vector = torch.randn(COUNT, dtype=torch.float64)

    async def act(made, came, told):
        await opened(made[0], 1)
        assert await made[0].post(1, message(vector, 0))

    came, told = between(roster_of(2), [None, None], act)
    assert len(came[1]) == 1 and torch.equal(came[1][0].data["vector"], vector)
    assert told[1] and all(who == "node-0" and "damaged" in reason for who, reason in told[1])


def test_nothing_is_said_to_whoever_answers_with_another_certificate_of_the_right_name(pki, tmp_path, beside):
    roster = roster_of(2, pki)
    Authority(tmp_path / "pki" / "ca").issue_node("node-1", tmp_path / "again", renew=True)
    again = load_credentials(tmp_path / "again", "node")

    async def act(made, came, told):
        said = made[0].post(1, message(torch.randn(COUNT), 0))
        while ("node-1", NOT_PINNED) not in told[0]:    # its own call is refused, too
            await asyncio.sleep(0.01)
        assert not said.done()

    came, told = between(roster, [pki.node(0), again], act)
    assert not came[1] and not beside


def test_a_port_that_was_asked_for_and_is_taken_is_named_and_nothing_is_left_listening():
    roster = roster_of(2)

    async def start(port):
        wire = wires(roster, [None, None])[0][0]
        try:
            await wire.start(side_port=port)
            return wire._door.port
        finally:
            await wire.close()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"port {port} of 127.0.0.1 for large vectors"):
            submit(start(port)).result(PATIENCE_S)
    assert submit(start(port)).result(PATIENCE_S) == port


def at_the_door(pki, act):
    """Open a door, and let something happen at it; returns what the door's owner was told."""
    told = []

    async def run():
        threads = peer_wire.pool_for(2)
        door = SideDoor("127.0.0.1", 0, pki and pki.node(0), Pace(), threads, lambda *what: told.append(what))
        expected = door.expect(roster_of(2, pki).peers[1].fingerprint)
        try:
            found = await asyncio.get_running_loop().run_in_executor(threads, act, ("127.0.0.1", door.port), expected)
            return found, expected.stream.done()
        finally:
            expected.close()
            await door.close()
            threads.shutdown()

    found, is_open = submit(run()).result(PATIENCE_S)
    return found, is_open, told


def raised(work):
    try:
        work().close()
    except (OSError, BadCertificate) as error:
        return error


@pytest.mark.parametrize("secure", [False, True])
def test_nobody_gets_in_without_a_ticket(secure, pki):
    own = pki.node(1) if secure else None
    prints = roster_of(2, pki if secure else None).peers
    found, is_open, told = at_the_door(pki if secure else None, lambda where, expected: raised(
        lambda: dial(where, "0" * len(expected.ticket), own, "node-0", prints[0].fingerprint, Pace())))
    assert isinstance(found, OSError) and not is_open and not told


def test_a_ticket_is_for_one_certificate_and_its_holder_talks_to_one_certificate(pki):
    prints = roster_of(3, pki).peers
    found, is_open, told = at_the_door(pki, lambda where, expected: raised(
        lambda: dial(where, expected.ticket, pki.node(2), "node-0", prints[0].fingerprint, Pace())))
    assert isinstance(found, OSError) and not is_open and "not the one that the roster pins" in told[0][1]
    found, is_open, told = at_the_door(pki, lambda where, expected: raised(
        lambda: dial(where, expected.ticket, pki.node(1), "node-0", prints[2].fingerprint, Pace())))
    assert isinstance(found, BadCertificate) and not is_open


def test_a_ticket_is_good_for_one_stream(pki):
    def twice(where, expected):
        streams = [dial(where, expected.ticket, None, "node-0", "", Pace())]
        error = raised(lambda: dial(where, expected.ticket, None, "node-0", "", Pace()))
        streams[0].close()
        return error

    found, is_open, told = at_the_door(None, twice)
    assert isinstance(found, OSError) and is_open and not told


def test_strangers_who_say_nothing_do_not_keep_others_out(monkeypatch):
    monkeypatch.setattr(side_streams, "ANSWER_S", 0.3)

    def act(where, expected):
        silent = [socket.create_connection(where) for _ in range(2 * STRANGERS)]
        found = raised(lambda: dial(where, expected.ticket, None, "node-0", "", Pace()))
        for link in silent:
            link.close()
        return found

    found, is_open, told = at_the_door(None, act)
    assert found is None and is_open and not told
