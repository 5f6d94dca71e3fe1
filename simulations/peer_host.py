"""What a run of virtual peers leaves: rows of metrics, evaluations, checkpoints."""
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedcore.checkpoint import Checkpoints
from fedcore.evaluation import Scores
from fedcore.options import Evaluation, StopRule
from fedcore.peers.consensus import mean_and_distance
from fedcore.recorder import Recorder
from fedcore.simulations.peer_board import Report
from fedcore.vectors import Model

# Of more peers the losses of so many, evenly spaced, stand for all.
MOST_MEASURED_PEERS = 16
# Rows name the peers that took part, up to so many.
MOST_NAMED_PEERS = 2000

# What every run's metrics are called, and what the peers count.
MAIN_TOTALS = {"client_updates": "updates", "client_steps": "gradients", "bytes_up": "bytes_sent",
               "bytes_down": "bytes_received", "exchanges": "exchanges"}

# Returns a model's figures; the rank says on whose data, where clients evaluate (None: on all, weighted by examples).
Measure = Callable[[Model, int | None], Mapping[str, float]]


def mean_model(model: Model, reports: "Sequence[Report]") -> tuple[Model, float]:
    """Return the mean model of all peers, and their distance from it.

    Floating-point buffers are averaged too; others are the lowest rank's.
    """
    params, distance = mean_and_distance([report.params for report in reports])
    buffers = dict(reports[0].buffers)
    for name, values in buffers.items():
        if values.is_floating_point():
            buffers[name], _ = mean_and_distance([report.buffers[name] for report in reports])
    return model.replace(params, buffers), distance


class PeerHost:
    """Writes down every step that all peers have finished; evaluates the mean of their models, and some of them.

    Args:
        model: that the run starts from.
        evaluation: who evaluates, and how often.
        stop: the targets that end the run.
        save_every_s: wall seconds between checkpoints; 0: after every step.
        extra_state: what a checkpoint holds besides the peers.
        can_save: asked whether a run can go on from the end of a step.
        stop_run: called with the reason when the run is to end.
        interrupted: asked after every step.
    """

    def __init__(
        self, model: Model, recorder: Recorder, measure: Measure | None, evaluation: Evaluation, stop: StopRule,
        checkpoints: Checkpoints, save_every_s: float, interrupted: Callable[[], bool],
    ):
        self.model, self.recorder = model, recorder
        self._measure, self._evaluation, self._stop = measure, evaluation, stop
        self._checkpoints, self._save_every_s, self._interrupted = checkpoints, save_every_s, interrupted
        self.scores = Scores(due_s=evaluation.every)
        self.version, self.time_s, self.distance = 0, 0.0, 0.0
        self.totals: dict[str, Any] = {}
        self.last_params: Sequence[Tensor] = ()    # at the end of the last step, by rank
        self.counts = {"evaluations": 0, "failures": 0, "refused": 0}
        self._counters: Mapping[int, Mapping[str, Any]] = {}    # by rank, at the end of its last step
        self._saved_at = time.monotonic()
        self._save_step = 0 if save_every_s == 0 else -1
        self._rows = 0
        self.extra_state: Callable[[int], dict[str, Any]] = lambda step: {}
        self.can_save: Callable[[int, Sequence[Report]], bool] = lambda step, reports: True
        self.begun: Callable[[], int] = lambda: -1
        self.num_steps: Callable[[], int | None] = lambda: None
        self.stop_run: Callable[[str], None] = lambda reason: None

    # ---- steps ------------------------------------------------------------------------------------------------------

    def wants_state(self, step: int) -> bool:
        """Say whether a checkpoint is to be taken at the end of a step: when it is time to, and of the last one."""
        last = self.num_steps()
        return self._save_every_s == 0 or step == self._save_step or (last is not None and step == last - 1)

    def close_step(self, step: int, reports: list[Report]) -> None:
        """Write what all peers did in a step, evaluate and save where that is due."""
        before = self.totals
        self.version, self.time_s = step + 1, max(report.at for report in reports)
        self.totals = self._sums(reports)
        self._write_logged(reports)
        for report in reports:
            self._write_task(step, report, before)
        self._counters = {**self._counters, **{report.rank: report.counters for report in reports}}
        figures: dict[str, Any] = {**self.main_totals(), "loss": mean_of([report.loss for report in reports])}
        if len(reports) <= MOST_NAMED_PEERS:
            figures["nodes"] = [report.rank for report in reports]
        self.recorder.metric(self.time_s, "update", version=self.version, **figures)
        if self._is_due():
            self.evaluate(reports)
        if all(report.state is not None for report in reports) and self.can_save(step, reports):
            self._save(step, reports)
        self.last_params = [report.params for report in reports]
        self._look_after(reports)

    def _look_after(self, reports: list[Report]) -> None:
        """Ask for a checkpoint when it is time to, and for the end when the user or a limit does."""
        updates = self._stop.client_updates
        if updates is not None and self.totals["updates"] >= updates:
            self.stop_run("client_updates")
        if self._interrupted():
            self.stop_run("interrupted")
        if self._save_step < self.version and time.monotonic() - self._saved_at >= self._save_every_s:
            # Nobody has begun the step after the latest, so everybody can still hand in its state at its end.
            self._save_step = self.begun() + 1

    def _sums(self, reports: list[Report]) -> dict[str, Any]:
        ranks = {report.rank for report in reports}
        rows: list[Mapping[str, Any]] = [report.counters for report in reports]
        rows += [counters for rank, counters in sorted(self._counters.items()) if rank not in ranks]    # who has gone
        return {name: sum(row[name] for row in rows) for name in rows[0]}

    def main_totals(self) -> dict[str, Any]:
        """Return what all peers together have done, under the names that every run's metrics have."""
        return {name: self.totals.get(source, 0) for name, source in MAIN_TOTALS.items()}

    def _write_logged(self, reports: list[Report]) -> None:
        rows = sorted(((at, report.rank, index, event, figures) for report in reports
                       for index, (at, event, figures) in enumerate(report.logged)), key=lambda row: row[:3])
        for at, rank, _, event, figures in rows:
            self.counts["refused"] += event == "refused"
            self.recorder.metric(at, event, version=self.version, node=rank, **figures)

    def _write_task(self, step: int, report: Report, before: Mapping[str, Any]) -> None:
        old, new = self._counters.get(report.rank, {}), report.counters
        change = {name: value - old.get(name, 0) for name, value in new.items()}
        computed = min(change["compute_s"], report.at - report.began)
        self.recorder.task({
            "task": self._rows, "node": report.rank, "kind": "train", "start_s": report.began, "end_s": report.at,
            "download_s": 0.0, "queue_s": 0.0, "compute_s": computed,
            "upload_s": report.at - report.began - computed, "local_steps": change["gradients"], "base_version": step,
            "staleness": 0, "outcome": "ok", "bytes_down": change["bytes_received"], "bytes_up": change["bytes_sent"],
            "exchanges": change["exchanges"],
        })
        self._rows += 1

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        rule = self._evaluation
        if self._measure is None:
            return False
        if rule.unit == "versions":
            return self.version % int(rule.every) == 0
        if self.time_s < self.scores.due_s:
            return False
        self.scores.due_s = (math.floor(self.time_s / rule.every) + 1) * rule.every
        return True

    def evaluate(self, reports: Sequence[Report]) -> None:
        """Measure the mean model, and the peers' own."""
        mean, self.distance = mean_model(self.model, reports)
        self.model = mean
        if self._measure is None:
            return
        self.scores.evaluated_version = self.version
        figures = dict(self._measure(mean, None))
        stride = -(-len(reports) // MOST_MEASURED_PEERS)
        if self.distance > 0:
            losses = [self._measure(self.model.replace(report.params, report.buffers), report.rank)["loss"]
                      for report in reports[::stride]]
        else:
            losses = [figures["loss"]]
        figures |= {"peer_loss_min": min(losses), "peer_loss_mean": sum(losses) / len(losses),
                    "peer_loss_max": max(losses), "consensus_distance": self.distance}
        self.counts["evaluations"] += 1
        self.recorder.metric(self.time_s, "evaluate", **{
            **figures, "version": self.version, "where": self._evaluation.where, **self.main_totals()})
        if self.scores.add(figures, self.time_s, self._stop.target):
            self.stop_run("target")

    def finish(self, reports: list[Report]) -> None:
        """Evaluate what the peers ended with, where it is not what was evaluated last."""
        mean, distance = mean_model(self.model, reports)
        if [id(report.params) for report in reports] != [id(params) for params in self.last_params]:
            # What came after the last step (a reduction that was still under way) makes one more version.
            self.version, self.time_s = self.version + 1, max(report.at for report in reports)
            self.totals = self._sums(reports)
            self._write_logged(reports)
        if self.scores.evaluated_version != self.version:
            self.evaluate(reports)
        self.model, self.distance = mean, distance

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, step: int, reports: Sequence[Report]) -> None:
        self._checkpoints.save({
            "kind": "peers", "step": step, "peers": {report.rank: report.state for report in reports},
            "host": self.state_dict(), **self.extra_state(step),
        })
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must survive a restart."""
        return {
            "version": self.version, "time_s": self.time_s, "distance": self.distance, "totals": self.totals,
            "counts": self.counts, "rows": self._rows, "counters": dict(self._counters), "scores": vars(self.scores),
            "model": self.model, "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.version, self.time_s, self.distance = state["version"], state["time_s"], state["distance"]
        self.totals, self.counts, self._rows = state["totals"], state["counts"], state["rows"]
        self._counters, self.scores, self.model = state["counters"], Scores(**state["scores"]), state["model"]
        self.recorder.load_state_dict(state["recorder"])


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean of those values that are numbers, None when there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else None
