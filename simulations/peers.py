"""One experiment of a peer strategy from its file to its run folder, in virtual time."""
import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedcore.checkpoint import Checkpoints
from fedcore.clients.build import build_task, train_settings
from fedcore.clients.data import as_dataset
from fedcore.clients.evaluation import measure, server_evaluation
from fedcore.clients.modules import flat_module, initial_model
from fedcore.clients.peer_training import peer_training
from fedcore.config import Experiment
from fedcore.errors import BadInput, UnusableCheckpoint
from fedcore.launch import Interrupt, peak_rss_mb
from fedcore.options import Evaluation, StopRule
from fedcore.peers.counters import Counters
from fedcore.peers.packing import packing_for
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import STEPS_BY_TIME, PeerStrategy
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
from fedcore.runs import Run
from fedcore.simulations.availability import Availability
from fedcore.simulations.devices import Devices
from fedcore.simulations.failures import Failures
from fedcore.simulations.loop import make_loop
from fedcore.simulations.memory import collecting_rarely, exempt_what_is_loaded
from fedcore.simulations.network import Network
from fedcore.simulations.peer_attendance import Attendance
from fedcore.simulations.peer_board import Report, VirtualBoard
from fedcore.simulations.peer_host import Measure, PeerHost
from fedcore.simulations.peer_labour import VirtualLabour
from fedcore.simulations.peer_wire import VirtualWire
from fedcore.vectors import Model

logger = logging.getLogger("fedcore")

MAX_DESCRIBED_PEERS = 2000
# Counted in the summary where there were any.
NOBODY_LEFT = "nobody is left"
TROUBLES = ("silent", "asymmetric_exchanges", "failed_meetings")


class PeerSimulation:
    """The parts of one run of virtual peers, put together."""

    def __init__(
        self, settings: Experiment, strategy: PeerStrategy, folder: Path, on_row: Listener | None = None
    ):
        exempt_what_is_loaded()
        self.interrupt = Interrupt()
        self.settings, self.strategy, self.folder = settings, strategy, folder
        self.task = build_task(settings)
        self.train = train_settings(settings)
        self.work = peer_training(self.task, self.train, settings.seed)
        self.model = self._initial_model()
        listeners = tuple(listener for listener in (on_row, *settings.build_writers(folder)) if listener)
        self.recorder = Recorder(folder, listeners)
        count, seed, simulation = settings.clients.count, settings.seed, settings.simulation
        self.devices = Devices.from_settings(simulation.devices.model_dump(), seed, count)
        self.network = Network.from_settings(simulation.network.model_dump(), seed, count)
        self.availability = Availability.from_settings(simulation.availability, seed, count)
        self.failures = Failures.from_settings(simulation.failures.model_dump(), seed, count)
        stop, rule = settings.stop, settings.evaluate
        self.checkpoints = Checkpoints(folder / CHECKPOINTS_FOLDER, settings.checkpoint.keep)
        self.host = PeerHost(
            self.model, self.recorder, self._measure(), Evaluation(rule.where, rule.every, rule.unit),
            StopRule(stop.seconds, stop.rounds, stop.client_updates, dict(stop.target or {})), self.checkpoints,
            settings.checkpoint.every_s, self.interrupt.asked)
        self.loop = make_loop()
        self.wire = VirtualWire(self.loop, self.network, count, self.availability, self.failures)
        self.peers: dict[int, Peer] = {}
        self.board: VirtualBoard
        self.attendance: Attendance | None = None
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ended: set[int] = set()        # who has come to the end of the run
        self._joined_after: dict[int, int] = {}    # by rank of those that came later: the last step without them
        self._over: asyncio.Future[None]
        self.finished = False

    def _initial_model(self) -> Model:
        model = initial_model(self.task, self.settings.seed, self.train.torch_dtype)
        path = self.settings.initial_model
        return model if path is None else Model.load(Path(path), model.layout)

    def _measure(self) -> Measure | None:
        where = self.settings.evaluate.where
        if where == "none":
            return None
        if where == "server":
            central = server_evaluation(self.task)
            return lambda model, rank: central(model)
        flat = flat_module(self.task, self.train.torch_dtype)
        ranks = range(self.settings.clients.count)

        def at(model: Model, rank: int | None) -> Mapping[str, float]:
            flat.load(model.params, model.buffers)
            rows = []
            for own in ranks if rank is None else [rank]:
                held_back = self.task.validation_data(own)
                data = as_dataset(self.task.data(own) if held_back is None else held_back)
                rows.append((len(data), measure(self.task, flat, data)))
            total = sum(size for size, _ in rows)
            return {name: sum(size * figures[name] for size, figures in rows) / total for name in rows[0][1]}

        return at

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, resuming: bool) -> Run:
        """Run to the end; whatever happens, what is known by then is in the folder."""
        started = time.monotonic()
        if not resuming:
            config = yaml.safe_dump(self.settings.resolved(), sort_keys=False)
            write_atomically(self.folder / CONFIG_FILE, config)
        self._write_peers()
        try:
            with self.interrupt.watch():
                self.play(resuming)
        finally:
            self.recorder.close()
            self.host.model.save(self.folder / MODEL_FILE)
            self._write_summary(time.monotonic() - started)
        write_report(self.folder)
        return Run(self.folder)

    def play(self, resuming: bool = False) -> None:
        """Let the peers run, to the end of the run; metrics and checkpoints are written, the rest of the folder not."""
        with collecting_rarely(), asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._main(resuming))

    async def _main(self, resuming: bool) -> None:
        saved = self._load() if resuming else None
        count = self.settings.clients.count
        here = tuple(rank for rank in range(count) if self.availability is None or self.availability.is_on(rank, 0.0))
        if not here:
            raise BadInput("No peer is online at the start. Choose another simulation.availability.")
        step_s, stop_s = self._times()
        num_steps = None if self.strategy.by_time else self.settings.stop.rounds
        self.board = VirtualBoard(self.loop, self.wire, self.host, here, count, num_steps, step_s, stop_s)
        board, host = self.board, self.host
        host.begun, host.num_steps, host.stop_run = lambda: board.begun, lambda: board.num_steps, board.stop
        host.extra_state = self._extra_state
        self.attendance = self._attend()
        if saved is None:
            self.recorder.metric(0.0, "start", version=0, nodes=len(here), num_params=self.model.layout.num_params)
            for rank in here:
                self._make(rank)
            if self.attendance is not None:
                self.attendance.begin(here)
        else:
            self._restore(saved)
            here = tuple(sorted(set(self.board.membership(saved["step"] + 1).members) & saved["peers"].keys()))
        self._over = self.loop.create_future()
        for rank in here:
            self._launch(rank, None if saved is None else saved["peers"][rank]["at"])
        await self._over
        self._finish()

    def _times(self) -> tuple[float | None, float | None]:
        """Return the length of a step, for strategies that stop by time, and when the run stops, seconds."""
        stop, rule, count = self.settings.stop, self.settings.evaluate, self.settings.clients.count
        if not self.strategy.by_time:
            return None, stop.seconds
        limits = [] if stop.seconds is None else [stop.seconds]
        if stop.rounds is not None:    # a round is as many gradients as there are peers
            usual = sum(self.devices.seconds_per_step(rank) for rank in range(count)) / count
            limits.append(stop.rounds * usual)
        total = min(limits) if limits else None
        if rule.unit == "seconds":
            return rule.every, total
        if total is None:
            raise BadInput(
                f"{self.settings.strategy_name} stops by time. Give stop.seconds or stop.rounds, or have it evaluated "
                "by the second (evaluate: {unit: seconds, every: ...}).")
        return total / STEPS_BY_TIME, total

    def _make(self, rank: int) -> Peer:
        work = self.work.peer(rank)
        labour = VirtualLabour(rank, work, self.devices, self.board, self.availability, self.failures)
        peer = Peer(
            rank, self.settings.seed, self.model.params, self.model.buffers, run=self.folder.name, labour=labour,
            wire=self.wire, board=self.board, num_examples=work.num_examples,
            packing=packing_for(self.settings, self.model.layout, rank))
        self.peers[rank] = self.wire.peers[rank] = peer
        return peer

    async def _run(self, peer: Peer, begins_at: float | None = None) -> None:
        if begins_at is not None:
            await self.board.sleep_until(peer.rank, begins_at)
            peer.resume()
        await self.strategy.run(peer)
        peer.close()

    def _launch(self, rank: int, begins_at: float | None) -> None:
        task = self.loop.create_task(self._run(self.peers[rank], begins_at), name=f"peer {rank}")
        self._running[rank] = task
        task.add_done_callback(lambda done: self._on_done(rank, done))

    def _on_done(self, rank: int, task: "asyncio.Task[None]") -> None:
        if self._running.get(rank) is task:
            del self._running[rank]
        if not task.cancelled():
            if (error := task.exception()) is not None:
                if not self._over.done():
                    self._over.set_exception(error)
                return
            if self.peers[rank].step > self._joined_after.get(rank, -1):
                self._ended.add(rank)    # else it came when the run was over
        self._look_whether_it_is_over()

    def _look_whether_it_is_over(self) -> None:
        """End the run once nobody is left who does anything, or will."""
        if self._running or self._over.done():
            return
        board, arrival = self.board, math.inf if self.attendance is None else self.attendance.next_arrival
        no_more = board.num_steps is not None and board.begun + 1 >= board.num_steps
        if self._ended or no_more or arrival >= (board.stop_s or math.inf):
            self.board.stop_reason = self.board.stop_reason if self._ended else NOBODY_LEFT
            self._over.set_result(None)

    # ---- those who go and come --------------------------------------------------------------------------------------

    def _attend(self) -> Attendance | None:
        if self.availability is None:
            return None
        count, lost_after_s = self.settings.clients.count, self.settings.peers.lost_after_s
        attendance = Attendance(self.loop, self.availability, self.network, self.board, self.wire, count, lost_after_s,
                                self._lose, self._prepare, self._start)
        self.host.can_save = lambda step, reports: attendance.can_save(
            step, {report.rank: report.state for report in reports if report.state is not None})
        return attendance

    def _lose(self, rank: int) -> dict[str, Any]:
        """End a peer; what it has counted outlives it."""
        peer, task = self.peers[rank], self._running.get(rank)
        remnants = {"counters": peer.counters.as_dict(), "wire": self.wire.state_dict(rank),
                    "pieces": peer.labour.state_dict().get("pieces", 0),
                    "clocks": {name: (count, None) for name, (count, _) in peer.clocks.items()}}
        peer.close()
        if task is not None:
            task.cancel()
        for other in sorted(self.peers):
            if other != rank:
                peer.lose(other)    # nothing of it stays open
        return remnants

    def _prepare(self, rank: int, remnants: Mapping[str, Any]) -> None:
        """Make a peer that takes messages already, for one that comes."""
        peer = self._make(rank)
        peer.incarnation = int(self.wire.lost_until[rank]) + 1
        for other in self.wire.gone:
            peer.mailbox.lose(other)
        if remnants:
            peer.counters, peer.clocks = Counters(**remnants["counters"]), dict(remnants["clocks"])
            self.wire.load_state_dict(rank, remnants["wire"])
            peer.labour.load_state_dict({**peer.labour.state_dict(), "pieces": remnants["pieces"]})

    def _start(self, rank: int, given: Mapping[str, Any]) -> None:
        """Let one that has come begin, with a living peer's model and place in the schedule."""
        peer = self.peers[rank]
        if "params" in given:
            work, own = dict(given["labour"]["work"]), peer.labour.state_dict()
            peer.labour.load_state_dict({**own, "work": {**work, "optimizer": None} if "optimizer" in work else work})
            state = None if given["state"] is None else self.strategy.newcomer(given["state"])
            peer.start_from(state, given["params"], given["buffers"], given["step"])
            peer.take_up([{"tag": one["tag"], "round": one["round"], "vector": None, "weight": 0.0,
                           "began": self.board.now, "charged": True} for one in given["pending"]])
        else:
            peer.step = given["step"]    # nobody has come to the end of a step yet
        self._joined_after[rank] = peer.step
        self._launch(rank, self.board.now)

    def _finish(self) -> None:
        """Evaluate what the peers ended with, where that differs from their last step, and write the end."""
        host, now = self.host, self.board.now
        self.finished = True
        reports = [Report(rank, now, now, peer.params, peer.buffers, peer.loss, peer.counters.as_dict(), [], None)
                   for rank, peer in sorted(self.peers.items()) if rank in self._ended]
        if reports:
            host.finish(reports)
        self.recorder.metric(host.time_s, "stop", version=host.version, reason=self.board.stop_reason,
                             **host.main_totals())
        self.recorder.flush()

    # ---- what survives a restart ------------------------------------------------------------------------------------

    def _load(self) -> dict[str, Any]:
        saved, problems = self.checkpoints.load_newest()
        for problem in problems:
            logger.warning("%s Using the checkpoint before it.", problem)
        if saved.get("kind") != "peers":
            raise UnusableCheckpoint(f"The checkpoints in {self.folder} are not of a run of peers.")
        return saved

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for rank in sorted(saved["peers"]):
            self._make(rank).load_state_dict(saved["peers"][rank])
        self.host.load_state_dict(saved["host"])
        self.host.last_params = [self.peers[rank].params for rank in sorted(self.peers)]
        self.board.load_state_dict(saved["board"], saved["step"])
        if self.attendance is not None:
            self.attendance.load_state_dict(saved["attendance"], saved["step"], saved["peers"])

    def _extra_state(self, step: int) -> dict[str, Any]:
        attendance = {} if self.attendance is None else {"attendance": self.attendance.state_dict(step)}
        return {"board": self.board.state_dict(step), **attendance}

    # ---- the folder -------------------------------------------------------------------------------------------------

    def _write_peers(self) -> None:
        rows = []
        for rank in range(min(self.settings.clients.count, MAX_DESCRIBED_PEERS)):
            labels = self.task.labels(rank) if hasattr(self.task, "labels") else None
            rows.append({"node": rank, "num_examples": len(as_dataset(self.task.data(rank))), "labels": labels,
                         "seconds_per_step": self.devices.seconds_per_step(rank)})
        write_atomically(self.folder / CLIENTS_FILE, json.dumps(plain(rows)))

    def _waiting_share(self) -> float | None:
        """Return which share of all peers' time they spent waiting for each other."""
        spent = self.host.time_s * len(self.peers)
        return self.host.totals.get("waiting_s", 0.0) / spent if spent else None

    def _write_summary(self, wall_s: float) -> None:
        host, settings, scores = self.host, self.settings, self.host.scores
        latest = dict(scores.latest)
        reason = self.board.stop_reason if self.finished else None
        totals = host.totals
        write_atomically(self.folder / SUMMARY_FILE, json.dumps(plain({
            "strategy": settings.strategy_name, "task": settings.task_name, "seed": settings.seed, "engine": "virtual",
            "stop_reason": reason or "error", "time_s": host.time_s, "wall_s": round(wall_s, 3),
            "versions": host.version, "rounds": None if self.strategy.by_time else host.version,
            **host.main_totals(), "gradients": totals.get("gradients", 0),
            "final_loss": latest.pop("loss", None), "final_accuracy": latest.pop("accuracy", None),
            "best_accuracy": scores.best_accuracy, "time_to_target_s": scores.time_to_target_s,
            "target": dict(settings.stop.target or {}) or None, "num_params": self.model.layout.num_params,
            **host.counts, **{name: totals.get(name) or None for name in TROUBLES},
            "waiting_share": self._waiting_share(),
            "peak_rss_mb": round(peak_rss_mb(), 1), **latest, "consensus_distance": host.distance,
            **self.strategy.summary_figures(),
        }), indent=2) + "\n")
