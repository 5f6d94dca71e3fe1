"""FedBuff: updates are added up as they arrive, and every K of them make one server step.

Source: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, 2022, "Federated Learning with Buffered Asynchronous
Aggregation", arXiv:2106.06639, Algorithm 1. The sum runs in the order of arrival: the algorithm itself is about
arrival, and the server needs the memory of one update, whatever K is.

Clients that answer at the same moment are all taken in before any of them gets new work (a server step in between
hands it out at once). Equal clients then stay together, and K = all of them is federated averaging.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedcore.errors import InvalidSetting
from fedcore.events import EventStrategy
from fedcore.hub import MAX_FAILURES_IN_A_ROW, Hub
from fedcore.seeds import derive_seed
from fedcore.strategies.buffers import add_buffers, settle_buffers
from fedcore.strategies.settings import check_count, check_number, check_switch
from fedcore.strategies.staleness import Staleness
from fedcore.tasks import Failure, Node, Reply

# Those who wait for work get it when everything that happens at this moment has happened: timers come last.
MOMENT = "moment"

# So many random draws among all nodes before the idle ones are listed: with few at work the first draw nearly always
# hits an idle node, and a list of a hundred thousand is not made for every reply.
DRAWS_BEFORE_LISTING = 32


@dataclass(frozen=True)
class Buffer:
    """Updates added up since the last server step.

    Attributes:
        total: sum of s(u_i) D_i with D_i = trained minus received, shape (d,); None when empty.
        count: how many updates are in it.
        buffers: sum of s(u_i) times non-trainable values.
        weight: sum of s(u_i).
    """

    total: Tensor | None = None
    count: int = 0
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0


def add(buffer: Buffer, update: Tensor, factor: float, buffers: Mapping[str, Tensor] | None = None) -> Buffer:
    """Return the buffer with s(u) D added, where `factor` is s(u) and `update` is D, shape (d,)."""
    total = factor * update if buffer.total is None else buffer.total.add(update, alpha=factor)
    return Buffer(total, buffer.count + 1, add_buffers(buffer.buffers, buffers or {}, factor), buffer.weight + factor)


def server_step(params: Tensor, total: Tensor, buffer_size: int, server_lr: float) -> Tensor:
    """Return w + eta (1/K) sum s(u_i) D_i: divided by K, not by the sum of the factors, so that stale ones move less.

    Args:
        params: w, shape (d,).
        total: sum of s(u_i) D_i, shape (d,).
        buffer_size: K.
        server_lr: eta.
    """
    step = total / buffer_size
    return step.mul_(server_lr).add_(params)    # in place: a server holds no more models than it must


def receipt(reply: Reply) -> dict[str, Any]:
    """Return a reply's state without its tensors: they are in the sum already, and must not be kept twice."""
    return {**reply.state(), "values": reply.values.new_empty(0), "buffers": {}, "base": None}


class FedBuff(EventStrategy):
    """Buffered asynchronous aggregation.

    Args:
        buffer_size: K, updates per server step.
        server_lr: eta.
        staleness: s(u), a name or `{name, a, b}` (see `fedcore.strategies.staleness`).
        wait: a client that has answered waits for the others of its buffer before it gets work again. That is not the
            published algorithm, but the one that Fraboni et al., 2023, arXiv:2206.10189, simulate under its name.
        max_staleness: drop updates older than this many versions (the client gets new work all the same).
        concurrency: train at most so many clients at once, and replace each that finishes by another one, drawn at
            random (cross-device); None trains all of them all the time (cross-silo).
    """

    def __init__(
        self,
        buffer_size: int = 3,
        server_lr: float = 1.0,
        staleness: str | Mapping[str, Any] = "polynomial",
        wait: bool = False,
        max_staleness: int | None = None,
        concurrency: int | None = None,
    ):
        check_count("buffer_size", buffer_size, at_least=1, advice="3 suits 10 clients; 10 is usual across devices.")
        check_number("server_lr", server_lr, above=0, advice="1 applies the mean update as it is.")
        check_switch("wait", wait)
        if max_staleness is not None:
            check_count("max_staleness", max_staleness, at_least=0, advice="It counts server versions; null keeps all.")
        if concurrency is not None:
            check_count("concurrency", concurrency, at_least=1, advice="null trains all clients all the time.")
        self.buffer_size, self.server_lr, self.wait = buffer_size, float(server_lr), wait
        self.staleness, self.max_staleness, self.concurrency = Staleness.of(staleness), max_staleness, concurrency
        self.buffer = Buffer()
        self.used: list[dict[str, Any]] = []    # receipts of what is in the buffer
        self.training: set[int] = set()         # partitions at work
        self.waiting: set[int] = set()          # partitions that answered, and have no new work yet
        self.applied = self.dropped = self.draws = 0

    # ---- who trains ---------------------------------------------------------------------------------------------

    def check_clients(self, count: int) -> None:
        """Raise `InvalidSetting` when clients that wait for each other cannot fill a buffer."""
        places = self._places(count)
        if self.wait and self.buffer_size > places:
            raise InvalidSetting("buffer_size", self.buffer_size, f"at most {places} when clients wait",
                                 "Otherwise all of them would wait for ever.")

    def _places(self, count: int) -> int:
        return count if self.concurrency is None else min(self.concurrency, count)

    def on_start(self, hub: Hub) -> None:
        self.check_clients(hub.expected)
        places = self._places(hub.expected)
        if self.buffer_size > places:
            hub.warn(f"buffer_size={self.buffer_size}, but only {places} clients train at once: each step uses several "
                     "updates of one client.")
        for node in hub.nodes if places >= len(hub.nodes) else [self._draw(hub) for _ in range(places)]:
            assert node is not None
            self.hand_out(hub, node)

    def hand_out(self, hub: Hub, node: Node) -> None:
        self.training.add(node.partition)
        hub.train(node)

    def _fill_place(self, hub: Hub, finished: Node) -> None:
        """Give work to the client that finished, or across devices to one drawn at random."""
        node = finished if self.concurrency is None else self._draw(hub)
        if node is not None:
            self.hand_out(hub, node)

    def _draw(self, hub: Hub) -> Node | None:
        """Return a random node that has nothing to do; the draw is named by its number, so a restart repeats it."""
        nodes = hub.nodes
        for attempt in range(DRAWS_BEFORE_LISTING if nodes else 0):
            node = nodes[derive_seed(hub.seed, "fedbuff", self.draws, attempt) % len(nodes)]
            if self._is_idle(hub, node):
                break
        else:
            idle = [node for node in nodes if self._is_idle(hub, node)]
            if not idle:
                return None
            node = idle[derive_seed(hub.seed, "fedbuff", self.draws, "idle") % len(idle)]
        self.draws += 1
        return node

    def _is_idle(self, hub: Hub, node: Node) -> bool:
        busy = node.partition in self.training or node.partition in self.waiting
        return not busy and not hub.is_left_aside(node)

    # ---- what happens -------------------------------------------------------------------------------------------

    def on_reply(self, hub: Hub, reply: Reply) -> None:
        self.training.discard(reply.node.partition)
        if self.max_staleness is not None and reply.staleness > self.max_staleness:
            self.dropped += 1
            hub.log(too_stale=reply.node.partition, staleness=reply.staleness)
            self._fill_place(hub, reply.node)
            return
        self.buffer = add(self.buffer, reply.update, self.staleness(reply.staleness), reply.buffers)
        self.used.append(receipt(reply))
        self.waiting.add(reply.node.partition)
        if self.buffer.count == self.buffer_size:
            self._step(hub)
            self._release(hub)
        elif self.wait:
            self._release_if_alone(hub)
        else:
            hub.set_timer(MOMENT, hub.now)

    def on_timer(self, hub: Hub, name: str) -> None:
        self._release(hub)

    def _step(self, hub: Hub) -> None:
        buffer, used = self.buffer, [hub.restore_reply(state) for state in self.used]
        assert buffer.total is not None
        params = server_step(hub.model.params, buffer.total, self.buffer_size, self.server_lr)
        buffers = settle_buffers(hub.model.buffers, buffer.buffers, buffer.weight / self.buffer_size)
        weights = [self.server_lr * self.staleness(reply.staleness) / self.buffer_size for reply in used]
        self.applied += buffer.count
        self.buffer, self.used = Buffer(), []
        hub.publish(params, used, buffers, weights)

    def _release(self, hub: Hub) -> None:
        """Give those that waited work again, in the order of their partitions."""
        released, self.waiting = self.waiting, set()
        for partition in sorted(released):
            if (node := hub.node_of(partition)) is not None:
                self._fill_place(hub, node)

    def _release_if_alone(self, hub: Hub) -> None:
        hopeful = (hub.failures_in_a_row.get(partition, 0) < MAX_FAILURES_IN_A_ROW for partition in self.training)
        if self.wait and not any(hopeful):
            self._release(hub)    # nobody is left for whom it is worth waiting

    def on_failure(self, hub: Hub, failure: Failure) -> None:
        self.training.discard(failure.node.partition)
        if self.concurrency is None:
            super().on_failure(hub, failure)
        else:
            self._fill_place(hub, failure.node)
        self._release_if_alone(hub)

    def on_join(self, hub: Hub, node: Node) -> None:
        if self.concurrency is None or len(self.training) + len(self.waiting) < self.concurrency:
            self.hand_out(hub, node)

    def on_leave(self, hub: Hub, node: Node) -> None:
        self.training.discard(node.partition)
        self.waiting.discard(node.partition)
        self._release_if_alone(hub)

    def on_stop(self, hub: Hub) -> None:
        # A buffer that is not full is discarded: dividing by K would shrink it, dividing by less is another method.
        hub.log(applied=self.applied, dropped=self.dropped, discarded=self.buffer.count)

    # ---- what survives a restart --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": {**vars(self.buffer), "buffers": dict(self.buffer.buffers)}, "used": list(self.used),
            "training": sorted(self.training), "waiting": sorted(self.waiting),
            "applied": self.applied, "dropped": self.dropped, "draws": self.draws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer, self.used = Buffer(**state["buffer"]), list(state["used"])
        self.training, self.waiting = set(state["training"]), set(state["waiting"])
        self.applied, self.dropped, self.draws = state["applied"], state["dropped"], state["draws"]
