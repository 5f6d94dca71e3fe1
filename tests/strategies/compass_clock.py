"""A few lines of virtual clock around FedCompass's pure scheduler."""
import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fedcore.strategies.compass_scheduler import Arrival, Rules, Schedule, on_deadline, on_upload, start

RULES = Rules(
    min_local_steps=20, max_local_steps=100, latest_time_factor=1.5, speed_momentum=0.9, initial_steps=20
)
UPLOAD, DEADLINE = 0, 1    # at equal times uploads come first


@dataclass
class Federation:
    """Clients of given speeds around a schedule; counts versions and follows every update to its application."""

    rules: Rules
    step_times: list[float]
    link_s: float = 0.0
    separate_links: bool = False
    jitter: Callable[[int, int], float] = lambda client, index: 1.0
    schedule: Schedule = field(default_factory=Schedule)
    version: int = 0
    now: float = 0.0
    queue: list = field(default_factory=list)
    tasks: dict = field(default_factory=dict)         # client -> (task, base version, sent at)
    late: list = field(default_factory=list)          # B: (client, base version)
    buffers: dict = field(default_factory=dict)       # B_g
    applied: list = field(default_factory=list)       # one list of (client, staleness) per version
    uploads: Counter = field(default_factory=Counter)
    waiting_since: dict = field(default_factory=dict)
    log: list = field(default_factory=list)
    _sequence: int = 0

    def begin(self):
        for client in range(len(self.step_times)):
            self.schedule, task = start(self.schedule, self.rules, client, self.now)
            self.send(task)
        return self

    def send(self, task):
        index = self.uploads[task.client]
        duration = task.local_steps * self.step_times[task.client] * self.jitter(task.client, index) + self.link_s
        self.tasks[task.client] = (task, self.version, self.now)
        self.waiting_since.pop(task.client, None)
        self.push(self.now + duration, UPLOAD, task.client)

    def push(self, at, kind, number):
        self._sequence += 1
        heapq.heappush(self.queue, (at, kind, number, self._sequence))

    def step(self):
        """Handle the next event; returns what was decided."""
        self.now, kind, number, _ = heapq.heappop(self.queue)
        known = set(self.schedule.groups)
        decision = self.upload(number) if kind == UPLOAD else self.deadline(number)
        for group in sorted(set(self.schedule.groups) - known):
            self.push(self.schedule.groups[group].latest_s, DEADLINE, group)
        return decision

    def upload(self, client):
        task, base, sent = self.tasks.pop(client)
        self.uploads[client] += 1
        elapsed = self.now - sent
        compute = elapsed - self.link_s if self.separate_links else None
        self.schedule, decision = on_upload(
            self.schedule, self.rules, client, self.now, elapsed, task.local_steps, compute
        )
        if decision.arrival is Arrival.FIRST:
            self.apply([(client, base)])
        elif decision.arrival is Arrival.LATE:
            self.late.append((client, base))
        else:
            self.buffers.setdefault(decision.group, []).append((client, base))
            self.waiting_since[client] = self.now
        return self.act(decision)

    def deadline(self, group):
        self.schedule, decision = on_deadline(self.schedule, self.rules, group, self.now)
        return self.act(decision)

    def act(self, decision):
        if decision.aggregate is not None:
            used, self.late = self.late + self.buffers.pop(decision.aggregate), []
            self.apply(used)
        for task in decision.tasks:
            self.send(task)
            self.log.append((round(self.now, 6), task.client, task.local_steps, task.group))
        return decision

    def apply(self, used):
        self.applied.append([(client, self.version - base) for client, base in used])
        self.version += 1

    def run(self, events):
        for _ in range(events):
            yield self.step()
