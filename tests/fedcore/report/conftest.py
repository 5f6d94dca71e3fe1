"""Run folders made up for the report's tests: what a simulation would leave, without simulating anything."""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

MODEL_BYTES = 32_000


@dataclass
class MadeUpRun:
    """Writes the folder of a run that never was; deterministic for a given seed.

    Clients work without pause (`strategy` fedasync, fedcompass) or in rounds that wait for the slowest (fedavg).
    """

    strategy: str = "fedcompass"
    clients: int = 10
    seconds: float = 120.0
    seed: int = 0
    labels: int = 10
    local_steps: int = 20
    target: float | None = 0.9
    evaluations: bool = True
    timeline: bool = True
    failing: tuple[tuple[str, str], ...] = ()          # (event, reason)
    nan_from: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        random = np.random.default_rng(self.seed)
        speeds = random.exponential(0.1, self.clients) + 0.01
        sizes = random.integers(80, 400, self.clients)
        self._write_clients(folder, random, speeds, sizes)
        tasks, rows = self._schedule(speeds)
        rows += [{"time_s": 1.5 + index, "event": event, "node": index % self.clients, "code": 3, "reason": reason}
                 for index, (event, reason) in enumerate(self.failing)]
        rows.sort(key=lambda row: row["time_s"])
        end = max(task["end_s"] for task in tasks)
        rows.append({"time_s": end, "event": "stop", "version": rows[-1].get("version", 0), "reason": "seconds: 120"})
        if self.timeline:
            write_lines(folder / "timeline.jsonl", tasks)
        write_lines(folder / "metrics.jsonl", rows)
        config = {"task": {"name": "digits"} if self.labels else {"name": "housing"}, "seed": self.seed,
                  "strategy": {"name": self.strategy, "server_lr": 1.0}, "clients": {"count": self.clients},
                  "train": {"local_steps": self.local_steps, "lr": 0.05}, "stop": {"seconds": self.seconds}}
        config |= self.settings
        if self.target is not None:
            config["stop"] = {"seconds": self.seconds, "target": {"accuracy": self.target}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "summary.json").write_text(json.dumps(self._summary(rows, tasks, end)))
        return folder

    def _write_clients(self, folder, random, speeds, sizes):
        shares = random.dirichlet([0.3] * max(self.labels, 1), self.clients)
        rows = [{"node": node, "num_examples": int(sizes[node]),
                 "labels": [int(share * sizes[node]) for share in shares[node]] if self.labels else None,
                 "seconds_per_step": float(speeds[node])} for node in range(self.clients)]
        (folder / "clients.json").write_text(json.dumps(rows))

    def _task(self, number, node, start, speed, steps, version, group):
        download, upload = 0.05 + 0.1 * (node % 3), 0.2
        task = {"task": number, "node": node, "kind": "train", "start_s": start, "download_s": download,
                "queue_s": 0.0, "compute_s": speed * steps, "upload_s": upload, "local_steps": steps,
                "base_version": version, "staleness": 0, "outcome": "ok", "bytes_down": MODEL_BYTES,
                "bytes_up": MODEL_BYTES, "end_s": start + download + speed * steps + upload}
        return task | ({"group": group} if self.strategy == "fedcompass" else {})

    def _schedule(self, speeds):
        tasks, applied = [], []            # applied: (time, [tasks])
        if self.strategy == "fedavg":
            now = 0.0
            while now < self.seconds:
                batch = [self._task(len(tasks) + node, node, now, speeds[node], self.local_steps, len(applied), None)
                         for node in range(self.clients)]
                now = max(task["end_s"] for task in batch)
                tasks += batch
                applied.append((now, batch))
        else:
            for node, speed in enumerate(speeds):
                now = 0.0
                while now < self.seconds:
                    steps = int(np.clip(8.0 / speed, 5, 60)) if self.strategy == "fedcompass" else self.local_steps
                    task = self._task(len(tasks), node, now, speed, steps, 0, int(now // 8))
                    tasks.append(task)
                    now = task["end_s"]
                    applied.append((now, [task]))
            tasks.sort(key=lambda task: task["end_s"])
            applied.sort(key=lambda pair: pair[0])
        return tasks, self._rows(applied)

    def _rows(self, applied):
        rows = [{"time_s": 0.0, "event": "start", "version": 0, "num_params": MODEL_BYTES // 4}]
        updates = steps = 0
        base: dict[int, int] = {}
        for version, (at, batch) in enumerate(applied, start=1):
            nodes = [task["node"] for task in batch]
            for task in batch:
                task["staleness"] = version - 1 - base.get(task["node"], 0)
                base[task["node"]] = version
            updates += len(batch)
            steps += sum(task["local_steps"] for task in batch)
            counts = {"version": version, "client_updates": updates, "client_steps": steps,
                      "bytes_up": updates * MODEL_BYTES, "bytes_down": updates * MODEL_BYTES}
            rows.append({"time_s": at, "event": "update", **counts, "nodes": nodes,
                         "staleness": [task["staleness"] for task in batch],
                         "weights": [1 / self.clients] * len(nodes),
                         **{name: value * at for name, value in self.figures.items()}})
            if self.evaluations:
                loss = None if self.nan_from is not None and at >= self.nan_from else 2.3 * np.exp(-steps / 4000) + 0.05
                measured = {"loss": loss}
                if self.labels:
                    measured["accuracy"] = 0.96 - 0.86 * float(np.exp(-steps / 3000))
                rows.append({"time_s": at, "event": "evaluate", "where": "server", **measured, **counts})
        return rows

    def _summary(self, rows, tasks, end):
        last = next(row for row in reversed(rows) if "client_updates" in row)
        accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
        losses = [row["loss"] for row in rows if "loss" in row]
        reached = [row["time_s"] for row in rows if self.target and row.get("accuracy", 0) >= self.target]
        return {"strategy": self.strategy, "task": "digits" if self.labels else "housing", "seed": self.seed,
                "stop_reason": "seconds: 120", "time_s": end, "wall_s": 3.21, "versions": last["version"],
                **{key: last[key] for key in ("client_updates", "client_steps", "bytes_up", "bytes_down")},
                "final_loss": losses[-1] if losses else None, "final_accuracy": accuracies[-1] if accuracies else None,
                "best_accuracy": max(accuracies, default=None), "time_to_target_s": reached[0] if reached else None,
                "num_params": MODEL_BYTES // 4, "failures": sum(event == "failure" for event, _ in self.failing),
                "refused": sum(event == "refused" for event, _ in self.failing), "lost": 0,
                "evaluations": len(losses), "peak_rss_mb": 412.0} | self.figures


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made_up_run(tmp_path):
    """A function that writes a made-up run and returns its folder."""
    def write(name: str = "run", **settings: Any) -> Path:
        return MadeUpRun(**settings).write(tmp_path / name)
    return write
