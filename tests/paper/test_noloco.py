"""NoLoCo: what it saves follows from its messages, and what it learns is what DiLoCo learns, no more and no less."""
import pytest

from tests.paper.noloco_study import latency_ratio, loss_over_diloco, parity, waiting_ratio

pytestmark = pytest.mark.paper


@pytest.mark.parametrize("count, sigma, ratio", [(16, 0.0, 4.0), (16, 0.5, 4.4), (16, 1.0, 5.8), (1024, 0.0, 10.0)])
def test_a_tree_takes_log2_of_the_peers_times_as_long_as_a_pair(count, sigma, ratio):
    assert latency_ratio(count, sigma, 100 if count > 16 else 20_000) == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("sigma, ratio, tolerance", [(0.5, 12.1, 0.3), (1.0, 23.0, 1.5)])
def test_the_more_latency_varies_the_more_a_tree_over_many_loses(sigma, ratio, tolerance):
    assert latency_ratio(1024, sigma, 400) == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize("count, ratio", [(16, 1.06), (128, 1.12)])
def test_waiting_for_everybody_costs_more_than_waiting_for_one(count, ratio):
    assert waiting_ratio(count, 200) == pytest.approx(ratio, abs=0.02)


@pytest.mark.slow
def test_peers_learn_what_diloco_learns_and_come_together(tmp_path):
    found = parity(tmp_path)
    assert 0.99 < found["loss_over_diloco"] < 1.02
    assert 0.99 < loss_over_diloco(tmp_path, 1)[0] < 1.02
    assert found["final_over_peak_spread"] < 0.4
    assert found["spread_over_that_without_pull"] < 0.2
    assert found["loss_over_diloco_without_pull"] > found["loss_over_diloco"]
