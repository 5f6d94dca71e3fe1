"""The server's side of compressed training: who is asked, after which task its memory goes on, and what it answered."""
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedcore.compressed import NEVER, Compression
from fedcore.errors import BadInput, MalformedReply
from fedcore.exchange import HubGrid
from fedcore.flower import with_id
from fedcore.options import RunOptions
from fedcore.payload import CONFIG, model_from_arrays, read_arrays, single_record
from fedcore.polls import Polls
from fedcore.recorder import Recorder
from fedcore.tasks import Failure, Task
from fedcore.vectors import Model

REFUSED_BY_US = 0    # Flower's code for an unknown reason


class CompressingExchange(Polls):
    """An exchange whose clients compress what they learn, where the run's options say so.

    A client's memory of what it left out goes on after the last of its tasks that is used, or may still be: a task that
    was lost, came too late or was refused is forgotten on both sides.
    """

    def __init__(self, grid: HubGrid, model: Model, options: RunOptions, recorder: Recorder | None = None):
        super().__init__(grid, model, options, recorder)
        self._used: dict[int, list[int]] = {}     # the last tasks whose answers were used, by partition: at most two
        self._given: dict[int, int] = {}          # the last task given out, by partition

    def send(self, node: Any, message: Message, **details: Any) -> Task:
        """Push a message (see `send_to`); one for training asks for a compressed answer."""
        compression = self.options.compression
        if compression is not None and message.metadata.message_type.startswith(MessageType.TRAIN):
            if message.metadata.message_type != MessageType.TRAIN:
                raise BadInput(
                    f"compression={compression.wire_spec}, but this strategy asks its clients for "
                    f"{message.metadata.message_type!r}, which is not compressed. Leave the section compression out."
                )
            number = self._next_task
            config = message.content.get(CONFIG)
            kind = str(config.get("reply", "model")) if isinstance(config, ConfigRecord) else "model"
            layout = self.model.layout
            if kind == "model":
                params, buffers = read_arrays(single_record(message.content, ArrayRecord, "arrays"), layout)
                details["origin"] = Model(params, buffers, layout)
            content = compression.ask(message.content, number, self._memory_of(node.partition), self.seed, layout)
            message, details["packed"] = with_id(message, content, message.metadata.message_id), kind
            self._given[node.partition] = number
        return super().send(node, message, **details)

    def _memory_of(self, partition: int) -> int:
        """Return after which task a client's memory is to go on."""
        latest = self.task(self._given.get(partition, NEVER))
        if latest is not None and not latest.abandoned:
            return latest.id
        return [NEVER, *self._used.get(partition, [])][-1]

    def _opened(self, task: Task, message: Message) -> Message:
        compression = self.options.compression
        if not task.packed or compression is None:
            return message
        content = compression.open(message.content, task.id, task.packed, self.model.layout, task.origin)
        self._used[task.node.partition] = [*self._used.get(task.node.partition, [])[-1:], task.id]
        return with_id(message, content, message.metadata.message_id)

    def refuse(self, task: Task, reason: str, bytes_up: int) -> Failure:
        """Count and log a reply that must not be used."""
        used = self._used.get(task.node.partition, [])
        if used[-1:] == [task.id]:
            used.pop()
        return super().refuse(task, reason, bytes_up)


class CompressedGrid(Grid):
    """Any Flower grid, with clients that compress: for a Flower strategy in an app of one's own.

        strategy.start(CompressedGrid(grid, {"name": "top_k", "fraction": 0.01}), initial_arrays, num_rounds=10)

    The clients need `fedcore.clients.compression.compression_mod`. Strategies see replies as if nothing had been
    compressed; one that cannot be read becomes an error reply, as Flower's strategies expect.

    Args:
        grid: carries the messages.
        compressor: a registered name, alone or under `name` among its settings.
        error_feedback: whether clients add to each update what was left out of those before.
        seed: of the compressor's random choices.

    Raises:
        InvalidSetting: no such compressor, or it is not contractive and there is error feedback.
    """

    def __init__(
        self, grid: Grid, compressor: "str | dict[str, Any]" = "top_k", error_feedback: bool = True, seed: int = 0
    ):
        spec = {"name": compressor} if isinstance(compressor, str) else dict(compressor)
        self.compression = Compression(spec, error_feedback)
        self.grid, self.seed = grid, seed
        self._next, self._used = 0, dict[int, int]()
        self._asked: dict[tuple[int, int], tuple[str, Model]] = {}    # by node and number: the kind, and what was sent
        self._latest: tuple[ArrayRecord, Model] | None = None

    def set_run(self, run: Any) -> None:
        """Set the run that this grid belongs to."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run that this grid belongs to."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message."""
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are online."""
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; those for training ask for compressed answers."""
        return self.grid.push_messages([self._ask(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there, as if they had not been compressed."""
        return [self._open(reply) for reply in self.grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their answers."""
        asked = [self._ask(message) for message in messages]
        return [self._open(reply) for reply in self.grid.send_and_receive(asked, timeout=timeout)]

    def _ask(self, message: Message) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return message
        arrays = single_record(message.content, ArrayRecord, "arrays")
        if self._latest is None or self._latest[0] is not arrays:    # a round's messages share their arrays
            self._latest = arrays, model_from_arrays(arrays)
        base, node_id = self._latest[1], message.metadata.dst_node_id
        config = message.content.get(CONFIG)
        kind = str(config.get("reply", "model")) if isinstance(config, ConfigRecord) else "model"
        number, self._next = self._next, self._next + 1
        # Whoever is asked anew will not answer what it was asked before, or nobody will wait for that.
        self._asked = {key: value for key, value in self._asked.items() if key[0] != node_id}
        self._asked[node_id, number] = kind, base
        after = self._used.get(node_id, NEVER)
        content = self.compression.ask(message.content, number, after, self.seed, base.layout)
        return with_id(message, content, message.metadata.message_id)

    def _open(self, reply: Message) -> Message:
        node_id = reply.metadata.src_node_id
        if reply.has_error() or reply.metadata.message_type != MessageType.TRAIN:
            return reply
        number = next((number for asked, number in self._asked if asked == node_id), NEVER)
        kind, base = self._asked.pop((node_id, number), ("", None))
        try:
            if base is None:
                raise MalformedReply("nobody asked for it")
            content = self.compression.open(reply.content, number, kind, base.layout, base)
        except MalformedReply as error:
            refused = with_id(reply, RecordDict(), reply.metadata.message_id)
            reason = f"The reply was refused: {error.reason}"
            refused.__dict__.update(_content=None, _error=Error(REFUSED_BY_US, reason))
            return refused
        self._used[node_id] = number
        return with_id(reply, content, reply.metadata.message_id)
