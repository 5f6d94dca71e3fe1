"""A federation in one process and in virtual time, behind Flower's `Grid`."""
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from fedcore.clock import Event
from fedcore.errors import NothingCanHappen
from fedcore.own_grid import OwnGrid
from fedcore.simulations.availability import Availability
from fedcore.simulations.devices import Devices
from fedcore.simulations.engine import FIRST_NODE_ID, Engine
from fedcore.simulations.execute import AppFactory
from fedcore.simulations.failures import Failures
from fedcore.simulations.network import Network

logger = logging.getLogger("fedcore")

# An app that asks for the nodes again and again waits for more of them: when it pauses between its questions, or has
# asked so often without a pause. It waits in vain when nothing can change any more, or has changed so often.
SLOW_POLL_S, MAX_QUICK_POLLS = 0.1, 1000
MAX_HOPELESS_POLLS, MAX_WAITS = 12, 1000


class VirtualGrid(OwnGrid):
    """Runs any ServerApp's messages against any ClientApp in virtual time.

    A message's answer comes at `now + download + queue + work x seconds_per_step + upload`. Work is what the reply's
    `work-steps` metric says, or `seconds_per_task`. A ClientApp that can tell its work from the request alone
    (`app.estimate`) is computed only when its answer arrives, or meanwhile on a worker process.

    Args:
        app: the ClientApp, or a function that makes it (needed with `workers`).
        num_nodes: registered clients; one that has nothing to do costs nothing.
        workers: processes that compute; 0 computes in this one. Results are the same.
        run_config: what clients find in `context.run_config`.
    """

    simulated = True    # noise follows from the seed; on any other grid it must not

    def __init__(
        self,
        app: ClientApp | AppFactory,
        num_nodes: int,
        *,
        seed: int = 0,
        devices: Devices | None = None,
        network: Network | None = None,
        availability: Availability | None = None,
        failures: Failures | None = None,
        workers: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ):
        self.num_nodes = num_nodes
        self.engine = Engine(app, num_nodes, seed, devices, network, availability, failures, workers, run_config)
        super().__init__()
        self._inbox: dict[str, Message] = {}    # replies that came while something else was waited for
        self._heard = False                     # somebody listens to events, and must not miss any
        self._news: deque[Event] = deque()
        # Questions for the nodes since anything was sent, those since the clock moved for them, and how often it did.
        self._polls = self._quick_polls = self._waits = 0
        self._last_poll = 0.0

    # ---- Flower's interface -------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are online now.

        An app that asks again and again without sending anything waits for nodes: the clock then moves to the next
        change of availability.

        Raises:
            NothingCanHappen: it keeps asking, and no node will ever come.
        """
        self._note_idle_poll()
        if not self.engine.offline:
            return list(range(FIRST_NODE_ID, FIRST_NODE_ID + self.num_nodes))
        return [FIRST_NODE_ID + index for index in range(self.num_nodes) if index not in self.engine.offline]

    def _note_idle_poll(self) -> None:
        """Find out whether the app waits for nodes: a pause between two questions, or very many of them, say so."""
        self._polls += 1
        self._quick_polls += 1
        paused = time.monotonic() - self._last_poll > SLOW_POLL_S and self._polls > 2
        if paused or self._quick_polls > MAX_QUICK_POLLS:
            self._wait_for_nodes()
            self._quick_polls = 0
        self._last_poll = time.monotonic()

    def _wait_for_nodes(self) -> None:
        can_change = self.engine.heap.next_at() is not None
        hopeless = not can_change and (self._polls > MAX_HOPELESS_POLLS or self._quick_polls > MAX_QUICK_POLLS)
        if hopeless or self._waits >= MAX_WAITS:
            raise NothingCanHappen(
                f"The app keeps waiting for more nodes than the {self.num_nodes - len(self.engine.offline)} that are "
                f"online (of {self.num_nodes}). Simulate more nodes, or ask for fewer (min_available_nodes)."
            )
        if can_change and (event := self.engine.next_event(None)) is not None:
            self._waits += 1
            if self._heard:
                self._news.append(event)
            else:
                self._keep(event)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:  # type: ignore[override]
        """Send messages; returns their ids in order, None for a node that is not there."""
        sent = [self.engine.push(message) for message in messages]
        if any(name is not None for name in sent):
            self._polls = self._quick_polls = self._waits = 0
        elif sent:
            self._note_idle_poll()
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived; when there is none, wait for the first one."""
        wanted = dict.fromkeys(message_ids)
        self._polls = self._quick_polls = self._waits = 0
        unknown = [self._no_reply(name) for name in wanted if name not in self.engine.tasks and name not in self._inbox]
        while any(name in self.engine.tasks for name in wanted) and not any(name in self._inbox for name in wanted):
            event = self.engine.next_event(None)
            if event is None:
                break
            self._keep(event)
            while (event := self.engine.next_event(self.now)) is not None and event.kind != "time":
                self._keep(event)    # what comes at the same moment is there, too
        return unknown + [self._inbox.pop(name) for name in wanted if name in self._inbox]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for their replies, in the order of the messages; `timeout` is in virtual seconds."""
        sent = [name for name in self.push_messages(messages) if name is not None]
        limit = None if timeout is None else self.engine.now + timeout
        missing = set(sent)
        found: dict[str, Message] = {}
        while missing:
            event = self.engine.next_event(limit)
            if event is None or event.kind == "time":
                logger.warning("%d of %d replies had not arrived after %s virtual seconds.", len(missing), len(sent),
                               timeout)
                self.engine.forgotten |= missing
                break
            if event.message is not None and event.message.metadata.reply_to_message_id in missing:
                name = event.message.metadata.reply_to_message_id
                missing.discard(name)
                self.engine.task_times(name)
                found[name] = event.message
            else:
                self._keep(event)
        return [found[name] for name in sent if name in found]

    # ---- what fedcore's hub uses --------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self.engine.now

    def partition_of(self, node_id: int) -> int:
        """Return which share of the data a node holds."""
        return node_id - FIRST_NODE_ID

    def introduction(self, node_id: int) -> RecordDict | None:
        """Return what a node answers to a query, if its app can say it without one (`app.describe`)."""
        return self.engine.introduction(node_id)

    def start_clock(self) -> None:
        """Call the present moment zero; only while nothing is under way."""
        self._heard = True
        self.engine.start_clock()

    def next_event(self, until: float | None) -> Event | None:
        """Move the clock to what happens next, at most to `until`; None when nothing can ever happen."""
        self._heard = True
        return self._news.popleft() if self._news else self.engine.next_event(until)

    def task_times(self, message_id: str | None) -> dict[str, float] | None:
        """Return how long the parts of a task took, once, after its reply was handed out."""
        return self.engine.task_times(message_id)

    def close(self) -> None:
        """End the worker processes."""
        self.engine.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the clock, the work under way and the clients' memory, for a checkpoint."""
        inbox = {name: reply.content for name, reply in self._inbox.items() if reply.has_content()}
        assert len(inbox) == len(self._inbox), "an app that pulls by itself cannot be saved"
        # A reply among the news is one that nobody waits for any longer.
        news = [[event.kind, event.at, event.node_id] for event in self._news if event.kind != "reply"]
        return {"engine": self.engine.state_dict(), "news": news}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on a grid made with the same arguments."""
        self.engine.load_state_dict(state["engine"])
        self._news = deque(Event(*entry) for entry in state["news"])

    def _keep(self, event: Event) -> None:
        """Keep a reply that came while something else was waited for."""
        if event.kind == "reply" and event.message is not None:
            self.engine.task_times(event.message.metadata.reply_to_message_id)
            self._inbox[event.message.metadata.reply_to_message_id] = event.message

    def _no_reply(self, name: str) -> Message:
        metadata = Metadata(1, "", 0, 1, name, "", time.time(), 1.0, "train")
        error = Error(4, f"message {name} is unknown, or its reply was pulled before")
        return Message(error, metadata=metadata)  # type: ignore[call-overload]    # Flower's own keyword
