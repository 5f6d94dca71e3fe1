import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidSetting, UnknownSetting
from fedcore.simulations.distributions import LogNormal, Trace
from fedcore.simulations.network import Network


def test_transfer_takes_latency_plus_bits_over_bandwidth():
    network = Network(latency_s=0.05, uplink_mbps=20, downlink_mbps=100)
    assert network.upload_seconds(0, 0, 2_500_000) == pytest.approx(0.05 + 1.0)
    assert network.download_seconds(0, 0, 2_500_000) == pytest.approx(0.05 + 0.2)


def test_without_limits_messages_take_no_time():
    assert Network().upload_seconds(3, 4, 10**9) == 0.0


def test_each_node_has_its_own_link():
    network = Network(uplink_mbps=Trace([1.0, 10.0]), latency_s=Trace([0.0, 0.5]))
    assert network.upload_seconds(0, 0, 125_000) == pytest.approx(1.0)
    assert network.upload_seconds(1, 0, 125_000) == pytest.approx(0.6)


transfers = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 10**7))


@given(questions=st.lists(transfers, min_size=1, max_size=20))
def test_times_do_not_depend_on_the_order_of_questions(questions):
    def answers(order):
        network = Network(0.01, LogNormal(10.0, relative_std=0.5), 50, jitter=0.2, seed=1)
        return {each: (network.upload_seconds(*each), network.download_seconds(*each)) for each in order}

    assert answers(questions) == answers(reversed(questions))


@given(small=st.integers(0, 10**6), more=st.integers(1, 10**6))
def test_more_bytes_take_longer(small, more):
    network = Network(0.01, LogNormal(10.0, relative_std=0.5), jitter=0.2)
    assert network.upload_seconds(2, 3, small) < network.upload_seconds(2, 3, small + more)


def test_jitter_differs_by_task_and_direction_around_the_mean():
    network = Network(latency_s=0.1, jitter=0.2)
    up = [network.upload_seconds(1, index, 0) for index in range(2000)]
    down = [network.download_seconds(1, index, 0) for index in range(2000)]
    assert len({*up, *down}) == 4000
    assert statistics.fmean(up) == pytest.approx(0.1, rel=0.02)


def test_settings_are_those_of_the_experiment_file():
    section = {"latency_s": 0.05, "uplink_mbps": {"name": "exponential", "mean": 20}, "downlink_mbps": None,
               "server_uplink_mbps": 1000, "jitter": 0.1}
    network = Network.from_settings(section, seed=2, num_nodes=10)
    assert (network.server_uplink_mbps, network.server_downlink_mbps) == (1000.0, None)
    assert network.upload_seconds(1, 0, 10**6) != network.upload_seconds(2, 0, 10**6)
    assert Network.from_settings(None, 0, 10).download_seconds(0, 0, 10**6) == 0.0


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"latency": 0.1}, UnknownSetting, "simulation.network.latency=.*Did you mean latency_s"),
        ({"latency_s": -0.1}, InvalidSetting, "simulation.network.latency_s=-0.1.*at least 0"),
        ({"uplink_mbps": 0}, InvalidSetting, "simulation.network.uplink_mbps=0.*above 0"),
        ({"downlink_mbps": math.inf}, InvalidSetting, "simulation.network.downlink_mbps=inf"),
        ({"server_uplink_mbps": 0}, InvalidSetting, "simulation.network.server_uplink_mbps=0"),
        ({"server_downlink_mbps": {"name": "constant", "value": 1}}, InvalidSetting, "server_downlink_mbps=.*finite"),
        ({"jitter": -1}, InvalidSetting, "simulation.network.jitter=-1"),
        ({"uplink_mbps": {"name": "trace", "values": [1.0, 2.0]}}, InvalidSetting, "uplink_mbps=.*at least 10"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(section, error, message):
    with pytest.raises(error, match=message):
        Network.from_settings(section, seed=0, num_nodes=10)
