"""The server's own connection, through which every transfer passes."""
from fedcore.simulations.network import Network
from fedcore.simulations.sim_task import SimTask

MEGABIT = 1e6


class ServerLink:
    """Transfers between the server and its nodes: each over the node's own link, all over the server's.

    On the server's link they go one after the other, first come first served, where the network has a limit for it.

    Attributes:
        free_at: when the link is free for the next transfer, by direction, seconds.
    """

    def __init__(self, network: Network):
        self.network = network
        self.free_at = {"down": 0.0, "up": 0.0}

    def download_seconds(self, task: SimTask, now: float, size: int) -> float:
        """Return how long a request of `size` bytes takes that is sent now."""
        network, address = self.network, (task.partition, task.index)
        own = network.download_seconds(*address, size)
        if network.server_uplink_mbps is None:
            return own
        through = self._queue("down", now, size, network.server_uplink_mbps)
        return max(own, through + network.download_seconds(*address, 0))    # its last byte has the latency before it

    def upload_seconds(self, task: SimTask, now: float, size: int) -> float:
        """Return how long a reply of `size` bytes takes that is sent now."""
        network, address = self.network, (task.partition, task.index)
        own = network.upload_seconds(*address, size)
        if network.server_downlink_mbps is None:
            return own
        through = self._queue("up", now, size, network.server_downlink_mbps)
        return max(own, through + network.upload_seconds(*address, 0))

    def _queue(self, direction: str, now: float, size: int, mbps: float) -> float:
        """Put a transfer on the server's link, and return how long until it is through."""
        through = max(now, self.free_at[direction]) + 8 * size / (mbps * MEGABIT)
        self.free_at[direction] = through
        return through - now
