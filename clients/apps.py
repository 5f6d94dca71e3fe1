"""What every client of ours has in common: its actions, and the estimate of what a reply will cost."""
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedcore.clients.books import Limits
from fedcore.clients.compression import compression_mod
from fedcore.clients.data import batches_per_pass
from fedcore.clients.requests import KINDS, Request
from fedcore.compressed import Asked
from fedcore.errors import ReleaseRefused
from fedcore.feedback import ACTION
from fedcore.flower import record_of
from fedcore.payload import REPLY, Estimate, Estimator, single_record, wire_bytes
from fedcore.privacy.wire import ACTION as PRIVATE_ACTION

# A forward pass costs about a third of a training step.
EVALUATIONS_PER_STEP = 3
EVALUATE_METRICS = ("num-examples", "work-steps")
# What replies to a query offer: `reply` in a request may be one of these.
OFFER = ",".join(KINDS)


PEER = "peer"
PEER_ACTIONS = (f"train.{PEER}", f"query.{PEER}")

# What one message is answered by.
Answering = Callable[[Message, Context], Message]


class Client(Protocol):
    """The three actions behind an app."""

    def train(self, message: Message, context: Context) -> Message: ...

    def evaluate(self, message: Message, context: Context) -> Message: ...

    def query(self, message: Message, context: Context) -> Message: ...

    def describe(self, context: Context) -> RecordDict: ...

    def estimate(self, message: Message, context: Context) -> Estimate | None: ...


class PeerActions(Protocol):
    """What a node answers where peers talk to each other."""

    def query(self, message: Message, context: Context) -> Message: ...

    def train(self, message: Message, context: Context) -> Message: ...


class EstimatingApp(ClientApp):
    """A ClientApp of which a simulator can learn more than its replies.

    Args:
        private: it answers to nothing but queries and private requests, at nodes without limits too.

    Attributes:
        estimate: says what a reply will cost before it is computed; None with mods, which may change it.
        describe: says what a node answers to a query, without a query.
    """

    def __init__(self, client: Client, mods: Sequence[Mod] | None = None, private: bool = False):
        super().__init__()
        open_to_all = partial(_unless_private, private)
        self.client = client
        self.estimate: Estimator | None = None if mods else self._estimate
        self.describe: Callable[[Context], RecordDict] = client.describe
        # Before all others: they see what was trained, and only then is it compressed.
        self.train(mods=[compression_mod, *(mods or [])])(open_to_all(client.train))
        # Flower's mods are about training: its clipping mods fail on a message that brings no model back.
        self.evaluate()(open_to_all(client.evaluate))
        self.query()(client.query)
        if (gradient := getattr(client, "gradient", None)) is not None:
            self.train(ACTION, mods=list(mods or []))(open_to_all(gradient))
        if (answer := getattr(client, "private_answer", None)) is not None:
            self.train(PRIVATE_ACTION, mods=list(mods or []))(answer)

    def add_peer(self, peer: PeerActions, private: bool = False) -> None:
        """Answer to a server that hosts peers, too: `query.peer` and `train.peer`."""
        self.train(PEER)(_unless_private(private, peer.train))
        self.query(PEER)(_unless_private(private, peer.query))

    def _estimate(self, message: Message, context: Context) -> Estimate | None:
        if message.metadata.message_type in PEER_ACTIONS:
            return None    # how long peers talk to each other nobody knows beforehand
        found = self.client.estimate(message, context)
        if found is None or message.metadata.message_type != MessageType.TRAIN:
            return found
        asked = Asked.of(message.content)
        if asked is None:
            return found
        layout = asked.layout(single_record(message.content, ArrayRecord, "arrays"))
        return found._replace(reply_bytes=found.reply_bytes - asked.saved_bytes(layout))


def _unless_private(always: bool, answering: Answering) -> Answering:
    """Return an action that nodes with private records refuse: its replies are computed from them without noise."""

    def guarded(message: Message, context: Context) -> Message:
        if always or Limits.of(context.node_config).any:
            raise ReleaseRefused(
                f"This node's records are private, and {message.metadata.message_type!r} would answer with what was "
                "computed from them without noise. It answers to train.diff2 and to queries."
            )
        return answering(message, context)

    return guarded


def echo(request: Request) -> dict[str, ConfigRecord]:
    """Return the record in which a reply repeats what its request wants repeated, by its name; none where nothing."""
    return {} if request.echo is None else {REPLY: record_of(ConfigRecord, dict(request.echo))}


def echo_bytes(request: Request) -> int:
    """Return what `echo` adds to the size of a reply."""
    return 0 if request.echo is None else _echo_bytes(request.kind, tuple(request.echo))


@lru_cache(maxsize=64)
def _echo_bytes(kind: str, names: tuple[str, ...]) -> int:
    return wire_bytes(RecordDict({REPLY: ConfigRecord({name: kind if name == "kind" else 0 for name in names})}))


def evaluation_steps(num_examples: int, batch_size: int) -> int:
    """Return what an evaluation costs, in training steps."""
    return -(-batches_per_pass(num_examples, batch_size) // EVALUATIONS_PER_STEP)
