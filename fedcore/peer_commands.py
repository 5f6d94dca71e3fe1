"""What `fedcore peer` does: one peer of a run without a server, on this machine."""
import json
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from fedcore.checkpoint import Checkpoints
from fedcore.cli import DONE, INTERRUPTED
from fedcore.config import Experiment, load_experiment
from fedcore.errors import BadInput, InvalidSetting
from fedcore.launch import make_folder, one_torch_thread
from fedcore.peers.packing import Packing, packing_for
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import STEPS_BY_TIME, PeerStrategy
from fedcore.recorder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MODEL_FILE,
    SUMMARY_FILE,
    Recorder,
    plain,
    write_atomically,
)
from fedcore.terminal import make_console
from fedcore.tls import Credentials, load_credentials
from fedcore.transport.loop import submit
from fedcore.transport.peer_roster import Roster
from fedcore.transport.peer_runner import PeerOptions
from fedcore.transport.roster_peer import RosterPeer
from fedcore.transport.wire import host_of, is_loopback
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

SHOWN_EVENTS = ("refused", "lost", "rejoined", "members")    # incidents are logged


def peer_parts(experiment: Experiment, rank: int) -> tuple[PeerStrategy, Model, Any]:
    """Return an experiment's strategy, the model that all start from, and the training of one peer.

    Raises:
        InvalidSetting: the strategy needs a server.
    """
    from fedcore.clients.build import build_task, train_settings
    from fedcore.clients.modules import initial_model
    from fedcore.clients.peer_training import peer_training

    strategy = experiment.build_strategy()
    if not isinstance(strategy, PeerStrategy):
        raise InvalidSetting("strategy", experiment.strategy_name, "a strategy of peers",
                             "This one needs a server: fedcore server, fedcore client.")
    task, settings = build_task(experiment), train_settings(experiment)
    model = initial_model(task, experiment.seed, settings.torch_dtype)
    if experiment.initial_model is not None:
        model = Model.load(Path(experiment.initial_model), model.layout)
    return strategy, model, peer_training(task, settings, experiment.seed).peer(rank)


def peer_options(experiment: Experiment, strategy: PeerStrategy) -> PeerOptions:
    """Return when a peer stops and how often it saves.

    Raises:
        InvalidSetting: the limit that all peers share is missing.
    """
    stop, every = experiment.stop, experiment.checkpoint.every_s
    name = "seconds" if strategy.by_time else "rounds"
    limit = getattr(stop, name)
    if limit is None:
        raise InvalidSetting(f"stop.{name}", limit, "given", f"All peers of {experiment.strategy_name} stop then.")
    if strategy.by_time:
        return PeerOptions(STEPS_BY_TIME, stop_s=limit, save_every_s=every, lost_after_s=experiment.peers.lost_after_s)
    return PeerOptions(limit, save_every_s=every, lost_after_s=experiment.peers.lost_after_s)


def credentials_for(tls: Path | None, insecure: bool, roster: Roster, rank: int) -> Credentials | None:
    """Return a peer's credentials; None in clear.

    Raises:
        BadInput: there are none, or they are not this peer's, or a roster in clear reaches beyond this machine.
    """
    entry = roster.peers[rank]
    if tls is None:
        outside = [peer.address for peer in roster.peers if not is_loopback(host_of(peer.address))]
        if not insecure or outside:
            where = f" {outside[0]} is not this machine." if insecure else ""
            raise BadInput(f"Peers talk with certificates: give --tls DIR.{where} Only peers that are all on one "
                           "machine may do without, with --insecure.")
        return None
    credentials = load_credentials(tls, "node")
    if credentials.name != entry.name:
        raise BadInput(f"The certificate in {tls} is {credentials.name}'s, but this peer is {entry.name}.")
    unpinned = [peer.name for peer in roster.peers if not peer.fingerprint]
    if unpinned:
        raise BadInput(f"The roster has no fingerprint of {unpinned[0]}'s certificate. "
                       "`openssl x509 -noout -fingerprint -sha256 -in node.crt` shows it; write it in lower case, "
                       "without colons.")
    return credentials


def run_peer(
    file: Path, overrides: Sequence[str], roster_file: Path, name: str, tls: Path | None, insecure: bool,
    doors: tuple[str | None, int], out: Path | None, resume: bool, rejoin: bool,
) -> int:
    """Run one peer to the end; returns the exit status.

    Args:
        doors: HOST:PORT where it listens, None: the roster's address; the port for large vectors, 0: any free one.
    """
    roster = Roster.of(roster_file)
    rank = roster.rank_of(name)
    experiment = load_experiment(file, [*overrides, f"clients.count={len(roster.peers)}"])
    credentials = credentials_for(tls, insecure, roster, rank)

    def make(parts: PeerParts) -> RosterPeer:
        return RosterPeer(parts.strategy, roster, rank, credentials, parts.model, parts.work, parts.options,
                          experiment.seed, parts.checkpoints, parts.on_row, parts.packing)

    return take_part(experiment, (roster.run, name, rank), out, resume, make,
                     lambda peer: peer.run(doors[0], resume, rejoin, doors[1]))


@dataclass(frozen=True)
class PeerParts:
    """What a real peer is made of, whatever carries its messages."""

    strategy: PeerStrategy
    model: Model
    work: Any
    options: PeerOptions
    checkpoints: Checkpoints
    on_row: Callable[[str, dict[str, Any]], None]
    packing: Packing | None


class Participant(Protocol):
    """A real peer that can run."""

    peer: Peer


P = TypeVar("P", bound=Participant)


def take_part(
    experiment: Experiment, who: tuple[str, str, int], out: Path | None, resume: bool, make: Callable[[PeerParts], P],
    start: Callable[[P], Coroutine[Any, Any, object]],
) -> int:
    """Run one peer to the end, and leave its folder; returns the exit status.

    Args:
        who: the run's name, the peer's name, its rank.
        make: puts the peer together.
        start: runs it to the end.
    """
    console, (run, name, rank) = make_console(), who
    strategy, model, work = peer_parts(experiment, rank)
    if resume and out is None:
        raise BadInput("--resume continues from this peer's own checkpoint: name its folder with --out.")
    folder = out if resume and out is not None else make_folder(out, f"{run}-{name}")
    if not resume:
        write_atomically(folder / CONFIG_FILE, yaml.safe_dump(experiment.resolved(), sort_keys=False))
    recorder, started = Recorder(folder), time.monotonic()

    def on_row(event: str, figures: dict[str, Any]) -> None:
        recorder.metric(peer.peer.now, event, node=rank, **figures)
        recorder.flush()
        if event in SHOWN_EVENTS:
            console.print(f"{event}: {', '.join(f'{key} {value}' for key, value in figures.items())}", markup=False)

    with one_torch_thread():
        peer = make(PeerParts(
            strategy, model, work, peer_options(experiment, strategy),
            Checkpoints(folder / CHECKPOINTS_FOLDER, experiment.checkpoint.keep), on_row,
            packing_for(experiment, model.layout, rank)))
        running = submit(start(peer))
        status = DONE
        try:
            running.result()
        except KeyboardInterrupt:
            running.cancel()
            status = INTERRUPTED
        finally:
            recorder.close()
    model.replace(peer.peer.params, peer.peer.buffers).save(folder / MODEL_FILE)
    counters = peer.peer.counters.as_dict()
    summary = {"strategy": experiment.strategy_name, "task": experiment.task_name, "seed": experiment.seed,
               "engine": "peers", "peer": name, "rank": rank, "steps": peer.peer.step + 1, "loss": peer.peer.loss,
               "wall_s": round(time.monotonic() - started, 3), **counters}
    write_atomically(folder / SUMMARY_FILE, json.dumps(plain(summary), indent=2) + "\n")
    console.print(f"{name}: {peer.peer.step + 1} steps, {counters['exchanges']} exchanges, loss {peer.peer.loss:.4g}: "
                  f"{folder}", markup=False, soft_wrap=True)
    return status
