"""NoLoCo's published claims at small scale: latency of a tree against pairs, waiting, parity of training.

    python -m tests.paper.noloco_study

Source: Kolehmainen et al., 2025, arXiv:2506.10911.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedcore.peers.groups import draw_groups
from fedcore.peers.strategy import PeerStrategy
from fedcore.simulations.peers import PeerSimulation
from fedcore.strategies.diloco import DiLoCo
from fedcore.strategies.noloco import NoLoCo
from tests.peer_lab import prepare

INPUTS, HIDDEN = 8, 16
# With 50 local steps per round NoLoCo ends 2 % above DiLoCo's loss, with 25 less than 1 %.
SETTING = {"peers": 8, "rounds": 40, "inner_steps": 25}
RATES = (0.003, 0.01, 0.02)


def tree_seconds(count: int, sigma: float, repeats: int, seed: int = 0) -> float:
    """Return the mean time of a tree all-reduce over 2^k peers whose messages take log-normal(0, sigma) each."""
    generator, total = np.random.default_rng(seed), np.zeros((repeats, count))
    levels = [1 << level for level in range(count.bit_length() - 1)]
    for stride in levels:                        # sums go up, one message per edge
        takers = np.arange(0, count, 2 * stride)
        came = total[:, takers + stride] + generator.lognormal(0.0, sigma, (repeats, len(takers)))
        total[:, takers] = np.maximum(total[:, takers], came)
    total[:] = total[:, :1]
    for stride in reversed(levels):              # the result comes down
        givers = np.arange(0, count, 2 * stride)
        total[:, givers + stride] = total[:, givers] + generator.lognormal(0.0, sigma, (repeats, len(givers)))
    return float(total.max(axis=1).mean())


def latency_ratio(count: int, sigma: float, repeats: int) -> float:
    """Return how many times longer a tree over all takes than a message and an answer between two."""
    return tree_seconds(count, sigma, repeats) / tree_seconds(2, sigma, 200_000)


def waiting_ratio(count: int, rounds: int, inner_steps: int = 100, variance: float = 0.5) -> float:
    """Return DiLoCo's time over NoLoCo's when messages are free and steps log-normal(1, variance)."""
    generator = np.random.default_rng(0)
    everybody, pairs = 0.0, np.zeros(count)
    for step in range(rounds):
        work = generator.lognormal(1.0, variance**0.5, (count, inner_steps)).sum(axis=1)
        everybody += work.max()
        pairs += work
        for group in set(draw_groups(tuple(range(count)), 2, 0, step).values()):
            pairs[list(group)] = pairs[list(group)].max()
    return float(everybody / pairs.mean())


class Students:
    """A tanh network learns from a larger one; every peer has examples of its own, and noise of its own."""

    metric_names = ("loss",)

    def __init__(self, examples: int = 256, seed: int = 0):
        self.examples, self.seed = examples, seed
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.teacher = nn.Sequential(nn.Linear(INPUTS, 2 * HIDDEN), nn.Tanh(), nn.Linear(2 * HIDDEN, 1))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (model(inputs).squeeze(1) - targets).square().mean()

    def data(self, site: int, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(100_000 * self.seed + site)
        inputs = torch.randn(count or self.examples, INPUTS, generator=generator)
        with torch.no_grad():
            clean = self.teacher(inputs).squeeze(1)
        return inputs, clean + 0.1 * torch.randn(len(inputs), generator=generator)

    def validation_data(self, site: int) -> None:
        return None

    def metrics(self, model: nn.Module, data: object) -> dict[str, float]:
        raise AssertionError("the study measures by itself")


def train(
    strategy: PeerStrategy, folder: Path, peers: int, rounds: int, inner_steps: int, seed: int = 0, lr: float = 0.01
) -> tuple[float, list[float]]:
    """Return the mean test loss of the peers' own models, and their spread after every round."""
    total = rounds * inner_steps
    simulation: PeerSimulation = prepare(strategy, folder, peers, seed=seed, stop={"rounds": rounds}, train={
        "optimizer": "adam", "lr": lr, "batch_size": 32, "dtype": "float32",
        "schedule": {"name": "cosine", "total_steps": total, "final_factor": 0.02}})
    task = Students(seed=seed)
    simulation.task = task                        # type: ignore[assignment]
    simulation.work = type(simulation.work)(task, simulation.train, seed)
    simulation.model = simulation.host.model = type(simulation.model).of(simulation.work.flat.module)
    spreads: list[float] = []
    closed = simulation.host.close_step

    def close(step: int, reports: list) -> None:  # type: ignore[type-arg]
        held = torch.stack([report.params for report in reports])
        spreads.append(float(held.std(0).mean()))
        closed(step, reports)

    simulation.host.close_step = close            # type: ignore[method-assign]
    simulation.play()
    simulation.recorder.close()
    inputs, targets = task.data(10_000, 4096)
    losses, module = [], task.model()
    with torch.no_grad():
        for peer in simulation.peers.values():
            simulation.model.replace(peer.params).load_into(module)
            losses.append(float(task.loss(module, inputs, targets)))
    return sum(losses) / len(losses), spreads


def heavy_ball() -> DiLoCo:
    """Return what NoLoCo is compared with: groups of everybody."""
    return DiLoCo(SETTING["inner_steps"], outer_momentum=0.5, nesterov=False)


def loss_over_diloco(folder: Path, seed: int) -> tuple[float, float, list[float]]:
    """Return NoLoCo's test loss over DiLoCo's, DiLoCo's, and the spread of NoLoCo's peers after every round."""
    average, _ = train(heavy_ball(), folder / f"d{seed}", **SETTING, seed=seed)
    gossip, spreads = train(NoLoCo(SETTING["inner_steps"]), folder / f"n{seed}", **SETTING, seed=seed)
    return gossip / average, average, spreads


def parity(folder: Path) -> dict[str, float]:
    """Return NoLoCo's test loss over DiLoCo's, and how the peers' spread ends."""
    ratio, average, spreads = loss_over_diloco(folder, 0)
    free = NoLoCo(SETTING["inner_steps"], gossip_lr=0.0, allow_no_consensus=True)
    apart, alone = train(free, folder / "g", **SETTING)
    return {"loss_over_diloco": ratio, "loss_over_diloco_without_pull": apart / average,
            "final_over_peak_spread": spreads[-1] / max(spreads),
            "spread_over_that_without_pull": spreads[-1] / alone[-1]}


def tuned(folder: Path) -> dict[str, list[float]]:
    """Return each method's test loss at each learning rate."""
    return {name: [train(strategy, folder / f"{name}{lr}", **SETTING, lr=lr)[0] for lr in RATES]
            for name, strategy in (("diloco", heavy_ball()), ("noloco", NoLoCo(SETTING["inner_steps"])))}


def main() -> None:
    """Print everything."""
    for count, repeats in ((16, 20_000), (1024, 500)):
        ratios = ", ".join(f"sigma {sigma}: {latency_ratio(count, sigma, repeats):.1f}" for sigma in (0.0, 0.5, 1.0))
        print(f"tree over pair, {count} peers: {ratios}")
    for count in (16, 128, 1024):
        print(f"DiLoCo over NoLoCo by waiting alone, {count} peers: {waiting_ratio(count, 200):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        print(parity(Path(folder)))
        print("NoLoCo over DiLoCo, other seeds:", [loss_over_diloco(Path(folder), seed)[0] for seed in (1, 2, 3)])
        print(f"test losses at learning rates {RATES}:", tuned(Path(folder)))


if __name__ == "__main__":
    main()
