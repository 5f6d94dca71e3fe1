"""What a client does with a request, within what its operator allows."""
import time
import traceback
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from fedcore.errors import AppFailed, FedcoreError
from fedcore.flower import RUN_ID, SERVER_NODE_ID
from fedcore.payload import CONFIG, clone_content, wire_bytes
from fedcore.transport.settings import Limits

APP_RAISED, NOT_ALLOWED, CRASHED = 2, 6, 8


class Outcome(NamedTuple):
    """What came of a task: the reply's content or an error, the state afterwards, and the seconds it took."""

    reply: RecordDict | Error
    state: RecordDict
    seconds: float


def request_message(facts: dict[str, Any], content: RecordDict, node_id: int) -> Message:
    """Return a request as Flower's ClientApp gets it."""
    about = Metadata(RUN_ID, str(facts["id"]), SERVER_NODE_ID, node_id, "", str(facts["group"]), time.time(),
                     float(facts["ttl"]), str(facts["type"]))
    return Message(content, metadata=about)  # type: ignore[call-overload]    # Flower's own keyword


def run_app(app: ClientApp, message: Message, context: Context, limits: Limits) -> Outcome:
    """Run a client's code on a request; what it raises becomes an error reply, and leaves the state as it was."""
    before, started = context.state, time.perf_counter()
    context.state = clone_content(before)
    try:
        refusal = _too_much(app, message, context, limits)
        if refusal is not None:
            return Outcome(Error(NOT_ALLOWED, refusal), before, 0.0)
        reply: object = app(message, context)
    except (Exception, SystemExit):  # a stranger's code may raise anything; Flower makes it an error reply, so do we
        return Outcome(Error(APP_RAISED, traceback.format_exc()), before, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    if not isinstance(reply, Message):
        returned, action = type(reply).__name__, message.metadata.message_type
        reason = f"the ClientApp returned a {returned} to {action!r}, not a Message"
        return Outcome(Error(APP_RAISED, reason), before, seconds)
    if reply.has_error():
        return Outcome(reply.error, context.state, seconds)
    if (refusal := limits.refuse_bytes(wire_bytes(reply.content), "reply")) is not None:
        return Outcome(Error(NOT_ALLOWED, refusal), before, seconds)
    # What a client keeps it may put into its reply, too; the two must not change each other.
    content = clone_content(reply.content) if context.state else reply.content
    return Outcome(content, context.state, seconds)


def _too_much(app: ClientApp, message: Message, context: Context, limits: Limits) -> str | None:
    if limits.max_steps is None:
        return None
    config = message.content.get(CONFIG)
    asked = config.get("local-steps") if isinstance(config, ConfigRecord) else None
    steps = float(asked) if isinstance(asked, (int, float)) else 0.0
    if (estimate_of := getattr(app, "estimate", None)) is not None and (found := estimate_of(message, context)):
        steps = max(steps, found.work_steps)
    return limits.refuse_steps(steps)


def introduce(app: ClientApp, context: Context) -> RecordDict | None:
    """Return what an app would answer to a query, if it can say so without one.

    Raises:
        FedcoreError: it cannot work at all, for instance without data.
    """
    if (describe := getattr(app, "describe", None)) is None:
        return None
    try:
        return describe(context)
    except FedcoreError:
        raise
    except Exception as error:  # the user's own code
        raise AppFailed(f"The client's app failed before its first task:\n{traceback.format_exc()}") from error
