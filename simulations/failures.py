"""What goes wrong: clients that crash in the middle of a task, and messages that are lost."""
from collections.abc import Mapping
from typing import Any

from fedcore.errors import InvalidSetting
from fedcore.simulations.distributions import check_keys, check_number, fraction


class Failures:
    """Crashes and losses, each task on its own.

    Args:
        crash_probability: that a node crashes while it works on a task, in [0, 1]. It is back for the next one.
        request_loss: that a task never reaches its node, in [0, 1].
        reply_loss: that a reply never reaches the server, in [0, 1].
        seed: of the draws.
    """

    def __init__(
        self, crash_probability: float = 0.0, request_loss: float = 0.0, reply_loss: float = 0.0, seed: int = 0
    ):
        self.crash_probability = check_number("crash_probability", crash_probability, at_least=0, at_most=1)
        self.request_loss = check_number("request_loss", request_loss, at_least=0, at_most=1)
        self.reply_loss = check_number("reply_loss", reply_loss, at_least=0, at_most=1)
        self.seed = seed

    def crash_point(self, partition: int, task_index: int) -> float | None:
        """Return the share of its work that a node does before it crashes, None when it does not."""
        if not self.crash_probability:
            return None
        drawn = fraction(self.seed, "crash", partition, task_index)
        # Given that the draw lies below the probability, it is uniform below it.
        return drawn / self.crash_probability if drawn < self.crash_probability else None

    def loses_request(self, partition: int, task_index: int) -> bool:
        """Say whether a task never reaches its node."""
        return self._loses(self.request_loss, "request", partition, task_index)

    def loses_reply(self, partition: int, task_index: int) -> bool:
        """Say whether a reply never reaches the server."""
        return self._loses(self.reply_loss, "reply", partition, task_index)

    def _loses(self, probability: float, what: str, partition: int, task_index: int) -> bool:
        return probability > 0 and fraction(self.seed, f"lost {what}", partition, task_index) < probability

    @classmethod
    def from_settings(cls, section: Mapping[str, Any] | None, seed: int, num_nodes: int,
                      path: str = "simulation.failures") -> "Failures | None":
        """Return what a file's section describes, None when nothing can fail.

        Raises:
            InvalidSetting: with the setting's full path.
        """
        section = dict(section or {})
        check_keys(section, path, ("crash_probability", "request_loss", "reply_loss"))
        try:
            failures = cls(**section, seed=seed)
        except InvalidSetting as error:
            raise error.under(path) from error
        return failures if failures.crash_probability or failures.request_loss or failures.reply_loss else None
