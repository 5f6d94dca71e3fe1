"""A synchronous strategy that a user could have written: robust averaging by a median of means.

The clients of a round are split at random into groups; the server applies the coordinate-wise median of the groups'
means. A client that sends nonsense spoils one group, not the model.
"""
from typing import Any

import torch
from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.hub import Hub
from fedcore.rounds import RoundStrategy, train_all
from fedcore.seeds import torch_generator


def median_of_means(updates: Tensor, order: Tensor, groups: int) -> Tensor:
    """Return the coordinate-wise median of the groups' mean updates.

    Args:
        updates: one row per client, shape (clients, d).
        order: a permutation of the clients, shape (clients,).
        groups: how many groups, at most `clients`.

    Returns:
        shape (d,).
    """
    means = torch.stack([updates[members].mean(0) for members in order.tensor_split(groups)])
    return means.median(0).values


class MedianOfHalves(RoundStrategy):
    """Median of means.

    Args:
        server_lr: step along the median, above 0.
        groups: how many groups the clients are split into, at least 1.
    """

    def __init__(self, server_lr: float = 1.0, groups: int = 3):
        if server_lr <= 0:
            raise InvalidSetting("server_lr", server_lr, "above 0", "1 applies the median as it is.")
        if groups < 1:
            raise InvalidSetting("groups", groups, "at least 1", "1 is plain averaging.")
        self.server_lr, self.groups = server_lr, groups

    def round(self, hub: Hub, round_index: int) -> None:
        replies = train_all(hub, hub.nodes)
        if not replies:
            hub.log(failed_round=True)
            return
        updates = torch.stack([reply.update for reply in replies])
        order = torch.randperm(len(replies), generator=torch_generator(hub.seed, "groups", round_index))
        step = median_of_means(updates, order, min(self.groups, len(replies)))
        hub.publish(hub.model.params + self.server_lr * step, replies)

    # What must survive a restart goes here. This strategy remembers nothing from round to round.

    def state_dict(self) -> dict[str, Any]:
        return {}
