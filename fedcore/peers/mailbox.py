"""What has arrived at a peer and what it waits for."""
import asyncio
from collections import Counter

from fedcore.peers.envelope import Envelope, is_finite

# Kind, tag, round, source.
Key = tuple[str, str, int, int]
# So many messages that nobody asked for yet are kept; beyond that the oldest is dropped.
MOST_EARLY = 4096
NOTHING: dict[int, set[int]] = {}


class Mailbox:
    """Messages by (kind, tag, round, source): each is taken once, early ones wait, late and second ones are dropped.

    Attributes:
        dropped: how many messages were dropped, by reason.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.dropped: Counter[str] = Counter()
        self.lost: set[int] = set()
        self._waiting: dict[Key, asyncio.Future[Envelope | None]] = {}
        self._early: dict[Key, Envelope] = {}
        self._handled: dict[tuple[str, str], dict[int, set[int]]] = {}    # by kind and tag, then round: sources
        self._latest: dict[tuple[str, str], int] = {}    # by kind and tag: the newest round that was asked for

    def take(self, envelope: Envelope) -> str | None:
        """Accept a message; returns why it was dropped, if it was."""
        reason = self._accept(envelope)
        if reason is not None:
            self.dropped[reason] += 1
        return reason

    def _accept(self, envelope: Envelope) -> str | None:
        key = (envelope.kind, envelope.tag, envelope.round, envelope.source)
        if envelope.run != self.run:
            return "another run"
        if key in self._early or envelope.source in self._handled.get(key[:2], NOTHING).get(envelope.round, ()):
            return "second or late"
        waiting = self._waiting.get(key)
        if waiting is None and envelope.round < self._latest.get(key[:2], 0) - 1:
            return "second or late"
        if not is_finite(envelope.data):
            self._settle(key, None)
            return "not finite"
        if waiting is not None:
            self._settle(key, envelope)
            return None
        if len(self._early) >= MOST_EARLY:
            del self._early[next(iter(self._early))]
            self.dropped["too many"] += 1
        self._early[key] = envelope
        return None

    def expect(self, kind: str, tag: str, round: int, source: int, future: "asyncio.Future[Envelope | None]") -> None:
        """Set a future to a message as soon as it is there; to None once its sender is known to be lost."""
        key = (kind, tag, round, source)
        if round > self._latest.get((kind, tag), -1):
            self._latest[kind, tag] = round
            self._forget_before(kind, tag, round - 1)
        envelope = self._early.pop(key, None)
        if envelope is not None or source in self.lost:
            self._note_handled(key)
            future.set_result(envelope)
        else:
            self._waiting[key] = future

    def pop_early(self, kind: str, tag: str) -> list[Envelope]:
        """Return what has come of a conversation that nobody had asked for so far, in order of arrival."""
        found = [key for key in self._early if key[:2] == (kind, tag)]
        return [self._early.pop(key) for key in found]

    def give_up(self, kind: str, tag: str, round: int, sources: list[int]) -> None:
        """Wait no longer for messages of these sources; should they still come, they are dropped."""
        for source in sources:
            self._settle((kind, tag, round, source), None)

    def lose(self, source: int) -> None:
        """Take note that a peer will never send anything again."""
        self.lost.add(source)
        for key in [key for key in self._waiting if key[3] == source]:
            self._settle(key, None)

    def _settle(self, key: Key, envelope: Envelope | None) -> None:
        future = self._waiting.pop(key, None)
        self._note_handled(key)
        if future is not None and not future.done():
            future.set_result(envelope)

    def _note_handled(self, key: Key) -> None:
        kind, tag, round, source = key
        self._handled.setdefault((kind, tag), {}).setdefault(round, set()).add(source)

    def _forget_before(self, kind: str, tag: str, round: int) -> None:
        """Forget what belongs to earlier rounds of a conversation; it would be late by now."""
        handled = self._handled.get((kind, tag))
        if handled:
            for old in [old for old in handled if old < round]:
                del handled[old]
        if self._early:
            self._early = {key: found for key, found in self._early.items()
                           if key[2] >= round or key[:2] != (kind, tag)}
