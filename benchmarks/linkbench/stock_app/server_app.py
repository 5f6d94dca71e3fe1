"""Sends one SuperNode tasks that do nothing, and models, and writes down how long they took."""
import json
import statistics
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def ask(grid: Grid, node: int, action: str, content: RecordDict) -> float:
    """Return the seconds until a task's reply is here."""
    started = time.perf_counter()
    (reply,) = grid.send_and_receive([Message(content, node, f"train.{action}", ttl=600.0)])
    seconds = time.perf_counter() - started
    if reply.has_error():
        raise RuntimeError(f"the task failed: {reply.error}")
    for record in reply.content.array_records.values():
        record["weight"].numpy()    # what a strategy does with it
    return seconds


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Measure, and write the figures into the file that the run's configuration names."""
    settings = context.run_config
    trips, size = int(settings["trips"]), int(settings["megabytes"]) * 10**6
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    node = nodes[0]
    times = sorted(1000 * ask(grid, node, "noop", RecordDict({"config": ConfigRecord({"i": index})}))
                   for index in range(trips + 1))[:-1]    # the slowest one warmed up
    model = RecordDict({"arrays": ArrayRecord({"weight": Array(np.full(size // 4, 1e-3, np.float32))})})
    wish = RecordDict({"config": ConfigRecord({"size": size})})
    rates = {"down": [], "up": []}
    for _ in range(int(settings["repetitions"])):
        rates["down"].append(size / 1e6 / ask(grid, node, "down", model))
        rates["up"].append(size / 1e6 / ask(grid, node, "up", wish))
    Path(str(settings["out"])).write_text(json.dumps({
        "p50_ms": statistics.median(times), "p99_ms": times[int(0.99 * len(times))], "MB": size // 10**6,
        **{direction: statistics.median(found) for direction, found in rates.items()}}))
