"""Values against annotations: what a type allows, in words, and the conversion of what a file says."""
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fedcore.errors import InvalidSetting

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "the path of a file",
    type(None): "null",
    Any: "anything",
    object: "anything",
}
BOUNDS = (
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Ge, "ge", "of at least"),
    (annotated_types.Lt, "lt", "below"),
    (annotated_types.Le, "le", "of at most"),
)


def nearest(word: object, known: Iterable[str]) -> str:
    """Return the question "Did you mean ...?" when a known word resembles this one, otherwise nothing."""
    if not isinstance(word, str):
        return ""
    by_plain_form = {name.lower().replace("-", "_"): name for name in known}
    close = get_close_matches(word.lower().replace("-", "_").replace(" ", "_"), by_plain_form, n=1, cutoff=0.55)
    return f"Did you mean {by_plain_form[close[0]]}?" if close else ""


def is_union(annotation: Any) -> bool:
    """Say whether an annotation is a union, in either notation."""
    return get_origin(annotation) in (Union, types.UnionType)


def members(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows: those of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if is_union(annotation):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def mentions(annotation: Any, wanted: Iterable[Any]) -> bool:
    """Say whether one of the types occurs in an annotation, at any depth."""
    wanted = tuple(wanted)
    return annotation in wanted or any(mentions(part, wanted) for part in get_args(annotation))


def describe(annotation: Any) -> str:
    """Return what an annotation allows, in words that follow "must be"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounded(describe(args[0]), args[1:])
    if is_union(annotation):
        words = dict.fromkeys(describe(part) for part in args)
        # A float annotation takes whole numbers too.
        if "a number" in words:
            words.pop("a whole number", None)
        return " or ".join(words)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        inner = "" if not args or args[1] in (Any, object) else f" to {_plural(args[1])}"
        return f"a mapping of names{inner}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, (Sequence, set)):
        return f"a list of {_plural(args[0])}" if args and args[0] not in (Any, object) else "a list"
    if annotation in WORDS:
        return WORDS[annotation]
    return f"a {getattr(annotation, '__name__', str(annotation))}"


def _plural(annotation: Any) -> str:
    words = describe(annotation)
    if words.startswith(("a number", "a whole number")):
        return words.removeprefix("a ").replace("number", "numbers", 1)
    return f"entries that are each {words}"


def _bounded(words: str, metadata: Iterable[Any]) -> str:
    """Add the limits that an `Annotated` carries to the description of its type."""
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    limits = [
        f"{word} {getattr(item, name):g}" for kind, name, word in BOUNDS for item in flat if isinstance(item, kind)
    ]
    texts = [item.documentation for item in flat if isinstance(item, annotated_types.DocInfo)]
    return texts[0] if texts else " ".join([words, " and ".join(limits)]).rstrip()


def convert(annotation: Any, value: Any, name: str) -> Any:
    """Return a value from a file as its annotation wants it; text that reads as a number becomes one.

    Raises:
        InvalidSetting: the value does not fit; `name` is the setting.
    """
    if _has_bool(value) and not mentions(annotation, (bool, Any, object)):
        raise InvalidSetting(name, value, describe(annotation), "Numbers are written with digits.")
    try:
        return _adapter(annotation)(value)
    except (ValidationError, OverflowError) as error:
        raise InvalidSetting(name, value, _allowed(annotation, value), _advice(annotation, value)) from error


def _adapter(annotation: Any) -> Callable[[Any], Any]:
    """Return pydantic's conversion for a type; a type that pydantic does not know lets everything pass."""
    try:
        return TypeAdapter(
            annotation, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
        ).validate_python
    except PydanticUserError as error:
        if isinstance(error, PydanticSchemaGenerationError):
            return lambda value: value
        # Types with a configuration of their own (dataclasses, models) refuse another one.
        return TypeAdapter(annotation).validate_python


def _allowed(annotation: Any, value: Any) -> str:
    text = describe(annotation)
    if isinstance(value, float) and not math.isfinite(value):
        text = text.replace("a number", "a finite number")
    return text


def _advice(annotation: Any, value: Any) -> str:
    choices = [str(choice) for part in members(annotation) if get_origin(part) is Literal for choice in get_args(part)]
    return nearest(value, choices)


def _has_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(_has_bool(item) for item in value))
