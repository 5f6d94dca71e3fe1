"""Every setting of FedCompass has its range and its error."""
import inspect

import pytest
import torch

from fedcore.errors import BadInput, InvalidSetting
from fedcore.strategies.fedcompass import FedCompass, client_share, weighted_sum

BAD = [
    ("max_local_steps", {"max_local_steps": 0}, "at least 1"),
    ("max_local_steps", {"max_local_steps": 50.0}, "whole number"),
    ("max_local_steps", {"max_local_steps": "many"}, "whole number"),
    ("min_local_steps", {"min_local_steps": 0}, "from 1 to 100"),
    ("min_local_steps", {"min_local_steps": 101}, "may not exceed max_local_steps"),
    ("min_local_steps", {"max_local_steps": 10}, "may not exceed max_local_steps"),
    ("min_local_steps", {"min_local_steps": 2.5}, "whole number"),
    ("latest_time_factor", {"latest_time_factor": 1.0}, "every jitter would make clients late"),
    ("latest_time_factor", {"latest_time_factor": float("nan")}, "above 1"),
    ("speed_momentum", {"speed_momentum": 0.0}, "above 0 and at most 1"),
    ("speed_momentum", {"speed_momentum": 1.1}, "above 0 and at most 1"),
    ("server_lr", {"server_lr": 0}, "above 0"),
    ("server_lr", {"server_lr": -0.9}, "above 0"),
    ("server_lr", {"server_lr": float("inf")}, "finite"),
    ("staleness", {"staleness": "exponential"}, "constant, polynomial, hinge"),
    ("staleness.a", {"staleness": {"name": "polynomial", "a": -0.5}}, "stale updates count more"),
    ("staleness.b", {"staleness": {"name": "hinge", "b": -1}}, "at least 0"),
    ("initial_steps", {"initial_steps": 19}, "from 20 to 100"),
    ("initial_steps", {"initial_steps": 101}, "from 20 to 100"),
    ("weights", {"weights": "loss"}, "equal, num_examples"),
    ("lr_decay", {"lr_decay": 0.0}, "above 0 and at most 1"),
    ("lr_decay", {"lr_decay": 1.01}, "above 0 and at most 1"),
    ("normalise_steps", {"normalise_steps": 1}, "true or false"),
    ("link_estimate", {"link_estimate": "yes"}, "true or false"),
    ("absence_s", {"absence_s": 0.0}, "above 0"),
]


@pytest.mark.parametrize(("setting", "arguments", "hint"), BAD)
def test_a_bad_setting_is_refused_with_its_name_and_what_is_allowed(setting, arguments, hint):
    with pytest.raises(InvalidSetting) as caught:
        FedCompass(**arguments)
    assert caught.value.name == setting
    assert hint in str(caught.value)
    assert isinstance(caught.value, BadInput) and isinstance(caught.value, ValueError)


def test_every_setting_is_tested_with_a_bad_value():
    assert {setting.split(".")[0] for setting, _, _ in BAD} == set(inspect.signature(FedCompass).parameters)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"min_local_steps": 1, "max_local_steps": 1},
        {"server_lr": 4.0},
        {"speed_momentum": 1},
        {"latest_time_factor": 1.0001, "lr_decay": 1},
        {"initial_steps": 100, "staleness": {"name": "hinge", "a": 0, "b": 0}},
    ],
)
def test_values_at_the_edges_are_allowed(arguments):
    assert FedCompass(**arguments).rules.min_local_steps >= 1


def test_first_tasks_have_the_fewest_steps_unless_told_otherwise():
    assert FedCompass(min_local_steps=7).rules.initial_steps == 7
    assert FedCompass(min_local_steps=7, initial_steps=30).rules.initial_steps == 30


def test_shares_are_equal_or_by_examples_and_never_renormalised():
    examples = {0: 30, 4: 10}
    assert client_share("equal", 0, examples, expected=8) == 1 / 8
    assert client_share("num_examples", 4, examples, expected=8) == 0.25


def test_weighing_by_examples_needs_some():
    with pytest.raises(InvalidSetting, match="No client has any examples"):
        client_share("num_examples", 0, {0: 0, 1: 0}, expected=2)


def test_the_weighted_sum_leaves_the_updates_untouched():
    updates = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    assert torch.equal(weighted_sum(updates, [0.5, 0.25]), torch.tensor([1.5, 3.0]))
    assert torch.equal(updates[0], torch.tensor([1.0, 2.0]))
