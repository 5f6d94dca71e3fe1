"""Asynchronous strategies: each reacts to what happens, one event at a time."""
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from fedcore.errors import RunEnded
from fedcore.hub import Hub
from fedcore.session import Session
from fedcore.strategy import HubStrategy
from fedcore.tasks import Answer, Failure, Node, Reply


class EventStrategy(HubStrategy):
    """Base of asynchronous strategies: override the events that matter to the method.

    Events arrive one at a time. At equal times replies come first, by partition, then failures, then timers.
    """

    def on_start(self, hub: Hub) -> None:
        """The expected nodes are here: hand out the first work."""
        for node in hub.nodes:
            self.hand_out(hub, node)

    def hand_out(self, hub: Hub, node: Node) -> None:
        """Give a node its next work."""
        hub.train(node)

    @abstractmethod
    def on_reply(self, hub: Hub, reply: Reply) -> None:
        """A node finished its work."""

    def on_failure(self, hub: Hub, failure: Failure) -> None:
        """A task failed, timed out, was lost or refused; called once per task.

        By default the node gets work again, unless its own code has failed three times in a row.
        """
        if failure.node.id in hub.node_ids and not hub.is_left_aside(failure.node):
            self.hand_out(hub, failure.node)

    def on_timer(self, hub: Hub, name: str) -> None:
        """A timer that the strategy set is due."""

    def on_join(self, hub: Hub, node: Node) -> None:
        """A node came, after the start."""
        self.hand_out(hub, node)

    def on_leave(self, hub: Hub, node: Node) -> None:
        """A node left; `on_failure` was called for each of its tasks before."""

    def on_stop(self, hub: Hub) -> None:
        """The run is over: flush what is buffered."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""

    def drive(self, session: Session) -> None:
        """Run the event loop until the run's limits, and close the run."""
        hub = session.hub
        if not session.resumed:
            session.open()
            self.on_start(hub)
        else:
            session.check_limits(self._rounds_done(hub))    # a run saved after its last event has nothing left to do
        try:
            if hub.stop_reason is None:
                self._loop(session)
        except RunEnded:
            pass    # the run's time is over; what is under way is dropped
        session.close(lambda: self.on_stop(hub))

    def _loop(self, session: Session) -> None:
        hub = session.hub
        for outcome in session.outcomes(hub.next_timer):
            if isinstance(outcome, Answer):
                self._on_answer(hub, outcome)
            elif isinstance(outcome, Failure):
                self.on_failure(hub, outcome)
            elif outcome.kind == "time":
                for name in hub.pop_due_timers():
                    self.on_timer(hub, name)
            elif outcome.kind == "join":
                assert outcome.node_id is not None
                node = hub.find_node(outcome.node_id)
                assert node is not None, "a node is admitted before its joining is reported"
                self.on_join(hub, node)
            elif outcome.node_id is not None and (gone := hub.remove_node(outcome.node_id)):
                for failure in hub.lose_tasks(gone):
                    self.on_failure(hub, failure)
                self.on_leave(hub, gone)
            hub.give_up_if_hopeless()
            session.check_limits(self._rounds_done(hub))
            session.safe_point()
            if hub.stop_reason is not None:
                return
            del outcome    # a model's worth of memory, not to be held while the next one is waited for

    @staticmethod
    def _rounds_done(hub: Hub) -> float:
        return hub.totals["client_updates"] / max(1, hub.expected)

    def _on_answer(self, hub: Hub, answer: Answer) -> None:
        reply = hub.read_reply(answer)
        if isinstance(reply, Failure):
            self.on_failure(hub, reply)
        else:
            self.on_reply(hub, reply)
