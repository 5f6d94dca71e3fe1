"""Gradient methods whose clients send a compressed vector each round: from plain SGD to EF21 with momentum.

Every round each client computes one stochastic gradient g at the server's x and answers with D = C(...); the server
steps along the mean u of what the answers stand for, x <- x - server_lr u. The methods differ in what a client
remembers. With e the compression error that it has not sent yet and h its gradient estimate, which the server knows:

    distributed_sgd   D = g                                                                              u = D
    compressed_sgd    D = C(g)                                                                           u = D
    ef14              D = C(e + g)              e <- e + g - D                                           u = D
    ef21              D = C(g - h)              h <- h + D                                               u = h
    ef21_sgdm         D = C(v - h)              h <- h + D           v <- (1 - a) v + a g before         u = h
    econtrol          D = C(eta e + g - h)      e <- e + g - h - D   (with the old h), h <- h + D        u = h

Source: Seide et al., 2014 (EF14, in the form of Stich et al., 2018, arXiv:1809.07599); Richtarik et al., 2021, "EF21",
arXiv:2106.05203, algorithm 2; Fatkhullin et al., 2023, "Momentum Provably Improves Error Feedback", arXiv:2305.15155,
algorithm 1; Gao, Islamov and Stich, 2024, "EControl", arXiv:2311.05645, algorithm 3.

A client whose answer is lost counts as absent: it forgets that round, so that both sides keep the same h.
"""
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedcore.compression.base import Codec
from fedcore.compression.dense import Identity
from fedcore.compression.named import registered_compressor
from fedcore.errors import InvalidSetting, MalformedReply
from fedcore.feedback import GRADIENT, Contribution, fingerprint, read_contribution
from fedcore.hub import Hub
from fedcore.payload import ARRAYS, CONFIG
from fedcore.rounds import RoundStrategy
from fedcore.strategies.buffers import blend_buffers
from fedcore.strategies.settings import check_choice, check_number
from fedcore.tasks import Node, Reply

INITS = ("full", "compressed", "zero")
# Of a model on which a compressor is tried out before the real one is known.
TRIAL_SHAPE = (100, 100)
# No round of this client's was used yet.
NEVER = -1


@dataclass(frozen=True)
class Rule:
    """What distinguishes a method.

    Attributes:
        feedback: eta, factor on the error memory; None: there is none.
        estimates: whether messages are differences to an estimate h.
        gradient_weight: a, of the new gradient in the client's momentum; None: no momentum.
    """

    feedback: float | None = None
    estimates: bool = False
    gradient_weight: float | None = None


@dataclass(frozen=True)
class Memory:
    """What a client keeps from round to round, each of shape (d,); None where the method has no such thing.

    Attributes:
        error: e, in units of the gradient.
        estimate: h.
        momentum: v.
    """

    error: Tensor | None = None
    estimate: Tensor | None = None
    momentum: Tensor | None = None

    @classmethod
    def at(cls, rule: Rule, gradient: Tensor, estimate: Tensor | None) -> "Memory":
        """Return the memory before the first round: e_0 = 0, h_0 as given, v_0 = g_0."""
        return cls(
            error=None if rule.feedback is None else torch.zeros_like(gradient),
            estimate=estimate,
            momentum=None if rule.gradient_weight is None else gradient,
        )


def respond(
    rule: Rule, memory: Memory, gradient: Tensor, compress: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Memory, Tensor]:
    """Return a client's memory after a round, and the payload it sends.

    Args:
        gradient: g, shape (d,).
        compress: returns the payload of a vector, and what a receiver decodes from it: D.
    """
    target = gradient
    if rule.gradient_weight is not None and memory.momentum is not None:
        target = (1 - rule.gradient_weight) * memory.momentum + rule.gradient_weight * gradient    # v
    difference = target if memory.estimate is None else target - memory.estimate                   # g - h
    message = difference
    if rule.feedback is not None and memory.error is not None:
        message = rule.feedback * memory.error + difference
    payload, sent = compress(message)
    return Memory(
        error=None if memory.error is None else memory.error + difference - sent,
        estimate=None if memory.estimate is None else memory.estimate + sent,
        momentum=None if memory.momentum is None else target,
    ), payload


def mean(vectors: Mapping[int, Tensor], count: int) -> Tensor:
    """Return the sum of vectors of shape (d,), in the order of their partitions, over `count`."""
    ordered = [vectors[partition] for partition in sorted(vectors)]
    total = ordered[0].clone()
    for vector in ordered[1:]:
        total += vector
    return total / count


def server_step(params: Tensor, direction: Tensor, server_lr: float) -> Tensor:
    """Return x - gamma u, shape (d,)."""
    return params - server_lr * direction


class ErrorFeedback(RoundStrategy):
    """What the methods have in common; each is a `Rule` and its settings.

    The server keeps each client's h, n vectors in all: a client that leaves, or forgets, takes its own with it.

    Args:
        rule: of the clients.
        server_lr: gamma, the step size.
        compressor: of what clients send; a registered name, alone or under `name` among its settings.
        init: h_0 of a client: `full` its first gradient, sent uncompressed once; `compressed` the same, compressed;
            `zero`.
        server_momentum: beta of m <- beta m + u, x <- x - gamma m; in [0, 1).
    """

    no_compression = "It compresses gradients itself: name the compressor under strategy.compressor."

    def __init__(
        self, rule: Rule, server_lr: float, compressor: str | Mapping[str, Any], init: str = "full",
        server_momentum: float = 0.0,
    ):
        check_number("server_lr", server_lr, above=0, advice="Theory asks for about contraction / smoothness.")
        check_choice("init", init, INITS)
        check_number("server_momentum", server_momentum, at_least=0, below=1)
        self.rule, self.server_lr, self.init = rule, float(server_lr), init
        self.server_momentum = float(server_momentum)
        self.spec = {"name": compressor} if isinstance(compressor, str) else dict(compressor)
        self.compressor = registered_compressor(self.spec)
        self.check_codec(self.compressor.codec([TRIAL_SHAPE], torch.float32))
        self.estimates: dict[int, Tensor] = {}      # h of each client, by partition
        self.used_rounds: dict[int, int] = {}       # the last round in which each client's answer was used
        self.momentum: Tensor | None = None         # m
        self.mismatches = 0                         # times that a client's h was not the server's
        self._codec: Codec | None = None

    def codec(self, hub: Hub) -> Codec:
        """Return the compressor as it suits the model."""
        if self._codec is None:
            layout = hub.model.layout
            self._codec = self.compressor.codec([spec.shape for spec in layout.params], layout.dtype)
        return self._codec

    def check_codec(self, codec: Codec) -> None:
        """Raise `InvalidSetting` when the method does not work with a compressor like this."""
        if codec.contraction is None:
            raise InvalidSetting("compressor", self.spec, "contractive", "Give it scaling: contractive, because "
                                 "error feedback diverges with a compressor that is not contractive.")

    def rule_for(self, codec: Codec) -> Rule:
        """Return the rule with nothing left open."""
        return self.rule

    # ---- a round --------------------------------------------------------------------------------------------------

    def round(self, hub: Hub, round_index: int) -> None:
        codec = self.codec(hub)
        rule, present = self.rule_for(codec), {node.partition for node in hub.nodes}
        for partition in [partition for partition in self.used_rounds if partition not in present]:
            self._forget(partition)    # one that left takes its estimate with it
        answers = hub.ask(hub.nodes, GRADIENT, lambda node: self._request(hub, node, round_index, rule))
        used: list[Reply] = []
        sent: dict[int, Tensor] = {}
        mismatches_before = self.mismatches
        for answer in answers.arrived:
            try:
                found = read_contribution(
                    answer.content, codec, self._start_codec(codec), self.init == "full", hub.model.layout)
                self._check_start(answer.node.partition, found)
                sent[answer.node.partition] = self._contribution(answer.node.partition, found)
            except MalformedReply as error:
                assert answer.task is not None
                hub.refuse(answer.task, error.reason, answer.bytes_up)
                continue
            self.used_rounds[answer.node.partition] = round_index
            reply = hub.restore_reply({
                "partition": answer.node.partition, "task_id": answer.task_id, "base_version": hub.version,
                "local_steps": 1, "num_examples": found.metrics["num-examples"], "elapsed_s": answer.elapsed_s,
                "train_seconds": None, "metrics": found.metrics, "buffers": found.buffers, "values": found.values,
                "kind": "update", "base": None,
            })
            hub.accept(answer, reply)
            used.append(reply)
        if not used:
            hub.log(round=round_index + 1, failed_round=True, replies=0, asked=len(hub.nodes))
            hub.give_up_if_hopeless()
            return
        direction = mean(self.estimates, len(self.estimates)) if self.rule.estimates else mean(sent, len(sent))
        if self.server_momentum:
            if self.momentum is not None:
                direction = self.server_momentum * self.momentum + direction
            self.momentum = direction
        buffers = blend_buffers(hub.model.buffers, [reply.buffers for reply in used], [1 / len(used)] * len(used))
        loss = sum(float(reply.metrics["loss"]) for reply in used) / len(used)
        params = server_step(hub.model.params, direction, self.server_lr)
        known: dict[str, Any] = {"h_mismatch": self.mismatches - mismatches_before} if self.rule.estimates else {}
        hub.publish(params, used, buffers, round=round_index + 1, train={"loss": loss}, **known)

    def _request(self, hub: Hub, node: Node, round_index: int, rule: Rule) -> RecordDict:
        config = ConfigRecord({
            "seed": hub.seed, "draw": round_index, "round": round_index, "version": hub.version,
            "after": self.used_rounds.get(node.partition, NEVER), "init": self.init,
            "compressor": json.dumps(self.spec), "estimates": rule.estimates,
        })
        if rule.feedback is not None:
            config["feedback"] = rule.feedback
        if rule.gradient_weight is not None:
            config["gradient-weight"] = rule.gradient_weight
        return RecordDict({ARRAYS: hub.model_record(), CONFIG: config})

    def _start_codec(self, codec: Codec) -> Codec | None:
        """Return how a client sends its h_0, None when it does not."""
        return start_codec(codec, self.init) if self.rule.estimates else None

    def _check_start(self, partition: int, found: Contribution) -> None:
        if self.rule.estimates and not found.begins and partition not in self.used_rounds:
            raise MalformedReply("it sends a difference to an estimate that the server does not have")

    def _contribution(self, partition: int, found: Contribution) -> Tensor:
        """Take in a client's answer, and return D or the client's new h.

        Raises:
            MalformedReply: the client's h is another; it will begin anew.
        """
        if not self.rule.estimates:
            assert found.sent is not None
            return found.sent
        estimate = self.estimates.get(partition)
        if found.begins or estimate is None:
            estimate = torch.zeros_like(found.values) if found.start is None else found.start
        if found.sent is not None:
            estimate = estimate + found.sent
        if found.estimate is not None and found.estimate != fingerprint(estimate):
            self.mismatches += 1
            self._forget(partition)
            raise MalformedReply("its gradient estimate is not the one that the server has of it")
        self.estimates[partition] = estimate
        return estimate

    def _forget(self, partition: int) -> None:
        self.estimates.pop(partition, None)
        self.used_rounds.pop(partition, None)

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"estimates": dict(self.estimates), "used_rounds": dict(self.used_rounds), "momentum": self.momentum,
                "mismatches": self.mismatches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimates, self.used_rounds = dict(state["estimates"]), dict(state["used_rounds"])
        self.momentum, self.mismatches = state["momentum"], state["mismatches"]

    def summary_figures(self) -> dict[str, float | int | str | None]:
        return {"h_mismatch": self.mismatches} if self.rule.estimates else {}


def start_codec(codec: Codec, init: str) -> Codec | None:
    """Return how a client sends its h_0 for a given `init`, None when h_0 is zero."""
    if init == "full":
        return Identity().codec([(codec.num_values,)], codec.dtype)
    return codec if init == "compressed" else None


# ---- the methods ----------------------------------------------------------------------------------------------------


class DistributedSgd(ErrorFeedback):
    """Uncompressed gradients of all clients, averaged: what compression is measured against.

    Args:
        server_lr: gamma, the step size.
        server_momentum: in [0, 1).
    """

    def __init__(self, server_lr: float = 0.1, server_momentum: float = 0.0):
        super().__init__(Rule(), server_lr, "identity", server_momentum=server_momentum)


class CompressedSgd(ErrorFeedback):
    """Compressed gradients, averaged, and what was not sent is lost; converges with unbiased compressors only.

    Args:
        server_lr: gamma, the step size.
        compressor: e.g. `{name: qsgd, scaling: unbiased}`.
        server_momentum: in [0, 1).
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: str | Mapping[str, Any] = "top_k", server_momentum: float = 0.0
    ):
        super().__init__(Rule(), server_lr, compressor, server_momentum=server_momentum)

    def check_codec(self, codec: Codec) -> None:
        """Any compressor will do."""


class Ef14(ErrorFeedback):
    """Compressed gradients; what was not sent is added to the next one.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        server_momentum: in [0, 1).
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: str | Mapping[str, Any] = "top_k", server_momentum: float = 0.0
    ):
        super().__init__(Rule(feedback=1.0), server_lr, compressor, server_momentum=server_momentum)


class Ef21(ErrorFeedback):
    """Compressed differences to a gradient estimate that client and server both keep.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        init: of the estimates: `full`, `compressed` or `zero` (the paper's h = C(g) after the first round).
        server_momentum: in [0, 1).
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: str | Mapping[str, Any] = "top_k", init: str = "full",
        server_momentum: float = 0.0,
    ):
        super().__init__(Rule(estimates=True), server_lr, compressor, init, server_momentum)


class Ef21Sgdm(ErrorFeedback):
    """EF21 on a running mean of the client's gradients, which removes the need for large batches.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        gradient_weight: a of v <- (1 - a) v + a g, in (0, 1]; 1 is EF21.
        init: of the estimates: `full`, `compressed` or `zero`.
        server_momentum: in [0, 1).
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: str | Mapping[str, Any] = "top_k", gradient_weight: float = 0.1,
        init: str = "full", server_momentum: float = 0.0,
    ):
        check_number("gradient_weight", gradient_weight, above=0, at_most=1, advice="0.1 suits most problems.")
        rule = Rule(estimates=True, gradient_weight=float(gradient_weight))
        super().__init__(rule, server_lr, compressor, init, server_momentum)
