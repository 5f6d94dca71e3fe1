"""Synchronous data parallelism: every gradient is averaged over everybody before it is used.

Source: Chen et al., 2016, arXiv:1604.00981, synchronous SGD without backup workers, over an all-reduce.
"""
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy
from fedcore.strategies.settings import check_count


class AllReduceSgd(PeerStrategy):
    """Average every gradient over all peers: what data-parallel training does, and the most communication there is.

    Any optimizer of `train.optimizer` takes the mean gradient; its memory is the same at all peers.

    Args:
        steps_per_round: gradients, each averaged, that make up one round (one version), at least 1.
    """

    no_compression = ""

    def __init__(self, steps_per_round: int = 1):
        check_count("steps_per_round", steps_per_round, 1)
        self.steps_per_round = steps_per_round

    async def run(self, peer: Peer) -> None:
        """Compute a gradient, average it with everybody, step."""
        saved: dict[str, int] = peer.restore(dict) or {}
        epoch = saved.get("epoch", 0)
        async for step in peer.steps():
            if epoch != peer.epoch:    # newcomers have no memory: that of the others must be the same
                peer.forget_optimizer()
                epoch = peer.epoch
            for index in range(self.steps_per_round):
                gradient = await peer.gradient()
                mean_gradient, contributors = await peer.all_reduce(
                    gradient, tag="gradient", round=step * self.steps_per_round + index)
                if contributors:
                    await peer.descend(mean_gradient)
            await peer.safe_point({"epoch": epoch})
