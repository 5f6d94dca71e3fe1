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
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedcore.compressed import TRIAL_SHAPE
from fedcore.compression.base import Codec
from fedcore.compression.named import registered_compressor
from fedcore.errors import InvalidSetting, MalformedReply
from fedcore.feedback import GRADIENT, Contribution, fingerprint, read_contribution
from fedcore.hub import Hub
from fedcore.payload import ARRAYS, CONFIG
from fedcore.rounds import RoundStrategy
from fedcore.strategies.buffers import blend_buffers
from fedcore.strategies.downlink import Downlink, round_schedule
from fedcore.strategies.feedback_rule import INITS, NEVER, Rule, mean, server_step, start_codec
from fedcore.strategies.settings import check_choice, check_number
from fedcore.tasks import Node, Reply

# A registered name, alone or under `name` among its settings.
Spec = str | Mapping[str, Any]


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
        schedule: of the step size, by round: a registered schedule, alone or under `name` among its settings; None: it
            is constant.
        downlink: what clients are sent: `full` the model; `sparse` its change, compressed as their answers are; or the
            settings of a compressor for that.
    """

    no_compression = "It compresses gradients itself: name the compressor under strategy.compressor."

    def __init__(
        self, rule: Rule, server_lr: float, compressor: Spec, init: str = "full",
        server_momentum: float = 0.0, schedule: Spec | None = None, downlink: Spec = "full",
    ):
        check_number("server_lr", server_lr, above=0, advice="Theory asks for about contraction / smoothness.")
        check_choice("init", init, INITS)
        check_number("server_momentum", server_momentum, at_least=0, below=1)
        self.rule, self.server_lr, self.init = rule, float(server_lr), init
        self.server_momentum = float(server_momentum)
        self.spec = {"name": compressor} if isinstance(compressor, str) else dict(compressor)
        self.compressor = registered_compressor(self.spec)
        self.schedule = round_schedule(schedule, self.server_lr)
        self.downlink = Downlink.of(downlink, self.spec)
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
        self.downlink.advance(hub.model, round_index, hub.seed)
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
        params = server_step(hub.model.params, direction, self.schedule.lr(self.server_lr, round_index))
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
        arrays = self.downlink.arrays(hub, self.used_rounds.get(node.partition, NEVER), config)
        return RecordDict({ARRAYS: arrays, CONFIG: config})

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
                "mismatches": self.mismatches, "downlink": self.downlink.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.estimates, self.used_rounds = dict(state["estimates"]), dict(state["used_rounds"])
        self.momentum, self.mismatches = state["momentum"], state["mismatches"]
        self.downlink.load_state_dict(state["downlink"])

    def summary_figures(self) -> dict[str, float | int | str | None]:
        return {"h_mismatch": self.mismatches} if self.rule.estimates else {}


# ---- the methods ----------------------------------------------------------------------------------------------------


class DistributedSgd(ErrorFeedback):
    """Uncompressed gradients of all clients, averaged: what compression is measured against.

    Args:
        server_lr: gamma, the step size.
        server_momentum: in [0, 1).
        schedule: of the step size, by round.
        downlink: `full`, `sparse`, or the settings of a compressor.
    """

    def __init__(
        self, server_lr: float = 0.1, server_momentum: float = 0.0, schedule: Spec | None = None,
        downlink: Spec = "full",
    ):
        super().__init__(Rule(), server_lr, "identity", server_momentum=server_momentum, schedule=schedule,
                         downlink=downlink)


class CompressedSgd(ErrorFeedback):
    """Compressed gradients, averaged, and what was not sent is lost; converges with unbiased compressors only.

    Args:
        server_lr: gamma, the step size.
        compressor: e.g. `{name: qsgd, scaling: unbiased}`.
        server_momentum: in [0, 1).
        schedule: of the step size, by round.
        downlink: `full`, `sparse`, or the settings of a compressor.
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: Spec = "top_k", server_momentum: float = 0.0,
        schedule: Spec | None = None, downlink: Spec = "full",
    ):
        super().__init__(Rule(), server_lr, compressor, server_momentum=server_momentum, schedule=schedule,
                         downlink=downlink)

    def check_codec(self, codec: Codec) -> None:
        """Any compressor will do."""


class Ef14(ErrorFeedback):
    """Compressed gradients; what was not sent is added to the next one.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        server_momentum: in [0, 1).
        schedule: of the step size, by round.
        downlink: `full`, `sparse`, or the settings of a compressor.
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: Spec = "top_k", server_momentum: float = 0.0,
        schedule: Spec | None = None, downlink: Spec = "full",
    ):
        super().__init__(Rule(feedback=1.0), server_lr, compressor, server_momentum=server_momentum, schedule=schedule,
                         downlink=downlink)


class Ef21(ErrorFeedback):
    """Compressed differences to a gradient estimate that client and server both keep.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        init: of the estimates: `full`, `compressed` or `zero` (the paper's h = C(g) after the first round).
        server_momentum: in [0, 1).
        schedule: of the step size, by round.
        downlink: `full`, `sparse`, or the settings of a compressor.
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: Spec = "top_k", init: str = "full",
        server_momentum: float = 0.0, schedule: Spec | None = None, downlink: Spec = "full",
    ):
        super().__init__(Rule(estimates=True), server_lr, compressor, init, server_momentum, schedule, downlink)


class Ef21Sgdm(ErrorFeedback):
    """EF21 on a running mean of the client's gradients, which removes the need for large batches.

    Args:
        server_lr: gamma, the step size.
        compressor: contractive.
        gradient_weight: a of v <- (1 - a) v + a g, in (0, 1]; 1 is EF21.
        init: of the estimates: `full`, `compressed` or `zero`.
        server_momentum: in [0, 1).
        schedule: of the step size, by round.
        downlink: `full`, `sparse`, or the settings of a compressor.
    """

    def __init__(
        self, server_lr: float = 0.1, compressor: Spec = "top_k", gradient_weight: float = 0.1,
        init: str = "full", server_momentum: float = 0.0, schedule: Spec | None = None, downlink: Spec = "full",
    ):
        check_number("gradient_weight", gradient_weight, above=0, at_most=1, advice="0.1 suits most problems.")
        rule = Rule(estimates=True, gradient_weight=float(gradient_weight))
        super().__init__(rule, server_lr, compressor, init, server_momentum, schedule, downlink)
