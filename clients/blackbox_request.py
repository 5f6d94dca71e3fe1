"""A request to a black box, read and checked, and what a client has to answer it with."""
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from torch import Tensor

from fedcore.clients.blackbox import BlackBoxTask, Counts, SiteOracle
from fedcore.clients.requests import Request
from fedcore.errors import MalformedReply, MalformedRequest
from fedcore.payload import ARRAYS, CONFIG, read_arrays
from fedcore.strategies.black_box import EXTRA, VALUES
from fedcore.vectors import Layout

COUNTS = "fedcore.blackbox.counts"


class Asked:
    """A request of a black-box method, read, and what the client has to answer it with.

    Attributes:
        point: x, in the unit cube, float64, shape (d,).
        layout: of the model that the point travels as.
        entries: the request's configuration.
        settings: the method's settings, as they travelled.
    """

    def __init__(self, message: Message, context: Context, action: str, task: BlackBoxTask, layout: Layout):
        self.request, self.context, self.action = Request.of(message, context), context, action
        self.task, self.layout = task, layout
        record = message.content.get(CONFIG)
        self.entries: dict[str, Any] = dict(record.items()) if isinstance(record, ConfigRecord) else {}
        self.round = self.entry("round", int)
        try:
            self.settings: Mapping[str, Any] = dict(json.loads(self.entry("settings", str)))
        except (ValueError, TypeError) as error:
            raise MalformedRequest(f"The request's settings cannot be read: {error}") from error
        try:
            arrays = message.content.get(ARRAYS)
            if not isinstance(arrays, ArrayRecord):
                raise MalformedReply("it brings no point")
            self.params, _ = read_arrays(arrays, layout)
        except MalformedReply as error:
            raise MalformedRequest(f"The request does not fit this client's task: {error.reason}.") from error
        self.point = task.box.to_unit(self.params.numpy().astype(float))
        self.extra = read_vector(message.content.get(EXTRA))
        self.oracle = SiteOracle(task, self.request.site, read_counts(context))

    def entry(self, name: str, kind: type) -> Any:
        """Return an entry of the configuration.

        Raises:
            MalformedRequest: it is missing, or of another type.
        """
        value = self.entries.get(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise MalformedRequest(f"The request's {name} is {value!r}, which is not usable.")
        return value

    @property
    def name(self) -> str:
        """What makes this request different from every other one of its run."""
        return f"{self.request.seed}:{self.round}:{self.action}"

    def moved(self, point: np.ndarray) -> Tensor:
        """Return x_i,T - x_r in the task's units, as it travels, shape (d,)."""
        change = torch.from_numpy(self.task.box.from_unit(point) - self.task.box.from_unit(self.point))
        return change.to(self.layout.dtype)

    def sent(self, vector: np.ndarray) -> Tensor:
        """Return a vector as it travels."""
        return torch.from_numpy(vector).to(self.layout.dtype)


class Outcome:
    """What a method answers.

    Args:
        update: x_i,T - x_r or another vector of shape (d,), as it travels; None: none.
        extra: a further vector.
        figures: of the answer.
    """

    def __init__(self, update: Tensor | None = None, extra: Tensor | None = None, **figures: float):
        self.update, self.extra, self.figures = update, extra, figures


def read_vector(record: Any) -> np.ndarray | None:
    """Return the vector that a request adds, float64; None where it adds none."""
    if record is None:
        return None
    if not isinstance(record, ArrayRecord) or VALUES not in record:
        raise MalformedRequest("The request's extra vector cannot be read.")
    return record[VALUES].numpy().astype(float)


def read_counts(context: Context) -> Counts:
    """Return what a client has counted so far."""
    record = context.state.get(COUNTS)
    if not isinstance(record, MetricRecord):
        return Counts()
    known: dict[str, Any] = dict(record.items())
    return Counts(**known)


def write_counts(context: Context, counts: Counts) -> None:
    """Keep what a client has counted."""
    context.state[COUNTS] = MetricRecord(dict(vars(counts)))
