"""The discrete-event engine: nodes that do one task after another, links, and what goes wrong."""
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.clock import Event
from fedcore.flower import adopt_identity, reply_to, with_id
from fedcore.payload import clone_content, wire_bytes
from fedcore.simulations.availability import Availability
from fedcore.simulations.clock import EventHeap
from fedcore.simulations.devices import Devices
from fedcore.simulations.execute import CRASHED, GONE, NO_ANSWER, AppFactory
from fedcore.simulations.failures import Failures
from fedcore.simulations.labour import FIRST_NODE_ID, Labour
from fedcore.simulations.links import ServerLink
from fedcore.simulations.memory import exempt_what_is_loaded
from fedcore.simulations.network import Network
from fedcore.simulations.sim_task import Coming, Expiry, Lane, SimTask, set_train_seconds, work_steps

# At equal times: transfers start, then replies, then failures, then nodes that come and go (the hub's timers follow).
UPLOAD, REPLY, FAILURE, MEMBERSHIP = -1, 0, 1, 2


class Engine:
    """Nodes, links and the clock of a simulated federation; `VirtualGrid` is its face towards Flower.

    Args:
        app: the ClientApp, or a function that makes it (needed with `workers`).
        num_nodes: registered clients; one that has nothing to do costs nothing.
        workers: processes that compute; 0 computes in this one. Results are the same.
        run_config: what clients find in `context.run_config`.
    """

    def __init__(
        self,
        app: ClientApp | AppFactory,
        num_nodes: int,
        seed: int,
        devices: Devices | None,
        network: Network | None,
        availability: Availability | None,
        failures: Failures | None,
        workers: int,
        run_config: Mapping[str, Any] | None,
    ):
        adopt_identity()
        exempt_what_is_loaded()
        self.num_nodes = num_nodes
        self.devices = devices or Devices(seed=seed)
        self.network = network or Network(seed=seed)
        self.availability, self.failures = availability, failures
        self.labour = Labour(app, num_nodes, {"seed": seed} if run_config is None else run_config, workers)
        self.link = ServerLink(self.network)
        self.now = 0.0
        self.heap = EventHeap()
        self.offline: set[int] = set()
        self.tasks: dict[str, SimTask] = {}            # awaited, by message id
        self.forgotten: set[str] = set()               # nobody wants their replies any more
        self._next_id = 0
        self._counts: dict[int, int] = {}              # tasks handed to each partition so far
        self._lanes: dict[int, Lane] = {}
        self._unsettled: list[SimTask] = []            # whose duration is known only once they are computed
        self._times: dict[str, dict[str, float] | None] = {}
        # Told of every task that ends, how, and whether anybody still wanted its reply.
        self.on_end: Callable[[SimTask, RecordDict | Error, bool], None] | None = None
        if availability is not None:
            for partition in range(num_nodes):
                if not availability.is_on(partition, 0.0):
                    self.offline.add(partition)
                self._plan_change(partition)

    # ---- time ---------------------------------------------------------------------------------------------------

    def start_clock(self) -> None:
        """Call the present moment zero; only while nothing is under way."""
        if self.heap.next_at() is None and not self._unsettled:
            self.now = 0.0
            self.link = ServerLink(self.network)

    def next_event(self, until: float | None) -> Event | None:
        """Move the clock to what happens next, at most to `until`; None when nothing can ever happen."""
        self._settle()
        while (at := self.heap.next_at()) is not None and (until is None or at <= until):
            item = self.heap.pop().item
            self.now = max(self.now, at)
            event = self._advance(item) if isinstance(item, SimTask) else self._change(item)
            if event is not None:
                return event
            self._settle()
        if until is None:
            return None
        self.now = max(self.now, until)
        return Event("time", self.now)

    def task_times(self, message_id: str | None) -> dict[str, float] | None:
        """Return how long the parts of a task took, once, after its reply was handed out."""
        return self._times.pop(message_id or "", None)

    def close(self) -> None:
        """End the worker processes."""
        self.labour.close()

    # ---- sending ------------------------------------------------------------------------------------------------

    def push(self, message: Message) -> str | None:
        """Send a message; returns its id, None when the node is not there."""
        partition = message.metadata.dst_node_id - FIRST_NODE_ID
        if not 0 <= partition < self.num_nodes or partition in self.offline:
            return None
        name = str(self._next_id)
        self._next_id += 1
        index = self._counts.get(partition, 0)
        self._counts[partition] = index + 1
        # The sender may go on changing its records (Flower's FedAvg does): take them as they are now.
        delivered = with_id(message, clone_content(message.content), name)
        task = SimTask(name, partition, delivered, self.now, index, self.now + message.metadata.ttl)
        self.tasks[name] = task
        task.download_s = self.link.download_seconds(task, self.now, wire_bytes(delivered.content))
        if self.failures is not None and self.failures.loses_request(partition, index):
            task.put_away("unreachable")
            self._expire_later(task)
            return name
        lane = self._lanes.get(partition)
        if lane is None:
            lane = self._lanes[partition] = Lane()
            self._begin(lane, task)
        else:
            lane.waiting.append(task)
            self._expire_later(task)    # it may expire before its turn comes
        return name

    def _begin(self, lane: Lane, task: SimTask) -> None:
        """Let a node start on a task."""
        lane.running = task
        task.started_at = max(self.now, task.pushed_at + task.download_s)
        estimate = self.labour.estimate(task)
        if estimate is None:
            task.stage = "unsettled"
            self._unsettled.append(task)
            return
        self._plan(task, estimate.work_steps, estimate.reply_bytes)
        if task.fate in ("ok", "reply_lost"):
            self.labour.begin(task)

    def introduction(self, node_id: int) -> RecordDict | None:
        """Return what a node answers to a query, if its app can say it without one; counted as the node's task."""
        partition = node_id - FIRST_NODE_ID
        content = self.labour.introduction(partition)
        if content is not None:
            self._counts[partition] = self._counts.get(partition, 0) + 1
        return content

    def _settle(self) -> None:
        """Compute the tasks whose duration only their reply tells, and plan their arrival."""
        if not self._unsettled:
            return
        tasks, self._unsettled = self._unsettled, []
        for task in tasks:
            self.labour.begin(task)
        for task in tasks:
            outcome = self.labour.result(task)
            if isinstance(outcome, Error):
                self._plan(task, None, 0)
            else:
                self._plan(task, work_steps(outcome), wire_bytes(outcome))

    def _plan(self, task: SimTask, steps: float | None, reply_bytes: int) -> None:
        """Fix how long a task takes, and what becomes of it."""
        if steps is None and task.message.metadata.message_type.startswith("query"):
            steps = 0.0
        task.compute_s = self.devices.compute_seconds(task.partition, task.index, steps)
        if self.failures is not None:
            if (point := self.failures.crash_point(task.partition, task.index)) is not None:
                task.fate = "crash"
                task.compute_s *= point
                self._arrive_at(task, task.started_at + task.compute_s)
                return
            if self.failures.loses_reply(task.partition, task.index):
                task.fate = "reply_lost"
        task.upload_bytes, uploads_at = reply_bytes, task.started_at + task.compute_s
        if self.network.server_downlink_mbps is None:
            self._upload(task, uploads_at)
        else:    # the server's link is shared in the order in which uploads begin
            task.stage = "uploading"
            task.entry = self.heap.push(uploads_at, UPLOAD, task.rank, task)

    def _upload(self, task: SimTask, at: float) -> None:
        task.upload_s = self.link.upload_seconds(task, at, task.upload_bytes)
        self._arrive_at(task, at + task.upload_s)

    def _arrive_at(self, task: SimTask, at: float) -> None:
        task.stage, task.arrives_at = "arriving", at
        task.entry = self.heap.push(at, REPLY, task.rank, task)
        if task.expiry is None and (task.fate == "reply_lost" or at > task.expires_at):
            self._expire_later(task)

    def _expire_later(self, task: SimTask) -> None:
        task.expiry = self.heap.push(task.expires_at, FAILURE, task.rank, Expiry(task))

    # ---- what becomes of a task -----------------------------------------------------------------------------------

    def _advance(self, task: SimTask) -> Event | None:
        """A task's next moment has come."""
        if task.stage == "uploading":
            self._upload(task, self.now)
            return None
        if task.fate == "gone":
            return self._hand_over(task, Error(GONE, "the node went offline"))
        if task.fate == "crash":
            self._free(task)
            return self._hand_over(task, Error(CRASHED, "the simulated device crashed while it was working"))
        outcome = self.labour.result(task)
        if isinstance(outcome, Error) and task.stage == "arriving":
            task.stage = "failing"    # at equal times failures come after replies
            task.entry = self.heap.push(self.now, FAILURE, task.rank, task)
            return None
        self.labour.remember(task)
        self._free(task)
        if task.fate == "reply_lost" or self.now > task.expires_at:
            task.put_away("done")
            return None
        return self._hand_over(task, outcome)

    def _free(self, task: SimTask) -> None:
        """Let a node go on to its next task."""
        lane = self._lanes.get(task.partition)
        if lane is None or lane.running is not task:
            return
        while lane.waiting:
            following = lane.waiting.popleft()
            if following.id in self.tasks:    # else it expired while it waited
                self._begin(lane, following)
                return
        del self._lanes[task.partition]

    def _hand_over(self, task: SimTask, outcome: RecordDict | Error) -> Event | None:
        if self.tasks.pop(task.id, None) is None:
            return None    # it had expired
        if task.expiry is not None:
            self.heap.cancel(task.expiry)
        wanted = task.id not in self.forgotten
        if self.on_end is not None:
            self.on_end(task, outcome, wanted)
        if not wanted:
            self.forgotten.discard(task.id)
            return None
        if isinstance(outcome, RecordDict):
            set_train_seconds(outcome, task.compute_s)
        reply = reply_to(task.message, outcome)
        expired = isinstance(outcome, Error) and outcome.code == NO_ANSWER
        self._times[task.id] = None if expired else task.times()
        task.outcome = task.state_after = None
        return Event("reply", self.now, FIRST_NODE_ID + task.partition, reply)

    def _change(self, item: "Expiry | Coming") -> Event | None:
        if isinstance(item, Expiry):
            item.task.expiry = None
            waited = f"{item.task.expires_at - item.task.pushed_at:g} s"
            return self._hand_over(item.task, Error(NO_ANSWER, f"no answer within {waited}"))
        node_id = FIRST_NODE_ID + item.partition
        self._plan_change(item.partition)
        if item.partition in self.offline:
            self.offline.discard(item.partition)
            return Event("join", self.now, node_id)
        self.offline.add(item.partition)
        lane = self._lanes.pop(item.partition, None)
        for task in [] if lane is None else [lane.running, *lane.waiting]:
            if task is not None:
                self._lose(task)
        # The news comes before the failures of its tasks: nobody gives work to a node that is gone.
        return Event("leave", self.now, node_id)

    def _plan_change(self, partition: int) -> None:
        assert self.availability is not None
        at = self.availability.next_change(partition, self.now)
        if at != float("inf"):
            self.heap.push(at, MEMBERSHIP, (partition, 0), Coming(partition))

    def _lose(self, task: SimTask) -> None:
        """Lose a task with the node that held it."""
        if task.entry is not None:
            self.heap.cancel(task.entry)
        if task.stage == "unsettled":
            self._unsettled.remove(task)
        task.fate, task.stage, task.arrives_at, task.future = "gone", "failing", self.now, None
        task.entry = self.heap.push(self.now, FAILURE, task.rank, task)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the clock, the work under way with the models it started from, and the clients' memory."""
        held = dict(self.tasks)
        for lane in self._lanes.values():    # a task that nobody awaits any more still keeps its node busy
            held.update({task.id: task for task in [lane.running, *lane.waiting] if task is not None})
        lanes = {partition: [task.id for task in (lane.running, *lane.waiting) if task is not None]
                 for partition, lane in self._lanes.items()}
        moments = [[at, item.partition] for at, item in self.heap.items() if isinstance(item, Coming)]
        return {
            "now": self.now, "next_id": self._next_id, "counts": self._counts,
            "states": self.labour.states,
            "tasks": [task.state_dict() for task in held.values()], "awaited": list(self.tasks), "lanes": lanes,
            "offline": sorted(self.offline), "moments": moments, "forgotten": sorted(self.forgotten),
            "link_free": self.link.free_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; replies that had been computed are computed again."""
        self.now, self._next_id, self._counts = state["now"], state["next_id"], state["counts"]
        self.labour.states, self.link.free_at = state["states"], state["link_free"]
        self.offline, self.forgotten = set(state["offline"]), set(state["forgotten"])
        self.heap = EventHeap()
        for at, partition in state["moments"]:
            self.heap.push(at, MEMBERSHIP, (partition, 0), Coming(partition))
        held = {fields["id"]: SimTask.from_state(fields) for fields in state["tasks"]}
        self.tasks = {name: held[name] for name in state["awaited"]}
        self._lanes = {}
        for partition, names in state["lanes"].items():
            running, *waiting = (held[name] for name in names)
            self._lanes[partition] = Lane(running, deque(waiting))
        for fields in state["tasks"]:
            self._replan(held[fields["id"]], fields["expires"])

    def _replan(self, task: SimTask, expires: bool) -> None:
        """Put a task that was read from a checkpoint back into the heap."""
        if expires:
            self._expire_later(task)
        if task.stage == "unsettled":
            self._unsettled.append(task)
        elif task.stage == "uploading":
            task.entry = self.heap.push(task.started_at + task.compute_s, UPLOAD, task.rank, task)
        elif task.stage in ("arriving", "failing"):
            assert task.arrives_at is not None
            priority = REPLY if task.stage == "arriving" else FAILURE
            task.entry = self.heap.push(task.arrives_at, priority, task.rank, task)
        if task.stage in ("uploading", "arriving") and task.fate in ("ok", "reply_lost"):
            self.labour.begin(task)
