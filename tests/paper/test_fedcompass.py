"""What FedCompass claims, at small scale, and what it does not deliver (see docs/algorithms/fedcompass.md).

Only the orderings that held for every target and every choice of data that was tried are asserted; all the others are
measured by `python tests/paper/fedcompass_study.py`.
"""
import statistics

import pytest

from tests.paper.fedcompass_study import (
    LIMIT_METHODS,
    LINKS,
    LOOSE_TARGET,
    QMAX,
    QMIN,
    REPORT_SEEDS,
    TARGET,
    Condition,
    limits,
    median_time,
    trials,
)

pytestmark = [pytest.mark.paper, pytest.mark.slow]


@pytest.mark.parametrize("links", LINKS)
def test_with_exponential_step_times_it_is_sooner_than_fedavg_with_as_many_steps_and_than_fedasync(links):
    condition = Condition("exponential", links)
    compass = trials("FedCompass", condition, REPORT_SEEDS)
    for name in (f"FedAvg Q={QMAX}", "FedAsync"):
        others = trials(name, condition, REPORT_SEEDS)
        for target in (LOOSE_TARGET, TARGET):
            assert median_time(compass, target) < median_time(others, target), (name, target)


@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize("step_times", ["equal", "normal"])
def test_with_equal_or_normal_step_times_it_reaches_the_target_with_staleness_below_the_number_of_clients(
    step_times, links
):
    found = trials("FedCompass", Condition(step_times, links), REPORT_SEEDS)
    assert all(one.seconds_to(TARGET) < 10.0 for one in found)
    assert max(one.max_staleness for one in found) < 10


def test_with_equal_step_times_and_free_links_fedavg_with_few_steps_is_sooner_at_the_price_of_more_updates():
    condition = Condition("equal")
    few, compass = (trials(name, condition, REPORT_SEEDS) for name in (f"FedAvg Q={QMIN}", "FedCompass"))
    assert median_time(few) < median_time(compass)
    assert statistics.median(one.updates for one in few) > statistics.median(one.updates for one in compass)


def test_fast_clients_dominate_with_two_classes_each_and_normalised_steps_take_back_a_part():
    condition = Condition("exponential", classes_per_client=2)
    for seed in (2, 3):
        fedavg, plain, normalised = (limits(name, condition, (seed,), horizon_s=10.0)[0] for name in LIMIT_METHODS)
        assert plain < normalised < fedavg
