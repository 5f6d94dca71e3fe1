"""Anybody's Flower app in virtual time: its unmodified ServerApp and ClientApp, on modelled devices and links."""
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp
from safetensors.numpy import save_file

from fedcore.checking import check_settings
from fedcore.errors import AllNodesFailed, AppFailed, BadInput, FedcoreError
from fedcore.flower import RUN_ID, SERVER_NODE_ID, legacy_servers_in_step, wrapped_starts
from fedcore.launch import make_folder, one_torch_thread, peak_rss_mb
from fedcore.recorder import (
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
from fedcore.runs import Run
from fedcore.simulations.app_folder import (
    DEFAULT_NUM_NODES,
    AppSettings,
    FlowerApp,
    LoadClient,
    app_traceback,
    split_overrides,
)
from fedcore.simulations.app_record import AppRecord
from fedcore.simulations.availability import Availability
from fedcore.simulations.devices import Devices
from fedcore.simulations.failures import Failures
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.network import Network
from fedcore.simulations.randomness import global_randomness
from fedcore.simulations.run import MAX_DESCRIBED_CLIENTS

logger = logging.getLogger("fedcore")


def simulate_app(
    app_dir: str | Path,
    settings: str | Path | Mapping[str, Any] | None = None,
    *,
    num_nodes: int | None = None,
    out: str | Path | None = None,
    workers: int = 0,
    overrides: Sequence[str] = (),
    on_row: Listener | None = None,
) -> Run:
    """Run a Flower app in virtual time, and return what it left.

    The app is what `flwr run` would take: a folder with a pyproject.toml. Its code is used as it is. Python's, NumPy's
    and torch's global random generators are seeded from the seed, at the start and for every message to a client, so
    the run is reproducible. A strategy inside someone else's ServerApp cannot be saved: such a run cannot be resumed.

    Args:
        settings: a YAML file, or a mapping of its shape, with `clients.count`, `seed` and `simulation`.
        num_nodes: simulated clients; None: what the settings say, else the app's options.num-supernodes, else 10.
        out: the run folder, which must be new or empty; None makes one below `runs/`.
        workers: processes that compute clients' work besides this one; 0: none. Results are the same.
        overrides: `key=value`, of the settings (`seed=1`, `simulation.devices.jitter=0.1`) or of the app's run config.
        on_row: called with every row of metrics.

    Raises:
        BadInput: a folder, a setting or an app that cannot be used.
        AppFailed: the ServerApp raised an exception; the folder is complete up to that moment.
        AllNodesFailed: not a single message to a client succeeded.
        NothingCanHappen: the app waits for what can never come.
    """
    if workers < 0:
        raise BadInput(f"workers={workers}, but it must be 0 (compute in this process) or more.")
    for_settings, for_app = split_overrides(overrides)
    world = check_settings(AppSettings, settings, for_settings)
    app = FlowerApp.read(app_dir, for_app)
    count = num_nodes or world.clients.count or app.num_supernodes or DEFAULT_NUM_NODES
    with one_torch_thread(), global_randomness(world.seed), app.modules():
        grid = make_grid(app, world, count, workers)
        try:
            server = app.load_server()
            folder = make_folder(out, f"{app.name}-seed{world.seed}")
            return _AppRun(app, world, grid, folder, on_row).run(server)
        finally:
            grid.close()


def make_grid(app: FlowerApp, world: AppSettings, count: int, workers: int) -> VirtualGrid:
    """Return the simulated federation that an app runs in."""
    simulation, seed = world.simulation, world.seed
    make_client = LoadClient(app, seed)
    return VirtualGrid(
        make_client if workers else make_client(), count, seed=seed,
        devices=Devices.from_settings(simulation.devices.model_dump(), seed, count),
        network=Network.from_settings(simulation.network.model_dump(), seed, count),
        availability=Availability.from_settings(simulation.availability, seed, count),
        failures=Failures.from_settings(simulation.failures.model_dump(), seed, count),
        workers=workers, run_config=app.run_config,
    )


class _AppRun:
    """One run of an app, with its folder."""

    def __init__(self, app: FlowerApp, world: AppSettings, grid: VirtualGrid, folder: Path, on_row: Listener | None):
        self.app, self.world, self.grid, self.folder = app, world, grid, folder
        self.recorder = Recorder(folder, (on_row,) if on_row else ())
        self.record = AppRecord(grid, self.recorder, app.folder)
        self.stop_reason = "error"

    def run(self, server: ServerApp) -> Run:
        started = time.monotonic()
        self._write_config()
        self.recorder.metric(0.0, "start", version=0, app=self.app.name, nodes=self.grid.num_nodes)
        try:
            self._serve(server)
            self.stop_reason = "finished"
        except KeyboardInterrupt:
            self.stop_reason = "interrupted"
            logger.warning("Interrupted. A Flower app's run cannot be resumed.")
        finally:
            # Whatever happened, what is known by now is in the folder.
            self._close(time.monotonic() - started)
            write_report(self.folder)
        record = self.record
        if record.last_error is not None and not record.succeeded and self.stop_reason == "finished":
            raise AllNodesFailed(f"All {record.counts['failures'] + record.counts['lost']} messages to clients failed. "
                                 f"{record.last_error}")
        return Run(self.folder)

    def _serve(self, server: ServerApp) -> None:
        """Run the ServerApp to its end.

        Raises:
            AppFailed: it raised an exception.
        """
        context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), dict(self.app.run_config))
        try:
            with wrapped_starts(self.record.wrap), legacy_servers_in_step(self.record.watch_legacy):
                server(self.grid, context)
        except FedcoreError:
            raise
        except (Exception, SystemExit) as error:    # a stranger's code may raise anything
            if isinstance(error, SystemExit) and not error.code:
                return
            raise AppFailed(
                f"The ServerApp of {self.app.name} ended {self.grid.now:.6g} s into the run with "
                f"{type(error).__name__}.\n{app_traceback(error, self.app.folder)}"
            ) from error

    def _close(self, wall_s: float) -> None:
        self.record.close()
        self.recorder.metric(self.grid.now, "stop", version=self.record.version, reason=self.stop_reason,
                             **self.record.totals)
        self.recorder.close()
        if self.record.arrays:
            save_file({name: array.numpy() for name, array in self.record.arrays.items()}, self.folder / MODEL_FILE)
        self._write_clients()
        self._write_summary(wall_s)

    def _write_config(self) -> None:
        settings = {
            "flower_app": str(self.app.folder), "run-config": self.app.run_config, "seed": self.world.seed,
            "clients": {"count": self.grid.num_nodes}, "simulation": self.world.simulation.model_dump(),
        }
        write_atomically(self.folder / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))

    def _write_clients(self) -> None:
        devices = self.grid.engine.devices
        rows = [{"node": partition, "num_examples": self.record.num_examples.get(partition), "labels": None,
                 "seconds_per_step": devices.seconds_per_step(partition)}
                for partition in range(min(self.grid.num_nodes, MAX_DESCRIBED_CLIENTS))]
        write_atomically(self.folder / CLIENTS_FILE, json.dumps(plain(rows)))

    def _write_summary(self, wall_s: float) -> None:
        record = self.record
        latest = dict(record.latest)
        summary = {
            "strategy": record.strategy, "task": self.app.name, "seed": self.world.seed, "engine": "virtual",
            "stop_reason": self.stop_reason, "time_s": self.grid.now, "wall_s": round(wall_s, 3),
            "versions": record.version, **record.totals, "final_loss": latest.pop("loss", None),
            "final_accuracy": latest.pop("accuracy", None), "best_accuracy": record.best_accuracy,
            "time_to_target_s": None, "num_params": record.num_params, **record.counts,
            "peak_rss_mb": round(peak_rss_mb(), 1), **latest,
        }
        write_atomically(self.folder / SUMMARY_FILE, json.dumps(plain(summary), indent=2) + "\n")
