"""How much an update counts that was computed from an older model.

An update of staleness u (server versions published since its base was handed out) is multiplied by s(u), with
s(0) = 1 and s non-increasing.

Source: Xie et al., 2019, arXiv:1903.03934, section 5.2 (constant, polynomial, hinge). Some public implementations
raise 1 + u to the power +a, which makes stale updates count more; here the exponent is -a, as in the paper.
"""
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Self

from fedcore.errors import InvalidSetting

# What each function may be given, with the values used when it is not.
DEFAULTS: dict[str, dict[str, float]] = {
    "constant": {},
    "polynomial": {"a": 0.5},
    "hinge": {"a": 10.0, "b": 4.0},
}


def constant(staleness: int) -> float:
    """Return 1: age does not matter."""
    return 1.0


def polynomial(staleness: int, a: float) -> float:
    """Return (1 + u)^(-a)."""
    return float((1 + staleness) ** -a)


def hinge(staleness: int, a: float, b: float) -> float:
    """Return 1 up to a staleness of b, then 1 / (a (u - b) + 1)."""
    return 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)


@dataclass(frozen=True)
class Staleness:
    """A staleness function with its constants; call it with a staleness (>= 0) to get a factor in (0, 1].

    Attributes:
        name: `constant`, `polynomial` or `hinge`.
        a: exponent of `polynomial` or slope of `hinge`, at least 0.
        b: staleness up to which `hinge` does not discount, at least 0.
    """

    name: str
    a: float = 0.0
    b: float = 0.0

    @classmethod
    def of(cls, spec: "str | Mapping[str, Any] | Staleness") -> Self:
        """Build a function from what a user types: its name, or `{name, a, b}`.

        Raises:
            InvalidSetting: the name or a key is unknown, or a constant is not a finite number of at least 0.
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            raise InvalidSetting("staleness", spec, _names(), "Write a name, or {name: polynomial, a: 0.5}.")
        name = spec.get("name")
        if not isinstance(name, str) or name not in DEFAULTS:
            raise InvalidSetting("staleness", name, _names(), _nearest(name, DEFAULTS))
        given = {key: value for key, value in spec.items() if key != "name"}
        for key, value in given.items():
            _check_constant(name, key, value)
        return cls(name, **{key: float(value) for key, value in {**DEFAULTS[name], **given}.items()})

    def __call__(self, staleness: int) -> float:
        """Return the factor of an update that is `staleness` versions old.

        The result is never 0: a factor too small for a float becomes the smallest positive one.
        """
        assert staleness >= 0, staleness
        if self.name == "constant":
            return constant(staleness)
        factor = hinge(staleness, self.a, self.b) if self.name == "hinge" else polynomial(staleness, self.a)
        return max(factor, math.ulp(0.0))


def _names() -> str:
    return f"one of {', '.join(DEFAULTS)}"


def _nearest(name: object, known: Mapping[str, object]) -> str:
    close = get_close_matches(str(name), known, n=1)
    return f"Did you mean {close[0]!r}?" if close else "The usual choice is polynomial."


def _check_constant(name: str, key: str, value: object) -> None:
    if key not in DEFAULTS[name]:
        takes = " and ".join(DEFAULTS[name]) or "no constant"
        raise InvalidSetting(f"staleness.{key}", value, f"left out: {name} takes {takes}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        advice = "A negative one would make stale updates count more." if key == "a" else "It counts server versions."
        raise InvalidSetting(f"staleness.{key}", value, "a finite number of at least 0", advice)
