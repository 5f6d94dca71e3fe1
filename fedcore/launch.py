"""What every run of an experiment has in common, in virtual time or on real machines: its parts and its folder."""
import json
import logging
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from flwr.serverapp.strategy import Strategy

from fedcore.checkpoint import Checkpoints
from fedcore.compressed import Compression
from fedcore.config import Experiment
from fedcore.errors import BadInput, InvalidSetting
from fedcore.hub import Hub
from fedcore.options import Evaluation, RunOptions, StopRule
from fedcore.peers.host_rules import HostRules
from fedcore.peers.hosting import HostedPeers
from fedcore.peers.strategy import PeerStrategy
from fedcore.recorder import (
    CHECKPOINTS_FOLDER,
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
from fedcore.strategy import HubStrategy
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

# After the first signal, work under way may go on for so long until a safe moment comes.
DRAIN_S = 30.0


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


class Interrupt:
    """Ctrl-C, or SIGTERM: the first ends the run at the next safe moment, a second one at once.

    Attributes:
        asked_with: the signal that came first; None while nobody wants to stop.
    """

    def __init__(self) -> None:
        self.asked_with: int | None = None
        self._asked_at = 0.0

    def asked(self) -> bool:
        """Say whether the run is to end."""
        return self.asked_with is not None

    def is_overdue(self) -> bool:
        """Say whether a safe moment has been waited for long enough."""
        return self.asked() and time.monotonic() - self._asked_at >= DRAIN_S

    @contextmanager
    def watch(self, wake: Callable[[], None] | None = None) -> Iterator[None]:
        """Listen for signals.

        Args:
            wake: wakes up whoever waits, at the signal and when the time to drain is over.
        """
        def on_signal(number: int, _: object) -> None:
            if self.asked():
                raise KeyboardInterrupt
            self.asked_with, self._asked_at = number, time.monotonic()
            logger.warning("Stopping after the present step; press Ctrl-C again to stop at once.")
            if wake is not None:
                wake()
                overdue = threading.Timer(DRAIN_S, wake)
                overdue.daemon = True
                overdue.start()

        try:
            before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:    # not the main thread: whoever runs us there handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Launch(ABC):
    """The parts of one run, put together; each engine adds its grid.

    Args:
        settings: the experiment.
        folder: of the run; it exists.
        on_row: called with every row of metrics.
    """

    engine = ""     # its name in summaries and checkpoints
    in_background = False    # whether checkpoints are written while the run goes on

    def __init__(self, settings: Experiment, folder: Path, on_row: Listener | None = None):
        from fedcore.clients.build import build_task

        self.settings, self.folder = settings, folder
        self.interrupt = Interrupt()
        self.task = build_task(settings)
        self.model = self._initial_model()
        self.strategy = driver(settings)
        self.grid = self.make_grid()    # what may fail comes before the first file
        listeners = tuple(listener for listener in (on_row, *settings.build_writers(folder)) if listener)
        self.recorder = Recorder(folder, listeners)
        self.hub = Hub(self.grid, self.model, self.make_options(), self.recorder)

    @abstractmethod
    def make_grid(self) -> Any:
        """Return the grid of this engine; it has a `close` method."""

    def close_grid(self) -> None:
        """Let go of what the grid holds; the run is over, or has failed."""
        self.grid.close()

    @abstractmethod
    def write_clients(self, session: Session) -> None:
        """Write what is known about the clients, for the report."""

    def make_checkpoints(self) -> Checkpoints | None:
        """Return where the run is saved; None where it could not be continued."""
        return Checkpoints(self.folder / CHECKPOINTS_FOLDER, self.settings.checkpoint.keep)

    def _initial_model(self) -> Model:
        from fedcore.clients.build import train_settings
        from fedcore.clients.modules import initial_model

        model = initial_model(self.task, self.settings.seed, train_settings(self.settings).torch_dtype)
        path = self.settings.initial_model
        return model if path is None else Model.load(Path(path), model.layout)

    def make_options(self) -> RunOptions:
        """Return what the hub is told about the run."""
        from fedcore.clients.evaluation import server_evaluation

        settings, rule = self.settings, self.settings.evaluate
        fn = server_evaluation(self.task) if rule.where == "server" else None
        stop, compression = settings.stop, settings.compression
        return RunOptions(
            seed=settings.seed,
            expected=settings.clients.count,
            min_nodes=settings.clients.count,
            stop=StopRule(stop.seconds, stop.rounds, stop.client_updates, dict(stop.target or {})),
            evaluation=Evaluation(rule.where, rule.every, rule.unit, fn),
            round_deadline_s=settings.round.deadline_s,
            deadline_factor=settings.round.deadline_factor,
            min_replies_share=settings.round.min_replies_share,
            task_timeout_s=settings.round.task_timeout_s,
            compression=None if compression is None else Compression.of(compression),
            train_config={} if settings.train.local_steps is None else {"local-steps": settings.train.local_steps},
        )

    def run(self, resuming: bool) -> Run:
        """Run to the end, whatever it is; the folder is complete up to that moment.

        Raises:
            AllNodesFailed, NothingCanHappen: the run cannot go on.
        """
        started = time.monotonic()
        try:
            with self.interrupt.watch(getattr(self.grid, "wake", None)):
                self.hub.must_stop = self.interrupt.is_overdue
                session = Session(self.hub, self.strategy, self.make_checkpoints(), self.settings.checkpoint.every_s,
                                  self.interrupt.asked, self.in_background, self.engine)
                if resuming:
                    for problem in session.restore():
                        logger.warning("%s Using the checkpoint before it.", problem)
                    self.hub.stop_reason = None
                else:
                    config = yaml.safe_dump(self.settings.resolved(), sort_keys=False)
                    write_atomically(self.folder / CONFIG_FILE, config)
                self.write_clients(session)
                session.check_limits(self.hub.round_index)
                self.strategy.drive(session)
                self.write_clients(session)
        finally:
            # Whatever happened, what is known by now is in the folder.
            self.close_grid()
            self.recorder.close()
            self.hub.model.save(self.folder / MODEL_FILE)
            self._write_summary(time.monotonic() - started)
        write_report(self.folder)
        return Run(self.folder)

    def _write_summary(self, wall_s: float) -> None:
        hub, scores = self.hub, self.hub.scores
        latest = dict(scores.latest)
        summary = {
            "strategy": self.settings.strategy_name, "task": self.settings.task_name, "seed": self.settings.seed,
            "engine": self.engine, "stop_reason": hub.stop_reason or "error",
            "time_s": hub.now, "wall_s": round(wall_s, 3), "versions": hub.version, "rounds": hub.round_index or None,
            **hub.totals,
            "final_loss": latest.pop("loss", None), "final_accuracy": latest.pop("accuracy", None),
            "best_accuracy": scores.best_accuracy, "time_to_target_s": scores.time_to_target_s,
            "target": dict(hub.options.stop.target) or None, "num_params": hub.model.layout.num_params, **hub.counts,
            **self.strategy.summary_figures(), "peak_rss_mb": round(peak_rss_mb(), 1), **latest,
        }
        write_atomically(self.folder / SUMMARY_FILE, json.dumps(plain(summary), indent=2) + "\n")


def driver(settings: Experiment) -> HubStrategy:
    """Return an experiment's strategy, ready to be driven; Flower's own are wrapped, and those of peers hosted."""
    strategy = settings.build_strategy()
    if isinstance(strategy, HubStrategy):
        return strategy
    if isinstance(strategy, PeerStrategy):
        if settings.compression is not None:
            raise InvalidSetting("compression", settings.compression, "left out where a server hosts peers",
                                 "`fedcore simulate` and `fedcore peer` compress what peers send.")
        peers = settings.peers
        return HostedPeers(strategy, HostRules(peers.segment, peers.lost_after_s, peers.relay))
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
