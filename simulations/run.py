"""One experiment from its file to its run folder, in virtual time."""
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from fedcore.checkpoint import Checkpoints
from fedcore.clients.build import build_client, build_task, train_settings
from fedcore.clients.data import as_dataset
from fedcore.clients.evaluation import server_evaluation
from fedcore.clients.modules import initial_model
from fedcore.config import Experiment, load_experiment
from fedcore.errors import BadInput
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.recorder import (
    CHECKPOINTS_FOLDER,
    CLIENTS_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    SUMMARY_FILE,
    Listener,
    Recorder,
    plain,
    write_atomically,
)
from fedcore.report import write_report
from fedcore.rounds import FlowerRounds
from fedcore.runs import Run
from fedcore.session import Session
from fedcore.simulations.availability import Availability
from fedcore.simulations.devices import Devices
from fedcore.simulations.failures import Failures
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from fedcore.strategy import HubStrategy
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# Beyond so many clients their label counts are not written down one by one.
MAX_DESCRIBED_CLIENTS = 2000


@dataclass(frozen=True)
class ExperimentApp:
    """Builds an experiment's ClientApp, here or in a worker process."""

    experiment: Experiment

    def __call__(self) -> ClientApp:
        return build_client(self.experiment)


def simulate(
    experiment: Experiment | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    workers: int = 0,
    resume: str | Path | None = None,
    on_row: Listener | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Run an experiment in virtual time, and return what it left.

    Args:
        experiment: a file, a mapping of the same shape, or one that was loaded; not needed with `resume`.
        out: the run folder, which must be new or empty; None makes one below `runs/`.
        workers: processes that compute clients' work besides this one; 0: none. Results are the same bits.
        resume: the folder of a run to continue, to the bits of a run that never stopped.
        on_row: called with every row of metrics, e.g. for a progress bar.
        overrides: `key.path=value`, as the command's `--set`.

    Raises:
        BadInput: settings, data or folders that cannot be used.
        AllNodesFailed, NothingCanHappen: the run cannot go on; the folder is complete up to that moment.
    """
    if workers < 0:
        raise BadInput(f"workers={workers}, but it must be 0 (compute in this process) or more.")
    if resume is not None:
        folder = Path(resume)
        if not (folder / CONFIG_FILE).is_file():
            raise BadInput(f"{folder} is not a run folder: it has no {CONFIG_FILE}. Give the folder of an earlier run.")
        settings = load_experiment(folder / CONFIG_FILE, overrides)
    elif experiment is None:
        raise BadInput("No experiment was given. Name a file, or a run folder to resume.")
    else:
        settings = experiment if isinstance(experiment, Experiment) else load_experiment(experiment, overrides)
        folder = new_folder(out, settings)
    with one_torch_thread(), quiet_flower():
        return _Simulation(settings, folder, workers, on_row).run(resuming=resume is not None)


def new_folder(out: str | Path | None, settings: Experiment) -> Path:
    """Return the folder of a new run of an experiment, and make it; see `make_folder`."""
    task, strategy = (name.rsplit(":", 1)[-1] for name in (settings.task_name, settings.strategy_name))
    return make_folder(out, f"{task}-{strategy}-seed{settings.seed}")


def make_folder(out: str | Path | None, stem: str) -> Path:
    """Make the folder of a new run; without `out`, the first `runs/STEM-NUMBER` that is free.

    Raises:
        BadInput: it holds something already, or cannot be made.
    """
    if out is None:
        number = 1
        while (folder := Path("runs") / f"{stem}-{number}").exists():
            number += 1
    else:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(
                f"{folder} exists and is not empty. Choose another --out, or continue it with --resume {folder}."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"The run folder {folder} cannot be made: {error.strerror}.") from error
    return folder


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread: the bits of a matrix product differ between one thread and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Let Flower print its warnings only: what it says about each round is in the metrics."""
    flower = logging.getLogger("flwr")
    before = flower.level
    flower.setLevel(logging.WARNING)
    try:
        yield
    finally:
        flower.setLevel(before)


class _Interrupt:
    """Ctrl-C: the first ends the run at the next safe moment, the second at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watch(self) -> Iterator[Callable[[], bool]]:
        def on_signal(*_: object) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            logger.warning("Stopping after the present step; press Ctrl-C again to stop at once.")

        try:
            before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:    # not the main thread: whoever runs us there handles signals
            before = {}
        try:
            yield lambda: self.asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Simulation:
    """The parts of one run, put together."""

    def __init__(self, settings: Experiment, folder: Path, workers: int, on_row: Listener | None):
        self.settings, self.folder, self.workers = settings, folder, workers
        self.task = build_task(settings)
        self.app = build_client(settings, self.task)
        self.model = self._initial_model()
        self.strategy = driver(settings)
        listeners = tuple(listener for listener in (on_row, *settings.build_writers(folder)) if listener)
        self.recorder = Recorder(folder, listeners)
        self.grid = self._grid()
        self.hub = Hub(self.grid, self.model, self._options(), self.recorder)

    def _initial_model(self) -> Model:
        model = initial_model(self.task, self.settings.seed, train_settings(self.settings).torch_dtype)
        path = self.settings.initial_model
        return model if path is None else Model.load(Path(path), model.layout)

    def _grid(self) -> VirtualGrid:
        simulation, count, seed = self.settings.simulation, self.settings.clients.count, self.settings.seed
        make_app = ExperimentApp(self.settings)
        return VirtualGrid(
            make_app if self.workers else self.app, count, seed=seed,
            devices=Devices.from_settings(simulation.devices.model_dump(), seed, count),
            network=Network.from_settings(simulation.network.model_dump(), seed, count),
            availability=Availability.from_settings(simulation.availability, seed, count),
            failures=Failures.from_settings(simulation.failures.model_dump(), seed, count),
            workers=self.workers, run_config={"seed": seed},
        )

    def _options(self) -> RunOptions:
        settings, rule = self.settings, self.settings.evaluate
        fn = server_evaluation(self.task) if rule.where == "server" else None
        stop = settings.stop
        always_on = self.grid.engine.availability is None
        return RunOptions(
            seed=settings.seed,
            expected=settings.clients.count,
            min_nodes=settings.clients.count if always_on else 1,
            stop=StopRule(stop.seconds, stop.rounds, stop.client_updates, dict(stop.target or {})),
            evaluation=Evaluation(rule.where, rule.every, rule.unit, fn),
            round_deadline_s=settings.round.deadline_s,
            deadline_factor=settings.round.deadline_factor,
            min_replies_share=settings.round.min_replies_share,
            task_timeout_s=settings.round.task_timeout_s,
            train_config={} if settings.train.local_steps is None else {"local-steps": settings.train.local_steps},
        )

    def run(self, resuming: bool) -> Run:
        started = time.monotonic()
        checkpoints = Checkpoints(self.folder / CHECKPOINTS_FOLDER, self.settings.checkpoint.keep)
        try:
            with _Interrupt().watch() as interrupted:
                session = Session(self.hub, self.strategy, checkpoints, self.settings.checkpoint.every_s, interrupted)
                if resuming:
                    for problem in session.restore():
                        logger.warning("%s Using the checkpoint before it.", problem)
                    self.hub.stop_reason = None
                else:
                    config = yaml.safe_dump(self.settings.resolved(), sort_keys=False)
                    write_atomically(self.folder / CONFIG_FILE, config)
                self._write_clients()
                session.check_limits(self.hub.round_index)
                self.strategy.drive(session)
        finally:
            # Whatever happened, what is known by now is in the folder.
            self.grid.close()
            self.recorder.close()
            self.hub.model.save(self.folder / MODEL_FILE)
            self._write_summary(time.monotonic() - started)
        write_report(self.folder)
        return Run(self.folder)

    def _write_clients(self) -> None:
        rows = []
        for partition in range(min(self.settings.clients.count, MAX_DESCRIBED_CLIENTS)):
            labels = self.task.labels(partition) if hasattr(self.task, "labels") else None
            count = len(as_dataset(self.task.data(partition)))
            speed = self.grid.engine.devices.seconds_per_step(partition)
            rows.append({"node": partition, "num_examples": count, "labels": labels,
                         "seconds_per_step": speed})
        write_atomically(self.folder / CLIENTS_FILE, json.dumps(plain(rows)))

    def _write_summary(self, wall_s: float) -> None:
        hub, scores = self.hub, self.hub.scores
        latest = dict(scores.latest)
        summary = {
            "strategy": self.settings.strategy_name, "task": self.settings.task_name, "seed": self.settings.seed,
            "engine": "virtual", "stop_reason": hub.stop_reason or "error",
            "time_s": hub.now, "wall_s": round(wall_s, 3), "versions": hub.version, "rounds": hub.round_index or None,
            **hub.totals,
            "final_loss": latest.pop("loss", None), "final_accuracy": latest.pop("accuracy", None),
            "best_accuracy": scores.best_accuracy, "time_to_target_s": scores.time_to_target_s,
            "target": dict(hub.options.stop.target) or None, "num_params": hub.model.layout.num_params, **hub.counts,
            **self.strategy.summary_figures(), "peak_rss_mb": round(peak_rss_mb(), 1), **latest,
        }
        write_atomically(self.folder / SUMMARY_FILE, json.dumps(plain(summary), indent=2) + "\n")


def driver(settings: Experiment) -> HubStrategy:
    """Return an experiment's strategy, ready to be driven; Flower's own are wrapped."""
    strategy = settings.build_strategy()
    if isinstance(strategy, HubStrategy):
        return strategy
    given = settings.strategy if isinstance(settings.strategy, dict) else {}
    inner: Strategy | None = strategy
    while inner is not None:
        # The experiment says who evaluates (`evaluate`); Flower's own federated evaluation runs only when asked for.
        if hasattr(inner, "fraction_evaluate") and "fraction_evaluate" not in given:
            inner.fraction_evaluate, inner.min_evaluate_nodes = 0.0, 0  # type: ignore[attr-defined]
        if hasattr(inner, "train_loss_key") and "train_loss_key" not in given:
            inner.train_loss_key = "loss"    # what our clients call it
        inner = getattr(inner, "strategy", None)
    return FlowerRounds(strategy)


def peak_rss_mb() -> float:
    """Return the largest memory this process ever had, MiB, where the system tells; else what it has now."""
    try:
        import resource
    except ImportError:    # Windows
        return psutil.Process().memory_info().rss / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
