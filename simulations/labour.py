"""Who computes the clients' tasks, and what the clients remember from one to the next."""
from collections.abc import Mapping
from typing import Any

from flwr.app import Error, RecordDict
from flwr.clientapp import ClientApp

from fedcore.errors import BadInput
from fedcore.flower import with_id
from fedcore.payload import Estimate, clone_content
from fedcore.simulations.execute import AppFactory, NodeInfo, execute
from fedcore.simulations.sim_task import SimTask
from fedcore.simulations.workers import WorkerPool

FIRST_NODE_ID = 1000


class Labour:
    """Runs a ClientApp for every node, in this process or in others; the results are the same.

    Args:
        app: the ClientApp, or a function that makes it (needed with `workers`).
        num_nodes: how many nodes clients are told of.
        run_config: what clients find in `context.run_config`.
        workers: processes that compute; 0 computes in this one.

    Attributes:
        states: what clients keep in `context.state`, by partition; only of those that keep anything.

    Raises:
        BadInput: an app that cannot be sent to another process.
    """

    def __init__(self, app: ClientApp | AppFactory, num_nodes: int, run_config: Mapping[str, Any], workers: int):
        if workers and isinstance(app, ClientApp):
            raise BadInput(
                "A ClientApp cannot be sent to a worker process. Give a function that makes it, or use workers=0."
            )
        self.num_nodes, self.run_config = num_nodes, dict(run_config)
        self.app = app if isinstance(app, ClientApp) else app()
        self.pool = WorkerPool(app, workers) if workers else None
        self.states: dict[int, RecordDict] = {}

    def estimate(self, task: SimTask) -> Estimate | None:
        """Return what a task will cost, None when only computing it can tell."""
        if (estimator := getattr(self.app, "estimate", None)) is None:
            return None
        context = self._info(task.partition).context(self.state_of(task.partition))
        try:
            return estimator(task.message, context)
        except Exception:  # a stranger's code may raise anything; computing the task makes an error reply of it
            return None

    def introduction(self, partition: int) -> RecordDict | None:
        """Return what a node answers to a query, if its app can say it without one."""
        if (describe := getattr(self.app, "describe", None)) is None:
            return None
        try:
            return describe(self._info(partition).context(RecordDict()))
        except Exception:  # as above: asking the node makes an error reply of it
            return None

    def begin(self, task: SimTask) -> None:
        """Let a worker process compute a task meanwhile, if there are any."""
        if self.pool is not None and task.future is None and task.outcome is None:
            wanted_at = task.started_at if task.arrives_at is None else task.arrives_at
            job = task.message, self._info(task.partition), self.state_of(task.partition)
            task.future = self.pool.submit(job, wanted_at)

    def result(self, task: SimTask) -> RecordDict | Error:
        """Return a task's outcome, computing it now if nobody has."""
        if task.outcome is None:
            if task.future is not None:
                task.outcome, task.state_after = task.future.result()
                task.future = None
            else:
                message, info = task.message, self._info(task.partition)
                if task.stage == "unsettled":    # a checkpoint may still want the request as it was
                    message = with_id(message, clone_content(message.content), task.id)
                task.outcome, task.state_after = execute(self.app, message, info, self.state_of(task.partition))
        assert task.outcome is not None
        return task.outcome

    def remember(self, task: SimTask) -> None:
        """Keep what a client's state is after a task that was really done."""
        if task.state_after:
            self.states[task.partition] = task.state_after
        else:
            self.states.pop(task.partition, None)

    def state_of(self, partition: int) -> RecordDict:
        """Return what a client remembers."""
        return self.states.get(partition) or RecordDict()

    def close(self) -> None:
        """End the worker processes."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _info(self, partition: int) -> NodeInfo:
        return NodeInfo(FIRST_NODE_ID + partition, partition, self.num_nodes, self.run_config)
