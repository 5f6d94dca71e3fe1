"""Numbers for readers: axis scales with round ticks, and figures with their units."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SECONDS, BYTES, COUNT, SHARE, NUMBER = "seconds", "bytes", "count", "share", "number"

SECOND_UNITS = ((172_800.0, 86_400.0, "days"), (7_200.0, 3_600.0, "h"), (600.0, 60.0, "min"), (2.0, 1.0, "s"),
                (0.0, 1e-3, "ms"))
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
COUNT_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
THIN = "\u202f"     # narrow no-break space, between digits and their unit
NO_FIGURE = "–"


@dataclass(frozen=True)
class Scale:
    """An axis: maps a value to its place between 0 and 1.

    Args:
        low, high: the values at both ends, low < high; positive when `log`.
        kind: what the values are, one of the constants above; decides units and tick labels.
        log: whether the axis is logarithmic.
    """

    low: float
    high: float
    kind: str = NUMBER
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`; clipped to that range."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    @property
    def unit(self) -> tuple[float, str]:
        """Divisor and name of the unit that the tick labels are written in."""
        reach = max(abs(self.low), abs(self.high))
        if self.kind == SECONDS:
            return next((size, name) for least, size, name in SECOND_UNITS if reach >= least)
        if self.kind == BYTES:
            return next(((size, name) for size, name in BYTE_UNITS if reach >= size), (1.0, "B"))
        return (0.01, "%") if self.kind == SHARE else (1.0, "")

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Return tick places (0 to 1) with their labels, without units."""
        size, _ = self.unit
        values = log_ticks(self.low, self.high) if self.log else round_ticks(self.low / size, self.high / size, about)
        if not self.log:
            step = values[1] - values[0] if len(values) > 1 else 1.0
            return [(self.place(value * size), tick_label(value, step, self.kind)) for value in values]
        return [(self.place(value), f"{value / size:.4g}" if self.kind != COUNT else count(value)) for value in values]


def scale_over(values: Sequence[float], kind: str, log: bool = False, from_zero: bool = False) -> Scale:
    """Return the scale that shows all finite values, with a little air when it does not start at zero."""
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(usable), max(usable)) if usable else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (0 if from_zero else 0.5), high + 0.5)
    if not log and not from_zero:
        air = 0.04 * (high - low)
        low, high = (max(low - air, 0.0) if low >= 0 else low - air), high + air
    if kind == SHARE:
        high = min(high, 1.0) if max(usable, default=1.0) <= 1.0 else high
    return Scale(low, high, kind, log)


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two values, at most `about` + 1 of them."""
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two positive values, with their doubles and fivefolds when there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * 10.0 ** power for power in powers for factor in factors]
        inside = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            break
    return inside[:: math.ceil(len(inside) / 7) or 1]


def tick_label(value: float, step: float, kind: str) -> str:
    """Return a tick's text with as many decimals as its step needs."""
    if abs(value) < step * 1e-6:
        return "0"
    if kind == COUNT:
        return count(value)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}" if decimals <= 4 and abs(value) < 1e6 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Return a duration in words: 0.35 s, 42.1 s, 12 min 5 s, 3 h 20 min, 2 days 4 h."""
    if value is None or not math.isfinite(value):
        return NO_FIGURE
    if value < 100:
        return f"{value:.3g}{THIN}s" if value >= 0.01 or value == 0 else f"{value * 1000:.2g}{THIN}ms"
    whole = round(value)
    for (size, name), (part, part_name) in pairwise(((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"))):
        if whole >= size and (size > 60 or whole >= 600):
            rest = whole % size // part
            return f"{whole // size}{THIN}{name}" + (f" {rest}{THIN}{part_name}" if rest else "")
    return f"{whole}{THIN}s"


def data_size(value: float | None) -> str:
    """Return a number of bytes with a decimal unit: 812 B, 3.41 MB."""
    if value is None or not math.isfinite(value):
        return NO_FIGURE
    size, name = next(((size, name) for size, name in BYTE_UNITS if value >= size), (1.0, "B"))
    return f"{_digits(value / size)}{THIN}{name}"


def count(value: float | None) -> str:
    """Return a count: 640, 12.5k, 3.2M."""
    if value is None or not math.isfinite(value):
        return NO_FIGURE
    if abs(value) < 10_000:
        return f"{value:,.0f}".replace(",", THIN) if float(value).is_integer() else f"{value:.3g}"
    size, name = next((size, name) for size, name in COUNT_UNITS if abs(value) >= size)
    return f"{value / size:.3g}{name}" if abs(value) < 1000 * size else f"{value / size:.0f}{name}"


def percent(value: float | None) -> str:
    """Return a share as a percentage: 0.9342 -> 93.4 %; more digits next to 100 %, where they matter."""
    if value is None or not math.isfinite(value):
        return NO_FIGURE
    if 0.999 < value < 1:
        return f"{math.floor(value * 10_000) / 100:.2f}{THIN}%"
    text = f"{value * 100:.1f}"
    return f"{text.removesuffix('.0')}{THIN}%"


def figure(value: object) -> str:
    """Return any recorded figure for a table: whole numbers in full, others with three digits, the rest as text."""
    if value is None:
        return NO_FIGURE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", THIN)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def metric_kind(metric: str) -> str:
    """Return how a metric's values are written: accuracies are shares, everything else a plain number."""
    return SHARE if "accuracy" in metric.lower() else NUMBER


def metric_figure(metric: str, value: float | None) -> str:
    """Return a metric's value as a reader expects it: accuracy in per cent, a loss as a number."""
    return percent(value) if metric_kind(metric) == SHARE else figure(value)


def goal_words(metric: str, value: float) -> str:
    """Return a target in words: `93 % accuracy`, `a loss of 0.3`."""
    if metric_kind(metric) == SHARE:
        return f"{percent(value)} {metric_words(metric)}"
    return f"a {metric_words(metric)} of {figure(value)}"


def metric_words(metric: str) -> str:
    """Return a metric's name without underscores."""
    return metric.replace("_", " ").replace("-", " ")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"
