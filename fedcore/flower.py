"""The one place that touches Flower's private modules (tested with flwr 1.41, pinned below 1.43)."""
from copy import copy

from flwr.app import Message, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1
RUN_ID = 1


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
    metadata = copy(message.metadata)
    metadata.__dict__["_message_id"] = message_id
    delivered = Message.__new__(Message)
    delivered.__dict__.update(message.__dict__, _metadata=metadata, _content=content)
    return delivered
