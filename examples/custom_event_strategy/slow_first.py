"""An asynchronous strategy that a user could have written: as much work as fits into a fixed time.

Every client gets the number of steps that it can do in about `longest_s` seconds, from its own last measurement; its
update is applied as soon as it arrives, scaled down by its steps, so that fast clients do not drown the others.
"""
from collections.abc import Mapping
from typing import Any

from fedcore.errors import InvalidSetting
from fedcore.events import EventStrategy
from fedcore.hub import Hub
from fedcore.tasks import Node, Reply


class SlowFirst(EventStrategy):
    """Equal time for everybody, and equal weight per step.

    Args:
        server_lr: step along an update of `reference_steps`, above 0.
        longest_s: how long a client should work, seconds, above 0.
        reference_steps: local steps of the first task, and of an update that counts as one.
    """

    def __init__(self, server_lr: float = 0.3, longest_s: float = 10.0, reference_steps: int = 10):
        for name, value in (("server_lr", server_lr), ("longest_s", longest_s), ("reference_steps", reference_steps)):
            if value <= 0:
                raise InvalidSetting(name, value, "above 0")
        self.server_lr, self.longest_s, self.reference_steps = server_lr, longest_s, reference_steps
        self.seconds_per_step: dict[int, float] = {}    # by partition, as last measured

    def hand_out(self, hub: Hub, node: Node) -> None:
        speed = self.seconds_per_step.get(node.partition)
        steps = self.reference_steps if speed is None else max(1, min(200, int(self.longest_s / speed)))
        hub.train(node, local_steps=steps)

    def on_reply(self, hub: Hub, reply: Reply) -> None:
        self.seconds_per_step[reply.node.partition] = reply.elapsed_s / reply.local_steps
        weight = self.server_lr * min(1.0, self.reference_steps / reply.local_steps)
        hub.publish(hub.model.params + weight * reply.update, [reply], weights=[weight])
        self.hand_out(hub, reply.node)

    # A run that is interrupted and resumed ends in the same bits, because all that is remembered is saved.

    def state_dict(self) -> dict[str, Any]:
        return {"seconds_per_step": self.seconds_per_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds_per_step = dict(state["seconds_per_step"])
