"""What a server relays between nodes: to whom it opens a tunnel, what it passes on, and how much it holds."""
import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from fedcore.errors import BadInput, InvalidSetting
from fedcore.peers.segments import RELAYED
from fedcore.transport import relay
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.loop import submit
from fedcore.transport.relay_ends import RelayEnds
from fedcore.transport.settings import LinkSettings
from fedcore.transport.wire import method, pack
from tests.fedcore.peers.test_hosting import segment
from tests.fedcore.transport.kit import Pki, Work, deployed, wait_for

MEGABYTES = 8


def link_of(client):
    return client.agent._link


def members(grid, *partitions):
    """Relay among these."""
    grid.relay_among([node for node in grid.get_node_ids() if grid.partition_of(node) in partitions])


async def refusal(link, **facts):
    """Return how a call ends that the server is to refuse."""
    channel = link.another()
    call = channel.stream_stream(method("Relay"))()
    try:
        await call.write(pack({"session": link.session, **facts}))
        assert not isinstance(await call.read(), bytes)
        return await call.code()
    except grpc.RpcError as error:
        return error.code()
    finally:
        call.cancel()
        await channel.close()


@asynccontextmanager
async def tunnel(dialler, acceptor, serve):
    """Connect to peer 1 of a segment, which serves its callers; yields the caller's connection."""
    plan = segment(members=(0, 1), donors=(), addresses=(RELAYED, RELAYED))
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    there, _ = await RelayEnds.open(plan, 1, lambda: link_of(acceptor))
    there.accept(server.sockets[0].getsockname()[1])
    here, reachable = await RelayEnds.open(plan, 0, lambda: link_of(dialler))
    host, _, port = reachable.addresses[1].rpartition(":")
    assert reachable.addresses[0] == RELAYED
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        await here.close()
        await there.close()
        server.close()


async def echo(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def _say(writer, data):
    writer.write(data)
    await writer.drain()


@pytest.mark.parametrize("secure", [False, True])
def test_what_is_said_arrives_is_counted_and_leaves_nothing_behind(secure, tmp_path):
    async def talk(clients):
        said = bytes(range(256)) * (MEGABYTES << 12)
        async with tunnel(*clients, echo) as (reader, writer):
            heard, _ = await asyncio.gather(reader.readexactly(len(said)), _say(writer, said))
            writer.write_eof()
            assert await reader.read() == b""    # the other end hears that nothing more comes, and ends, too
        return heard == said

    with deployed(Work(), 2, Pki(tmp_path, nodes=2) if secure else None) as (grid, clients):
        members(grid, 0, 1)
        assert submit(talk(clients)).result(30)
        assert grid.relayed_bytes == grid.snapshot()["relayed_bytes"] == 2 * (MEGABYTES << 20)
        wait_for(lambda: grid.snapshot()["tunnels"] == 0, "the tunnel's end")


def test_who_does_not_read_stops_who_writes():
    async def sleep(reader, writer):
        await asyncio.sleep(3600)

    async def write(clients, grid):
        async with tunnel(*clients, sleep) as (_, writer):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    while True:
                        await _say(writer, bytes(1 << 20))
            return grid.relayed_bytes

    with deployed(Work(), 2) as (grid, clients):
        members(grid, 0, 1)
        assert 0 < submit(write(clients, grid)).result(30) < 32 << 20


def test_only_members_of_the_roster_have_tunnels_and_only_to_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(relay, "PAIR_S", 0.1)
    denied, unknown = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND

    def refused(client, **facts):
        return submit(refusal(link_of(client), **facts)).result(10)

    with deployed(Work(), 3, Pki(tmp_path, nodes=3)) as (grid, clients):
        assert refused(clients[0], kind="dial", to=1) is denied    # nothing is relayed before anybody said so
        members(grid, 0, 1)
        for facts in ({"kind": "dial", "to": 1}, {"kind": "accept"}, {"kind": "answer", "id": "x"}):
            assert refused(clients[2], **facts) is denied
        for to in (2, 0, 7, "1", None):
            assert refused(clients[0], kind="dial", to=to) is unknown
        assert refused(clients[0], kind="answer", id="x") is unknown
        assert refused(clients[0], kind="answer") is unknown
        assert refused(clients[0], kind="listen") is grpc.StatusCode.INVALID_ARGUMENT
        assert refused(clients[0], kind="dial", to=1) is grpc.StatusCode.UNAVAILABLE    # it accepts no calls
        stolen = link_of(clients[0]).session
        assert refused(clients[2], kind="dial", to=1, session=stolen) is grpc.StatusCode.UNAUTHENTICATED
        assert grid.snapshot()["tunnels"] == 0


async def _rest(reader):
    """Return what still comes through a tunnel that is being cut."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def test_whoever_leaves_the_roster_loses_its_tunnels():
    async def wait_for_the_end(clients, grid):
        async with tunnel(*clients, echo) as (reader, writer):
            await _say(writer, b"hello")
            assert await reader.readexactly(5) == b"hello" and grid.snapshot()["tunnels"] == 1
            members(grid, 0)
            return await _rest(reader)

    with deployed(Work(), 2) as (grid, clients):
        members(grid, 0, 1)
        assert submit(wait_for_the_end(clients, grid)).result(10) == b""


def test_a_tunnel_that_is_cut_while_bytes_are_on_their_way_ends_for_both_and_without_an_error(caplog):
    ends = []

    async def hoard(reader, writer):
        await _rest(reader)
        ends.append(reader)

    async def speak(clients, grid):
        async with tunnel(*clients, hoard) as (reader, writer):
            before = grid.relayed_bytes
            saying = asyncio.create_task(_say(writer, bytes(MEGABYTES << 20)))
            while grid.relayed_bytes == before:
                await asyncio.sleep(0)
            members(grid, 0)
            rest = await _rest(reader)
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)
            return rest

    with deployed(Work(), 2) as (grid, clients):
        for _ in range(5):
            members(grid, 0, 1)
            assert submit(speak(clients, grid)).result(10) == b""
            wait_for(lambda: grid.snapshot()["tunnels"] == 0, "the tunnel's end")
        wait_for(lambda: len(ends) == 5, "the other end's hearing of it")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

def test_tunnels_are_bounded_in_number_and_idle_ones_end(monkeypatch):
    async def many(clients):
        async with tunnel(*clients, echo) as (reader, writer):
            await _say(writer, b"hello")
            assert await reader.readexactly(5) == b"hello"
            code = await refusal(link_of(clients[1]), kind="dial", to=0)
            return code, await _rest(reader)

    monkeypatch.setattr(relay, "IDLE_S", 2.0)
    with deployed(Work(), 2, grid=GrpcGrid(settings=LinkSettings(max_tunnels=1))) as (grid, clients):
        members(grid, 0, 1)
        assert submit(many(clients)).result(10) == (grpc.StatusCode.RESOURCE_EXHAUSTED, b"")
    with pytest.raises(InvalidSetting, match="max_tunnels"):
        LinkSettings(max_tunnels=0)


def test_a_node_of_another_grid_cannot_be_relayed():
    async def begin():
        await RelayEnds.open(segment(addresses=("h:1", RELAYED)), 0, None)

    with pytest.raises(BadInput, match="Only `fedcore server` relays"):
        submit(begin()).result(5)
