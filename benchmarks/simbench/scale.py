"""Throughput with clients that do nothing, and growth with the number of clients."""
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simbench.workload import BATCH, LOCAL_STEPS, LR, PER_ROUND

NOOP_NODES, NOOP_ACTIVE = 1000, 100


def noop_app() -> ClientApp:
    """Return a plain client that sends back what it received."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    return app


def send_and_receive(tasks: int) -> float:
    """Return client tasks per CPU second through Flower's `send_and_receive`, by batches of 1,000."""
    from fedcore.payload import VectorRecord
    from fedcore.simulations.grid import VirtualGrid
    from fedcore.vectors import Model

    grid = VirtualGrid(noop_app(), NOOP_NODES)
    nodes, arrays = grid.get_node_ids(), VectorRecord(Model.of(torch.nn.Linear(99, 10)))
    began = time.process_time()
    for _ in range(tasks // NOOP_NODES):
        contents = (RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": LR})}) for _ in nodes)
        messages = [Message(content, node, "train") for node, content in zip(nodes, contents, strict=True)]
        assert len(grid.send_and_receive(messages)) == NOOP_NODES
    return tasks / (time.process_time() - began)


def event_loop(tasks: int) -> float:
    """Return client tasks per CPU second through the event loop, under FedBuff, rows of the run folder included."""
    from fedcore.hub import Hub
    from fedcore.options import RunOptions, StopRule
    from fedcore.recorder import Recorder
    from fedcore.session import Session
    from fedcore.simulations.grid import VirtualGrid
    from fedcore.strategies.fedbuff import FedBuff
    from fedcore.vectors import Model

    moments: dict[str, float] = {}

    def on_row(row: dict[str, Any]) -> None:
        if row["event"] in ("start", "stop"):
            moments[row["event"]] = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        strategy, recorder = FedBuff(buffer_size=PER_ROUND), Recorder(Path(folder), (on_row,))
        model, options = Model.of(torch.nn.Linear(99, 10)), RunOptions(stop=StopRule(client_updates=tasks))
        strategy.drive(Session(Hub(VirtualGrid(noop_app(), NOOP_ACTIVE), model, options, recorder), strategy))
        recorder.close()
    return tasks / (moments["stop"] - moments["start"])


def run_registered(count: int, active: int, updates: int, size: str | None) -> dict[str, Any]:
    """Run `fedcore.simulate` with FedBuff until so many client updates have come in.

    Args:
        size: of the model that clients really train; None: the task `simulated`, which takes virtual time only.
    """
    import fedcore

    moments: dict[str, float] = {}

    def on_row(row: dict[str, Any]) -> None:
        if row["event"] in ("start", "stop"):
            moments[row["event"]] = time.process_time()

    task = {"name": "simulated", "num_params": 1000} if size is None else {
        "name": "simbench.workload:BenchTask", "size": size
    }
    experiment = {
        "task": task, "clients": {"count": count}, "stop": {"client_updates": updates}, "evaluate": {"where": "none"},
        "strategy": {"name": "fedbuff", "buffer_size": PER_ROUND, "concurrency": min(count, active)},
        "train": {"lr": LR, "batch_size": BATCH, "local_steps": LOCAL_STEPS, "device": "cpu"},
        "simulation": {"devices": {"seconds_per_step": {"name": "exponential", "mean": 0.1}}},
    }
    import fedcore.simulations.run  # noqa: F401 (so that start-up below is that of the federation alone)

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        done = fedcore.simulate(experiment, out=Path(folder) / "run", on_row=on_row).summary["client_updates"]
    return {"startup_cpu_s": moments["start"] - began, "updates": done,
            "cpu_us_per_update": 1e6 * (moments["stop"] - moments["start"]) / done}
