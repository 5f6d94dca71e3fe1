"""The staleness functions shared by FedAsync, FedBuff and FedCompass."""
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import builds, floats, integers, just, one_of

from fedcore.errors import BadInput, InvalidSetting
from fedcore.strategies.staleness import Staleness, hinge, polynomial

REPOSITORY = Path(__file__).parents[2]
functions = one_of(
    just(Staleness.of("constant")),
    builds(lambda a: Staleness.of({"name": "polynomial", "a": a}), floats(0, 50)),
    builds(lambda a, b: Staleness.of({"name": "hinge", "a": a, "b": b}), floats(0, 50), floats(0, 20)),
)


@given(function=functions)
def test_a_fresh_update_counts_in_full(function):
    assert function(0) == 1.0


@given(function=functions, staleness=integers(0, 10_000))
def test_an_older_update_never_counts_more(function, staleness):
    assert 0 < function(staleness + 1) <= function(staleness) <= 1


def test_polynomial_discounts_by_default_with_one_over_the_root():
    assert Staleness.of("polynomial")(3) == 0.5
    assert polynomial(3, 1.0) == 0.25


@given(a=floats(0, 100), b=integers(0, 50))
def test_hinge_is_continuous_where_it_bends(a, b):
    assert hinge(b, a, b) == 1.0
    assert hinge(b, a, b - 1e-12) == pytest.approx(1.0, abs=1e-9)


def test_hinge_has_the_usual_constants_by_default():
    function = Staleness.of("hinge")
    assert [function(4), function(5)] == [1.0, 1 / 11]


def test_constant_never_discounts():
    assert Staleness.of("constant")(10**9) == 1.0


@pytest.mark.parametrize(
    ("spec", "setting", "hint"),
    [
        ("polynomail", "staleness", "Did you mean 'polynomial'?"),
        ({"name": "linear"}, "staleness", "constant, polynomial, hinge"),
        ({"a": 0.5}, "staleness", "constant, polynomial, hinge"),
        ({"name": ["hinge"]}, "staleness", "constant, polynomial, hinge"),
        (0.5, "staleness", "Write a name"),
        (None, "staleness", "Write a name"),
        ({"name": "polynomial", "a": -0.5}, "staleness.a", "stale updates count more"),
        ({"name": "polynomial", "a": "0.5"}, "staleness.a", "a finite number"),
        ({"name": "polynomial", "a": float("nan")}, "staleness.a", "a finite number"),
        ({"name": "polynomial", "a": float("inf")}, "staleness.a", "a finite number"),
        ({"name": "polynomial", "a": 10**400}, "staleness.a", "a finite number"),
        ({"name": "polynomial", "a": True}, "staleness.a", "a finite number"),
        ({"name": "polynomial", "b": 1}, "staleness.b", "polynomial takes a"),
        ({"name": "hinge", "b": -1}, "staleness.b", "at least 0"),
        ({"name": "constant", "a": 1}, "staleness.a", "constant takes no constant"),
    ],
)
def test_a_bad_staleness_setting_is_refused_with_its_name(spec, setting, hint):
    with pytest.raises(InvalidSetting, match="must be") as caught:
        Staleness.of(spec)
    assert caught.value.name == setting
    assert hint in str(caught.value)
    assert isinstance(caught.value, BadInput)


def test_the_package_is_not_importable_under_a_second_name():
    command = [sys.executable, "-c", "import strategies"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "This package is fedcore.strategies" in result.stderr
