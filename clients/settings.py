"""How a client trains, as the `train` section of an experiment says it."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedcore.errors import InvalidSetting

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainSettings:
    """Local training, unless a request says otherwise.

    Attributes:
        optimizer: registered name or `module:Class`, alone or under `name` among its settings.
        lr: learning rate; finite and above 0.
        batch_size: examples per local step.
        local_steps: optimizer steps per task; None when `local_epochs` is given; 10 when neither is.
        local_epochs: passes over the client's data per task; None when `local_steps` is given.
        schedule: as `optimizer`; None keeps the learning rate.
        dtype: `float32` or `float64`.
        device: `cpu`, `cuda`, ..., or `auto` for a GPU where there is one.
        clip_norm: largest l2 norm of a minibatch gradient; longer ones are scaled down. None: no limit.
    """

    optimizer: str | Mapping[str, Any] = "sgd"
    lr: float = 0.05
    batch_size: int = 32
    local_steps: int | None = None
    local_epochs: int | None = None
    schedule: str | Mapping[str, Any] | None = None
    dtype: str = "float32"
    device: str = "auto"
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise InvalidSetting("train.lr", self.lr, "a finite number above 0")
        for name in ("batch_size", "local_steps", "local_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSetting(f"train.{name}", value, "at least 1")
        if self.local_steps is not None and self.local_epochs is not None:
            raise InvalidSetting(
                "train.local_epochs", self.local_epochs, f"left out when local_steps={self.local_steps} is given"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InvalidSetting("train.clip_norm", self.clip_norm, "above 0, or left out")
        if self.dtype not in DTYPES:
            raise InvalidSetting("train.dtype", self.dtype, " or ".join(DTYPES))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """Where training runs.

        Raises:
            InvalidSetting: this machine has no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidSetting("train.device", self.device, "a device of this machine", f"{reason}.") from error
        return device

    def steps_for(self, batches_per_pass: int) -> int:
        """Return the local steps of a task on data that make up so many batches."""
        if self.local_epochs is not None:
            return self.local_epochs * batches_per_pass
        return 10 if self.local_steps is None else self.local_steps
