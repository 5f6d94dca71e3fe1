"""Small runs of virtual peers, for tests: quadratic tasks, in float64, a second or less."""
from typing import Any

import torch
from torch import Tensor

from fedcore.config import Experiment
from fedcore.peers.peer import Peer
from fedcore.peers.strategy import PeerStrategy
from fedcore.simulations.peers import PeerSimulation

DEVICES = {"seconds_per_step": {"name": "exponential", "mean": 0.1}}


def prepare(strategy: PeerStrategy, folder: Any, count: int = 4, **settings: Any) -> PeerSimulation:
    """Return a simulation that has not begun; `settings` are sections of an experiment."""
    given = {
        "task": {"name": "quadratic", "noise": 0.5, "dimension": 6}, "strategy": "noloco",
        "clients": {"count": count}, "evaluate": {"where": "none"},
        "train": {"lr": 0.1, "batch_size": 4, "dtype": "float64", "local_steps": 1, "device": "cpu"},
        "stop": {"rounds": 4}, "simulation": {"devices": DEVICES},
    }
    for name, section in settings.items():
        both = isinstance(given.get(name), dict) and isinstance(section, dict) and "name" not in section
        given[name] = {**given[name], **section} if both else section  # type: ignore[dict-item]
    folder.mkdir(parents=True, exist_ok=True)
    return PeerSimulation(Experiment(**given), strategy, folder)  # type: ignore[arg-type]


def play(strategy: PeerStrategy, folder: Any, count: int = 4, **settings: Any) -> PeerSimulation:
    """Return a simulation that has ended."""
    simulation = prepare(strategy, folder, count, **settings)
    try:
        simulation.play()
    finally:
        simulation.recorder.close()
    return simulation


def models(simulation: PeerSimulation) -> list[Tensor]:
    """Return every peer's parameters, by rank."""
    return [peer.params for _, peer in sorted(simulation.peers.items())]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Say whether two lists of vectors are equal, bit for bit."""
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class Script(PeerStrategy):
    """A peer strategy made of one function."""

    def __init__(self, run: Any, by_time: bool = False):
        self._run, self.by_time = run, by_time  # type: ignore[misc]

    async def run(self, peer: Peer) -> None:
        """Call the function."""
        await self._run(peer)
