"""What the server of a gradient method sends: the whole model, or the compressed change of a copy that clients hold.

Server and clients hold the same w. In round t the server sends C(x_t - w_{t-1}) to those that hold w_{t-1}, and the
whole w_t = w_{t-1} + C(x_t - w_{t-1}) to the others; gradients are computed at w_t. What one change leaves out is in
the next one, so that w follows x.

Source: Gruntkowska, Tyurin and Richtarik, 2022, "EF21-P and Friends", arXiv:2209.15218, algorithm 1.
"""
import json
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor

from fedcore.arrays import LazyArray
from fedcore.catalogue import SCHEDULE_TRIAL
from fedcore.compressed import TRIAL_SHAPE
from fedcore.compression.base import Codec
from fedcore.compression.named import registered_compressor
from fedcore.errors import InvalidSetting
from fedcore.feedback import PAYLOAD
from fedcore.hub import Hub
from fedcore.payload import VectorRecord
from fedcore.registry import load
from fedcore.seeds import torch_generator
from fedcore.strategies.feedback_rule import NEVER
from fedcore.vectors import Model

FULL, SPARSE = "full", "sparse"
# Entries of a request: how the model's change is compressed, and after which round's model.
DOWNLINK, BASE_ROUND = "downlink", "base-round"


class Schedule(Protocol):
    """The step size of every round."""

    def lr(self, base_lr: float, position: int) -> float: ...


def round_schedule(spec: str | Mapping[str, Any] | None, server_lr: float) -> Schedule:
    """Return the schedule of a server's step size, by round.

    Raises:
        InvalidSetting: no such schedule, or a setting that it does not have.
    """
    if isinstance(spec, Mapping) and "unit" in spec:
        raise InvalidSetting("schedule.unit", spec["unit"], "left out", "The server's schedule counts rounds.")
    try:
        schedule: Schedule = load(SCHEDULE_TRIAL)(spec, server_lr)[0]
    except InvalidSetting as error:    # clients know schedules under another path
        name = error.name.removeprefix("train.")
        raise InvalidSetting(name, error.value, error.allowed, error.advice) from error
    return schedule


def changed(held: Tensor, payload: Tensor, codec: Codec) -> Tensor:
    """Return w after a change, shape (d,): on both ends the same bits.

    Args:
        held: w before it, shape (d,).
        payload: bytes; of a compressor that changes nothing, those of w itself, which a difference would round.
    """
    sent = codec.decode(payload)
    return sent if codec.is_exact else held + sent


class Downlink:
    """The way from the server to its clients.

    Args:
        spec: of the compressor of changes; None: models are sent whole.
    """

    def __init__(self, spec: Mapping[str, Any] | None):
        self.spec = None if spec is None else dict(spec)
        self._compressor = None if spec is None else registered_compressor(spec, DOWNLINK)
        if self._compressor is not None and self._compressor.codec([TRIAL_SHAPE], torch.float32).contraction is None:
            raise InvalidSetting(DOWNLINK, self.spec, "contractive",
                                 "Clients' models would leave the server's with a compressor that is not.")
        self._held: Tensor | None = None    # w, shape (d,)
        self._round = self._base = NEVER    # whose w that is, and after which round's w a change leaves off
        self._whole: ArrayRecord | None = None
        self._change: ArrayRecord | None = None

    @classmethod
    def of(cls, downlink: str | Mapping[str, Any], uplink: Mapping[str, Any]) -> "Downlink":
        """Read the setting `downlink`.

        Args:
            downlink: `full`, `sparse` (compressed as `uplink` is), or a compressor's settings.

        Raises:
            InvalidSetting: it is none of these, or no contractive compressor.
        """
        if isinstance(downlink, str):
            if downlink not in (FULL, SPARSE):
                raise InvalidSetting(DOWNLINK, downlink, "full, sparse, or the settings of a compressor",
                                     "For example downlink: {name: top_k, fraction: 0.05}.")
            return cls(uplink if downlink == SPARSE else None)
        return cls(downlink)

    def advance(self, model: Model, round_index: int, seed: int) -> None:
        """Prepare what is sent in a round, whose model is x."""
        if self._compressor is None:
            return
        self._base, self._round, self._change = self._round, round_index, None
        if self._held is None:
            self._held = model.params
        else:
            codec = self._compressor.codec([spec.shape for spec in model.layout.params], model.layout.dtype)
            target = model.params if codec.is_exact else model.params - self._held
            payload = codec.encode(target, torch_generator(seed, DOWNLINK, round_index))
            self._held = changed(self._held, payload, codec)
            self._change = ArrayRecord()
            self._change[PAYLOAD] = LazyArray(payload.numpy())
            for name, values in model.buffers.items():
                self._change[name] = Array(values.numpy())
        self._whole = VectorRecord(model.replace(self._held))

    def arrays(self, hub: Hub, after: int, config: ConfigRecord) -> ArrayRecord:
        """Return the arrays of a request in the present round, and say in its configuration what they are.

        Args:
            after: the last round of this client's that was used, or `NEVER`.
        """
        if self.spec is None:
            return hub.model_record()
        assert self._whole is not None
        config[DOWNLINK] = json.dumps(self.spec)
        if self._change is None or after != self._base:
            return self._whole
        config[BASE_ROUND] = self._base
        return self._change

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {"held": self._held, "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._held, self._round = state["held"], state["round"]
