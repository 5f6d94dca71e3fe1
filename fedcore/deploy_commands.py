"""What `fedcore server`, `fedcore client` and `fedcore status` do, after the command line has been read."""
import contextlib
import fcntl
import json
import signal
import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedcore.cli import DONE, FOLDER, INTERRUPTED
from fedcore.commands import conclude, ending_well, of_folder, show_warnings
from fedcore.config import Experiment, load_experiment
from fedcore.deploy import Address, Deployment, ServerLink, ask_status, open_tls, read_node_config
from fedcore.errors import BadInput, LinkRefused, StoppedEarly
from fedcore.launch import new_folder, one_torch_thread, quiet_flower
from fedcore.peers.strategy import PeerStrategy
from fedcore.progress import Progress
from fedcore.recorder import Listener
from fedcore.report.scales import seconds
from fedcore.runs import Run
from fedcore.tasks import printable
from fedcore.terminal import make_console, plain_spaces
from fedcore.tls import Credentials, expiry_warning
from fedcore.transport.handshakes import Overheard
from fedcore.transport.settings import Limits
from fedcore.watch import Watch, status_table

if TYPE_CHECKING:
    from fedcore.transport.agent import ClientAgent

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ServerSettings:
    """The options of `fedcore server` about its link, and what hears of handshakes that fail."""

    listen: str
    tls: Path | None
    insecure: int
    dashboard: int | None
    observers: tuple[str, ...]
    overheard: Overheard | None = None

    def link(self) -> ServerLink:
        """Return how clients reach the server.

        Raises:
            BadInput: the options do not go together, or a certificate cannot be used.
        """
        address = Address.of("--listen", self.listen)
        credentials = open_tls("server", self.tls, self.insecure, address)
        return ServerLink(address, credentials, self.tls, self.insecure >= 2, self.observers)


def run_server(
    file: Path | None, overrides: Sequence[str], out: Path | None, resume: Path | None, settings: ServerSettings,
    meta: MutableMapping[str, Any],
) -> int:
    """Run or resume an experiment on real machines, with progress and a summary; returns the exit status.

    Args:
        meta: gets the run's folder, for whoever reports a defect.
    """
    console = make_console()
    link = settings.link()
    if resume is not None:
        experiment, folder = of_folder(resume, overrides, "server"), resume
    else:
        assert file is not None
        experiment = load_experiment(file, overrides, "server")
        folder = new_folder(out, experiment)
        show_warnings(experiment)
    meta[FOLDER] = folder
    try:
        with ending_well(console, folder, "fedcore server"):
            run, stopped_with = _serve(console, experiment, folder, link, settings, resume is not None)
    except StoppedEarly as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return INTERRUPTED
    status = conclude(console, run)
    # Whoever manages services asks for an end with SIGTERM, and takes anything but 0 for a failure.
    return DONE if status == INTERRUPTED and stopped_with == signal.SIGTERM else status


def _serve(
    console: Console, experiment: Experiment, folder: Path, link: ServerLink, settings: ServerSettings, resuming: bool
) -> tuple[Run, int | None]:
    """Run the server; returns the run, and the signal that ended it early, if one did."""
    with one_torch_thread(), quiet_flower(), contextlib.ExitStack() as stack:
        progress = Progress.of(console, experiment)
        listeners: list[Listener] = [progress.on_row]

        def on_row(row: dict[str, Any]) -> None:
            for listener in listeners:
                listener(row)

        deployment = Deployment(experiment, folder, link, on_row)
        if settings.overheard is not None:
            settings.overheard.tell = deployment.grid.report
        stack.callback(deployment.grid.close, "the server stopped", final=False)
        watch = Watch(console, deployment.grid.snapshot, experiment.clients.count)
        listeners.append(watch.heard)
        progress.remarks = watch.lines
        _say_where(console, experiment, folder, link)
        if settings.dashboard is not None:
            from fedcore.dashboard import serve_dashboard

            page = stack.enter_context(serve_dashboard(deployment.grid.snapshot, folder, settings.dashboard))
            listeners.append(page.on_row)
            deployment.recorder.task_listeners.append(page.on_task)
            console.print(f"live page: {page.url}", markup=False, soft_wrap=True)
        stack.enter_context(progress)
        stack.enter_context(watch)
        return deployment.run(resuming), deployment.interrupt.asked_with


def _say_where(console: Console, experiment: Experiment, folder: Path, link: ServerLink) -> None:
    secured = "IN CLEAR, everybody is believed" if link.credentials is None else "mutual TLS"
    console.print(
        f"{experiment.strategy_name} on {experiment.task_name}, {experiment.clients.count} clients, seed "
        f"{experiment.seed}: {folder}\nlistening on {link.address} ({secured}); the run begins when "
        f"{experiment.clients.count} clients are here", markup=False, soft_wrap=True)
    _warn_of_expiry(console, link.credentials)


def _warn_of_expiry(console: Console, credentials: Credentials | None) -> None:
    from datetime import UTC, datetime

    if credentials is not None:
        warning = expiry_warning("This certificate", credentials.not_after, datetime.now(UTC))
        if warning:
            console.print(f"Note: {warning}", style="yellow", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class ClientSettings:
    """The options of `fedcore client` beyond its experiment."""

    server: str
    tls: Path | None
    insecure: bool
    name: str | None
    node_config: tuple[str, ...]
    state: Path
    allow: tuple[str, ...] | None
    max_local_steps: int | None
    max_seconds: float | None
    max_megabytes: float | None
    peer_listen: str | None = None
    peer_advertise: str | None = None
    peer_side_port: int | None = None

    def as_peer(self, experiment: Experiment) -> dict[str, str]:
        """Return what the node's configuration says to other peers, where the experiment has any.

        Raises:
            BadInput: others could not reach this client, or nobody will want to.
        """
        given = {"peer-listen": self.peer_listen, "peer-advertise": self.peer_advertise,
                 "peer-side-port": None if self.peer_side_port is None else str(self.peer_side_port),
                 "peer-tls": None if self.tls is None else str(self.tls.absolute())}
        if not isinstance(experiment.build_strategy(), PeerStrategy):
            if self.peer_listen or self.peer_advertise or self.peer_side_port:
                raise BadInput("--peer-listen, --peer-advertise and --peer-side-port are for strategies of peers; with "
                               f"{experiment.strategy_name} clients talk to the server alone. Leave them out.")
            return {}
        from fedcore.clients.peer_client import Door

        found = {key: value for key, value in given.items() if value is not None}
        Door.of({**read_node_config(self.node_config), **found}, experiment.peers.relay)
        return found


def run_client(file: Path, overrides: Sequence[str], settings: ClientSettings) -> int:
    """Train for a server until its run is over; returns the exit status."""
    from fedcore.clients.build import build_client
    from fedcore.transport.agent import ClientAgent

    console = make_console()
    address = Address.of("--server", settings.server)
    credentials = open_tls("node", settings.tls, int(settings.insecure), address)
    name = _client_name(settings.name, credentials)
    node_config = read_node_config(settings.node_config)
    experiment = load_experiment(file, overrides, "client")
    node_config |= settings.as_peer(experiment)
    largest = None if settings.max_megabytes is None else int(settings.max_megabytes * MEGABYTE)
    allowed = None if settings.allow is None else frozenset(settings.allow)
    limits = Limits(allowed, settings.max_local_steps, settings.max_seconds, largest)
    with one_torch_thread(), _held(settings.state / name) as state:
        agent = ClientAgent(
            build_client(experiment), str(address), name, credentials=credentials, node_config=node_config,
            state=state, limits=limits, on_status=_Diary(console),
        )
        stopped = _stop_at_signals(agent, console)
        _say(console, f"{name} dials {address} ({'in clear' if credentials is None else 'mutual TLS'}); "
                      f"what it must not forget is in {state}")
        _warn_of_expiry(console, credentials)
        try:
            reason = agent.run()
        except ConnectionError as error:
            raise LinkRefused(str(error)) from error
    _say(console, f"Ended: {reason}.")
    return INTERRUPTED if stopped and stopped[0] == signal.SIGINT else DONE


def _client_name(given: str | None, credentials: Credentials | None) -> str:
    if credentials is None:
        if given is None:
            raise BadInput("Give --name: without certificates nothing else says who this client is.")
        return given
    if given not in (None, credentials.name):
        raise BadInput(f"--name {given}, but this client's certificate is for {credentials.name}: leave out --name.")
    return credentials.name


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """Hold a client's state folder, so that no second process works with it.

    Raises:
        BadInput: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w", encoding="utf-8")  # noqa: SIM115 (held as long as the client runs)
    except OSError as error:
        raise BadInput(f"The state folder {folder} cannot be used: {error.strerror}. Give another --state.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(f"Another client works with {folder}: end it, or give this one its own --state.") from error
        yield folder


class _Diary:
    """Prints what a client does, task by task."""

    def __init__(self, console: Console):
        self.console, self._task, self._since = console, "", 0.0

    def __call__(self, status: str) -> None:
        if status in ("connected", "disconnected"):
            _say(self.console, status)
        elif status == "idle":
            if self._task:
                _say(self.console, f"{self._task}: {time.monotonic() - self._since:.2f} s")
            self._task = ""
        elif status not in ("downloading", "uploading"):
            self._task, self._since = status, time.monotonic()


def _stop_at_signals(agent: "ClientAgent", console: Console) -> list[int]:
    """End after the present task at the first SIGTERM or Ctrl-C, at once at the second; returns what has come."""
    came: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        _say(console, "Ending after the present task; press Ctrl-C again to end at once.")
        agent.stop("it was asked to stop")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return came


def show_status(server: str, tls: Path | None, insecure: bool, as_json: bool) -> None:
    """Print what a server says of its clients."""
    address = Address.of("--server", server)
    credentials = open_tls("node", tls, int(insecure), address)
    snapshot = ask_status(str(address), credentials)
    console = make_console()
    if as_json:
        console.print(json.dumps(snapshot, indent=2), markup=False, soft_wrap=True)
        return
    console.print(status_table(snapshot))
    _say(console, f"up for {seconds(snapshot['uptime_s'])}, fedcore {snapshot['version']}, {snapshot['tasks']} tasks, "
                  f"{snapshot['uploads_admitted']} uploads under way, {snapshot['uploads_waiting']} waiting")
    if snapshot.get("relayed_bytes"):
        _say(console, f"{snapshot['relayed_bytes']} bytes relayed between peers, {snapshot['tunnels']} tunnels")


def _say(console: Console, text: str) -> None:
    console.print(printable(plain_spaces(text)), markup=False, soft_wrap=True)
