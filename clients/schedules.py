"""Learning rates that change while a client trains.

A schedule is a function of a position, so that nothing but the position must be remembered. By default the position is
the number of local steps that this client has trained in all its tasks (kept in Flower's `Context.state`); with
`unit: versions` it is the version of the model that the task starts from, and all steps of a task share one rate.
"""
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch.optim.lr_scheduler import LRScheduler

from fedcore.errors import InvalidSetting
from fedcore.registry import check, resolve

PATH = "train.schedule"
Unit = Literal["steps", "versions"]
UNITS = get_args(Unit)
# These need what a schedule of positions cannot give: a metric, a function, or other schedulers.
UNSUITABLE = ("ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "LRScheduler")


class Schedule(Protocol):
    """The learning rate at every position."""

    def lr(self, base_lr: float, position: int) -> float: ...


class Constant:
    """The learning rate of the settings, always."""

    def lr(self, base_lr: float, position: int) -> float:
        """Return the base rate."""
        return base_lr


class Cosine:
    """Linear warm-up, then half a cosine down to `final_factor` of the rate, which it keeps.

    Args:
        total_steps: positions until the end of the descent, warm-up included.
        warmup_steps: positions at which the rate rises in equal steps to its full value.
        final_factor: share of the rate at the end, in [0, 1].

    Source: Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5, without restarts.
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0):
        if total_steps < 1:
            raise InvalidSetting(f"{PATH}.total_steps", total_steps, "at least 1")
        if not 0 <= warmup_steps < total_steps:
            raise InvalidSetting(f"{PATH}.warmup_steps", warmup_steps, f"from 0 to below total_steps={total_steps}")
        if not 0 <= final_factor <= 1:
            raise InvalidSetting(f"{PATH}.final_factor", final_factor, "in [0, 1]")
        self.total_steps, self.warmup_steps, self.final_factor = total_steps, warmup_steps, final_factor

    def lr(self, base_lr: float, position: int) -> float:
        """Return the rate at a position, counted from 0."""
        if position < self.warmup_steps:
            return base_lr * (position + 1) / (self.warmup_steps + 1)
        share = min(1.0, (position - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return base_lr * (self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * share)) / 2)


class TorchSchedule:
    """A scheduler of torch.optim.lr_scheduler, run once and tabulated.

    Torch's schedulers compute each rate from the one before. The table depends on the settings alone, so every process
    that fills it gets the same bits.
    """

    def __init__(self, scheduler: type[LRScheduler], settings: Mapping[str, Any]):
        self._class, self._settings = scheduler, dict(settings)
        self._tables: dict[float, list[float]] = {}
        self._runs: dict[float, LRScheduler] = {}

    def lr(self, base_lr: float, position: int) -> float:
        """Return the rate at a position, counted from 0; past the scheduler's end, its last rate."""
        table = self._tables.get(base_lr)
        if table is None:
            # The scheduler also drives momentum where it is told to; any optimizer that has one will do.
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base_lr, momentum=0.9)
            self._runs[base_lr] = self._class(optimizer, **self._settings)
            table = self._tables[base_lr] = [float(optimizer.param_groups[0]["lr"])]
            # Torch warns when a scheduler moves before its optimizer has.
            optimizer.step()
        scheduler = self._runs[base_lr]
        total = getattr(scheduler, "total_steps", math.inf)
        while len(table) <= position and len(table) < total:
            scheduler.step()
            table.append(float(scheduler.get_last_lr()[0]))
        return table[min(position, len(table) - 1)]


def make_schedule(spec: str | Mapping[str, Any] | None, base_lr: float = 1.0) -> tuple[Schedule, Unit]:
    """Return a schedule and the unit of its positions.

    Args:
        spec: registered name or `module:Class`, alone or under `name` among its settings and `unit`; None: constant.
        base_lr: the learning rate of the settings, to try the schedule out with.

    Raises:
        InvalidSetting: no such schedule, no such setting or unit, or a value out of its range.
    """
    if spec is None:
        return Constant(), "versions"
    settings, problems = check("schedules", spec, PATH)
    if problems:
        raise problems[0]
    name, unit = settings.pop("name"), settings.pop("unit", "steps")
    if unit not in UNITS:
        raise InvalidSetting(f"{PATH}.unit", unit, " or ".join(UNITS))
    found: Any = resolve("schedules", name)
    if found.__name__ in UNSUITABLE:
        raise InvalidSetting(PATH, name, "a schedule that follows from the number of steps alone")
    try:
        if not (isinstance(found, type) and issubclass(found, LRScheduler)):
            return found(**settings), unit
        schedule = TorchSchedule(found, settings)
        schedule.lr(base_lr, 1)
        return schedule, unit
    except InvalidSetting:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidSetting(PATH, dict(spec) if isinstance(spec, Mapping) else spec, "usable", f"{error}.") from error

