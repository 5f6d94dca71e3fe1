"""What can be known about a stranger's Flower app while it runs: its tasks, and what its strategy makes of them."""
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result, Strategy

from fedcore.flower import LegacyStrategy, Start
from fedcore.payload import wire_bytes
from fedcore.recorder import Recorder
from fedcore.simulations.app_folder import app_traceback
from fedcore.simulations.execute import GONE, LOAD_FAILED, NO_ANSWER
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.sim_task import SimTask, work_steps

logger = logging.getLogger("fedcore")

NO_TIMES = dict.fromkeys(("download_s", "queue_s", "compute_s", "upload_s"))
# Columns of our own that an app's metrics must not overwrite.
TOTALS = ("client_updates", "client_steps", "bytes_up", "bytes_down")
TAKEN = frozenset(("time_s", "event", "version", "where", "nodes", *TOTALS))


class AppRecord:
    """Listens to a grid and to strategies, and writes the run folder's rows.

    Args:
        folder: of the app, to cut tracebacks down to its own code.
    """

    def __init__(self, grid: VirtualGrid, recorder: Recorder, folder: Path):
        self._grid, self._recorder, self._folder = grid, recorder, folder
        self.totals = dict.fromkeys(TOTALS, 0)
        self.counts = {"failures": 0, "refused": 0, "lost": 0, "evaluations": 0}
        self.succeeded = 0                        # tasks of any kind
        self.version = 0
        self.strategy: str | None = None
        self.arrays: ArrayRecord | None = None    # the strategy's result
        self.num_params: int | None = None
        self.latest: dict[str, float] = {}
        self.best_accuracy: float | None = None
        self.num_examples: dict[int, int] = {}    # by partition, as last reported
        self.last_error: str | None = None
        self._shown: set[str] = set()
        self._watching = False
        grid.engine.on_end = self.task_ended

    # ---- tasks --------------------------------------------------------------------------------------------------

    def task_ended(self, task: SimTask, outcome: RecordDict | Error, wanted: bool) -> None:
        """Write a task's row."""
        kind, down = task.message.metadata.message_type, wire_bytes(task.message.content)
        ok, up, steps = isinstance(outcome, RecordDict), 0, None
        if isinstance(outcome, RecordDict):
            up, steps = wire_bytes(outcome), work_steps(outcome)
            result = "ok" if wanted else "lost"
        else:
            result = "lost" if outcome.code in (NO_ANSWER, 4, GONE) else "failed"
        self.totals["bytes_up"] += up
        self.totals["bytes_down"] += down
        if not wanted:
            self.counts["lost"] += 1
        elif isinstance(outcome, RecordDict):
            self._succeeded(task, kind, outcome, steps)
        else:
            self._failed(task, kind, outcome, result)
        times = task.times() if ok else None
        self._row(task, kind, result, times or NO_TIMES, steps, down, up)

    def _row(self, task: SimTask, kind: str, outcome: str, times: Mapping[str, float | None], steps: float | None,
             bytes_down: int, bytes_up: int) -> None:
        self._recorder.task({
            "task": int(task.id), "node": task.partition, "kind": kind, "start_s": task.pushed_at,
            "end_s": self._grid.now, **times, "local_steps": None if steps is None else int(steps),
            "base_version": None, "staleness": None, "outcome": outcome, "bytes_down": bytes_down, "bytes_up": bytes_up,
        })

    def _succeeded(self, task: SimTask, kind: str, content: RecordDict, steps: float | None) -> None:
        self.succeeded += 1
        if not kind.startswith("train"):
            return
        self.totals["client_updates"] += 1
        self.totals["client_steps"] += int(steps or 0)
        for record in content.values():
            if isinstance(record, MetricRecord) and isinstance(count := record.get("num-examples"), (int, float)):
                self.num_examples[task.partition] = int(count)

    def _failed(self, task: SimTask, kind: str, error: Error, result: str) -> None:
        self.counts["lost" if result == "lost" else "failures"] += 1
        text = str(error.reason)
        reason = text.rstrip().splitlines()[-1] if text.strip() else "no reason given"
        self._recorder.metric(self._grid.now, "failure", version=self.version, node=task.partition, kind=kind,
                              code=error.code, reason=reason)
        self.last_error = f"Node {task.partition} failed at a {kind} message: {reason}"
        if LOAD_FAILED <= error.code < NO_ANSWER and reason not in self._shown:
            # A mistake in the app's code: shown once in full, however many nodes make it.
            self._shown.add(reason)
            logger.error("Node %d failed at a %s message, %.6g s into the run:\n%s", task.partition, kind,
                         self._grid.now, app_traceback(text, self._folder))

    def close(self) -> None:
        """Write the rows of tasks that are still under way."""
        for task in self._grid.engine.tasks.values():
            kind, down = task.message.metadata.message_type, wire_bytes(task.message.content)
            self.totals["bytes_down"] += down
            self._row(task, kind, "cancelled", NO_TIMES, None, down, 0)

    # ---- strategies ---------------------------------------------------------------------------------------------

    def wrap(self, start: Start) -> Start:
        """Return a strategy's `start` that lets this record look on."""
        signature = inspect.signature(start)

        @functools.wraps(start)
        def watched(*args: Any, **kwargs: Any) -> Result:
            if self._watching:    # a strategy that calls its base's start
                return start(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            strategy = args[0]
            self.strategy = type(strategy).__name__
            arrays = given.arguments.get("initial_arrays")
            if isinstance(arrays, ArrayRecord):
                self.num_params = sum(_size(array.shape) for array in arrays.values())
            if (evaluate_fn := given.arguments.get("evaluate_fn")) is not None:
                given.arguments["evaluate_fn"] = self._watched_evaluation(evaluate_fn)
            with self._watch(strategy, evaluates_itself=evaluate_fn is not None):
                result = start(*given.args, **given.kwargs)
            if isinstance(getattr(result, "arrays", None), ArrayRecord):
                self.arrays = result.arrays
            return result

        return watched

    @contextmanager
    def _watch(self, strategy: Strategy, evaluates_itself: bool) -> Iterator[None]:
        """Look on as a strategy aggregates.

        Args:
            evaluates_itself: whether the server evaluates; then its figures are the run's, and the clients' are noted.
        """
        first, self._watching = self.version, True
        train, evaluate = strategy.aggregate_train, strategy.aggregate_evaluate

        def aggregate_train(server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            aggregated = train(server_round, replies)
            if aggregated[0] is not None:    # else the round failed, and the model is as it was
                self.version = first + server_round
                self._updated(replies, aggregated[1])
            return aggregated

        def aggregate_evaluate(server_round: int, replies: Iterable[Message]) -> Any:
            metrics = evaluate(server_round, replies)
            if not evaluates_itself:
                self._evaluated("clients", metrics)
            elif found := figures(metrics):
                self._recorder.metric(self._grid.now, "log", version=self.version, where="clients", **found)
            return metrics

        vars(strategy).update(aggregate_train=aggregate_train, aggregate_evaluate=aggregate_evaluate)
        try:
            yield
        finally:
            del strategy.aggregate_train, strategy.aggregate_evaluate
            self._watching = False

    @contextmanager
    def watch_legacy(self, strategy: LegacyStrategy) -> Iterator[None]:
        """Look on as a strategy of Flower's deprecated kind aggregates and evaluates."""
        self.strategy, first = type(strategy).__name__, self.version
        fit, evaluate_clients, evaluate_here = strategy.aggregate_fit, strategy.aggregate_evaluate, strategy.evaluate

        def aggregate_fit(server_round: int, results: list[Any], failures: list[Any]) -> Any:
            aggregated = fit(server_round, results, failures)
            if aggregated[0] is not None:
                self.version = first + server_round
                nodes = [self._grid.partition_of(proxy.node_id) for proxy, _ in results]
                self._update_row(nodes, aggregated[1])
            return aggregated

        def aggregate_evaluate(server_round: int, results: list[Any], failures: list[Any]) -> Any:
            loss, metrics = found = evaluate_clients(server_round, results, failures)
            self._evaluated("clients", {"loss": loss, **(metrics or {})})
            return found

        def evaluate(server_round: int, parameters: Any) -> Any:
            found = evaluate_here(server_round, parameters)
            if found is not None:
                self._evaluated("server", {"loss": found[0], **found[1]})
            return found

        replacements = {"aggregate_fit": aggregate_fit, "aggregate_evaluate": aggregate_evaluate, "evaluate": evaluate}
        vars(strategy).update(replacements)
        try:
            yield
        finally:
            for name in replacements:
                delattr(strategy, name)

    def _updated(self, replies: list[Message], metrics: Mapping[str, Any] | None) -> None:
        nodes = [self._grid.partition_of(reply.metadata.src_node_id) for reply in replies if not reply.has_error()]
        self._update_row(nodes, metrics)

    def _update_row(self, nodes: list[int], metrics: Mapping[str, Any] | None) -> None:
        self._recorder.metric(self._grid.now, "update", version=self.version, **self.totals, nodes=sorted(nodes),
                              **figures(metrics))

    def _watched_evaluation(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        first = self.version

        @functools.wraps(evaluate)
        def watched(server_round: int, *args: Any, **kwargs: Any) -> Any:
            metrics = evaluate(server_round, *args, **kwargs)
            self.version = max(self.version, first + server_round)
            self._evaluated("server", metrics)
            return metrics

        return watched

    def _evaluated(self, where: str, metrics: Mapping[str, Any] | None) -> None:
        if not (found := figures(metrics)):
            return
        self.counts["evaluations"] += 1
        found = standard_names(found)
        self.latest = found
        if (accuracy := found.get("accuracy")) is not None:
            self.best_accuracy = max(accuracy, self.best_accuracy or 0.0)
        self._recorder.metric(self._grid.now, "evaluate", version=self.version, where=where, **found, **self.totals)


def figures(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the single numbers among an app's metrics, under names that are free in our rows."""
    numbers = {name: value for name, value in (metrics or {}).items() if isinstance(value, (int, float))}
    return {f"app_{name}" if name in TAKEN else name: value for name, value in numbers.items()}


def standard_names(found: Mapping[str, float]) -> dict[str, float]:
    """Return evaluation figures with the names that reports know: `eval_acc` is an accuracy, `test-loss` a loss."""
    renamed: dict[str, float] = {}
    for name, value in found.items():
        short = re.sub(r"^(eval|evaluation|test|val|validation|centrali[sz]ed|global|server)[_-]", "", name)
        short = {"acc": "accuracy"}.get(short, short)
        usual = short in ("accuracy", "loss") and short not in found and short not in renamed
        renamed[short if usual else name] = value
    return renamed


def _size(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
