"""How long messages travel."""
import math
from collections.abc import Mapping
from typing import Any

from fedcore.errors import InvalidSetting
from fedcore.simulations.devices import NodeValues
from fedcore.simulations.distributions import Distribution, as_distribution, check_keys, check_number, jitter_factor

SECONDS_PER_BYTE_AT_1_MBPS = 8e-6
PER_NODE = ("latency_s", "uplink_mbps", "downlink_mbps")
SHARED = ("server_uplink_mbps", "server_downlink_mbps")


class Network:
    """Transfer times: (latency + bits / bandwidth) x a random factor per transfer.

    Args:
        latency_s: one-way delay of every message, at least 0; a distribution gives each node its own.
        uplink_mbps: megabits (10^6 bits) per second from a node to the server, above 0; None: no limit.
        downlink_mbps: megabits per second from the server to a node, above 0; None: no limit.
        server_uplink_mbps: megabits per second that the server sends to all nodes together; None: no limit.
        server_downlink_mbps: megabits per second that the server receives from all nodes together; None: no limit.
        jitter: relative standard deviation of a log-normal factor with mean 1, drawn for each transfer, at least 0.
        seed: of the draws.
    """

    def __init__(
        self,
        latency_s: float | Distribution = 0.0,
        uplink_mbps: float | Distribution | None = None,
        downlink_mbps: float | Distribution | None = None,
        server_uplink_mbps: float | None = None,
        server_downlink_mbps: float | None = None,
        jitter: float = 0.0,
        seed: int = 0,
    ):
        self.jitter = check_number("jitter", jitter, at_least=0)
        self.seed = seed
        self._latency = NodeValues("latency_s", as_distribution(latency_s, "latency_s"), seed)
        self._up = _bandwidth("uplink_mbps", uplink_mbps, seed)
        self._down = _bandwidth("downlink_mbps", downlink_mbps, seed)
        self.server_uplink_mbps = _shared("server_uplink_mbps", server_uplink_mbps)
        self.server_downlink_mbps = _shared("server_downlink_mbps", server_downlink_mbps)

    def download_seconds(self, partition: int, task_index: int, num_bytes: int) -> float:
        """Return how long a request of `num_bytes` travels from the server to a node."""
        return self._seconds(self._down, "download", partition, task_index, num_bytes)

    def upload_seconds(self, partition: int, task_index: int, num_bytes: int) -> float:
        """Return how long a reply of `num_bytes` travels from a node to the server."""
        return self._seconds(self._up, "upload", partition, task_index, num_bytes)

    def _seconds(self, bandwidth: NodeValues | None, direction: str, partition: int, task_index: int,
                 num_bytes: int) -> float:
        seconds = self._latency.of(partition)
        if bandwidth is not None:
            seconds += num_bytes * SECONDS_PER_BYTE_AT_1_MBPS / bandwidth.of(partition)
        if self.jitter and seconds:
            seconds *= jitter_factor(self.jitter, self.seed, direction, partition, task_index)
        return seconds

    def between(self, source: int, to: int, message_index: int, num_bytes: int) -> tuple[float, float]:
        """Return how long a message from one node to another takes to send, and then to arrive, seconds.

        It is sent as fast as the sender's uplink and the receiver's downlink allow; its latency is the mean of both
        nodes'.

        Args:
            message_index: how many messages the sender has sent before.
        """
        latency = 0.5 * (self._latency.of(source) + self._latency.of(to))
        sending = num_bytes * self.seconds_per_byte(source, to)
        if self.jitter and (latency or sending):
            factor = jitter_factor(self.jitter, self.seed, "peers", source, to, message_index)
            return sending * factor, latency * factor
        return sending, latency

    def seconds_per_byte(self, source: int, to: int) -> float:
        """Return what a byte takes from one node to another, before jitter."""
        up = math.inf if self._up is None else self._up.of(source)
        down = math.inf if self._down is None else self._down.of(to)
        return SECONDS_PER_BYTE_AT_1_MBPS / min(up, down)

    @classmethod
    def from_settings(cls, section: Mapping[str, Any] | None, seed: int, num_nodes: int,
                      path: str = "simulation.network") -> "Network":
        """Return what a file's section describes; None: messages that take no time.

        Raises:
            InvalidSetting: with the setting's full path.
        """
        section = {key: value for key, value in (section or {}).items() if value is not None}
        check_keys(section, path, (*PER_NODE, *SHARED, "jitter"))
        for key in section.keys() & set(PER_NODE):
            section[key] = as_distribution(section[key], f"{path}.{key}")
        try:
            network = cls(**section, seed=seed)
            for values in (network._latency, network._up, network._down):
                if values is not None:
                    values.check(num_nodes)
        except InvalidSetting as error:
            raise error.under(path) from error
        return network


def _bandwidth(name: str, value: float | Distribution | None, seed: int) -> NodeValues | None:
    return None if value is None else NodeValues(name, as_distribution(value, name), seed, above=0)


def _shared(name: str, value: float | None) -> float | None:
    return None if value is None else check_number(name, value, above=0, advice="Leave it out for no limit.")
