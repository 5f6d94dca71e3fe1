"""The client's side of the gradient methods: one stochastic gradient, compressed, and what is remembered of it.

What a client remembers is kept as `fedcore.clients.memory` says: the number of a task is its round, and the server says
which of a client's rounds it used last.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor

from fedcore.clients import memory
from fedcore.clients.data import Dataset, shuffled_batches
from fedcore.clients.requests import Request
from fedcore.clients.task import Task
from fedcore.clients.training import clip, trainable
from fedcore.compression.base import unsent_share
from fedcore.compression.named import codec_asked_for
from fedcore.errors import MalformedRequest
from fedcore.feedback import read_payload
from fedcore.payload import ARRAY_HEADER_BYTES, CONFIG, SCALAR_BYTES, read_arrays
from fedcore.seeds import torch_generator
from fedcore.strategies.downlink import BASE_ROUND, DOWNLINK, changed
from fedcore.strategies.feedback_rule import INITS, NEVER, Memory, Rule, respond, start_codec
from fedcore.vectors import FlatModule, Layout

ROUNDS = "fedcore.feedback"
# Where a client keeps the model, if it is to be sent changes of it.
MODEL, HELD = "fedcore.downlink", "params"
FIELDS = ("error", "estimate", "momentum")


@dataclass(frozen=True)
class GradientRequest:
    """What a request for a compressed gradient asks beyond what every request does.

    Attributes:
        round: t, counted from zero.
        after: the last round of this client's that the server used; `NEVER`: none.
        init: of h_0.
        compressor: its settings, as JSON.
        downlink: settings of the compressor of the model's changes, as JSON; None: models come whole always.
        base_round: after which round's model the change is that came; `NEVER`: the model came whole.
    """

    rule: Rule
    round: int
    after: int
    init: str
    compressor: str
    downlink: str | None = None
    base_round: int = NEVER

    @classmethod
    def of(cls, message: Message) -> "GradientRequest":
        """Read a request.

        Raises:
            MalformedRequest: an entry is missing or has no meaning.
        """
        record = message.content.get(CONFIG)
        config: dict[str, Any] = dict(record) if isinstance(record, ConfigRecord) else {}
        kinds: dict[str, type | tuple[type, ...]] = {
            "round": int, "after": int, "init": str, "compressor": str, "estimates": bool,
        }
        for name, kind in kinds.items():
            if not isinstance(config.get(name), kind):
                raise MalformedRequest(f"The request's {name} is {config.get(name)!r}, which is not usable.")
        if config["init"] not in INITS:
            raise MalformedRequest(f"The request's init is {config['init']!r}, but must be one of {', '.join(INITS)}.")
        rule = Rule(_share(config, "feedback"), config["estimates"], _share(config, "gradient-weight"))
        downlink, base_round = config.get(DOWNLINK), config.get(BASE_ROUND, NEVER)
        if not isinstance(downlink, str | None) or type(base_round) is not int:
            raise MalformedRequest(f"The request's {DOWNLINK} is {downlink!r} after round {base_round!r}.")
        return cls(rule, config["round"], config["after"], config["init"], config["compressor"], downlink, base_round)


def _share(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is not None and (not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise MalformedRequest(f"The request's {name} is {value!r}, but must be a number from 0 to 1.")
    return value


@dataclass(frozen=True)
class Answer:
    """What one round made of a client: payloads, and whether it began anew.

    Attributes:
        estimate: h after the round, shape (d,); None where the method has none.
        unsent: share of the squared norm of what was to be sent that the payload leaves out.
    """

    begins: bool
    start: Tensor | None
    payload: Tensor | None
    estimate: Tensor | None
    unsent: float


def received_model(
    asked: GradientRequest, arrays: ArrayRecord, layout: Layout, context: Context
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the model that a request brings, whole or as a change of the one that this client holds, and hold it.

    Returns:
        Parameters, shape (d,), and buffers.

    Raises:
        MalformedReply: the arrays are no model, and no change of one.
        MalformedRequest: this client does not hold the model that the change is to.
    """
    if asked.downlink is None:
        return read_arrays(arrays, layout)
    if asked.base_round == NEVER:
        params, buffers = read_arrays(arrays, layout)
        memory.keep(context, MODEL, None, NEVER, {HELD: params}, asked.round)
        return params, buffers
    before = memory.recall(context, MODEL, asked.base_round)
    if before is None or before[HELD].shape != (layout.num_params,) or before[HELD].dtype != layout.dtype:
        raise MalformedRequest(f"This client no longer has the model of round {asked.base_round}, and needs all of it.")
    codec = codec_asked_for(asked.downlink, layout)
    payload, buffers = read_payload(arrays, codec, layout)
    params = changed(before[HELD], payload, codec)
    memory.keep(context, MODEL, before, asked.base_round, {HELD: params}, asked.round)
    return params, buffers


def answer(asked: GradientRequest, request: Request, gradient: Tensor, layout: Layout, context: Context) -> Answer:
    """Return a client's answer to a request, and write its memory.

    Args:
        gradient: g, shape (d,).
    """
    codec = codec_asked_for(asked.compressor, layout)
    generator = torch_generator(request.seed, request.partition, "compress", request.draw)
    unsent = 0.0

    def compress(vector: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal unsent
        payload = codec.encode(vector, generator)
        sent = codec.decode(payload)
        unsent = unsent_share(vector, sent)
        return payload, sent

    before, start = recall(context, asked.after), None
    begins = before is None
    if before is None:
        estimate = torch.zeros_like(gradient) if asked.rule.estimates else None
        starter = start_codec(codec, asked.init)
        if estimate is not None and starter is not None:
            start = starter.encode(gradient, generator)
            estimate = starter.decode(start)
        before = Memory.at(asked.rule, gradient, estimate)
    if start is not None and asked.init == "full":
        # h_0 = g_0 is this round's gradient: D_0 = C(0) = 0 need not be sent, and changes nothing.
        after, payload = before, None
    else:
        after, payload = respond(asked.rule, before, gradient, compress)
    keep(context, None if begins else before, asked.after, after, asked.round)
    return Answer(begins, start, payload, after.estimate, unsent)


def answer_bytes(asked: GradientRequest, layout: Layout, context: Context) -> int:
    """Return how many bytes the arrays and the words of an answer will take on the wire, before it is computed."""
    codec = codec_asked_for(asked.compressor, layout)
    arrays = [codec.num_bytes]
    if asked.rule.estimates and (asked.after == NEVER or not memory.knows(context, ROUNDS, asked.after)):
        starter = start_codec(codec, asked.init)
        if starter is not None:
            arrays = [starter.num_bytes] if asked.init == "full" else [starter.num_bytes, *arrays]
    arrays += [spec.num_bytes for spec in layout.buffers]
    words = 2 if asked.rule.estimates else 1    # whether it begins, and the fingerprint of h
    return sum(arrays) + ARRAY_HEADER_BYTES * len(arrays) + SCALAR_BYTES * words


def recall(context: Context, after: int) -> Memory | None:
    """Return what this client remembered after a round; None when it does not know that round, or never had one."""
    found = None if after == NEVER else memory.recall(context, ROUNDS, after)
    return None if found is None else Memory(**found)


def keep(context: Context, before: Memory | None, before_round: int, after: Memory, after_round: int) -> None:
    """Write what this client remembers, before and after a round."""
    old = None if before is None else _vectors(before)
    memory.keep(context, ROUNDS, old, before_round, _vectors(after), after_round)


def _vectors(remembered: Memory) -> dict[str, Tensor]:
    return {name: values for name in FIELDS if (values := getattr(remembered, name)) is not None}


def stochastic_gradient(
    task: Task, flat: FlatModule, data: Dataset, batch_size: int, clip_norm: float | None, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Return the gradient of a random batch at the loaded model, shape (d,) on the CPU, and the batch's mean loss.

    Args:
        data: at least one example; with no more than `batch_size` the gradient is exact.
        clip_norm: largest l2 norm; None: no limit.
        generator: of the batch.
    """
    parameters = trainable(flat)
    inputs, targets = data.batch(next(shuffled_batches(len(data), batch_size, generator)))
    loss = task.loss(flat.module, inputs, targets)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    if clip_norm is not None:
        clip(gradients, clip_norm)
    return torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu(), loss.item()
