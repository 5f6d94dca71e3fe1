"""How a server divides a run of peers."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcore.errors import InvalidSetting

if TYPE_CHECKING:
    from fedcore.peers.strategy import PeerStrategy


@dataclass(frozen=True)
class HostRules:
    """How a run of peers is divided.

    Attributes:
        segment: how long peers are by themselves: steps, or seconds for strategies that stop by time; above 0.
        lost_after_s: a peer that the others could not reach for so long takes no further part in a segment; above 0.
        relay: pass on, unread, what peers say to those who give no address.
    """

    segment: float = 10
    lost_after_s: float = 30.0
    relay: bool = False

    def __post_init__(self) -> None:
        for name in ("segment", "lost_after_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidSetting(name, getattr(self, name), "a number above 0")

    def check(self, strategy: "PeerStrategy") -> None:
        """Raise `InvalidSetting` where the steps of a segment are no whole number."""
        if not strategy.by_time and self.segment != int(self.segment):
            raise InvalidSetting("segment", self.segment, f"a whole number of steps with {type(strategy).__name__}")
