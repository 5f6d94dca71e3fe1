"""Synchronous strategies: our own, and the driver under which Flower's run."""
import gc
import logging
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from flwr.app import DEFAULT_TTL, Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedcore.errors import MalformedReply, NothingCanHappen, RunEnded, UnsupportedModel, shown
from fedcore.evaluation import NOT_FIGURES
from fedcore.hub import Hub
from fedcore.payload import CONFIG, read_arrays
from fedcore.seeds import derive_seed
from fedcore.session import Session
from fedcore.strategy import HubStrategy
from fedcore.tasks import Answer, Failure, Node, Reply, Task
from fedcore.vectors import Layout, Model

logger = logging.getLogger("fedcore")

# Looking for unused memory takes a tenth of a second: less than rounds of so many bytes do anyway.
LITTER_BYTES = 256 << 20

SAVEABLE = (type(None), bool, int, float, str, bytes, np.generic, np.ndarray, Tensor, ArrayRecord, ConfigRecord,
            MetricRecord)
# What Flower's strategies compare: the names of the records, and of the metrics.
Shape = tuple[str, str, tuple[str, ...]]


class RoundStrategy(HubStrategy):
    """Base of synchronous strategies: write `round`, with as many exchanges as the method has."""

    introduces_nodes = True    # whether every node is asked who it is before the first round

    @abstractmethod
    def round(self, hub: Hub, round_index: int) -> None:
        """Run one round, counted from zero; `hub.ask` and `train_all` send work and wait."""

    def on_stop(self, hub: Hub) -> None:
        """The run is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""

    def drive(self, session: Session) -> None:
        """Run rounds until the run's limits, and close the run."""
        hub = session.hub
        if not session.resumed:
            session.open(self.introduces_nodes)
        else:
            session.check_limits(hub.round_index)    # a run saved after its last round has nothing left to do
        try:
            while hub.stop_reason is None:
                session.remember()    # the run's time may be over in the middle of the round
                session.admit_waiting(self.introduces_nodes)
                before = hub.moment
                self.round(hub, hub.round_index)
                hub.round_index += 1
                hub.end_unread()
                hub.finish_polls()
                session.forget()
                session.check_limits(hub.round_index)
                self._require_progress(hub, before)
                if hub.stop_reason is None:
                    hub.note_news()    # whoever left at the very end of the round is not asked in the next
                session.safe_point()
        except RunEnded:
            pass    # the run's time is over; the round under way is dropped
        session.close(lambda: self.on_stop(hub))

    def _require_progress(self, hub: Hub, before: tuple[float, int]) -> None:
        """Raise an error where rounds would follow each other for ever, and nothing would come of it."""
        hub.give_up_if_hopeless()
        if hub.stop_reason is None and hub.options.stop.rounds is None and hub.moment == before:
            raise NothingCanHappen(
                f"{type(self).__name__} sent nobody any work in round {hub.round_index}, and so no time passes: the "
                "run would never end. Limit its rounds, or let it ask some clients."
            )


def train_all(hub: Hub, nodes: Sequence[Node], **settings: Any) -> list[Reply]:
    """Train on all the nodes, and return the valid replies in ascending partition order.

    Args:
        settings: arguments of `Hub.train`.
    """
    sent = [hub.task(hub.train(node, **settings)) for node in nodes]
    replies = (hub.read_reply(answer) for answer in hub.collect([task for task in sent if task]).arrived)
    return [reply for reply in replies if isinstance(reply, Reply)]


class FlowerRounds(RoundStrategy):
    """Runs one of Flower's own strategies: their hooks in Flower's order, our limits, deadlines and checkpoints.

    Args:
        strategy: an unmodified Flower strategy. Its federated evaluation runs when its own settings ask for it.
    """

    introduces_nodes = False

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self._litter_bytes = 0    # replies of the round before

    def round(self, hub: Hub, round_index: int) -> None:
        """Configure, send, wait, validate, aggregate, publish; then the strategy's federated evaluation."""
        if self._litter_bytes >= LITTER_BYTES:
            gc.collect()    # Flower's records refer to themselves: they would stay until Python happens to look
        server_round = round_index + 1    # Flower counts rounds from one
        seed_globals(hub.seed, "round", server_round)
        config = ConfigRecord({"seed": hub.seed, **hub.options.train_config})
        grid: Grid = hub.grid  # type: ignore[assignment]
        # Every round begins with a record of ours, which clients read without decoding it.
        arrays = hub.model_record().copy()
        sent = _send(hub, self.strategy.configure_train(server_round, arrays, config, grid))
        answers = hub.collect(sent).arrived
        self._litter_bytes = len(answers) * hub.model.layout.num_bytes
        usual = usual_shape(answers)
        pairs = [(self._read(hub, answer, usual), answer.message) for answer in answers]
        replies = [reply for reply, _ in pairs if isinstance(reply, Reply)]
        # Clients that compute in this process may have drawn from the same generators.
        seed_globals(hub.seed, "aggregate", server_round)
        # Ascending partition order, not order of arrival, which must not change the bits of a sum.
        result, metrics = self.strategy.aggregate_train(
            server_round, [message for reply, message in pairs if isinstance(reply, Reply)]
        )
        if result is None:
            hub.log(round=server_round, failed_round=True, replies=len(replies), asked=len(sent))
            return
        result = in_model_dtypes(result, hub.model.layout)
        try:
            params, buffers = read_arrays(result, hub.model.layout)
        except MalformedReply as error:
            name = type(self.strategy).__name__
            raise UnsupportedModel(f"{name} returned arrays that do not fit the model: {error}.") from error
        figures = {name: value for name, value in (metrics or {}).items() if name not in NOT_FIGURES}
        hub.publish(Model(params, buffers, hub.model.layout), replies, round=server_round, train=figures)
        self._evaluate(hub, server_round)

    @staticmethod
    def _read(hub: Hub, answer: Answer, usual: Shape | None) -> Reply | Failure:
        """Read a reply; one that Flower's strategies could not average with the others is refused."""
        shape = shape_of(answer.content)
        if shape is None or shape == usual or usual is None:
            return hub.read_reply(answer)
        assert answer.task is not None
        return hub.refuse(answer.task, f"its records {describe(shape)} are not those of the other clients, "
                                       f"{describe(usual)}", answer.bytes_up)

    def _evaluate(self, hub: Hub, server_round: int) -> None:
        seed_globals(hub.seed, "evaluate", server_round)
        config, grid = ConfigRecord({"seed": hub.seed}), hub.grid
        arrays = hub.model_record().copy()
        sent = _send(hub, self.strategy.configure_evaluate(server_round, arrays, config, grid))  # type: ignore[arg-type]
        replies = [answer.message for answer in hub.collect(sent).arrived if hub.read_figures(answer) is not None]
        metrics = self.strategy.aggregate_evaluate(server_round, replies)
        if metrics:
            figures = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            hub.record_evaluation(figures, hub.version, "clients")

    def state_dict(self) -> dict[str, Any]:
        """Return the strategy's attributes that hold plain values, arrays, or another strategy."""
        return {"attributes": attributes_of(self.strategy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the attributes back."""
        set_attributes(self.strategy, state["attributes"])

    def summary(self) -> None:
        """Let the strategy print its settings."""
        self.strategy.summary()


def _send(hub: Hub, messages: Iterable[Message]) -> list[Task]:
    sent = []
    for message in messages:
        node = hub.find_node(message.metadata.dst_node_id)
        if node is None:
            continue    # it left between sampling and sending
        config = message.content.get(CONFIG)
        steps = config.get("local-steps") if isinstance(config, ConfigRecord) else None
        if message.metadata.ttl == DEFAULT_TTL:
            message.metadata.ttl = hub.options.task_timeout_s
        # A model is wanted, and nothing else: an update would be averaged as if it were one.
        sent.append(hub.send(node, message, local_steps=steps if isinstance(steps, int) else None, wanted="model"))
    return sent


def shape_of(content: RecordDict) -> Shape | None:
    """Return what Flower's strategies require to be equal in all replies; None without one record of each kind."""
    names: dict[type, list[str]] = {ArrayRecord: [], MetricRecord: []}
    for name, record in content.items():
        for kind, found in names.items():
            if isinstance(record, kind):
                found.append(name)
    if any(len(found) != 1 for found in names.values()):
        return None
    (arrays,), (metrics,) = names.values()
    return arrays, metrics, tuple(sorted(content[metrics]))


def usual_shape(answers: Sequence[Answer]) -> Shape | None:
    """Return the shape that most replies have; of several, that of the lowest partition."""
    counts = Counter(shape for answer in answers if (shape := shape_of(answer.content)) is not None)
    return counts.most_common(1)[0][0] if counts else None


def describe(shape: Shape) -> str:
    """Return a shape for a message."""
    arrays, metrics, names = shape
    return f"({shown(arrays)}, {shown(metrics)} of {shown(list(names))})"


def in_model_dtypes(arrays: ArrayRecord, layout: Layout) -> ArrayRecord:
    """Return what a strategy computed in the model's dtypes, as loading it into the model would.

    Flower's FedAdam and FedYogi turn float32 models into float64, and its means turn integer counters into floats.
    """
    dtypes = {spec.name: spec.dtype for spec in layout.params + layout.buffers}
    if all(array.dtype == dtypes.get(name, array.dtype) for name, array in arrays.items()):
        return arrays
    fitted = ArrayRecord()
    for name, array in arrays.items():
        dtype = np.dtype(dtypes.get(name, array.dtype))
        values = array.numpy()
        rounded = np.rint(values) if dtype.kind in "iu" else values
        fitted[name] = Array(np.asarray(rounded, dtype))    # of a counter without dimensions, NumPy returns a scalar
    return fitted


def seed_globals(seed: int, purpose: str, server_round: int) -> None:
    """Seed the global generators that Flower's strategies draw from (sampling, noise), anew for every round.

    A run that resumes at a round then draws what the run that never stopped drew.
    """
    random.seed(derive_seed(seed, purpose, server_round))
    np.random.seed(derive_seed(seed, purpose, server_round) % 2**32)


def attributes_of(strategy: Strategy) -> dict[str, Any]:
    """Return what a strategy object remembers, as far as a checkpoint can hold it; functions are left to the file."""
    found: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            found[name] = {"strategy": attributes_of(value)}
        elif _is_plain(value):
            found[name] = {"value": value}
        elif not callable(value):
            _warn_once(f"{type(strategy).__name__}.{name} cannot be saved: a resumed run starts it anew.")
    return found


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, SAVEABLE)


def set_attributes(strategy: Strategy, saved: Mapping[str, Any]) -> None:
    """Give a strategy object the attributes that `attributes_of` read off it."""
    for name, entry in saved.items():
        if "strategy" in entry:
            set_attributes(getattr(strategy, name), entry["strategy"])
        else:
            setattr(strategy, name, entry["value"])
