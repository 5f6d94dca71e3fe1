"""FZooS's published claim at small scale, and what must be said beside it.

The figures, and the command that prints them, are in docs/algorithms/fzoos.md.
"""
import pytest

from tests.paper.fzoos_study import course, to_target

pytestmark = [pytest.mark.paper, pytest.mark.slow]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("heterogeneity, most, most_of_fedzo", [(0.5, 8, 12), (5.0, 10, 24)])
def test_a_tenth_of_the_gap_takes_two_fifths_of_fedzos_queries_and_fewer_rounds(
    heterogeneity, seed, most, most_of_fedzo
):
    ours = to_target("FZooS", heterogeneity, seed, most)
    theirs = to_target("FedZO", heterogeneity, seed, most_of_fedzo)
    assert ours is not None and theirs is not None
    assert ours[0] < theirs[0] and ours[1] <= 0.4 * theirs[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_uneven_clients_need_the_correction(seed):
    corrected = to_target("FZooS", 5.0, seed, 10)
    assert corrected is not None
    assert to_target("FZooS, gamma = 0", 5.0, seed, corrected[0]) is None


def test_where_clients_contradict_each_other_it_is_not_promised_to_converge():
    assert course("FZooS", 50.0, 0, 10).ratios[-1] > 0.5
