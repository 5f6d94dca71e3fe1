"""Types in words, and values against them."""
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidSetting
from fedcore.schema import convert, describe, nearest


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize("annotation, words", [
    (int, "a whole number"),
    (float, "a number"),
    (int | float, "a number"),
    (float | int | None, "a number or null"),
    (Optional[str], "text or null"),  # noqa: UP045 (users write it this way too)
    (Literal["a", "b"], "one of a, b"),
    (Literal["a"] | float, "a or a number"),
    (list[int], "a list of whole numbers"),
    (tuple[float, ...], "a list of numbers"),
    (list[Literal["a", "b"]], "a list of entries that are each one of a, b"),
    (list, "a list"),
    (dict[str, Any], "a mapping of names"),
    (dict[str, float], "a mapping of names to numbers"),
    (Path | str, "the path of a file or text"),
    (Any, "anything"),
    (Colour, "a Colour"),
    (Annotated[float, Gt(0)], "a number above 0"),
    (Annotated[int, Ge(1)] | None, "a whole number of at least 1 or null"),
    (Annotated[float, Ge(0), Le(1)], "a number of at least 0 and of at most 1"),
    (Annotated[float, Ge(0), Lt(1)], "a number of at least 0 and below 1"),
])
def test_a_type_is_said_in_words(annotation, words):
    assert describe(annotation) == words


@pytest.mark.parametrize("annotation, value, result", [
    (float, "1e-3", 1e-3), (float, 3, 3.0), (int, 3.0, 3), (int, "12", 12), (bool, True, True), (str, "3", "3"),
    (float | None, None, None), (list[float], [1, "2"], [1.0, 2.0]), (tuple[int, ...], [1, 2], (1, 2)),
    (dict[str, float], {"a": 1}, {"a": 1.0}), (Colour, "red", Colour.RED), (Any, {"a": [1]}, {"a": [1]}),
    (dict[str, Any], {"a": True}, {"a": True}), (float | str, "auto", "auto"), (Path, "a/b", Path("a/b")),
])
def test_a_value_becomes_what_the_annotation_says(annotation, value, result):
    assert convert(annotation, value, "setting") == result


@pytest.mark.parametrize("annotation, value", [
    (float, "fast"), (float, True), (float, None), (float, [1]), (float, float("inf")), (int, 1.5), (int, False),
    (int, "1.5"), (str, 3), (list[int], [1, True]), (list[int], [1.5]), (Literal["a"], "b"), (Colour, "green"),
    (Annotated[float, Gt(0)], 0), (Annotated[int, Ge(1)], 0), (dict[str, float], {"a": "b"}), (bool, "perhaps"),
    (float, 10**400),
])
def test_a_value_that_does_not_fit_is_refused_with_what_is_allowed(annotation, value):
    with pytest.raises(InvalidSetting) as caught:
        convert(annotation, value, "some.setting")
    assert caught.value.name == "some.setting"
    assert caught.value.value == value
    assert caught.value.allowed in (describe(annotation), describe(annotation).replace("a number", "a finite number"))


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                          lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_any_value_is_converted_or_refused(value):
    for annotation in (int, float | None, Annotated[float, Gt(0)], list[float], dict[str, float], Literal["a", "b"]):
        try:
            converted = convert(annotation, value, "setting")
        except InvalidSetting:
            continue
        assert convert(annotation, converted, "setting") == converted


@pytest.mark.parametrize("word, meant", [
    ("fedavgg", "fedavg"), ("FedAvg", "fedavg"), ("Fed-Prox", "fed_prox"), ("something", ""), (3, ""), (None, ""),
])
def test_the_nearest_word_is_asked_for(word, meant):
    assert nearest(word, ["fedavg", "fed_prox"]) == (f"Did you mean {meant}?" if meant else "")
