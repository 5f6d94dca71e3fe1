"""The one place that touches Flower's private modules (tested with flwr 1.41, pinned below 1.43)."""
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.common import Code
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.compat.common import recorddict_compat
from flwr.server import server as legacy_server
from flwr.server.client_manager import ClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp import Grid, server_app
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
RUN_ID = 1

R = TypeVar("R", ConfigRecord, MetricRecord, RecordDict)


def adopt_identity(run_id: int = RUN_ID, node_id: int = SERVER_NODE_ID, task_id: int = 1) -> None:
    """Let `Message(...)` be used in this process; inside a Flower run, where it can be already, nothing changes."""
    if vars(TaskIdentity)["_run_id"] is None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def empty_run(run_id: int = RUN_ID) -> Run:
    """Return the description of a run that no SuperLink knows."""
    return Run.create_empty(run_id)


def with_id(message: Message, content: RecordDict, message_id: str) -> Message:
    """Return a message with an id and content of its own, as a SuperLink would deliver it.

    Copies what the public constructor would check again; a simulation delivers thousands of messages a second.
    """
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(message.metadata.__dict__, _message_id=message_id)
    delivered = Message.__new__(Message)
    delivered.__dict__.update(message.__dict__, _metadata=metadata, _content=content)
    return delivered


def reply_to(message: Message, outcome: RecordDict | Error) -> Message:
    """Return what `Message(outcome, reply_to=message)` makes, in a third of the time."""
    asked, now = message.metadata.__dict__, time.time()
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(
        asked, _message_id="", _src_node_id=asked["_dst_node_id"], _dst_node_id=asked["_src_node_id"],
        _src_task_id=asked["_dst_task_id"], _dst_task_id=asked["_src_task_id"],
        _reply_to_message_id=asked["_message_id"], _delivered_at="", _created_at=now,
        _ttl=asked["_created_at"] + asked["_ttl"] - now,
    )
    reply = Message.__new__(Message)
    content, error = (None, outcome) if isinstance(outcome, Error) else (outcome, None)
    reply.__dict__.update(_metadata=metadata, _content=content, _error=error)
    return reply


def record_of(kind: type[R], entries: dict[str, Any]) -> R:
    """Return a record around entries whose types are known to be right.

    Flower checks each entry as it is put in. That takes 2 us, a tenth of all the time spent on a small message.
    """
    record = kind()
    record.__dict__["_data"] = entries
    return record


def put(record: ConfigRecord | MetricRecord, name: str, value: int | float | str) -> None:
    """Set an entry of a record, without the check of `record_of`."""
    record.__dict__["_data"][name] = value


# ---- other people's apps ------------------------------------------------------------------------------------------


def read_app(folder: Path) -> dict[str, Any]:
    """Return what an app's pyproject.toml says.

    Raises:
        FileNotFoundError, ValueError: there is none, or it describes no Flower app.
    """
    return get_project_config(folder)


def read_run_config(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return an app's run config, flat, with some of its values replaced.

    Raises:
        ValueError: a value of a type that Flower does not know, or an override of a key that the app does not have.
    """
    return dict(get_fused_config_from_dir(folder, dict(overrides)))


def load_object(reference: str, folder: Path) -> Any:
    """Import what a reference such as `my_app.server_app:app` names; the folder is put on `sys.path`.

    Raises:
        ValueError: the reference is malformed, or the module has no such attribute.
        Exception: whatever the module raises.
    """
    return load_app(reference, ValueError, folder)


Start = Callable[..., Result]


@contextmanager
def wrapped_starts(wrap: Callable[[Start], Start]) -> Iterator[None]:
    """Wrap `start` of every strategy class that exists, Flower's and users' own."""
    before: list[tuple[type[Strategy], Start]] = []
    classes: list[type[Strategy]] = [Strategy]  # type: ignore[type-abstract]
    while classes:
        strategy = classes.pop()
        classes += strategy.__subclasses__()
        if (start := vars(strategy).get("start")) is not None and strategy not in dict(before):
            before.append((strategy, start))
            setattr(strategy, "start", wrap(start))  # noqa: B010 (mypy knows it as a method)
    try:
        yield
    finally:
        for strategy, start in before:
            setattr(strategy, "start", start)  # noqa: B010


# ---- apps of the deprecated kind: ServerApp(server_fn=...) with NumPyClients -----------------------------------------

LegacyWatch = Callable[[LegacyStrategy], AbstractContextManager[None]]


@contextmanager
def legacy_servers_in_step(watch: LegacyWatch) -> Iterator[None]:
    """Let deprecated ServerApps send a round's messages together, from one thread.

    Flower gives each client a thread that sends and waits on its own, and polls for nodes in another. In virtual time
    threads have no defined order, so here the whole round is one `send_and_receive`.

    Args:
        watch: a context around the run of a deprecated strategy.
    """
    def start_grid(*, grid: Grid, **given: Any) -> Any:
        server, config = legacy_server.init_defaults(**{**dict.fromkeys(LEGACY_PARTS), **given})
        _follow_nodes(server.client_manager(), grid)
        with watch(server.strategy):
            return legacy_server.run_fl(server, config)

    asking = {"fit_clients": _ask_together(TRAIN), "evaluate_clients": _ask_together(EVALUATE)}
    with _replaced(legacy_server, **asking), _replaced(server_app, start_grid=start_grid):
        yield


@contextmanager
def _replaced(module: ModuleType, **functions: Callable[..., Any]) -> Iterator[None]:
    """Let a module have other functions for a while."""
    before = {name: vars(module)[name] for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def _follow_nodes(manager: ClientManager, grid: Grid) -> None:
    """Keep a client manager up to date with a grid's nodes, whenever it is asked."""
    known: dict[int, GridClientProxy] = {}

    def look() -> None:
        online = list(grid.get_node_ids())
        for node_id in known.keys() - set(online):
            manager.unregister(known.pop(node_id))
        for node_id in online:
            if node_id not in known:
                known[node_id] = GridClientProxy(node_id, grid, grid.run.run_id)
                manager.register(known[node_id])

    def looking_first(method: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            look()
            return method(*args, **kwargs)

        return asked

    def wait_for(num_clients: int, timeout: int = 0) -> bool:
        while manager.num_available() < num_clients:
            pass    # each question is one to the grid, which moves its clock or finds that nobody will come
        return True

    for name in ("num_available", "all", "sample"):
        setattr(manager, name, looking_first(getattr(manager, name)))
    setattr(manager, "wait_for", wait_for)  # noqa: B010 (mypy knows it as a method)


def _ask_together(kind: str) -> Callable[..., Any]:
    """Return a stand-in for Flower's `fit_clients` or `evaluate_clients`."""
    encode, decode = LEGACY_RECORDS[kind]

    def ask(
        client_instructions: list[tuple[GridClientProxy, Any]], max_workers: int | None, timeout: float | None,
        group_id: int,
    ) -> tuple[list[Any], list[Any]]:
        instructions = client_instructions
        results: list[Any] = []
        failures: list[Any] = []
        messages = [Message(encode(ins, True), proxy.node_id, kind, ttl=timeout, group_id=str(group_id))
                    for proxy, ins in instructions]
        replies = list(instructions[0][0].grid.send_and_receive(messages)) if instructions else []
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        for proxy, _ in instructions:
            reply = by_node.get(proxy.node_id)
            if reply is None or reply.has_error():
                failures.append(ValueError("no reply" if reply is None else reply.error.reason))
                continue
            result = decode(reply.content)
            (results if result.status.code == Code.OK else failures).append((proxy, result))
        return results, failures

    return ask


def _fit_result(content: RecordDict) -> Any:
    return recorddict_compat.recorddict_to_fitres(content, keep_input=False)


TRAIN, EVALUATE = "train", "evaluate"
LEGACY_PARTS = ("server", "config", "strategy", "client_manager")
LEGACY_RECORDS: dict[str, tuple[Callable[[Any, bool], RecordDict], Callable[[RecordDict], Any]]] = {
    TRAIN: (recorddict_compat.fitins_to_recorddict, _fit_result),
    EVALUATE: (recorddict_compat.evaluateins_to_recorddict, recorddict_compat.recorddict_to_evaluateres),
}
