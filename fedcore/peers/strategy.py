"""The base of algorithms that run on every node and talk to each other."""
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedcore.config import Experiment
from fedcore.peers.host_rules import HostRules
from fedcore.peers.hosting import HostedPeers
from fedcore.peers.peer import Peer
from fedcore.strategy import OwnStrategy

# Strategies that stop by time have their safe points so many times in a run, unless evaluations come by the second.
STEPS_BY_TIME = 30


class PeerStrategy(OwnStrategy):
    """An algorithm as one coroutine, which runs on every peer and reads like the paper's listing.

    One object holds the settings and serves all peers of a process: what belongs to a peer lives in the coroutine, and
    what must survive a restart goes through `peer.safe_point`.

    A strategy that can compress sets `no_compression = ""`: then `peer.all_reduce` does, and for what it exchanges
    there is `peer.packing`.

    Attributes:
        by_time: whether peers go at their own pace and all stop at one time; else the run consists of steps, and ends
            after one that was announced to all before any had begun it. A limit of each peer's own would let fast peers
            leave early and pull the consensus towards the data of the slow ones.
    """

    by_time: bool = False
    no_compression = "Its peers exchange whole vectors."

    @abstractmethod
    async def run(self, peer: Peer) -> None:
        """Take part in a run, from its first step (or the one after `peer.restore`'s) to its last."""

    def newcomer(self, state: Any) -> Any:
        """Return the state from which a peer starts that comes later, made from that of a living one, a mapping.

        It starts with the living one's model, with an optimizer and clocks of its own.
        """
        return state

    def check_compression(self, settings: str | Mapping[str, Any], count: int) -> None:
        """Refuse an experiment's section `compression`, for so many peers, that does not suit the other settings.

        Raises:
            InvalidSetting: with what is wrong.
        """

    def doubts(self, experiment: Experiment) -> list[str]:
        """Return warnings: what is allowed in this experiment, but probably not meant."""
        return []

    def summary_figures(self) -> dict[str, float | int | str | None]:
        """Return figures for the run's summary, besides those that every run has."""
        return {}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        rules: HostRules | None = None,
    ) -> Result:
        """Host the peers from any Flower ServerApp: the server introduces them to each other, and never averages.

        The nodes' ClientApp is `torch_client(task, settings, peers=...)` with the same strategy; their configuration
        says where they listen (`peer-listen`, `peer-advertise`) and with which certificate (`peer-tls`).

        Args:
            grid: any Flower grid whose nodes can dial each other.
            initial_arrays: the model that all peers start from.
            num_rounds: steps; by time, a round is as many gradients as there are peers.
            timeout: seconds that a segment may take.
            train_config: `seed` in it is the run's.
            evaluate_config: not used.
            evaluate_fn: called with the version and the mean of all peers' models, after each segment.
            rules: how long peers are by themselves, and when one of them counts as lost.

        Returns:
            Its arrays are the mean of the peers' models.
        """
        return HostedPeers(self, rules).start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
