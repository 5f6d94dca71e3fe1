"""A run that goes on, as the server and its link describe it."""
from typing import Any

import pytest
import yaml

Row = dict[str, Any]


def node(partition: int, **figures: Any) -> Row:
    """Return a client as the link's snapshot describes one."""
    return {
        "name": f"site-{partition}", "node_id": 1000 + partition, "partition": partition, "connected": True,
        "connected_s": 80.0, "doing": "working", "doing_s": 3.25, "action": "train", "tasks": 1, "version": "0.1.0",
        "address": f"ipv4:10.0.0.{partition + 1}:51234", "bytes_up": 12_340_000, "bytes_down": 23_400_000,
        "up_bytes_per_s": 1.2e6, "down_bytes_per_s": 3e5, "heard_s": 0.4, "certificate_until": None, **figures,
    }


def link(*nodes: Row) -> Row:
    """Return a snapshot of the link."""
    return {"nodes": list(nodes), "uptime_s": 100.0, "version": "0.1.0", "uploads_admitted": 0, "uploads_waiting": 0,
            "tasks": len(nodes), "run": "r", "address": "127.0.0.1:9400"}


def rows_of_a_run(clients: int = 4, updates: int = 40) -> tuple[list[Row], list[Row]]:
    """Return rows of metrics and of the timeline."""
    metrics: list[Row] = [{"time_s": 0.0, "event": "start", "version": 0, "nodes": clients}]
    tasks: list[Row] = []
    for index in range(updates):
        at, partition = 2.0 * (index + 1), index % clients
        accuracy = 0.95 - 0.85 * 0.92 ** index
        tasks.append({"task": index, "node": partition, "kind": "train", "start_s": max(at - 7.0, 0.0), "end_s": at,
                      "download_s": 0.4, "queue_s": 0.0, "compute_s": 5.0, "upload_s": 1.0, "local_steps": 20,
                      "base_version": index, "staleness": 0, "outcome": "failed" if index == 17 else "ok",
                      "bytes_down": 30_000, "bytes_up": 30_000})
        totals = {"client_updates": index + 1, "client_steps": 20 * (index + 1), "bytes_up": 30_000 * (index + 1),
                  "bytes_down": 32_000 * (index + 1)}
        metrics.append({"time_s": at, "event": "update", "version": index + 1, "nodes": [partition], "staleness": [0],
                        **totals})
        metrics.append({"time_s": at, "event": "evaluate", "version": index + 1, "where": "server",
                        "loss": 2.3 * 0.95 ** index, "accuracy": accuracy, **totals})
    metrics.append({"time_s": 34.0 + 2.0 * updates, "event": "refused", "version": updates, "node": 1,
                    "reason": "the update holds NaN"})
    return metrics, tasks


@pytest.fixture
def run_folder(tmp_path):
    """Return a run folder that holds its settings only, as at the start."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"strategy": {"name": "fedbuff"}, "task": "digits", "clients": {"count": 5}, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder
