"""The one place that touches Flower's private modules (tested with flwr 1.41, pinned below 1.43)."""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
RUN_ID = 1

R = TypeVar("R", ConfigRecord, MetricRecord, RecordDict)


def adopt_identity(run_id: int = RUN_ID, node_id: int = SERVER_NODE_ID, task_id: int = 1) -> None:
    """Let `Message(...)` be used in this process; inside a Flower run, where it can be already, nothing changes."""
    if TaskIdentity._run_id is None:
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


def record_of(kind: type[R], entries: dict[str, Any]) -> R:
    """Return a record around entries whose types are known to be right.

    Flower checks each entry as it is put in. That takes 2 us, a tenth of all the time spent on a small message.
    """
    record = kind()
    record.__dict__["_data"] = entries
    return record


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
    classes: list[type[Strategy]] = [Strategy]
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
