"""One experiment from its file to its run folder, in virtual time."""
import json
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from fedcore.clients.build import build_client
from fedcore.clients.data import as_dataset
from fedcore.config import Experiment, load_experiment
from fedcore.errors import BadInput
from fedcore.launch import Launch, new_folder, one_torch_thread, quiet_flower
from fedcore.options import RunOptions
from fedcore.peers.strategy import PeerStrategy
from fedcore.recorder import CLIENTS_FILE, CONFIG_FILE, Listener, plain, write_atomically
from fedcore.runs import Run
from fedcore.session import Session
from fedcore.simulations.availability import Availability
from fedcore.simulations.devices import Devices
from fedcore.simulations.failures import Failures
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from fedcore.simulations.peers import PeerSimulation

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
        KeyboardInterrupt: after Ctrl-C, once the run is saved and its folder complete. SIGTERM then ends the process as
            it does elsewhere, and handlers of the caller's own are called.
    """
    run, asked_with = run_until_asked(experiment, out, workers, resume, on_row, overrides)
    if asked_with is not None:
        signal.raise_signal(asked_with)    # whoever asked meant the caller, too, and not this run alone
    return run


def run_until_asked(
    experiment: Experiment | Mapping[str, Any] | str | Path | None, out: str | Path | None, workers: int,
    resume: str | Path | None, on_row: Listener | None, overrides: Sequence[str],
) -> tuple[Run, int | None]:
    """Do what `simulate` does; returns the run, and the signal that ended it early, if one did."""
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
    strategy = settings.build_strategy()
    with one_torch_thread(), quiet_flower():
        launched = PeerSimulation(settings, strategy, folder, on_row) if isinstance(strategy, PeerStrategy) else \
            Simulation(settings, folder, workers, on_row)
        return launched.run(resuming=resume is not None), launched.interrupt.asked_with


class Simulation(Launch):
    """An experiment in virtual time."""

    engine = "virtual"

    def __init__(self, settings: Experiment, folder: Path, workers: int, on_row: Listener | None):
        self.workers = workers
        super().__init__(settings, folder, on_row)

    def make_grid(self) -> VirtualGrid:
        simulation, count, seed = self.settings.simulation, self.settings.clients.count, self.settings.seed
        make_app = ExperimentApp(self.settings)
        return VirtualGrid(
            make_app if self.workers else build_client(self.settings, self.task), count, seed=seed,
            devices=Devices.from_settings(simulation.devices.model_dump(), seed, count),
            network=Network.from_settings(simulation.network.model_dump(), seed, count),
            availability=Availability.from_settings(simulation.availability, seed, count),
            failures=Failures.from_settings(simulation.failures.model_dump(), seed, count),
            workers=self.workers, run_config={"seed": seed},
        )

    def make_options(self) -> RunOptions:
        always_on = self.grid.engine.availability is None
        return replace(super().make_options(), min_nodes=self.settings.clients.count if always_on else 1)

    def write_clients(self, session: Session) -> None:
        if (self.folder / CLIENTS_FILE).is_file():
            return    # they do not change
        rows = []
        for partition in range(min(self.settings.clients.count, MAX_DESCRIBED_CLIENTS)):
            # Of private records not even a simulation's report says which labels they have.
            private = getattr(self.strategy, "keeps_records_private", False)
            labels = self.task.labels(partition) if hasattr(self.task, "labels") and not private else None
            count = len(as_dataset(self.task.data(partition)))
            speed = self.grid.engine.devices.seconds_per_step(partition)
            rows.append({"node": partition, "num_examples": count, "labels": labels,
                         "seconds_per_step": speed})
        write_atomically(self.folder / CLIENTS_FILE, json.dumps(plain(rows)))
