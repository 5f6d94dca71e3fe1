"""The steps of a run, for one peer."""
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from fedcore.peers.peer import Peer


class Steps:
    """Begins one step after another, until the run ends."""

    def __init__(self, peer: "Peer"):
        self._peer, self._begun = peer, False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        """Begin the next step and return its number."""
        peer = self._peer
        if self._begun and not peer._reported:
            await peer.safe_point()
        membership = await peer.board.begin(peer, peer.step + 1)
        if membership is None:
            raise StopAsyncIteration
        peer.epoch, peer.members = membership.epoch, membership.members
        peer.step += 1
        self._begun, peer._reported = True, False
        return peer.step


def as_plain(state: Any) -> Any:
    """Return a strategy's state as a mapping of its fields."""
    if is_dataclass(state) and not isinstance(state, type):
        return {name: getattr(state, name) for name in _names(type(state))}
    return state if state is None else dict(state)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
