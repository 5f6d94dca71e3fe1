"""What a report says about a run, worked out from its rows: who was busy, who waited, who contributed how much.

Pure functions from rows to figures. Rows may come from a run that was killed or from software of other people, so a
row without usable times is left out here rather than trusted.
"""
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedcore.runs import Row, Run, finite

TRAINING, EVALUATING, OTHER = "train", "evaluate", "other"


@dataclass(frozen=True, slots=True)
class Task:
    """One client task as the timeline tells it; times in seconds."""

    node: int
    kind: str
    start: float
    end: float
    download: float
    queue: float            # received, but its turn has not come: the client is at another task
    compute: float
    upload: float
    steps: int
    staleness: int | None
    outcome: str
    group: object = None

    @property
    def worked_from(self) -> float:
        return min(self.start + self.download + self.queue, self.end)

    @property
    def worked_until(self) -> float:
        return min(self.worked_from + self.compute, self.end)

    @property
    def cancelled(self) -> bool:
        """Whether the task was called off, as the end of a run calls off whatever is under way."""
        return self.outcome == "cancelled"

    @property
    def failed(self) -> bool:
        """Whether the task's work was lost: failed, lost or refused."""
        return self.outcome not in ("ok", "cancelled")


@dataclass(frozen=True)
class Spent:
    """How client time was spent, in seconds."""

    training: float = 0.0
    transfer: float = 0.0
    evaluating: float = 0.0
    waiting: float = 0.0
    offline: float = 0.0

    @property
    def online(self) -> float:
        return self.training + self.transfer + self.evaluating + self.waiting

    def share(self, name: str) -> float:
        """Return the share of online time that went into `training`, `transfer`, `evaluating` or `waiting`."""
        return float(getattr(self, name)) / self.online if self.online > 0 else 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.training + other.training, self.transfer + other.transfer,
                     self.evaluating + other.evaluating, self.waiting + other.waiting, self.offline + other.offline)


@dataclass(frozen=True)
class Client:
    """One client's part in a run; shares are between 0 and 1, None where the run does not say."""

    node: int
    examples: int | None
    labels: Sequence[int] | None
    seconds_per_step: float | None
    updates: int
    steps: int
    weight: float | None
    staleness: float | None
    failures: int
    spent: Spent | None


@dataclass(frozen=True)
class Facts:
    """Everything that is derived from the rows once and used in several places."""

    end: float
    tasks: list[Task]
    offline: dict[int, list[tuple[float, float]]]
    clients: list[Client]
    staleness: list[int]
    spent: Spent | None
    lost_steps: int

    @property
    def slow_to_fast(self) -> tuple[Client, Client] | None:
        """The slowest and the fastest client, when their speeds are known and differ."""
        timed = [client for client in self.clients if client.seconds_per_step]
        slowest = max(timed, key=lambda client: client.seconds_per_step or 0.0, default=None)
        fastest = min(timed, key=lambda client: client.seconds_per_step or 0.0, default=None)
        if slowest is None or fastest is None or slowest.seconds_per_step == fastest.seconds_per_step:
            return None
        return slowest, fastest


def facts_of(run: Run) -> Facts:
    """Return the derived figures of a run."""
    tasks = tasks_of(run.timeline, {node: speed for row in run.clients if (node := node_of(row)) is not None
                                    and (speed := finite(row.get("seconds_per_step"))) is not None},
                     default_steps(run.config))
    ends = [task.end for task in tasks] + [finite(row.get("time_s")) or 0.0 for row in run.metrics]
    end = max([finite(run.summary.get("time_s")) or 0.0, *ends])
    offline = offline_spans(run.metrics, tasks, end)
    clients = clients_of(run, tasks, offline, end)
    parts = [client.spent for client in clients if client.spent is not None]
    staleness = [int(value) for row in run.rows("update") for value in _list(row, "staleness")
                 if finite(value) is not None]
    lost = sum(task.steps for task in tasks if task.kind == TRAINING and task.failed)
    return Facts(end, tasks, offline, clients, staleness, sum(parts, Spent()) if parts else None, lost)


def default_steps(config: Row) -> int:
    """Return the local steps of a task whose row does not say: the experiment's, 0 when it says nothing either."""
    train = config.get("train")
    return int(finite(train.get("local_steps")) or 0) if isinstance(train, dict) else 0


def tasks_of(timeline: Iterable[Row], speeds: Mapping[int, float] | None = None, usual_steps: int = 0) -> list[Task]:
    """Return the tasks of a timeline, by node and start; rows without usable times or node are left out.

    A row ends when its task was answered for: in rounds that is when the round closed, so the parts decide when the
    client was done. Where a task ended without telling its parts (called off, lost), its work is taken to have lasted
    as long as its steps take on that client, and the rest of its time was waiting.

    Args:
        speeds: seconds per step by node.
        usual_steps: steps of a task whose row does not tell.
    """
    tasks = []
    for row in timeline:
        start, end, node = finite(row.get("start_s")), finite(row.get("end_s")), node_of(row)
        if start is None or end is None or end < start or node is None:
            continue
        download, queue, upload = (_part(row, name) for name in ("download_s", "queue_s", "upload_s"))
        compute, known_steps = finite(row.get("compute_s")), row.get("local_steps")
        outcome = str(row.get("outcome") or "ok")
        steps = int(finite(known_steps) or 0) if known_steps is not None else usual_steps
        if compute is None:     # unknown: what is not transfer counts as work
            compute = max(end - start - download - queue - upload, 0.0)
            if outcome != "ok" and speeds is not None and node in speeds and steps:
                compute = min(compute, steps * speeds[node])
        staleness = finite(row.get("staleness"))
        end = min(end, start + download + queue + compute + upload)
        tasks.append(Task(node, _kind(row), start, end, download, queue, compute, upload, steps,
                          None if staleness is None else int(staleness), outcome, row.get("group")))
    return sorted(tasks, key=lambda task: (task.node, task.start, task.end))


def clients_of(run: Run, tasks: Sequence[Task], offline: dict[int, list[tuple[float, float]]],
               end: float) -> list[Client]:
    """Return every client that is registered, was handed a task or is named by an update, by partition."""
    known = {node: row for row in run.clients if (node := node_of(row)) is not None}
    by_node: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        by_node[task.node].append(task)
    updates, weights, staleness = applied_updates(run)
    failures = Counter(node_of(row) for row in [*run.rows("failure"), *run.rows("refused")])
    clients = []
    for node in sorted({*known, *by_node, *updates}):
        row, own = known.get(node, {}), by_node.get(node, [])
        labels = row.get("labels")
        stale = staleness.get(node)
        examples = finite(row.get("num_examples"))
        clients.append(Client(
            node=node, examples=None if examples is None else int(examples),
            labels=[int(finite(value) or 0) for value in labels] if isinstance(labels, list) else None,
            seconds_per_step=finite(row.get("seconds_per_step")), updates=updates[node],
            steps=sum(task.steps for task in own if task.kind == TRAINING and task.outcome == "ok"),
            weight=weights.get(node, 0.0) if weights else None, staleness=statistics.fmean(stale) if stale else None,
            failures=failures[node], spent=time_spent(own, offline.get(node, []), end) if tasks else None))
    return clients


def applied_updates(run: Run) -> tuple[Counter[int], dict[int, float] | None, dict[int, list[float]]]:
    """Return per node: how many of its updates were applied, their summed weight, their staleness.

    The weights are None when some update row does not carry them.
    """
    updates: Counter[int] = Counter()
    weights: dict[int, float] = defaultdict(float)
    staleness: dict[int, list[float]] = defaultdict(list)
    weighted = True
    for row in run.rows("update"):
        nodes, row_weights, row_staleness = _list(row, "nodes"), _list(row, "weights"), _list(row, "staleness")
        weighted = weighted and len(row_weights) == len(nodes)
        for index, node in enumerate(nodes):
            if not isinstance(node, int):
                continue
            updates[node] += 1
            if weighted:
                weights[node] += finite(row_weights[index]) or 0.0
            if index < len(row_staleness) and (stale := finite(row_staleness[index])) is not None:
                staleness[node].append(stale)
    return updates, weights if weighted and sum(weights.values()) > 0 else None, staleness


def offline_spans(metrics: Iterable[Row], tasks: Sequence[Task], end: float) -> dict[int, list[tuple[float, float]]]:
    """Return when each node was away, from its join and leave rows.

    A node whose first row is a join was away before it, unless it had been given a task by then.
    """
    first_task: dict[int, float] = {}
    for task in tasks:
        first_task.setdefault(task.node, task.start)
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    left_at: dict[int, float | None] = {}
    for row in metrics:
        node, at = node_of(row), finite(row.get("time_s"))
        if row.get("event") not in ("join", "leave") or node is None or at is None:
            continue
        if row["event"] == "leave":
            left_at[node] = at
            continue
        since = left_at.get(node) if node in left_at else 0.0
        if since is not None and at > since and (node in left_at or first_task.get(node, end) >= at):
            spans[node].append((since, at))
        left_at[node] = None
    for node, since in left_at.items():
        if since is not None and since < end:
            spans[node].append((since, end))
    return dict(spans)


def time_spent(tasks: Sequence[Task], offline: Sequence[tuple[float, float]], end: float) -> Spent:
    """Return how one client spent the run, from time 0 to `end`; waiting is whatever nothing else explains."""
    training = sum(task.compute for task in tasks if task.kind == TRAINING)
    evaluating = sum(task.compute for task in tasks if task.kind != TRAINING)
    transfer = sum(task.download + task.upload for task in tasks)
    spans = sorted([*((task.start, min(task.start + task.download, task.end)) for task in tasks),
                    *((task.worked_from, task.end) for task in tasks), *offline])
    covered, reached = 0.0, 0.0
    for since, until in spans:
        covered += max(0.0, min(until, end) - max(since, reached))
        reached = max(reached, until)
    away = sum(until - since for since, until in offline)
    return Spent(training, transfer, evaluating, max(end - covered, 0.0), away)


def histogram_bins(values: Sequence[int], most: int = 32) -> list[tuple[str, int]]:
    """Return (label, count) per whole number, or per range of equal width when there would be too many bars."""
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // most)
    counts = Counter((value - low) // width for value in values)
    bins = []
    for index in range((high - low) // width + 1):
        first = low + index * width
        bins.append((str(first) if width == 1 else f"{first}–{first + width - 1}", counts[index]))
    return bins


def busiest_share(amounts: Sequence[float], part: float = 0.1) -> float | None:
    """Return which share of a total the largest tenth (`part`) of the amounts makes up."""
    total = sum(amounts)
    top = max(1, round(part * len(amounts)))
    return sum(sorted(amounts, reverse=True)[:top]) / total if total > 0 else None


def node_of(row: Row) -> int | None:
    """Return the partition number that a row speaks of."""
    node = row.get("node")
    return node if isinstance(node, int) and not isinstance(node, bool) else None


def _kind(row: Row) -> str:
    kind = str(row.get("kind") or TRAINING).split(".")[0]
    return kind if kind in (TRAINING, EVALUATING) else OTHER


def _part(row: Row, key: str) -> float:
    return max(finite(row.get(key)) or 0.0, 0.0)


def _list(row: Row, key: str) -> list:
    value = row.get(key)
    return value if isinstance(value, list) else []
