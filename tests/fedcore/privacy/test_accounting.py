"""What releases cost: published figures, dp-accounting's, and what composition must keep."""
import math

import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis.strategies import floats, integers

from fedcore.errors import InvalidSetting
from fedcore.privacy.accounting import (
    Release,
    Spending,
    delta_of,
    epsilon_of,
    mu_of,
    noise_for_sampled,
    plan,
)
from fedcore.strategies.private_plan import BETWEEN, FULL, LOCAL_STEPS, Schedule, make_budget

DELTA = 1e-5
ratios, epsilons = floats(0.01, 10), floats(0.05, 20)


@pytest.mark.parametrize("noise_multiplier, times, epsilon", [
    (10, 100, 4.377178), (20, 300, 3.708635), (2, 1, 1.993091),
])
def test_full_batch_releases_cost_the_published_figures(noise_multiplier, times, epsilon):
    assert plan((Release(noise_multiplier, times=times),)).epsilon(DELTA) == pytest.approx(epsilon, abs=1e-5)


@pytest.mark.parametrize("epsilon, mu", [
    (0.5, 0.142211), (1, 0.268051), (2, 0.501552), (3, 0.719117), (5, 1.121242), (8, 1.666031),
])
def test_a_budget_is_the_published_ratio(epsilon, mu):
    assert mu_of(epsilon, DELTA) == pytest.approx(mu, abs=1e-6)


@pytest.mark.parametrize("epsilon, full, between", [(3, 7.616594, 22.849782), (1, 20.433511, 61.300533)])
def test_a_plan_with_restarts_has_the_published_noise_and_costs_its_budget(epsilon, full, between):
    budget = make_budget(Schedule(10, split=0.5), 150, 0, epsilon, None, DELTA, "local", "replace-one")
    assert budget.noise[FULL] == pytest.approx(full, abs=1e-5)
    assert budget.noise[BETWEEN] == pytest.approx(between, abs=1e-5)
    assert budget.total.epsilon(DELTA) == pytest.approx(epsilon, abs=1e-5)
    assert budget.total.within(epsilon, DELTA)


@pytest.mark.parametrize("releases", [
    (Release(10, times=100),), (Release(20, times=300),), (Release(2),),
    (Release(7.616594, times=15), Release(22.849782, times=135)),
])
def test_exact_accounting_is_that_of_privacy_loss_distributions(releases):
    accountant = PLDAccountant()
    for release in releases:
        accountant.compose(GaussianDpEvent(release.noise_multiplier), release.times)
    assert plan(releases).epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-4)


def test_sampled_releases_cost_the_published_figure():
    assert plan((Release(1.1, 0.01, 1000),)).epsilon(DELTA) == pytest.approx(1.515370, abs=1e-5)


def test_the_noise_for_a_sampled_budget_keeps_it_and_wastes_little():
    noise = noise_for_sampled(1.5, DELTA, 0.01, 300)
    assert 1.48 < plan((Release(noise, 0.01, 300),)).epsilon(DELTA) <= 1.5


def test_sampled_and_full_releases_add_up():
    sampled, full = Release(1.1, 0.01, 200), Release(3.0)
    together = plan((sampled, full)).epsilon(DELTA)
    assert max(plan((sampled,)).epsilon(DELTA), plan((full,)).epsilon(DELTA)) < together
    assert together < plan((sampled,)).epsilon(DELTA / 2) + plan((full,)).epsilon(DELTA / 2)


def test_a_sampled_budget_allows_as_many_releases_as_it_was_planned_for():
    noise = noise_for_sampled(2.0, DELTA, 0.05, 40)
    assert Spending(sampled={(noise, 0.05): 40}).within(2.0, DELTA)
    assert not Spending(sampled={(noise, 0.05): 42}).within(2.0, DELTA)


def test_a_sampled_budget_that_asks_for_hardly_any_noise_is_refused():
    with pytest.raises(InvalidSetting, match="epsilon"):
        noise_for_sampled(1e6, DELTA, 0.5, 4)


@given(first=ratios, second=ratios)
def test_two_runs_compose_to_the_root_of_their_squares(first, second):
    both = Spending(first**2).plus(Release(1 / second))
    assert both.epsilon(DELTA) == pytest.approx(epsilon_of(math.hypot(first, second), DELTA), rel=1e-9)


@given(mu=ratios)
def test_epsilon_and_delta_are_each_others_inverse(mu):
    epsilon = epsilon_of(mu, DELTA)
    assert delta_of(mu, epsilon) <= DELTA
    if epsilon:
        assert mu_of(epsilon, DELTA) == pytest.approx(mu, rel=1e-6)


@given(mu=floats(0, 0.9), more=floats(0.05, 5))
def test_more_releases_never_cost_less(mu, more):
    assert epsilon_of(mu + more, DELTA) > epsilon_of(mu, DELTA) or epsilon_of(mu + more, DELTA) == 0


@given(epsilon=epsilons, rounds=integers(1, 200), interval=integers(1, 50), local=integers(0, 40))
def test_every_plan_spends_its_budget_and_no_more(epsilon, rounds, interval, local):
    budget = make_budget(Schedule(min(interval, rounds), split=0.3), rounds, local, epsilon, None, DELTA, "local",
                         "replace-one")
    assert budget.total.within(epsilon, DELTA)
    assert budget.total.mu_squared == pytest.approx(mu_of(epsilon, DELTA) ** 2, rel=1e-9)
    assert (LOCAL_STEPS in budget.noise) == (local > 0)


def test_nothing_costs_nothing():
    assert Spending().epsilon(DELTA) == 0 and epsilon_of(1e-9, DELTA) == 0


def test_spending_is_saved_and_read():
    spending = plan((Release(3.0, times=7), Release(1.1, 0.01, 5)))
    assert Spending.of(spending.state()) == spending
