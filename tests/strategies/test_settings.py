"""The range checks that strategies share."""
import pytest

from fedcore.errors import InvalidSetting
from fedcore.strategies.settings import check_choice, check_count, check_number, check_switch


@pytest.mark.parametrize("value", [0, 11, 1.0, True, None, "3", float("nan")])
def test_a_count_must_be_a_whole_number_within_bounds(value):
    with pytest.raises(InvalidSetting, match="a whole number from 1 to 10. Try 5."):
        check_count("rounds", value, 1, 10, "Try 5.")


@pytest.mark.parametrize("value", [1, 10])
def test_the_bounds_of_a_count_are_allowed(value):
    check_count("rounds", value, 1, 10)


@pytest.mark.parametrize("value", [0, -1, 1.5, 10**400, float("nan"), float("inf"), "0.5", False, None, [1]])
def test_a_number_must_be_finite_and_within_bounds(value):
    with pytest.raises(InvalidSetting, match="a finite number above 0 and at most 1"):
        check_number("share", value, above=0, at_most=1)


def test_exclusive_and_inclusive_bounds_differ():
    check_number("share", 1, at_most=1)
    check_number("share", 0, at_least=0)
    with pytest.raises(InvalidSetting, match="of at least 0 and below 1"):
        check_number("share", 1, at_least=0, below=1)


def test_a_choice_names_what_is_allowed():
    check_choice("weights", "equal", ("equal", "num_examples"))
    with pytest.raises(InvalidSetting, match="weights='size', but it must be one of equal, num_examples"):
        check_choice("weights", "size", ("equal", "num_examples"))


def test_a_switch_is_a_boolean():
    check_switch("link_estimate", True)
    with pytest.raises(InvalidSetting, match="true or false"):
        check_switch("link_estimate", 1)
