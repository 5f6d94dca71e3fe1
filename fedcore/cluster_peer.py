"""What `fedcore peer --torch-distributed` does: one process of those that torchrun started."""
import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcore.checkpoint import Checkpoints
from fedcore.config import load_experiment
from fedcore.peer_commands import PeerParts, take_part
from fedcore.peers.envelope import Envelope
from fedcore.peers.packing import Packing
from fedcore.peers.peer import Peer
from fedcore.peers.seams import PeerWork
from fedcore.peers.strategy import PeerStrategy
from fedcore.transport.peer_labour import ThreadLabour
from fedcore.transport.peer_runner import ENDED, GOODBYE, POLL_S, READY, PeerOptions, RosterBoard
from fedcore.transport.torch_wire import TorchGroup, TorchWire
from fedcore.vectors import Model

WORDS = (READY, ENDED, GOODBYE)


class GroupPeer:
    """A process of a group, ready to run: all take part from the beginning to the end, or nobody does.

    Args:
        model: from which all peers start.
        seed: of the run, the same at all peers.
        on_row: told what happens: (event, figures).
        packing: compresses what this peer sends; None: nothing does.
    """

    def __init__(
        self, strategy: PeerStrategy, group: TorchGroup, model: Model, work: PeerWork, options: PeerOptions, seed: int,
        checkpoints: Checkpoints | None = None,
        on_row: Callable[[str, dict[str, Any]], None] = lambda event, figures: None, packing: Packing | None = None,
    ):
        if options.stop_s is not None:
            options = replace(options, num_steps=1)
        self._strategy, self._group, self._labour, self._options = strategy, group, ThreadLabour(work), options
        self._checkpoints = checkpoints
        self._heard: defaultdict[tuple[str, int], int] = defaultdict(int)    # by word and step: how many said it
        self.wire = TorchWire(group, self._take, model.layout.num_bytes)
        self.board = RosterBoard(group.size, options, checkpoints, on_row, self._gather)
        self.peer = Peer(group.rank, seed, model.params, model.buffers, run=run_name(), labour=self._labour,
                         wire=self.wire, board=self.board, num_examples=work.num_examples, packing=packing)

    def _take(self, envelope: Envelope) -> str | None:
        if envelope.kind in WORDS:
            self._heard[envelope.kind, envelope.round] += 1
            return None
        return self.peer.take(envelope)

    async def _gather(self, word: str) -> None:
        """Say a word to all, and wait until all have said it at the same step."""
        step = self.peer.step
        for rank in range(self._group.size):
            if rank != self.peer.rank:
                self.peer.post(rank, word, "", step, {})
        while self._heard[word, step] < self._group.size - 1:
            await asyncio.sleep(POLL_S)

    async def run(self, resume: bool = False) -> Tensor:
        """Take part to the end; returns this peer's parameters.

        Args:
            resume: continue from this peer's own checkpoint; all peers must.

        Raises:
            GroupBroken: a member of the group is gone.
            UnusableCheckpoint: there is none to resume from.
        """
        if resume and self._checkpoints is not None:
            saved, _ = self._checkpoints.load_newest()
            self.peer.load_state_dict(saved["peer"])
        await self.wire.start()
        running, broken = asyncio.create_task(self._run()), asyncio.wrap_future(self.wire.broken)
        either: list[asyncio.Future[Any]] = [running, broken]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                broken.result()
            await running
        finally:
            for future in either:
                future.cancel()
            self.peer.close()
            self._labour.close()
            await self.wire.close()
        return self.peer.params

    async def _run(self) -> None:
        await self._gather(READY)
        self.board.start_clock()
        self.peer.resume()
        await self._strategy.run(self.peer)
        await self._gather(GOODBYE)
        await self.wire.drain(self._options.farewell_s)


def run_name() -> str:
    """Return what the processes of a group call their run."""
    return f"torchrun-{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}"


def run_cluster_peer(file: Path, overrides: Sequence[str], backend: str, out: Path | None, resume: bool) -> int:
    """Run one peer to the end; returns the exit status. Its folder is `out`/rank-N."""
    group = TorchGroup.join(backend)
    experiment = load_experiment(file, [*overrides, f"clients.count={group.size}"])
    name = f"rank-{group.rank}"

    def make(parts: PeerParts) -> GroupPeer:
        return GroupPeer(parts.strategy, group, parts.model, parts.work, parts.options, experiment.seed,
                         parts.checkpoints, parts.on_row, parts.packing)

    status = take_part(experiment, (run_name(), name, group.rank), None if out is None else out / name, resume, make,
                       lambda peer: peer.run(resume))
    group.leave()
    return status
