"""What each process of a group does in `test_torch_wire.py`: several runs, one after another; in the last, rank 2 dies.

    RANK=0 WORLD_SIZE=4 MASTER_ADDR=... MASTER_PORT=... python -m tests.fedcore.transport.torch_peers FOLDER
"""
import os
import sys
from pathlib import Path

import torch

from fedcore.clients.peer_training import PeerTraining
from fedcore.cluster_peer import GroupPeer
from fedcore.errors import GroupBroken
from fedcore.peers.strategy import PeerStrategy
from fedcore.registry import build
from fedcore.transport.loop import submit
from fedcore.transport.peer_runner import PeerOptions
from fedcore.transport.torch_wire import TorchGroup
from tests.peer_lab import Script, prepare

TRAIN = {"train": {"dtype": "float32", "optimizer": {"name": "sgd", "momentum": 0.9}}}
NAMES, ROUNDS, DIES, PATIENCE_S = ("diloco", "co2"), 4, 2, 200.0


def strategy(name: str) -> PeerStrategy:
    """Return one of the strategies of the first runs."""
    return build("strategies", {"name": name, "inner_steps": 3})


async def until_death(peer):
    async for step in peer.steps():
        await peer.exchange(peer.members, peer.params)
        if step == 1 and peer.rank == DIES:
            os._exit(9)


def run(group: TorchGroup, made: PeerStrategy, folder: Path) -> torch.Tensor:
    """Return this process's parameters at the end of a run."""
    virtual = prepare(made, folder, group.size, stop={"rounds": ROUNDS}, **TRAIN)
    virtual.recorder.close()
    work = PeerTraining(virtual.task, virtual.train, 0).peer(group.rank)
    peer = GroupPeer(made, group, virtual.model, work, PeerOptions(ROUNDS), 0)
    return submit(peer.run()).result(PATIENCE_S)


def main() -> None:
    """Run, leave the models and the error in the folder."""
    torch.set_num_threads(1)
    folder, group = Path(sys.argv[1]), TorchGroup.join()
    for name in NAMES:
        torch.save(run(group, strategy(name), folder / f"{name}-{group.rank}"), folder / f"{name}-{group.rank}.pt")
    try:
        run(group, Script(until_death), folder / f"dies-{group.rank}")
    except GroupBroken as error:
        (folder / f"error-{group.rank}.txt").write_text(f"{error.rank} {error}")


if __name__ == "__main__":
    main()
