"""The client's side of private training: clipped sums over its records, with noise, and an account of them.

The client takes nothing on trust that concerns its records: it clips to the distance of the two points that it computes
gradients at, adds the noise itself unless its operator trusts the server, and writes every release down before it is
sent. A request that comes twice is answered with the same bytes: new noise would be one more release.
"""
import logging
import math
import os
from functools import cache
from hashlib import blake2b

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedcore.arrays import LazyArray
from fedcore.clients.books import SIMULATED, Books
from fedcore.clients.data import Dataset, batches_per_pass, shuffled_batches
from fedcore.clients.per_record import Gradients, record_gradients, summed_gradients
from fedcore.clients.requests import site_of
from fedcore.clients.task import Task
from fedcore.errors import MalformedReply, MalformedRequest
from fedcore.flower import record_of, reply_to
from fedcore.payload import ARRAYS, METRICS, REPLY, VectorRecord, check_finite, read_arrays
from fedcore.privacy.accounting import Release
from fedcore.privacy.mechanism import LOCAL, Tally, message_std, noise, sensitivity
from fedcore.privacy.wire import (
    DIFFERENCE,
    DIRECTION,
    GRADIENT,
    KNOWS_PREVIOUS,
    MIXTURE,
    PREVIOUS,
    ROUND,
    STEPS,
    Ask,
    digest,
)
from fedcore.seeds import torch_generator
from fedcore.vectors import FlatModule, Layout

logger = logging.getLogger("fedcore")

LAST_POINT, ANSWERS = "fedcore.private.point", "fedcore.private.answers"
# Requests whose answers are kept: the two exchanges of a round.
KEPT_ANSWERS = 2
MUCH_CLIPPED = 0.2


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def read_vector(message: Message, name: str, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a vector that a request brings, shape (d,), and the buffers with it.

    Raises:
        MalformedRequest: it is not there, or does not fit the model.
    """
    record = message.content.get(name)
    if not isinstance(record, ArrayRecord):
        raise MalformedRequest(f"The request has no arrays {name!r}.")
    try:
        values, buffers = read_arrays(record, layout)
        check_finite(values, buffers)
    except MalformedReply as error:
        raise MalformedRequest(f"The request's {name!r} does not fit this client's model: {error.reason}.") from error
    return values, buffers


class PrivateClient:
    """Answers one request; made anew for each.

    Args:
        task: whose loss is differentiated.
        flat: holds the model; its parameters are not used, its buffers are.
        data: the client's records, at least one.
        batch_size: examples that count as one work step.

    Raises:
        UnsupportedModel: a record's gradient depends on other records.
        MalformedRequest: the request has no meaning.
    """

    def __init__(
        self, task: Task, flat: FlatModule, data: Dataset, batch_size: int, message: Message, context: Context
    ):
        self.flat, self.data, self.batch_size = flat, data, batch_size
        self.message, self.context = message, context
        self.asked, self.books = Ask.of(message), Books(context)
        number = context.node_config.get("partition-id")
        self.partition = number if isinstance(number, int) else site_of(context)
        self.simulated = context.node_config.get(SIMULATED) is True
        self.params, buffers = read_vector(message, ARRAYS, flat.layout)
        flat.load(self.params, buffers)
        self.gradients: Gradients = record_gradients(task, flat)
        self.tally = Tally()

    def reply(self) -> Message:
        """Return the answer, after it was written down."""
        asked, previous = self.asked, None
        if asked.kind in (DIFFERENCE, MIXTURE) and asked.previous:
            previous = self._previous_point()
            if previous is None:
                return self._packed(None)
        direction = read_vector(self.message, DIRECTION, self.flat.layout)[0] if asked.kind == STEPS else self.params
        key = digest(self.params, direction) + blake2b(repr(asked).encode(), digest_size=16).hexdigest()
        kept = self.context.state.get(ANSWERS)
        if isinstance(kept, ArrayRecord) and key in kept:
            return self._packed(torch.from_numpy(kept[key].numpy().copy()))
        release = self._release()
        self.books.admit(asked, release)
        values = self._local_steps(direction, release) if asked.kind == STEPS else self._exchange(previous, release)
        self._remember(key, values)
        self._warn()
        return self._packed(values)

    def _previous_point(self) -> Tensor | None:
        """Return x', shape (d,); None when this client has lost it, and the request does not bring it."""
        if PREVIOUS in self.message.content:
            found = read_vector(self.message, PREVIOUS, self.flat.layout)[0]
        else:
            record = self.context.state.get(LAST_POINT)
            if not isinstance(record, ArrayRecord):
                return None
            found = torch.from_numpy(record[PREVIOUS].numpy().copy())
        return found if digest(found) == self.asked.previous else None

    def _release(self) -> Release:
        asked = self.asked
        if asked.kind == STEPS:
            return Release(asked.noise_multiplier, 1.0, participations(asked, len(self.data)))
        return Release(asked.noise_multiplier, asked.sample_rate)

    def _exchange(self, previous: Tensor | None, release: Release) -> Tensor:
        """Return the noised mean of the records' clipped vectors, shape (d,)."""
        asked, count = self.asked, len(self.data)
        weight = {GRADIENT: 1.0, DIFFERENCE: 0.0}.get(asked.kind, asked.gradient_weight if previous is not None else 1)
        slope = 0.0 if previous is None else asked.clip_difference * float((self.params - previous).norm())
        if not math.isfinite(slope):
            raise MalformedRequest("The request's two points are infinitely far apart.")
        clip_norm = weight * asked.clip_gradient + (1 - weight) * slope
        if clip_norm == 0:
            return torch.zeros_like(self.params)    # nothing moved: nothing to say, and nothing to hide
        device = self.flat.device
        total = summed_gradients(
            self.gradients, self.data, self._drawn(), self.params.to(device), asked.clip_gradient, weight,
            None if previous is None else previous.to(device), slope, self.tally,
        ).cpu()
        expected = asked.sample_rate * count
        mode, terms = asked.terms.noise_mode, asked.terms
        std = message_std(mode, release.noise_multiplier, clip_norm, expected, [expected], terms.neighbouring)
        self.books.charge(asked, release)
        mean = total / expected
        return mean + noise(std, mean, self._generator("privacy")) if mode == LOCAL else mean

    def _drawn(self) -> Tensor:
        """Return the records that take part: all of them, or each with the sample rate, independently."""
        count, rate = len(self.data), self.asked.sample_rate
        if rate >= 1:
            return torch.arange(count)
        generator = self._generator("sample")
        if generator is not None:
            drawn = torch.rand(count, dtype=torch.float64, generator=generator)
        else:    # who is drawn has to stay unknown: the seed of a run is not
            bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
            drawn = torch.from_numpy(bits.astype(np.float64) / 2.0**53)
        return (drawn < rate).nonzero().flatten()

    def _local_steps(self, direction: Tensor, release: Release) -> Tensor:
        """Return y_K after K steps from x along v, corrected by noised differences on batches; shape (d,).

        u_k = u_{k-1} + mean_B clip(g_z(y_{k-1}) - g_z(y_{k-2}), C3 |y_{k-1} - y_{k-2}|) + noise
        y_k = y_{k-1} - eta u_k

        Source: Murata and Suzuki, 2021, arXiv:2102.03198 (the routine), and 2023, arXiv:2302.03884 (its noise).
        """
        asked, device = self.asked, self.flat.device
        if release.times:
            self.books.charge(asked, release)
        order = torch_generator(asked.seed, self.partition, "local batches", asked.round)
        batches = shuffled_batches(len(self.data), asked.batch_size, order)
        generator = self._generator("local privacy")
        before = here = self.params.to(device)
        estimate = direction.to(device)
        for step in range(asked.num_steps):
            if step:    # the first difference is zero
                batch = next(batches)
                clip_norm = asked.clip_difference * float((here - before).norm())
                total = summed_gradients(self.gradients, self.data, batch, here, asked.clip_gradient, 0, before,
                                         clip_norm, self.tally)
                std = release.noise_multiplier * sensitivity(clip_norm, len(batch), asked.terms.neighbouring)
                estimate = estimate + total / len(batch) + noise(std, total.cpu(), generator).to(device)
            before, here = here, here - asked.step_size * estimate
        return here.cpu()

    def _generator(self, purpose: str) -> torch.Generator | None:
        """Return a seeded generator in a simulation; None, for the system's secure source, anywhere else."""
        if not self.simulated:
            return None
        return torch_generator(self.asked.seed, self.partition, purpose, self.asked.round)

    def _remember(self, key: str, values: Tensor) -> None:
        kept = self.context.state.get(ANSWERS)
        record = ArrayRecord()
        if isinstance(kept, ArrayRecord):
            for name in list(kept)[1 - KEPT_ANSWERS:]:
                record[name] = kept[name]
        record[key] = LazyArray(values.numpy().copy())
        self.context.state[ANSWERS] = record
        point = ArrayRecord()
        point[PREVIOUS] = LazyArray(self.params.numpy().copy())
        self.context.state[LAST_POINT] = point

    def _warn(self) -> None:
        """Tell this node's operator, and nobody else, what became of the records."""
        tally = self.tally
        if tally.dropped:
            _warn_once(f"Records of node {self.partition} have gradients that are not finite; they count as zero.")
        if self.asked.kind in (DIFFERENCE, STEPS) and tally.clipped > MUCH_CLIPPED * tally.records:
            _warn_once(f"At node {self.partition} more than {MUCH_CLIPPED:.0%} of the differences are clipped: "
                       "clip_difference is too small, and what is cut off is never made up for.")

    def _packed(self, values: Tensor | None) -> Message:
        asked, count = self.asked, len(self.data)
        batches = batches_per_pass(max(1, math.ceil(asked.sample_rate * count)), self.batch_size)
        passes = 1 if asked.kind == GRADIENT or (asked.kind == MIXTURE and not asked.previous) else 2
        steps = 2 * (asked.num_steps - 1) if asked.kind == STEPS else passes * batches
        content = RecordDict({
            METRICS: record_of(MetricRecord, {"num-examples": count, "work-steps": 0 if values is None else steps}),
            REPLY: ConfigRecord({ROUND: asked.round, KNOWS_PREVIOUS: values is not None}),
        })
        if values is not None:
            content[ARRAYS] = VectorRecord.of(values, self.flat.buffers(), self.flat.layout)
        return reply_to(self.message, content)


def participations(asked: Ask, num_records: int) -> int:
    """Return in how many of a visit's noised steps a record takes part at most: batches of one pass are disjoint."""
    return math.ceil((asked.num_steps - 1) / batches_per_pass(num_records, asked.batch_size))
