"""A client whose replies come late, twice, and again long after, as a bad network may deliver them."""
import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import fedcore.transport.agent
from fedcore.errors import TaskLost
from fedcore.transport.dial import Link
from fedcore.transport.frames import Framed

LONGEST_DELAY_S = 0.2
REMEMBERED = 8


class RepeatingLink(Link):
    """Holds every reply for a moment, so that those of others overtake it; then delivers it twice, and an old one."""

    dice = random.Random(0)
    recorded: ClassVar[deque[tuple[str, Framed]]] = deque(maxlen=REMEMBERED)

    async def send(self, name: str, framed: Framed) -> None:
        await asyncio.sleep(self.dice.uniform(0, LONGEST_DELAY_S))
        await super().send(name, framed)
        for again in self._repeats(name, framed):
            with contextlib.suppress(TaskLost):    # the server says that it does not want it
                await super().send(*again)

    async def tell(self, facts: Mapping[str, Any], framed: Framed | None = None) -> None:
        if facts.get("kind") != "reply" or framed is None:
            return await super().tell(facts, framed)
        await asyncio.sleep(self.dice.uniform(0, LONGEST_DELAY_S))
        await super().tell(facts, framed)
        for name, again in self._repeats(str(facts["id"]), framed):
            await super().tell({**facts, "id": name}, again)

    def _repeats(self, name: str, framed: Framed) -> list[tuple[str, Framed]]:
        self.recorded.append((name, framed))
        return [(name, framed), self.dice.choice(self.recorded)]


def misbehave() -> None:
    """Let this process's client deliver like that from now on."""
    fedcore.transport.agent.Link = RepeatingLink  # type: ignore[misc]
