"""What a server that hosts peers and its nodes say to each other: Flower records both ways.

The server asks each node where it is reached (`query.peer`), and gives all of them a segment of the run (`train.peer`):
who takes part, and which steps. The peers then talk to each other, and answer with figures; one of them adds the mean
of their models.
"""
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedcore.errors import MalformedReply, MalformedRequest, shown
from fedcore.payload import ARRAYS, CONFIG, METRICS, REPLY, VectorRecord, check_finite, read_arrays
from fedcore.peers.counters import Counters
from fedcore.vectors import Layout, Model

QUERY, TRAIN = "query.peer", "train.peer"
SEGMENT, ABOUT, RUN, RELAY = "segment", "about", "run", "relay"
# Instead of the address of a peer that nobody can dial: it is reached through the server.
RELAYED = "relayed"
NO_STEP = -1
# Rows of metrics that one peer may add in one segment; further ones are dropped.
MOST_ROWS = 200
# What a row is made of by whoever writes it down.
OURS = ("time_s", "event", "version", "node", "wall_s")
EVENTS = ("log", "refused", "incident", "lost", "rejoined")
COUNTERS = tuple(entry.name for entry in fields(Counters))


def describe(strategy: object) -> dict[str, Any]:
    """Return a strategy's class and its plain settings, by which nodes find out that theirs is another."""
    settings = {name: value for name, value in sorted(vars(strategy).items())
                if not name.startswith("_") and (value is None or isinstance(value, (bool, int, float, str)))}
    return {"class": type(strategy).__name__, **settings}


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself as a peer.

    Attributes:
        name: of its certificate, or what it calls itself in clear.
        address: HOST:PORT at which other peers reach it; "relayed": through the server; empty: nowhere.
        fingerprint: SHA-256 of its certificate, lower-case hex; empty in clear.
        step: the latest step of this run after which it knows its state; -1: none.
        problem: why it cannot take part; empty: it can.
    """

    name: str = ""
    address: str = ""
    fingerprint: str = ""
    step: int = NO_STEP
    problem: str = ""

    def content(self) -> RecordDict:
        """Return the answer to a `query.peer`."""
        return RecordDict({ABOUT: ConfigRecord(asdict(self))})

    @classmethod
    def of(cls, content: RecordDict) -> "Introduction":
        """Read an answer.

        Raises:
            MalformedReply: it is none.
        """
        record = content.get(ABOUT)
        found = dict(record.items()) if isinstance(record, ConfigRecord) else {}
        kinds = {"name": str, "address": str, "fingerprint": str, "step": int, "problem": str}
        for name, kind in kinds.items():
            if type(found.get(name)) is not kind:
                raise MalformedReply(f"a peer's {name} is {shown(found.get(name))}")
        return cls(**{name: found[name] for name in kinds})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Segment:
    """A stretch of a run: who takes part in it, and which steps it has.

    Attributes:
        run: names the run.
        number: counts the segments, from 0.
        epoch: counts the changes of membership.
        first: its first step.
        steps: how many there are; for strategies that stop by time there is at most one.
        seconds: how long that one lasts; None for strategies that stop by step.
        began_s: where the peers' clock stands when it begins.
        final: whether the run ends with it.
        measure: whether each peer is to measure its own model.
        lost_after_s: a peer that could not be reached for so long takes no further part.
        members: ranks, ascending; `names`, `addresses` and `fingerprints` are theirs, in this order.
        donors: ranks of those who know the state after the step before `first`; without any, all start from the model
            that comes with the segment.
        strategy: as `describe` returns it.
    """

    run: str
    number: int
    epoch: int
    seed: int
    first: int
    steps: int
    seconds: float | None
    began_s: float
    final: bool
    measure: bool
    lost_after_s: float
    members: tuple[int, ...]
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    fingerprints: tuple[str, ...]
    donors: tuple[int, ...]
    strategy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The step before which it ends."""
        return self.first + self.steps

    @property
    def conversation(self) -> str:
        """What peers call it when they connect: who is in another segment must not be heard."""
        return f"{self.run}/{self.number}"

    def content(self, rank: int, model: Model | None = None) -> RecordDict:
        """Return the request to the peer with a rank."""
        settings: dict[str, Any] = {SEGMENT: json.dumps(asdict(self)), "rank": rank, "seed": self.seed}
        inner_steps = self.strategy.get("inner_steps")
        if isinstance(inner_steps, int) and self.steps:
            settings["local-steps"] = inner_steps * self.steps    # a node's operator may limit it
        content = RecordDict({CONFIG: ConfigRecord(settings)})
        if model is not None:
            content[ARRAYS] = VectorRecord(model)
        return content

    @classmethod
    def of(cls, content: RecordDict) -> "tuple[Segment, int]":
        """Read a request; returns the segment and the receiver's rank.

        Raises:
            MalformedRequest: it is none.
        """
        config = content.get(CONFIG)
        found = config if isinstance(config, ConfigRecord) else ConfigRecord()
        try:
            body = json.loads(str(found[SEGMENT]))
            lists = {name: tuple(body[name]) for name in ("members", "names", "addresses", "fingerprints", "donors")}
            segment, rank = cls(**{**body, **lists}), found["rank"]
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedRequest(f"The request describes no segment of a run: {shown(str(error))}.") from error
        if not isinstance(rank, int) or rank not in segment.members:
            raise MalformedRequest(f"The request is for peer {shown(rank)}, which is not among {segment.members}.")
        numbers = (segment.number, segment.epoch, segment.first, segment.steps, segment.seed, *segment.members)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise MalformedRequest("The request's segment has a step, a rank or a seed that is no whole number.")
        if len({len(lists[name]) for name in ("members", "names", "addresses", "fingerprints")}) != 1:
            raise MalformedRequest("The request's segment does not say of every member where it is reached.")
        return segment, rank


@dataclass(frozen=True)
class SegmentReport:
    """What a peer says after a segment.

    Attributes:
        step: the latest step after which it knows its state.
        at: its clock, seconds.
        counters: since the run began, by name; see `Counters`.
        num_examples: that it holds.
        loss: of its latest training; None: it never trained.
        peer_loss: of its own model on its own data; None where nobody asked.
        lost: ranks of peers that it could not reach any more.
        problem: why it stopped before the end of the segment; empty: it did not.
        beside_bytes: sent and received for the mean of all models.
        rows: of metrics: pairs of event and figures.
        mean: of all peers' models, from one of them; None from the others.
        distance: root mean square distance from it.
    """

    step: int
    at: float
    counters: Mapping[str, float]
    num_examples: int
    loss: float | None = None
    peer_loss: float | None = None
    lost: tuple[int, ...] = ()
    problem: str = ""
    beside_bytes: tuple[int, int] = (0, 0)
    rows: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    mean: Model | None = None
    distance: float | None = None

    def content(self) -> RecordDict:
        """Return the answer to a `train.peer`."""
        figures = {name: getattr(self, name) for name in ("loss", "peer_loss", "distance")}
        metrics = {name.replace("_", "-"): float(value) for name, value in figures.items()
                   if value is not None and math.isfinite(value)}
        said = {name: getattr(self, name) for name in ("step", "at", "counters", "lost", "problem", "beside_bytes")}
        said["rows"] = [[event, dict(row)] for event, row in self.rows[:MOST_ROWS]]
        content = RecordDict({
            METRICS: MetricRecord({"num-examples": self.num_examples, **metrics}),
            REPLY: ConfigRecord({ABOUT: json.dumps(said, default=str)}),
        })
        if self.mean is not None:
            content[ARRAYS] = VectorRecord(self.mean)
        return content

    @classmethod
    def of(cls, content: RecordDict, layout: Layout) -> "SegmentReport":
        """Read an answer, and check everything in it.

        Raises:
            MalformedReply: something in it must not be used.
        """
        record, metrics = content.get(REPLY), content.get(METRICS)
        try:
            said = json.loads(str(record[ABOUT]))  # type: ignore[index]
            counters = {name: _number(said["counters"][name], name) for name in COUNTERS}
            bytes_beside = (_whole(said["beside_bytes"][0], 0), _whole(said["beside_bytes"][1], 0))
            lost = tuple(_whole(rank, 0) for rank in said["lost"])
            rows = tuple(_row(*row) for row in said["rows"][:MOST_ROWS])
            step, at, problem = _whole(said["step"], NO_STEP), _number(said["at"], "clock"), str(said["problem"])
            examples = _whole(metrics["num-examples"], 1)  # type: ignore[index]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise MalformedReply(f"it is no report of a peer: {shown(str(error))}") from error
        losses = {name: None if (value := metrics.get(name.replace("_", "-"))) is None  # type: ignore[union-attr]
                  else _number(value, name, least=-math.inf) for name in ("loss", "peer_loss", "distance")}
        mean, arrays = None, content.get(ARRAYS)
        if isinstance(arrays, ArrayRecord):
            params, buffers = read_arrays(arrays, layout)
            check_finite(params, buffers)
            mean = Model(params, buffers, layout)
        return cls(step, at, counters, examples, losses["loss"], losses["peer_loss"], lost, problem, bytes_beside, rows,
                   mean, losses["distance"])


def _number(value: Any, name: str, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise MalformedReply(f"a peer's {name} is {shown(value)}, but must be a finite number of at least {least:g}")
    return value


def _whole(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise MalformedReply(f"{shown(value)} came where a whole number of at least {least} was expected")
    return value


def _row(event: Any, figures: Any) -> tuple[str, dict[str, Any]]:
    if event not in EVENTS or not isinstance(figures, dict):
        raise MalformedReply(f"a row of metrics is {shown(event)}")
    return event, {str(name): value for name, value in figures.items() if name not in OURS}
