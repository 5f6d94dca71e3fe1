"""The engine `superlink`: an experiment as a Flower app, on stock SuperNodes or in Flower's own simulation.

`fedcore export-app` writes an app of two lines of code each for server and client; this is what they call. The same
strategies and the same client code run as on the other engines. What differs is Flower's: every message starts a
process of its own on the node and takes seconds, what a client remembers is lost when its SuperNode restarts, and a run
cannot be resumed.
"""
import json
import logging
import shlex
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcore.checkpoint import Checkpoints
from fedcore.clock import PolledGrid
from fedcore.config import Experiment, load_experiment
from fedcore.errors import BadInput
from fedcore.launch import Launch, new_folder, one_torch_thread
from fedcore.progress import Progress
from fedcore.recorder import CLIENTS_FILE, Listener, plain, write_atomically
from fedcore.session import Session
from fedcore.terminal import make_console, show_logs

logger = logging.getLogger("fedcore")

# Keys of an exported app's run config, and `SET` of a node's configuration too.
OUT, SET = "out", "set"
# Between two questions to the SuperLink; a message takes several seconds anyway.
LONGEST_PAUSE_S = 1.0


def overrides_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that a run config or a node's configuration changes: `set = "train.lr=0.1 seed=1"`.

    Raises:
        BadInput: a quote in it is never closed.
    """
    try:
        return tuple(shlex.split(str(config.get(SET, ""))))
    except ValueError as error:
        raise BadInput(f"{SET}={config[SET]!r} cannot be read: {error}. Write key.path=value, separated by spaces; put "
                       "what contains a space into quotes.") from error


# ---- the server ------------------------------------------------------------------------------------------------------


class FlowerLaunch(Launch):
    """An experiment on somebody else's Flower grid."""

    engine = "superlink"

    def __init__(self, settings: Experiment, folder: Path, grid: Grid, on_row: Listener | None = None):
        self.foreign = grid
        super().__init__(settings, folder, on_row)

    def make_grid(self) -> PolledGrid:
        return PolledGrid(self.foreign, longest_pause_s=LONGEST_PAUSE_S)

    def close_grid(self) -> None:
        """Do nothing: whoever made the grid owns it."""

    def make_checkpoints(self) -> Checkpoints | None:
        return None     # the messages under way are lost with the run, so that nothing could be continued

    def write_clients(self, session: Session) -> None:
        rows = [{**about, "seconds_per_step": None} for _, about in sorted(session.clients.items())]
        write_atomically(self.folder / CLIENTS_FILE, json.dumps(plain(rows)))


def server_app(file: str | Path) -> ServerApp:
    """Return the ServerApp of an experiment file.

    Its run config may hold `set`, more settings, and `out`, the folder for the results: without it, a new one below
    `runs/` where the SuperLink was started.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        show_logs(verbose=False)
        settings = load_experiment(file, overrides_in(context.run_config))
        folder = new_folder(str(context.run_config.get(OUT, "")) or None, settings)
        console = make_console()
        console.print(f"{settings.strategy_name} on {settings.task_name}, waiting for {settings.clients.count} nodes; "
                      f"results in {folder.resolve()}", markup=False, soft_wrap=True)
        with one_torch_thread(), Progress.of(console, settings) as progress:
            run = FlowerLaunch(settings, folder, grid, progress.on_row).run(resuming=False)
        console.print(f"stopped: {run.summary['stop_reason']}, final accuracy {run.summary['final_accuracy']}",
                      markup=False, soft_wrap=True)

    return app


# ---- the clients -----------------------------------------------------------------------------------------------------


def client_app(file: str | Path) -> ClientApp:
    """Return the ClientApp of an experiment file, for every node.

    A node's operator may change settings with `set` in the node's configuration, such as where the data are; the run
    config's `set` comes before.
    """
    return ExportedClient(Path(file))


class ExportedClient(ClientApp):
    """Builds the experiment's client when the first message says with which settings."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        overrides = overrides_in(context.run_config) + overrides_in(context.node_config)
        # One thread on every engine: the bits of a matrix product differ between one thread and two.
        torch.set_num_threads(1)
        return client_of(self.file, overrides, context.node_config.get("partition-id"))(message, context)


@lru_cache(maxsize=16)
def client_of(file: Path, overrides: tuple[str, ...], partition: Any) -> ClientApp:
    """Return the client that an experiment describes, with everything loaded that is needed only once.

    A SuperNode starts a process for each message. What that costs must not count as training: FedCompass takes the
    time that clients report for their speed.

    Args:
        partition: what the node calls its data; None: nothing of it is loaded.
    """
    from fedcore.clients.build import build_client, build_task
    from fedcore.clients.data import as_dataset

    settings = load_experiment(file, overrides)
    task = build_task(settings)
    app = build_client(settings, task)
    # Torch imports half of itself when the first optimizer is made.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    if partition is not None:
        as_dataset(task.data(partition))
    return app
