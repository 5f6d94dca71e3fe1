"""Running a client's code on one message, here or in a worker process."""
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.flower import RUN_ID
from fedcore.payload import clone_content

LOAD_FAILED, APP_RAISED, NO_ANSWER, GONE, CRASHED = 1, 2, 3, 5, 8

AppFactory = Callable[[], ClientApp]


class NodeInfo(NamedTuple):
    """Who executes: what a client's `Context` says about its node and its run."""

    node_id: int
    partition: int
    num_partitions: int
    run_config: dict[str, Any]

    def context(self, state: RecordDict) -> Context:
        """Return a context around a node's state, which the client may change."""
        config: dict[str, Any] = {"partition-id": self.partition, "num-partitions": self.num_partitions}
        config["simulated"] = True    # noise follows from the seed; anywhere else it must not
        return Context(RUN_ID, self.node_id, config, state, dict(self.run_config))


def execute(
    app: ClientApp, message: Message, info: NodeInfo, state: RecordDict
) -> tuple[RecordDict | Error, RecordDict]:
    """Run a client on a message.

    Args:
        state: the node's state before; it is not touched, so that a task can be computed again.

    Returns:
        The reply's content, or Flower's error with the traceback; and the node's state afterwards.
    """
    context = info.context(clone_content(state))
    try:
        reply: object = app(message, context)
    except (Exception, SystemExit):  # a stranger's code may raise anything; Flower makes it an error reply, so do we
        return Error(APP_RAISED, traceback.format_exc()), state
    if not isinstance(reply, Message):
        returned, action = type(reply).__name__, message.metadata.message_type
        return Error(APP_RAISED, f"the ClientApp returned a {returned} to {action!r}, not a Message"), state
    if reply.has_error():
        return reply.error, context.state
    # What a client keeps it may put into its reply, too; who gets the reply must not change what the client keeps.
    return clone_content(reply.content) if context.state else reply.content, context.state
