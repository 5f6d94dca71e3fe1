"""What tests of the link share: a server with clients in threads, certificates, and a network that misbehaves.

Import it as `from tests.fedcore.transport.kit import ...`.
"""
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names
from fedcore.payload import VectorRecord
from fedcore.tls import Credentials, load_credentials
from fedcore.transport.agent import ClientAgent
from fedcore.transport.grid import GrpcGrid
from fedcore.transport.loop import submit
from fedcore.vectors import Layout, TensorSpec

PATIENCE_S = 30.0


def wait_for(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until something is so; fails the test when it never is."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"{what} did not happen"
        time.sleep(0.005)


class Pki:
    """A certificate authority with a server's folder and nodes' folders."""

    def __init__(self, folder: Path, nodes: int = 3):
        self.folder = folder
        init_ca(folder / "ca")
        self.authority = Authority(folder / "ca")
        self.authority.issue_server(host_names("localhost,127.0.0.1"), folder / "server")
        for index in range(nodes):
            self.authority.issue_node(f"node-{index}", folder / f"node-{index}")

    @property
    def server(self) -> Credentials:
        return load_credentials(self.folder / "server", "server")

    def node(self, index: int) -> Credentials:
        return load_credentials(self.folder / f"node-{index}", "node")


class Client:
    """A client agent in a thread of its own; `join` returns how it ended."""

    def __init__(self, app: ClientApp, address: str, index: int, **settings: Any):
        config = settings.pop("node_config", {"partition-id": index})
        name = settings.pop("name", f"node-{index}")
        self.agent = ClientAgent(app, address, name, node_config=config, **settings)
        self.outcome: str | Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.agent.run()
        except Exception as error:  # whatever it is, the test looks at it
            self.outcome = error

    def stop(self) -> None:
        self.agent.stop()
        self.join()

    def join(self) -> str | Exception:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the client did not end"
        assert self.outcome is not None
        return self.outcome


@contextmanager
def deployed(
    app: Callable[[], ClientApp], clients: int, pki: Pki | None = None, grid: GrpcGrid | None = None, **settings: Any
) -> Iterator[tuple[GrpcGrid, list[Client]]]:
    """Run a server and clients in threads of this process; they end with the block."""
    grid = grid or GrpcGrid("127.0.0.1:0", None if pki is None else pki.server, run_config={"seed": 0})
    others: list[Client] = []
    with grid:
        others += [Client(app(), grid.address, index, credentials=None if pki is None else pki.node(index), **settings)
                  for index in range(clients)]
        # The server knows of a client before the client knows that it does.
        wait_for(lambda: len(grid.get_node_ids()) == clients and all(other.agent._link for other in others),
                 "all clients connecting")
        try:
            yield grid, others
        finally:
            for client in others:
                client.agent.stop()
    for client in others:
        client.join()


class Proxy:
    """A network between clients and a server that a test can cut, delay and slow down.

    Attributes:
        delay_s: added to whatever passes, each way.
        bytes_per_s: at which each direction of each connection passes; None: as fast as it can.
        cut_after: bytes from clients after which each connection is cut; None: never.
        refusing: new connections are closed at once.
        passed: bytes from clients so far.
    """

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.delay_s, self.bytes_per_s, self.cut_after = 0.0, None, None  # type: float, float | None, int | None
        self.refusing = self.holding = False
        self.passed = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Cut all connections, as a router that was switched off and on again."""
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue    # it was cut before
            finally:
                one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            for source, sink, up in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 16):
                while self.holding:
                    time.sleep(0.005)
                if self.delay_s:
                    time.sleep(self.delay_s)
                if self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                if up and self.cut_after is not None and passed + len(data) > self.cut_after:
                    break
                sink.sendall(data)
                passed += len(data)
                self.passed += len(data) if up else 0
        except OSError:
            pass    # the other direction was cut
        finally:
            for one in (source, sink):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


def crash(grid: GrpcGrid) -> None:
    """End a server without a word to anybody, as kill -9 does."""
    submit(grid._server._grpc.stop(0)).result()
    grid._server.closed = True


class Work:
    """Makes ClientApps that note what they do, and can be held up.

    Attributes:
        done: what was computed, in order: the requests' `number`.
        gate: cleared, it holds training up.
    """

    def __init__(self) -> None:
        self.done: list[int] = []
        self.begun = 0
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self) -> ClientApp:
        app = ClientApp()
        app.train()(self.train)
        app.train("fail")(self.fail)
        app.evaluate()(self.train)
        return app

    def train(self, message: Message, context: Context) -> Message:
        """Count in the state, and answer with the state and with the arrays that came."""
        self.begun += 1
        assert self.gate.wait(PATIENCE_S)
        self.threads.add(threading.get_ident())
        number = int(message.content["config"]["number"])
        before = list(context.state["seen"]["numbers"]) if "seen" in context.state else []
        context.state["seen"] = ConfigRecord({"numbers": [*before, number]})
        self.done.append(number)
        content = RecordDict({"seen": ConfigRecord({"numbers": [*before, number]})})
        if "arrays" in message.content:
            content["arrays"] = message.content["arrays"]
        return Message(content, reply_to=message)

    def fail(self, message: Message, context: Context) -> Message:
        context.state["seen"] = ConfigRecord({"numbers": [-1]})
        raise RuntimeError("this data is broken")


def ask(node_id: int, number: int, values: int = 0, action: str = "train", ttl: float = 600.0) -> Message:
    """Return a request for `Work`, with a model of so many values."""
    content = RecordDict({"config": ConfigRecord({"number": number})})
    if values:
        layout = Layout((TensorSpec("weight", (values,), "float32"),), (), ("weight",))
        content["arrays"] = VectorRecord.of(torch.arange(values, dtype=torch.float32) + number, {}, layout)
    return Message(content, node_id, action, ttl=ttl)


def seen(reply: Message) -> list[int]:
    """Return which numbers a client had seen when it answered."""
    return list(reply.content["seen"]["numbers"])
