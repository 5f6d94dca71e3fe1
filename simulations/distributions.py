"""How a figure such as a device's speed differs from node to node: one draw per node, a pure function of the seed.

Every distribution here answers `draw(seed, partition, purpose)` by inverting its cumulative distribution at the one
number that `fraction` derives from the arguments. Nothing is stored, so 100,000 nodes cost nothing until they are used.
"""
import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, runtime_checkable

from fedcore.errors import InvalidSetting, MissingData, UnknownSetting
from fedcore.registry import build
from fedcore.schema import nearest
from fedcore.seeds import derive_seed

STANDARD_NORMAL = NormalDist()
# No draw of a cut-off normal distribution is smaller than this share of its mean: zero has to stay out of reach.
SMALLEST_SHARE = 1e-9


@runtime_checkable
class Distribution(Protocol):
    """What a user's own distribution must offer."""

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        """Return the value of node `partition`, the same at every call with the same arguments."""


def fraction(seed: int, *parts: int | str) -> float:
    """Return a number in the open interval (0, 1), uniform over `parts`."""
    return ((derive_seed(seed, *parts) >> 11) + 0.5) * 2.0**-52


def jitter_factor(relative_std: float, seed: int, *parts: int | str) -> float:
    """Return a log-normal factor with mean 1 and the given relative standard deviation."""
    variance = math.log1p(relative_std * relative_std)
    return math.exp(math.sqrt(variance) * STANDARD_NORMAL.inv_cdf(fraction(seed, *parts)) - variance / 2)


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None,
                 at_most: float | None = None, advice: str = "") -> float:
    """Return `value` as a float.

    Raises:
        InvalidSetting: it is no number, not finite, or outside the range.
    """
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"at least {at_least:g}"] if at_least is not None else []
    bounds += [f"at most {at_most:g}"] if at_most is not None else []
    allowed = " ".join(["a finite number", " and ".join(bounds)]).rstrip()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidSetting(name, value, allowed, advice)
    below = (above is not None and value <= above) or (at_least is not None and value < at_least)
    if below or (at_most is not None and value > at_most):
        raise InvalidSetting(name, value, allowed, advice)
    return float(value)


def as_distribution(value: float | str | Mapping[str, Any] | Distribution, path: str) -> Distribution:
    """Return the distribution that a setting describes; a number is the same for every node.

    Args:
        value: a number, a distribution's name or settings as in an experiment file, or a distribution.
        path: the setting's full name, for messages.

    Raises:
        InvalidSetting: there is no such distribution, or its settings are out of range.
    """
    if isinstance(value, (str, Mapping)):
        return as_distribution(build("distributions", value, path), path)
    if not isinstance(value, Distribution):
        return Constant(check_number(path, value, at_least=0, advice="A distribution is written {name: ..., ...}."))
    return value


def check_keys(section: Mapping[str, Any], path: str, known: Iterable[str]) -> None:
    """Refuse keys of a section that are not known.

    Raises:
        UnknownSetting: with the nearest right spelling.
    """
    known = list(known)
    for key in section:
        if key not in known:
            raise UnknownSetting(f"{path}.{key}", section[key], ", ".join(known), nearest(key, known))


def _spread(mean: float, std: float | None, relative_std: float | None) -> float:
    if (std is None) == (relative_std is None):
        raise InvalidSetting("std, relative_std", (std, relative_std), "one of the two", "relative_std is std / mean.")
    if std is not None:
        return check_number("std", std, at_least=0)
    return mean * check_number("relative_std", relative_std, at_least=0)


class Constant:
    """The same value for every node."""

    def __init__(self, value: float):
        self.value = check_number("value", value, at_least=0)

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        return self.value


class Uniform:
    """Equally likely between `low` and `high`."""

    def __init__(self, low: float, high: float):
        self.low = check_number("low", low, at_least=0)
        self.high = check_number("high", high, above=0, at_least=self.low)

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        return self.low + (self.high - self.low) * fraction(seed, partition, purpose)


class Normal:
    """A normal distribution cut off at zero.

    Args:
        mean: of the normal distribution before it is cut, above 0. Cutting raises the mean of the draws when the
            spread is wide: by 3 % at relative_std 0.5, by less than 0.05 % at 0.3.
        std: standard deviation before it is cut.
        relative_std: `std` / `mean`, to be given instead of `std`.
        minimum: draws below are raised to it.
    """

    def __init__(self, mean: float, std: float | None = None, relative_std: float | None = None, minimum: float = 0.0):
        self.mean = check_number("mean", mean, above=0)
        self.std = _spread(self.mean, std, relative_std)
        self.minimum = check_number("minimum", minimum, at_least=0)
        self._below_zero = STANDARD_NORMAL.cdf(-self.mean / self.std) if self.std else 0.0

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        # Counted from the upper end, where one minus a small probability loses no digits.
        upper = (1.0 - self._below_zero) * (1.0 - fraction(seed, partition, purpose))
        value = self.mean - self.std * STANDARD_NORMAL.inv_cdf(upper) if self.std else self.mean
        return max(value, self.minimum, self.mean * SMALLEST_SHARE)


class LogNormal:
    """A log-normal distribution, given by the mean and the standard deviation of its values (not of their logarithms).

    Args:
        mean: mean of the values, above 0.
        std: standard deviation of the values.
        relative_std: `std` / `mean`, to be given instead of `std`.
        minimum: draws below are raised to it.
    """

    def __init__(self, mean: float, std: float | None = None, relative_std: float | None = None, minimum: float = 0.0):
        self.mean = check_number("mean", mean, above=0)
        self.std = _spread(self.mean, std, relative_std)
        self.minimum = check_number("minimum", minimum, at_least=0)
        self._relative_std = self.std / self.mean

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        return max(self.mean * jitter_factor(self._relative_std, seed, partition, purpose), self.minimum)


class Exponential:
    """An exponential distribution.

    Args:
        mean: above 0.
        minimum: draws below are raised to it. The smallest of n draws is about `mean` / n, so among many nodes one
            would be faster than any computer is; `minimum` says where that ends. The default leaves the draws alone.
    """

    def __init__(self, mean: float, minimum: float = 0.0):
        self.mean = check_number("mean", mean, above=0)
        self.minimum = check_number("minimum", minimum, at_least=0)

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        return max(-self.mean * math.log(fraction(seed, partition, purpose)), self.minimum)


class Trace:
    """Measured values, one per node in the order of the partitions.

    Args:
        values: the figures themselves, or
        path: a file of them: JSON (a list of numbers) or CSV (one number per line; a header is allowed).
        column: which column of a CSV file with a header to read; the last one by default.
        cycle: begin again at the first value when there are more nodes than values, instead of refusing.
    """

    def __init__(self, values: list[float] | None = None, path: Path | None = None, column: str | None = None,
                 cycle: bool = False):
        if (values is None) == (path is None):
            raise InvalidSetting("values, path", (values, path), "one of the two", "Give a list or name a file.")
        figures: Any = values if path is None else read_numbers(Path(path), column)
        if not isinstance(figures, (list, tuple)) or not figures:
            raise InvalidSetting("values", figures, "a list of at least one number", "Give one per node.")
        name = "values" if path is None else str(path)
        self.values = [check_number(f"{name}[{i}]", value, at_least=0) for i, value in enumerate(figures)]
        self.cycle = cycle

    def draw(self, seed: int, partition: int, purpose: str) -> float:
        if partition >= len(self.values) and not self.cycle:
            raise InvalidSetting(
                purpose, f"trace of {len(self.values)} values", f"one value per node, at least {partition + 1}",
                "Set cycle: true to begin again at the first value.",
            )
        return self.values[partition % len(self.values)]


def read_numbers(path: Path, column: str | None = None) -> list[float]:
    """Return the numbers in a JSON list or in one column of a CSV file.

    Raises:
        MissingData: the file is not there, or holds something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return json.load(file) if path.suffix == ".json" else _csv_column(csv.reader(file), path, column)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MissingData(f"{path} cannot be read as a list of numbers: {error}.") from error


def _csv_column(rows: Iterable[list[str]], path: Path, column: str | None) -> list[float]:
    filled = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    header = filled[0] if filled and _number(filled[0][-1]) is None else None
    if column is not None and column not in (header or []):
        first = ",".join(filled[0]) if filled else ""
        raise MissingData(f"{path} has no column {column!r}; its first line is {first!r}.")
    index = -1 if column is None or header is None else header.index(column)
    numbers = []
    for row in filled[1:] if header else filled:
        number = _number(row[index]) if len(row) > max(index, 0) else None
        if number is None:
            raise MissingData(f"{path} holds {','.join(row)!r} where a number was expected.")
        numbers.append(number)
    return numbers


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
