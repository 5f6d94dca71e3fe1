"""What DADAO's peers agree on: a unit of time that they can keep, and more exchanges where some fail."""
import pytest

from fedcore.strategies.dadao_pace import Tally, Terms, next_terms
from fedcore.strategies.pace import Pace

TERMS = Terms(1.0, 10.0, 2.0, Pace(0.5), 1.0, 5.0, 1)


def told(due=1000.0, attempted=1000.0, succeeded=1000.0, due_gradients=500.0, gradients=500.0):
    return [Tally(due_gradients, gradients, due, attempted, succeeded).values(),
            Tally(due_gradients, due_gradients).values()]


def test_a_clock_goes_on_where_it_stood_when_its_unit_changes():
    pace = Pace(0.5, since_s=2.0, since=10.0)
    slower = pace.changed(1.0, 6.0)
    assert pace.at(6.0) == slower.at(6.0) == 18.0
    assert (pace.at(8.0), slower.at(8.0)) == (22.0, 20.0) and pace.changed(0.5, 6.0) is pace


def test_peers_that_keep_up_change_nothing():
    assert next_terms(TERMS, told(), 30.0, fixed=False) is TERMS
    assert next_terms(TERMS, told(due=40.0, attempted=25.0, succeeded=25.0), 30.0, fixed=False) is TERMS    # chance


@pytest.mark.parametrize("row, factor", [
    ({"attempted": 800.0, "succeeded": 800.0}, 1.25), ({"attempted": 100.0, "succeeded": 100.0}, 2.0),
    ({"gradients": 250.0}, 2.0), ({"gradients": 0.0}, 2.0), ({"attempted": 0.0, "succeeded": 0.0}, 2.0),
    ({"due": 10_000.0, "attempted": 8_600.0, "succeeded": 8_600.0}, 1 / 0.86),
])
def test_the_unit_is_stretched_when_anybody_falls_behind(row, factor):
    after = next_terms(TERMS, told(**row), 30.0, fixed=False)
    assert after.pace.unit_s == pytest.approx(0.5 * max(factor, 1.1))
    assert after.pace.at(30.0) == TERMS.pace.at(30.0)


def test_a_unit_that_the_user_gave_stays():
    assert next_terms(TERMS, told(gradients=100.0), 30.0, fixed=True) is TERMS


@pytest.mark.parametrize("succeeded, boost", [(800.0, 1.25), (100.0, 4.0), (0.0, 1.0)])
def test_exchanges_fire_more_often_where_some_fail(succeeded, boost):
    assert next_terms(TERMS, told(succeeded=succeeded), 30.0, fixed=False).boost == pytest.approx(boost)


def test_terms_survive_a_checkpoint():
    assert Terms.from_state(TERMS.state()) == TERMS
