"""The ClientApp of a black box: searches, measures and evaluates when asked, and remembers what it has asked.

What a client knows lives in `context.state`: its queries, its counters, the vector it sent last, and its last answer. A
request that comes twice is answered twice with the same bytes, and no query is made again.
"""
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from threadpoolctl import ThreadpoolController

from fedcore.arrays import LazyArray
from fedcore.clients.apps import EVALUATE_METRICS, OFFER, EstimatingApp
from fedcore.clients.blackbox import BlackBoxTask
from fedcore.clients.blackbox_request import Asked, read_counts, write_counts
from fedcore.clients.modules import flat_module
from fedcore.clients.requests import Request, site_of
from fedcore.clients.searching import METHODS
from fedcore.clients.settings import TrainSettings
from fedcore.errors import BlackBoxFailed, MalformedRequest
from fedcore.flower import record_of, reply_to
from fedcore.payload import (
    ARRAYS,
    INFO,
    METRICS,
    REPLY,
    Estimate,
    VectorRecord,
    read_arrays,
    single_record,
    wire_bytes,
)
from fedcore.strategies.black_box import ACTIONS, EXTRA, extra_record

RAISED = 2    # Flower's code of an app that raised an exception
ANSWER, LAST = "fedcore.blackbox.answer", "fedcore.blackbox.last"


class BlackBoxClient:
    """The work behind the app.

    Args:
        task: whose functions are asked.
        settings: only its dtype matters: points travel in it.
    """

    def __init__(self, task: BlackBoxTask, settings: TrainSettings):
        self.task, self.settings = task, settings
        self.layout = flat_module(task, settings.torch_dtype).layout    # type: ignore[arg-type]
        self._threads: ThreadpoolController | None = None

    def act(self, action: str, message: Message, context: Context) -> Message:
        """Answer a request of a black-box method.

        Raises:
            MalformedRequest: it has no meaning to this client.
            InvalidSetting, SingularKernel: the method cannot be used on this function.
        """
        started = time.perf_counter()
        asked = Asked(message, context, action, self.task, self.layout)
        last = context.state.get(LAST)
        if isinstance(last, ConfigRecord) and last.get("name") == asked.name:
            return Message(self._repeated(context), reply_to=message)
        method = METHODS.get((asked.entry("method", str), action))
        if method is None:
            raise MalformedRequest(f"This client knows no {action!r} of the method {asked.entries.get('method')!r}.")
        if self._threads is None:
            self._threads = ThreadpoolController()
        # The bits of a matrix product depend on the number of threads.
        counts = asked.oracle.counts
        try:
            with self._threads.limit(limits=1):
                outcome = method(asked)
        except BlackBoxFailed as error:
            # An error that is sent, not raised: what was asked until now stays counted.
            write_counts(context, counts)
            return reply_to(message, Error(RAISED, f"{type(error).__name__}: {error}"))
        write_counts(context, counts)
        figures: dict[str, Any] = {
            "num-examples": 1, "work-steps": asked.oracle.queries, "train-seconds": time.perf_counter() - started,
            "queries": asked.oracle.queries, "total-queries": counts.queries, "failed-queries": counts.failed,
            "spent": int(asked.oracle.spent),
            **{name.replace("_", "-"): value for name, value in outcome.figures.items() if np.isfinite(value)},
        }
        content = RecordDict({METRICS: MetricRecord(figures)})
        if outcome.update is not None:
            content[ARRAYS] = VectorRecord.of(outcome.update, {}, self.layout)
            content[REPLY] = ConfigRecord({"kind": "update"})
        if outcome.extra is not None:
            content[EXTRA] = extra_record(outcome.extra)
        self._keep(context, asked.name, content)
        return Message(content, reply_to=message)

    @staticmethod
    def _keep(context: Context, name: str, content: RecordDict) -> None:
        """Remember an answer, should the same question come again."""
        context.state[LAST] = ConfigRecord({"name": name, "records": sorted(content)})
        for key in [key for key in context.state if key.startswith(f"{ANSWER}.")]:
            del context.state[key]
        for key, record in content.items():
            plain = record
            if isinstance(record, ArrayRecord):
                plain = ArrayRecord()
                for array_name, array in record.items():
                    plain[array_name] = LazyArray(array.numpy())
            context.state[f"{ANSWER}.{key}"] = plain

    @staticmethod
    def _repeated(context: Context) -> RecordDict:
        prefix = f"{ANSWER}."
        return RecordDict({key.removeprefix(prefix): record for key, record in context.state.items()
                           if key.startswith(prefix)})

    # ---- the actions that every client has --------------------------------------------------------------------------

    def train(self, message: Message, context: Context) -> Message:
        """Refuse: there is no gradient.

        Raises:
            MalformedRequest: always.
        """
        raise MalformedRequest("A black box has no gradient to train with: use fzoos, fedzo, fedprox_zo, scaffold_zo_1 "
                               "or scaffold_zo_2.")

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate the site's function at the received point; it is counted, but not as a method's query."""
        request = Request.of(message, context)
        params, _ = read_arrays(single_record(message.content, ArrayRecord, "arrays"), self.layout)
        point = self.task.box.clip(params.numpy().astype(float))
        counts = read_counts(context)
        counts.evaluations += 1
        value = float(self.task.evaluate_many(point[None], request.site)[0])
        write_counts(context, counts)
        metrics = MetricRecord({**dict(zip(EVALUATE_METRICS, (1, 1), strict=True)), "loss": value})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    def query(self, message: Message, context: Context) -> Message:
        """Say which part this node plays."""
        return Message(self.describe(context), reply_to=message)

    def describe(self, context: Context) -> RecordDict:
        """Return what this node answers to a query."""
        site_of(context)
        partition = context.node_config.get("partition-id")
        entries = {"num-examples": 1, **({"partition-id": partition} if isinstance(partition, int) else {})}
        records = {METRICS: record_of(MetricRecord, entries), INFO: record_of(ConfigRecord, {"kinds": OFFER})}
        return record_of(RecordDict, records)

    def estimate(self, message: Message, context: Context) -> Estimate | None:
        """Return what the reply to a request will cost; how many queries a search takes, only doing it tells."""
        if message.metadata.message_type == "query":
            return Estimate(0, wire_bytes(self.describe(context)))
        return None


class BlackBoxApp(EstimatingApp):
    """The ClientApp of a black box."""

    def __init__(self, client: BlackBoxClient):
        super().__init__(client)
        for action in ACTIONS:
            self.train(action)(answering(client, action))


def answering(client: BlackBoxClient, action: str) -> Callable[[Message, Context], Message]:
    """Return the function that answers one action."""

    def answer(message: Message, context: Context) -> Message:
        return client.act(action, message, context)

    return answer
