"""A node of a run of peers that a Flower server hosts: says where it is reached, and takes part, segment by segment.

What a peer must not forget between segments is in Flower's `Context.state`, so that it works where every message has a
process of its own, too.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedcore.arrays import LazyArray, array_view
from fedcore.checkpoint import Frozen, freeze, thaw
from fedcore.clients.data import as_dataset
from fedcore.clients.evaluation import measure
from fedcore.clients.modules import flat_module, initial_model
from fedcore.clients.peer_training import peer_training
from fedcore.clients.requests import site_of
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import Site
from fedcore.errors import BadInput, MalformedReply, MalformedRequest, StrategyMismatch
from fedcore.flower import reply_to
from fedcore.payload import ARRAYS, CONFIG, read_arrays, single_record
from fedcore.peers.segments import (
    EVENTS,
    MOST_ROWS,
    NO_STEP,
    RELAY,
    RELAYED,
    RUN,
    Introduction,
    Segment,
    SegmentReport,
    describe,
)
from fedcore.peers.strategy import PeerStrategy
from fedcore.tls import Credentials, identity_of, load_credentials
from fedcore.vectors import Model

# Where Flower keeps it for us.
STATE, STATE_TEXT = "fedcore.peer", "fedcore.peer-text"
# Keys of a node's configuration.
LISTEN, ADVERTISE, TLS, SIDE_PORT = "peer-listen", "peer-advertise", "peer-tls", "peer-side-port"
EVERYWHERE = ("0.0.0.0", "[::]", "::", "")
HOW = ("Start it with --peer-listen HOST:PORT (of a SuperNode: peer-listen=\"HOST:PORT\" in --node-config), where the "
       "other peers can dial it; or let the server relay to it, with peers.relay: true in its experiment file.")
# Where a node listens that is reached through the server.
INSIDE = "127.0.0.1:0"


@dataclass(frozen=True)
class Door:
    """Where a node listens to other peers, and who it is to them.

    Attributes:
        listen: HOST:PORT on this machine.
        address: HOST:PORT that others dial; "relayed": the server relays to it.
        credentials: None: in clear.
        side_port: on which large vectors come; 0: any free one.
    """

    listen: str
    address: str
    credentials: Credentials | None
    side_port: int = 0

    @classmethod
    def of(cls, node_config: Mapping[str, Any], relay: bool = False) -> "Door":
        """Read a node's configuration.

        Args:
            relay: whether the server relays to nodes that give no address.

        Raises:
            BadInput: other peers could not reach the node, or anybody could.
        """
        from fedcore.transport.wire import host_of, is_loopback

        listen, tls = str(node_config.get(LISTEN, "")), node_config.get(TLS)
        address = str(node_config.get(ADVERTISE, "")) or listen
        if not listen and not address and relay:
            return cls(INSIDE, RELAYED, load_credentials(Path(str(tls)), "node") if tls else None)
        if not listen:
            raise BadInput(f"This node gives no address at which other peers can reach it. {HOW}")
        for name, text in ((LISTEN, listen), (ADVERTISE, address)):
            host, _, port = text.rpartition(":")
            if not port.isdecimal() or not 0 < int(port) < 65536 or (not host and name == ADVERTISE):
                raise BadInput(f"{name}={text!r}, but it must be HOST:PORT with a port from 1 to 65535.")
        side_port = _side_port(node_config.get(SIDE_PORT, 0), listen)
        if address.rpartition(":")[0] in EVERYWHERE:
            raise BadInput(f"{LISTEN}={listen!r} does not say where others can dial this node. Add --peer-advertise "
                           f"HOST:PORT (of a SuperNode: {ADVERTISE}).")
        if tls:
            return cls(listen, address, load_credentials(Path(str(tls)), "node"), side_port)
        if not is_loopback(host_of(listen)) or not is_loopback(host_of(address)):
            raise BadInput(f"Peers beyond one machine talk with certificates, but this node has none for {address}. "
                           f"Start it with --tls DIR (of a SuperNode: {TLS}).")
        return cls(listen, address, None, side_port)

    def introduce(self, rank: object, step: int) -> Introduction:
        """Return what the server is told."""
        if self.credentials is None:
            # Names in clear only tell peers apart: an address does that, too.
            name = f"node-{rank}" if rank is not None else f"port-{self.address.rpartition(':')[2]}"
            return Introduction(name, self.address, "", step)
        identity = identity_of(self.credentials.cert)
        return Introduction(identity.name, self.address, identity.fingerprint, step)


def _side_port(value: object, listen: str) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) >= 65536 or (int(text) and text == listen.rpartition(":")[2]):
        raise BadInput(f"{SIDE_PORT}={text!r}, but it must be a port from 1 to 65535, another than in {LISTEN}; 0 "
                       "takes any free one.")
    return int(text)


class PeerClient:
    """Answers `query.peer` and `train.peer`.

    Args:
        task: anything with the methods of `Task`, or with `peer_training`.
        settings: of local training.
        strategy: that this node takes part in; the server's must have the same settings.
    """

    def __init__(self, task: Any, settings: TrainSettings, strategy: PeerStrategy):
        self.task, self.settings, self.strategy = task, settings, strategy
        self._training: dict[int, Any] = {}      # by seed: the model's memory, shared by all segments
        self._initial: dict[int, Model] = {}

    # ---- actions ------------------------------------------------------------------------------------------------

    def query(self, message: Message, context: Context) -> Message:
        """Say where this node is reached, by which certificate, and after which step of the run it knows its state."""
        from fedcore.transport.relay_ends import LINK

        config = message.content.get(CONFIG)
        asked = config if isinstance(config, ConfigRecord) else ConfigRecord()
        run, relay = str(asked.get(RUN, "")), asked.get(RELAY) is True and LINK.get() is not None
        try:
            door, rank = Door.of(context.node_config, relay), context.node_config.get("partition-id")
            if rank is None and door.address == RELAYED:
                rank = context.node_id    # no address tells it apart
            found = door.introduce(rank, step_of(context, run))
        except BadInput as error:
            found = Introduction(problem=str(error))
        return Message(found.content(), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Take part in a segment, and reply with figures; the member of the lowest rank adds the mean of all models.

        Raises:
            BadInput: the node's configuration or its data cannot be used.
            MalformedRequest: the request describes no segment, or a model of another shape.
            StrategyMismatch: the server's strategy is another.
        """
        from fedcore.transport.loop import submit
        from fedcore.transport.peer_segment import SegmentPeer
        from fedcore.transport.relay_ends import LINK, RelayEnds

        segment, rank = Segment.of(message.content)
        self._compare(segment)
        relayed = segment.addresses[segment.members.index(rank)] == RELAYED
        door, site = Door.of(context.node_config, relayed), site_of(context)
        rows: list[tuple[str, dict[str, Any]]] = []

        def on_row(event: str, figures: dict[str, Any]) -> None:
            if event in EVENTS and len(rows) < MOST_ROWS:
                rows.append((event, figures))

        model, given = self._model(message.content, segment.seed)
        work = self._work(segment.seed, rank, site)
        # The peer lives on the link's loop, and trains in a thread of its own; this one only waits.
        ends, reachable = submit(RelayEnds.open(segment, rank, LINK.get())).result()
        try:
            peer = SegmentPeer(self.strategy, reachable, rank, door.credentials, model, given, work,
                               read_state(context, segment.run), on_row)
            playing = peer.play(door.listen, ends.accept) if relayed else \
                peer.play(door.listen, side_port=door.side_port)
            outcome = submit(playing).result()
        finally:
            submit(ends.close()).result()
        if outcome.state is not None:
            write_state(context, segment.run, outcome.state)
        found, beside = outcome.consensus, outcome.beside
        report = SegmentReport(
            outcome.step, outcome.at, outcome.counters.as_dict(), work.num_examples, outcome.loss,
            self._own_loss(outcome.model, site) if segment.measure and not outcome.problem else None, outcome.lost,
            outcome.problem, (beside.bytes_sent, beside.bytes_received), tuple(rows),
            None if found is None else model.replace(found.params, found.buffers),
            None if found is None else found.distance)
        return reply_to(message, report.content())

    # ---- what they need -----------------------------------------------------------------------------------------

    def _compare(self, segment: Segment) -> None:
        ours, theirs = describe(self.strategy), dict(segment.strategy)
        differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            raise StrategyMismatch(f"The server's strategy has {name}={theirs.get(name)!r}, and this node's "
                                   f"{name}={ours.get(name)!r}. Give both the same experiment file.")

    def _model(self, content: RecordDict, seed: int) -> tuple[Model, bool]:
        """Return the model that came with a request, and whether one came; else any of the same layout."""
        if seed not in self._initial:
            self._initial = {seed: initial_model(self.task, seed, self.settings.torch_dtype)}
        model = self._initial[seed]
        if ARRAYS not in content:
            return model, False
        try:
            params, buffers = read_arrays(single_record(content, ArrayRecord, ARRAYS), model.layout)
        except MalformedReply as error:
            raise MalformedRequest(f"The request does not fit this node's model: {error.reason}.") from error
        return model.replace(params, buffers), True

    def _work(self, seed: int, rank: int, site: Site) -> Any:
        if seed not in self._training:
            self._training = {seed: peer_training(self.task, self.settings, seed)}
        return self._training[seed].peer(rank, site)

    def _own_loss(self, model: Model, site: Site) -> float | None:
        """Return the loss of this peer's own model on its own data: those held back from training, if there are any."""
        if not hasattr(self.task, "metrics"):
            return None
        held_back = self.task.validation_data(site)
        data = as_dataset(self.task.data(site) if held_back is None else held_back)
        flat = flat_module(self.task, model.layout.dtype)
        flat.load(model.params, model.buffers)
        return measure(self.task, flat, data).get("loss")


# ---- between segments ----------------------------------------------------------------------------------------------


def step_of(context: Context, run: str) -> int:
    """Return after which step of a run a node knows its state; -1: none."""
    about = context.state.get(STATE_TEXT)
    if not isinstance(about, ConfigRecord) or about.get(RUN) != run:
        return NO_STEP
    return int(about["step"])  # type: ignore[arg-type]


def write_state(context: Context, run: str, state: Mapping[str, Any]) -> None:
    """Put what a peer needs to go on into Flower's state of its node."""
    frozen = freeze(dict(state))
    context.state[STATE] = ArrayRecord({name: LazyArray(tensor.detach().cpu().contiguous().numpy())
                                        for name, tensor in frozen.tensors.items()})
    context.state[STATE_TEXT] = ConfigRecord({RUN: run, "step": int(state["step"]), "text": frozen.text})


def read_state(context: Context, run: str) -> dict[str, Any] | None:
    """Return what a peer was at the end of the latest segment of a run, None when there was none.

    Tensors are copies: whatever happens to them, the node still has its state from before.
    """
    arrays, about = context.state.get(STATE), context.state.get(STATE_TEXT)
    if step_of(context, run) == NO_STEP or not isinstance(arrays, ArrayRecord) or not isinstance(about, ConfigRecord):
        return None
    tensors = {name: torch.from_numpy(array_view(array).copy()) for name, array in arrays.items()}
    found: dict[str, Any] = thaw(Frozen(str(about["text"]), tensors))
    return found
