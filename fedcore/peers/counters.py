"""What a peer gets from a group, and what it has done."""
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from fedcore.peers.envelope import Payload


class Offers(dict[int, Payload]):
    """What the members of a group sent, by rank, ascending, one's own included.

    Attributes:
        missing: ranks that did not answer, or did not acknowledge, in time.
    """

    missing: tuple[int, ...] = ()


@dataclass(slots=True)
class Counters:
    """What a peer has done so far.

    Attributes:
        bytes_sent, bytes_received: as the wire format counts them.
        exchanges: conversations with other peers that came about and in which this peer took part, reductions
            included; of one between two peers both ends count one.
        gradients: minibatch gradients computed.
        updates: pieces of local work done (`train`, `gradient`, `displacement`).
        compute_s: time spent computing.
        waiting_s: time spent waiting for other peers: communication that computing did not hide.
        silent: partners that did not answer in time.
        asymmetric_exchanges: offers received from partners that did not acknowledge ours.
        failed_meetings: pairwise exchanges that were dropped at both ends.
        refused: messages that were not used.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    exchanges: int = 0
    gradients: int = 0
    updates: int = 0
    compute_s: float = 0.0
    waiting_s: float = 0.0
    silent: int = 0
    asymmetric_exchanges: int = 0
    failed_meetings: int = 0
    refused: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return a copy by name."""
        return dict(zip(NAMES, _values(self), strict=True))


NAMES = tuple(field.name for field in fields(Counters))
_values = attrgetter(*NAMES)
