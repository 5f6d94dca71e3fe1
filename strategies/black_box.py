"""What methods that only evaluate have in common: their messages, their counters, and the server's step.

A client's search is asked for with `train.descend`; it answers with x_i,T - x_r in the form of every training reply,
and may add one vector of its own. Further exchanges of a round: `train.probe` and `train.surrogate`.
"""
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedcore.arrays import LazyArray
from fedcore.errors import MalformedReply, shown
from fedcore.hub import Hub
from fedcore.payload import (
    ARRAYS,
    CONFIG,
    METRICS,
    REPLY,
    VectorRecord,
    check_finite,
    read_array,
    read_num_examples,
)
from fedcore.rounds import RoundStrategy
from fedcore.strategies.settings import check_number
from fedcore.tasks import Answer, Node, Reply
from fedcore.vectors import Layout, TensorSpec, check_names

# The actions that a ClientApp registers, and the message types that reach them.
DESCEND, PROBE, SURROGATE = "descend", "probe", "surrogate"
ACTIONS = (DESCEND, PROBE, SURROGATE)
# A record, beside the usual ones, with one vector: the surrogate's weights or the control variate.
EXTRA, VALUES = "extra", "values"
MOST_QUERIES = 10**12
# Figures of a reply that are averaged over the clients into the row of a round.
AVERAGED = ("gradient-error", "surrogate-error")


def message_type(action: str) -> str:
    """Return Flower's message type for an action."""
    return f"train.{action}"


def settings_entry(settings: Any) -> str:
    """Return a method's settings (a dataclass) as they travel."""
    return json.dumps(asdict(settings), sort_keys=True)


def extra_record(values: Tensor) -> ArrayRecord:
    """Return a record with one vector, over the same memory."""
    record = ArrayRecord()
    record[VALUES] = LazyArray(values.numpy())
    return record


def read_extra(content: RecordDict, count: int, layout: Layout) -> Tensor:
    """Return the one vector that a reply adds, shape (count,), in the model's dtype.

    Raises:
        MalformedReply: it is absent, of another length, or not finite.
    """
    record = content.get(EXTRA)
    if not isinstance(record, ArrayRecord):
        raise MalformedReply(f"the reply has no arrays under {EXTRA!r}")
    check_names(record, (VALUES,))
    values = torch.from_numpy(read_array(record[VALUES], TensorSpec(VALUES, (count,), layout.params[0].dtype)).copy())
    check_finite(values, {})
    return values


def mean(vectors: Mapping[int, Tensor], weights: Mapping[int, int]) -> Tensor:
    """Return the weighted mean of vectors of shape (d,), in the order of their partitions.

    Computed as the first plus the mean difference to it: equal vectors have themselves as their mean, to the last bit.
    """
    order = sorted(vectors)
    first = vectors[order[0]]
    total, shift = sum(weights[partition] for partition in order), torch.zeros_like(first)
    for partition in order[1:]:
        shift += (weights[partition] / total) * (vectors[partition] - first)
    return first + shift


@dataclass(frozen=True)
class Figures:
    """The metrics of a black-box reply, validated.

    Attributes:
        queries: made for this request.
        total: made by the client so far, those of lost replies included.
        value: f_i at the point that the request is about, None where it was not finite.
        spent: whether the client's budget of queries is used up.
    """

    queries: int
    total: int
    value: float | None
    spent: bool
    all: dict[str, Any]

    @classmethod
    def of(cls, content: RecordDict) -> "Figures":
        """Read a reply's metrics.

        Raises:
            MalformedReply: a counter is missing or makes no sense.
        """
        record = content.get(METRICS)
        if not isinstance(record, MetricRecord):
            raise MalformedReply("the reply has no metrics")
        metrics: dict[str, Any] = dict(record.items())
        read_num_examples(metrics)
        counts = [metrics.get(name) for name in ("queries", "total-queries")]
        for name, count in zip(("queries", "total-queries"), counts, strict=True):
            if type(count) is not int or not 0 <= count <= MOST_QUERIES:
                raise MalformedReply(f"{name} is {shown(count)}, but must be a whole number of at least 0")
        value = metrics.get("value")
        if value is not None and (isinstance(value, list) or not abs(value) < float("inf")):
            raise MalformedReply(f"value is {shown(value)}, but must be a finite number")
        return cls(counts[0], counts[1], value, bool(metrics.get("spent", 0)), metrics)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arrival:
    """What a client's search came to: its reply, its figures, and the vector that it added."""

    reply: Reply
    figures: Figures
    extra: Tensor | None = None


class BlackBoxRounds(RoundStrategy):
    """Base of rounds in which clients search from a common point, and the server averages where they ended.

    Args:
        server_lr: eta_g of x <- x + eta_g mean (x_i,T - x), above 0; 1 is the plain mean.

    Attributes:
        queries: evaluations of each client so far, by partition.
    """

    needs_black_box = True
    no_compression = "Its clients search a function, and send no model."

    def __init__(self, server_lr: float = 1.0):
        check_number("server_lr", server_lr, above=0, advice="1 takes the mean of the clients' points.")
        self.server_lr = float(server_lr)
        self.queries: dict[int, int] = {}

    # ---- exchanges --------------------------------------------------------------------------------------------------

    def request(
        self, hub: Hub, round_index: int, settings: Any, extra: Tensor | None = None, params: Tensor | None = None,
        **entries: Any,
    ) -> RecordDict:
        """Return a request: a point, the method's settings, and perhaps a vector.

        Args:
            settings: a dataclass.
            params: the point, shape (d,); None: the model.
            entries: further entries of the configuration.
        """
        arrays = hub.model_record() if params is None else VectorRecord(hub.model.replace(params))
        config = ConfigRecord({
            "seed": hub.seed, "round": round_index, "version": hub.version, "method": type(settings).__name__,
            "settings": settings_entry(settings), **entries,
        })
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        if extra is not None:
            content[EXTRA] = extra_record(extra)
        return content

    def search(
        self, hub: Hub, content: Callable[[Node], RecordDict], extra_count: int | None = None
    ) -> list[Arrival]:
        """Let every client search, and return what arrived and can be used, ascending partition.

        Args:
            extra_count: length of the vector that each reply must add; None: none.
        """
        arrivals = []
        for answer in hub.ask(hub.nodes, message_type(DESCEND), content).arrived:
            try:
                figures = Figures.of(answer.content)
                extra = None if extra_count is None else read_extra(answer.content, extra_count, hub.model.layout)
            except MalformedReply as error:
                self.refuse(hub, answer, error)
                continue
            plain = RecordDict({name: record for name, record in answer.content.items() if name in
                                (ARRAYS, METRICS, REPLY)})
            reply = hub.read_reply(replace(answer, content=plain))
            if isinstance(reply, Reply):
                self.count(answer.node.partition, figures)
                arrivals.append(Arrival(reply, figures, extra))
        return arrivals

    def refuse(self, hub: Hub, answer: Answer, error: MalformedReply) -> None:
        """Count and log an answer that must not be used."""
        assert answer.task is not None
        hub.refuse(answer.task, error.reason, answer.bytes_up)

    def count(self, partition: int, figures: Figures) -> None:
        """Take a client's counter over; one that has forgotten how many it made goes on from what is known."""
        known = self.queries.get(partition, 0)
        self.queries[partition] = figures.total if figures.total >= known else known + figures.queries

    def note_failed_round(self, hub: Hub, round_index: int) -> None:
        """Write down a round of which nothing came: the next one starts from the same point."""
        hub.log(round=round_index + 1, failed_round=True, replies=0, asked=len(hub.nodes))
        hub.give_up_if_hopeless()

    # ---- the server's step ------------------------------------------------------------------------------------------

    def stepped(self, hub: Hub, arrivals: Sequence[Arrival]) -> Tensor:
        """Return x_{r+1} = x_r + eta_g sum_i p_i (x_i,T - x_r), shape (d,), with p_i over those that arrived."""
        updates = {arrival.reply.node.partition: arrival.reply.update for arrival in arrivals}
        weights = {arrival.reply.node.partition: arrival.reply.num_examples for arrival in arrivals}
        return hub.model.params + self.server_lr * mean(updates, weights)

    def publish(
        self, hub: Hub, round_index: int, params: Tensor, arrivals: Sequence[Arrival], **figures: Any
    ) -> None:
        """Publish a round's point with its figures; ends the run when a client has no budget left."""
        for name in AVERAGED:
            found = [arrival.figures.all[name] for arrival in arrivals if name in arrival.figures.all]
            if found:
                figures[name.replace("-", "_")] = sum(found) / len(found)
        flat = [arrival.reply.node.partition for arrival in arrivals if arrival.figures.all.get("flat-steps")]
        if flat and "flat" not in self.told:
            self.told.add("flat")
            hub.warn(f"The black box of client {flat[0]} returns the same value everywhere around the point, so there "
                     "is no direction to go.")
        clients = sorted(self.queries)
        hub.publish(
            params, [arrival.reply for arrival in arrivals], round=round_index + 1,
            queries=sum(self.queries.values()), clients=clients,
            client_queries=[self.queries[partition] for partition in clients], **figures)
        if any(arrival.figures.spent for arrival in arrivals):
            hub.stop("queries")

    # ---- what survives a restart ------------------------------------------------------------------------------------

    @property
    def told(self) -> set[str]:
        """What the user was told already, by this process."""
        return self.__dict__.setdefault("_told", set())

    def summary_figures(self) -> dict[str, float | int | str | None]:
        return {"queries": sum(self.queries.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"queries": dict(self.queries)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.queries = dict(state["queries"])
