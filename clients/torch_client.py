"""A task as a Flower ClientApp: trains with PyTorch when asked, evaluates, and says what data it has."""
import threading
import time
from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import Mod
from torch import Tensor

from fedcore.clients.apps import EVALUATE_METRICS, OFFER, EstimatingApp, echo, echo_bytes, evaluation_steps
from fedcore.clients.books import Limits
from fedcore.clients.data import Dataset, as_dataset, batches_per_pass
from fedcore.clients.evaluation import measure
from fedcore.clients.gradient import GradientRequest, answer, answer_bytes, received_model, stochastic_gradient
from fedcore.clients.modules import flat_module, seeded_torch
from fedcore.clients.optim import OptimizerFactory
from fedcore.clients.peer_client import PeerClient
from fedcore.clients.private import PrivateClient
from fedcore.clients.requests import Request, site_of
from fedcore.clients.schedules import make_schedule
from fedcore.clients.settings import TrainSettings
from fedcore.clients.task import Site, Task
from fedcore.clients.training import Placed, Work, train_steps
from fedcore.errors import EmptyClient, MalformedReply, MalformedRequest
from fedcore.feedback import BEGINS, BUFFERS, ESTIMATE, GRADIENT, contribution_arrays, fingerprint
from fedcore.flower import record_of, reply_to
from fedcore.payload import (
    ARRAYS,
    COMPRESSION_ERROR,
    INFO,
    METRICS,
    REPLY,
    SCALAR_BYTES,
    Estimate,
    VectorRecord,
    read_arrays,
    single_record,
    wire_bytes,
)
from fedcore.peers.strategy import PeerStrategy
from fedcore.seeds import derive_seed, torch_generator
from fedcore.vectors import FlatModule

TRAIN_METRICS = ("num-examples", "work-steps", "train-seconds", "loss")
GRADIENT_METRICS = (*TRAIN_METRICS, COMPRESSION_ERROR)
DOES_NOT_FIT = "The request does not fit this client's model"
# Where a client that follows a schedule keeps how many steps it has trained.
PROGRESS, STEPS_DONE = "fedcore.progress", "steps-done"


def torch_client(
    task: Task, settings: TrainSettings | None = None, mods: Sequence[Mod] | None = None, private: bool = False,
    peers: PeerStrategy | None = None,
) -> EstimatingApp:
    """Return a Flower ClientApp that trains a task.

    Actions: `train` (arrays and config in; arrays and metrics out), `evaluate` on the site's validation data (on its
    training data where it has none), `query`. The site is `site` of the node's configuration, or its `partition-id`.

    Args:
        task: anything with the methods of `Task`; a task with a `client_app` method supplies the app itself.
        settings: what requests leave open.
        mods: Flower's client mods for training, such as its clipping mods.
        private: answer to nothing but queries and private requests, and say nothing of the labels.
        peers: take part in this strategy of peers when a server hosts it; the same as the server's.
    """
    settings = settings or TrainSettings()
    if hasattr(task, "client_app"):
        app = task.client_app(settings)
    else:
        app = EstimatingApp(TorchClient(task, settings, private), mods, private)
    if peers is not None and isinstance(app, EstimatingApp):
        app.add_peer(PeerClient(task, settings, peers), private)
    return app


class TorchClient:
    """The work behind the app. All clients of a thread share one model's memory; nothing of a client stays behind."""

    def __init__(self, task: Task, settings: TrainSettings, private: bool = False):
        self.task, self.settings, self.private = task, settings, private
        self.device = settings.torch_device
        self.optimizer = OptimizerFactory(settings.optimizer)
        self.schedule, self.schedule_unit = make_schedule(settings.schedule, settings.lr)
        self._local = threading.local()

    @property
    def flat(self) -> FlatModule:
        """The model that this thread trains in."""
        if not hasattr(self._local, "flat"):
            self._local.flat = flat_module(self.task, self.settings.torch_dtype, self.device)
        return self._local.flat

    # ---- actions ------------------------------------------------------------------------------------------------

    def train(self, message: Message, context: Context) -> Message:
        """Train the received model on the site's data; reply with the trained model, or with what changed.

        Raises:
            EmptyClient: the site has no example.
            MalformedRequest: the arrays or the configuration do not fit the task.
        """
        started = time.perf_counter()
        request, flat = Request.of(message, context), self.flat
        params = self._load(message)
        data = self._training_data(request.site)
        work = self._work(request, len(data), context)
        if not flat.module.training:
            flat.module.train()
        with seeded_torch(derive_seed(request.seed, request.partition, "torch", request.draw), self.device):
            order = torch_generator(request.seed, request.partition, "train", request.draw)
            loss = train_steps(self.task, flat, data, work, self.optimizer, order)
        if self._counts_steps:
            context.state[PROGRESS] = MetricRecord({STEPS_DONE: self._steps_done(context) + work.steps})
        trained = flat.params.cpu()
        values = trained - params if request.kind == "update" else trained.clone()
        figures = (len(data), work.steps, time.perf_counter() - started, loss)
        content = record_of(RecordDict, {
            ARRAYS: VectorRecord.of(values, flat.buffers(), flat.layout),
            METRICS: record_of(MetricRecord, dict(zip(TRAIN_METRICS, figures, strict=True))),
            **echo(request),
        })
        return reply_to(message, content)

    def gradient(self, message: Message, context: Context) -> Message:
        """Reply with one stochastic gradient at the received model, compressed as the request says.

        Raises:
            EmptyClient, MalformedRequest: as for `train`.
            NotFinite: the gradient cannot be compressed.
        """
        started = time.perf_counter()
        request, asked, flat = Request.of(message, context), GradientRequest.of(message), self.flat
        try:
            arrays = single_record(message.content, ArrayRecord, ARRAYS)
            flat.load(*received_model(asked, arrays, flat.layout, context))
        except MalformedReply as error:
            raise MalformedRequest(f"{DOES_NOT_FIT}: {error.reason}.") from error
        data = self._training_data(request.site)
        flat.module.train()
        with seeded_torch(derive_seed(request.seed, request.partition, "torch", request.draw), self.device):
            order = torch_generator(request.seed, request.partition, "train", request.draw)
            values, loss = stochastic_gradient(
                self.task, flat, data, self.settings.batch_size, self.settings.clip_norm, order)
        answered = answer(asked, request, values, flat.layout, context)
        figures = (len(data), 1, time.perf_counter() - started, loss, answered.unsent)
        said = ConfigRecord({BEGINS: answered.begins})
        if answered.estimate is not None:
            said[ESTIMATE] = fingerprint(answered.estimate)
        content = RecordDict({
            ARRAYS: contribution_arrays(answered.payload, answered.start),
            METRICS: record_of(MetricRecord, dict(zip(GRADIENT_METRICS, figures, strict=True))),
            REPLY: said,
        })
        if flat.layout.buffers:
            content[BUFFERS] = ArrayRecord({name: Array(value.numpy()) for name, value in flat.buffers().items()})
        return reply_to(message, content)

    def private_answer(self, message: Message, context: Context) -> Message:
        """Reply with a clipped and noised vector about the site's records, or refuse (see `fedcore.clients.books`).

        Raises:
            EmptyClient, MalformedRequest: as for `train`.
            ReleaseRefused: it is more than was agreed, or than the node's operator allows.
            UnsupportedModel: a record's gradient depends on other records, or cannot be computed.
        """
        data = self._training_data(site_of(context))
        return PrivateClient(self.task, self.flat, data, self.settings.batch_size, message, context).reply()

    def evaluate(self, message: Message, context: Context) -> Message:
        """Measure the received model on the site's validation data.

        Raises:
            EmptyClient, MalformedRequest: as for `train`.
        """
        data = self._evaluation_data(Request.of(message, context).site)
        self._load(message)
        figures = measure(self.task, self.flat, data)
        counts = (len(data), evaluation_steps(len(data), self.settings.batch_size))
        metrics = MetricRecord({**dict(zip(EVALUATE_METRICS, counts, strict=True)), **figures})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    def query(self, message: Message, context: Context) -> Message:
        """Say how many examples the site has, and of which classes."""
        return Message(self.describe(context), reply_to=message)

    def describe(self, context: Context) -> RecordDict:
        """Return what this node answers to a query."""
        site, partition = site_of(context), context.node_config.get("partition-id")
        entries: dict[str, int] = {"num-examples": len(as_dataset(self.task.data(site)))}
        if isinstance(partition, int):
            entries["partition-id"] = partition
        info: dict[str, str | list[int]] = {"kinds": OFFER}
        secret = self.private or Limits.of(context.node_config).any    # how many have which label says it of each
        labels = self.task.labels(site) if hasattr(self.task, "labels") and not secret else None
        if labels is not None:
            info["labels"] = [int(count) for count in labels]
        records = {METRICS: record_of(MetricRecord, entries), INFO: record_of(ConfigRecord, info)}
        return record_of(RecordDict, records)

    def estimate(self, message: Message, context: Context) -> Estimate | None:
        """Return what the reply to a request will cost, exactly; None where only computing it can tell."""
        request, action = Request.of(message, context), message.metadata.message_type
        names: tuple[str, ...] | None = getattr(self.task, "metric_names", None)
        if action == "query":
            return Estimate(0, wire_bytes(self.describe(context)))
        if action == "train":
            return Estimate(self._steps(request), self._train_reply_bytes() + echo_bytes(request))
        if action == GRADIENT:
            arrays = answer_bytes(GradientRequest.of(message), self.flat.layout, context)
            return Estimate(1, arrays + SCALAR_BYTES * len(GRADIENT_METRICS))
        if action == "evaluate" and names is not None:
            steps = evaluation_steps(len(self._evaluation_data(request.site)), self.settings.batch_size)
            metrics = MetricRecord(dict.fromkeys((*EVALUATE_METRICS, *names), 0))
            return Estimate(steps, wire_bytes(RecordDict({METRICS: metrics})))
        return None

    # ---- what they share ----------------------------------------------------------------------------------------

    def _load(self, message: Message) -> Tensor:
        """Put the received model into this thread's module and return its parameters, shape (d,), read only."""
        flat = self.flat
        try:
            params, buffers = read_arrays(single_record(message.content, ArrayRecord, ARRAYS), flat.layout)
        except MalformedReply as error:
            raise MalformedRequest(f"{DOES_NOT_FIT}: {error.reason}.") from error
        flat.load(params, buffers)
        return params

    def _training_data(self, site: Site) -> Dataset:
        data = as_dataset(self.task.data(site))
        if not len(data):
            raise EmptyClient(site, "train on")
        return Placed(data, self.settings.torch_dtype, self.device)

    def _evaluation_data(self, site: Site) -> Dataset:
        held_back = self.task.validation_data(site)
        data = as_dataset(self.task.data(site) if held_back is None else held_back)
        if not len(data):
            raise EmptyClient(site, "evaluate on")
        return data

    def _steps(self, request: Request, num_examples: int | None = None) -> int:
        if request.local_steps is not None:
            return request.local_steps
        if self.settings.local_epochs is None:
            return self.settings.steps_for(0)
        if num_examples is None:
            num_examples = len(self._training_data(request.site))
        return self.settings.steps_for(batches_per_pass(num_examples, self.settings.batch_size))

    def _work(self, request: Request, num_examples: int, context: Context) -> Work:
        position = self._steps_done(context) if self._counts_steps else request.version
        stride = 1 if self._counts_steps else 0
        base_lr, scale, schedule = self.settings.lr, request.lr_scale, self.schedule
        return Work(
            steps=self._steps(request, num_examples),
            batch_size=self.settings.batch_size,
            lr_at=lambda step: scale * schedule.lr(base_lr, position + stride * step),
            proximal_mu=request.proximal_mu,
            clip_norm=self.settings.clip_norm,
        )

    @property
    def _counts_steps(self) -> bool:
        return self.schedule_unit == "steps"

    @staticmethod
    def _steps_done(context: Context) -> int:
        progress = context.state.get(PROGRESS)
        return int(progress[STEPS_DONE]) if isinstance(progress, MetricRecord) else 0  # type: ignore[arg-type]

    def _train_reply_bytes(self) -> int:
        """Return the size of a training reply without what it echoes: equal for all clients and tasks."""
        if not hasattr(self._local, "train_reply_bytes"):
            arrays = VectorRecord.of(self.flat.params.cpu(), self.flat.buffers(), self.flat.layout)
            metrics = MetricRecord(dict.fromkeys(TRAIN_METRICS, 0))
            self._local.train_reply_bytes = wire_bytes(RecordDict({ARRAYS: arrays, METRICS: metrics}))
        return self._local.train_reply_bytes
