"""What travels between peers, and what it costs."""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedcore.payload import ARRAY_HEADER_BYTES

# A vector, or several by name.
Payload = Tensor | Mapping[str, Tensor]

# Run, epoch, kind, tag, round, source and checksum, rounded up: the same bill on every engine.
ENVELOPE_BYTES = 64
# The name under which a payload that is one vector travels.
ALONE = "vector"


@dataclass(slots=True, eq=False)
class Envelope:
    """A message between two peers.

    Attributes:
        run: the run's name; messages of other runs are refused.
        epoch: of the membership under which it was sent.
        kind: what it belongs to: `exchange`, `ring`, `meeting`, ...
        tag: the sender's name for the conversation.
        round: counts the messages of a conversation; older ones than awaited are dropped.
        source: the sender's rank.
        data: vectors by name; nobody writes into them.
        meta: a few plain values.
        num_bytes: what the message counts on the wire.
    """

    run: str
    epoch: int
    kind: str
    tag: str
    round: int
    source: int
    data: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    num_bytes: int

    @property
    def payload(self) -> Payload:
        """The data as the sender gave it: one vector, or several by name."""
        return self.data[ALONE] if len(self.data) == 1 and ALONE in self.data else self.data


def named(payload: Payload) -> Mapping[str, Tensor]:
    """Return a payload as vectors by name."""
    return {ALONE: payload} if isinstance(payload, Tensor) else payload


def payload_bytes(payload: Payload) -> int:
    """Return how many bytes a message with this payload counts on the wire, from shapes and dtypes alone."""
    return ENVELOPE_BYTES + sum([ARRAY_HEADER_BYTES + tensor.nbytes for tensor in named(payload).values()])


def is_finite(data: Mapping[str, Tensor]) -> bool:
    """Say whether all values are finite."""
    for tensor in data.values():
        # A sum is finite when all its terms are, unless it overflows: then, and only then, look at each element.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
            return False
    return True
