"""Checks of strategies' settings, made when a strategy is built, so that a bad run fails before a client connects."""
import sys
from collections.abc import Sequence

from fedcore.errors import InvalidSetting


def check_count(name: str, value: object, at_least: int, at_most: int | None = None, advice: str = "") -> None:
    """Raise `InvalidSetting` unless `value` is a whole number within bounds."""
    fits = isinstance(value, int) and not isinstance(value, bool) and at_least <= value
    if not fits or (at_most is not None and value > at_most):  # type: ignore[operator]
        limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise InvalidSetting(name, value, f"a whole number {limits}", advice)


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    advice: str = "",
) -> None:
    """Raise `InvalidSetting` unless `value` is a finite number within bounds; `above` and `below` exclude the bound."""
    fits = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        and (above is None or value > above) and (at_least is None or value >= at_least)
        and (below is None or value < below) and (at_most is None or value <= at_most)
    )
    if not fits:
        bounds = (("above", above), ("of at least", at_least), ("below", below), ("at most", at_most))
        limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise InvalidSetting(name, value, f"a finite number {limits}".rstrip(), advice)


def check_choice(name: str, value: object, choices: Sequence[str], advice: str = "") -> None:
    """Raise `InvalidSetting` unless `value` is one of `choices`."""
    if value not in choices:
        raise InvalidSetting(name, value, f"one of {', '.join(choices)}", advice)


def check_switch(name: str, value: object) -> None:
    """Raise `InvalidSetting` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise InvalidSetting(name, value, "true or false")
