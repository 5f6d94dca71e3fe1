"""Messages between peers by `torch.distributed`: for the processes of one cluster, which `torchrun` starts together.

Every ordered pair of ranks has two threads, one that sends and one that receives, so messages of a pair keep their
order, and both ways go at once. A message is a length, a head and the vectors' memory, one transfer each. Heads always
travel by gloo; vectors by gloo too, or by NCCL with a communicator for every direction: transfers on one wait for
each other.

Such a group does not survive the loss of a member: see `GroupBroken`. There are no certificates either; whoever reaches
the rendezvous takes part.
"""
import asyncio
import datetime
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedcore.errors import BadInput, GroupBroken, MalformedFrame, PeerLost
from fedcore.peers.envelope import Envelope
from fedcore.peers.packing import Packed
from fedcore.peers.peer import Peer
from fedcore.peers.seams import Reduced
from fedcore.transport.frames import MAX_HEAD_BYTES
from fedcore.transport.peer_link import MOST_QUEUED
from fedcore.transport.peer_messages import Arriving, frame
from fedcore.transport.peer_wire import IDLE_BYTES, largest_message
from fedcore.transport.pool import BufferPool

BACKENDS = ("gloo", "nccl")
# A peer may train for long before it sends anything: silence is no failure, and a lost connection is noticed at once.
SILENCE = datetime.timedelta(days=30)
FAREWELL_S = 60.0
NEVER_SENT = 1    # a tag
GOODBYE = -1    # in the place of a head's length: nothing more will come
Deliver = Callable[[Envelope], str | None]
Outgoing = tuple[bytes, list[Tensor], "asyncio.Future[bool]"]


@dataclass(frozen=True)
class TorchGroup:
    """The processes that take part, and what connects them.

    Attributes:
        device: where vectors are while they travel.
        heads: the process group of the messages' heads.
        lanes: those of the vectors, by (source, receiver).
    """

    rank: int
    size: int
    device: torch.device
    heads: Any = field(repr=False)
    lanes: dict[tuple[int, int], Any] = field(repr=False)

    @classmethod
    def join(cls, backend: str = "gloo") -> "TorchGroup":
        """Meet the other processes that torchrun has started; all of them call this.

        Args:
            backend: `gloo`, or `nccl`: each process uses the GPU of its local rank.

        Raises:
            BadInput: this process was not started by torchrun, or has no GPU for NCCL.
        """
        if backend not in BACKENDS:
            raise BadInput(f"torch.distributed is used with {' or '.join(BACKENDS)}, not with {backend}.")
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise BadInput("torchrun starts the peers that talk by torch.distributed: "
                           "torchrun --nproc-per-node 4 -m fedcore peer FILE --torch-distributed gloo")
        if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise BadInput("There is no GPU here, or this torch has no NCCL. Use --torch-distributed gloo.")
        dist.init_process_group("gloo")
        rank, size, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
        heads = dist.new_group(backend="gloo", timeout=SILENCE)
        pairs = [(source, to) for source in range(size) for to in range(size) if source != to]
        if backend == "gloo":
            return cls(rank, size, device, heads, dict.fromkeys(pairs, heads))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        lanes = {pair: dist.new_group(list(pair), backend="nccl", timeout=SILENCE) for pair in pairs}
        return cls(rank, size, device, heads, lanes)

    def cut(self) -> None:
        """End all transfers that are under way, here and, as the connections end, at the others.

        Nothing else ends a thread that waits for a message: gloo takes a transfer that runs out of time for the end of
        all its connections. (A process that ends while such threads wait is aborted.)
        """
        for rank in range(self.size):
            if rank != self.rank:
                with suppress(RuntimeError):
                    waiting = dist.irecv(torch.empty(1), rank, group=self.heads, tag=NEVER_SENT)
                    assert waiting is not None
                    waiting.wait(datetime.timedelta(milliseconds=1))
        if self.device.type == "cuda":
            for pair, lane in self.lanes.items():
                if self.rank in pair:
                    lane.abort()

    def leave(self) -> None:
        """End the group; all call this, after they have said goodbye."""
        dist.destroy_process_group()


class TorchWire:
    """Carries a peer's messages to the others of its group, and theirs to it.

    Reductions are the ring of messages that every engine has, not torch's own, which adds in another order: so the bits
    are those of virtual time.

    Args:
        deliver: takes what comes; returns why it was not used, if it was not.
        model_bytes: of this peer's model; messages may be several times as large, and no larger.

    Attributes:
        broken: raises `GroupBroken` once a member is lost; else never done.
    """

    def __init__(self, group: TorchGroup, deliver: Deliver, model_bytes: int):
        self._group, self._deliver = group, deliver
        self._most_bytes, self._pool = largest_message(model_bytes), BufferPool(IDLE_BYTES)
        self._queues: dict[int, SimpleQueue[Outgoing | None]] = {
            rank: SimpleQueue() for rank in range(group.size) if rank != group.rank}
        self._unsent = dict.fromkeys(self._queues, 0)
        self._threads: list[threading.Thread] = []
        self._drained = self._closing = False
        self.broken: Future[None] = Future()

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to send and to receive."""
        self._loop = asyncio.get_running_loop()
        for rank in self._queues:
            for work in (self._say, self._hear):
                thread = threading.Thread(target=self._guarded, args=(work, rank), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _is_broken(self) -> bool:
        return self.broken.done() and not self.broken.cancelled()    # cancelled: nobody wants to know any more

    async def drain(self, within_s: float) -> None:
        """Wait until everything was sent, or for so many seconds: the run is over."""
        self._drained = True
        until = self._loop.time() + within_s
        while any(self._unsent.values()) and self._loop.time() < until and not self._is_broken():
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Say goodbye to the others, and wait for theirs; where the run has failed, let theirs fail, too."""
        self._closing, until = True, self._loop.time() + FAREWELL_S
        for queue in self._queues.values():
            queue.put(None)
        cut = False
        while any(thread.is_alive() for thread in self._threads) and self._loop.time() < until:
            if not cut and (self._is_broken() or not self._drained):
                cut = True
                await self._loop.run_in_executor(None, self._group.cut)
            await asyncio.sleep(0.01)

    # ---- as the peer sees it ----------------------------------------------------------------------------------------

    def post(self, to: int, envelope: Envelope) -> "asyncio.Future[bool]":
        """Send an envelope; the future becomes True when the other end has taken it, False when it never will."""
        taken: asyncio.Future[bool] = self._loop.create_future()
        if self._closing or self._is_broken() or self._unsent[to] >= MOST_QUEUED:
            taken.set_result(False)
            return taken
        self._unsent[to] += 1
        vectors = [_as_bytes(tensor) for tensor in envelope.data.values() if tensor.numel()]
        self._queues[to].put((frame(envelope).head, vectors, taken))
        return taken

    def all_reduce(
        self, peer: Peer, vector: Tensor | Packed, tag: str, round: int, weight: float, began: float
    ) -> "asyncio.Future[Reduced]":
        """Begin a mean over all members, of messages around a ring."""
        return peer.means.start(vector, tag, round, weight)

    def observe(self, peer: Peer, tag: str, round: int) -> "asyncio.Future[Reduced]":
        """Refuse: nobody joins such a group later.

        Raises:
            PeerLost: always; what this peer waits for will never come.
        """
        raise PeerLost(peer.rank)

    def state_dict(self, rank: int) -> dict[str, Any]:
        """Return nothing: links remember nothing."""
        return {}

    def load_state_dict(self, rank: int, state: Mapping[str, Any]) -> None:
        """Nothing was remembered."""

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[int], None], rank: int) -> None:
        try:
            work(rank)
        except (RuntimeError, MalformedFrame) as error:    # torch's errors are RuntimeErrors
            # Without the line of gloo's code before it, and its advice behind it.
            reason = re.sub(r"^\[[^]]*] ", "", str(error)).split(". ")[0].strip().removesuffix(".")
            with suppress(InvalidStateError):    # it is broken already, or nobody wants to know any more
                self.broken.set_exception(GroupBroken(rank, reason))

    def _say(self, to: int) -> None:
        heads, lane, device = self._group.heads, self._group.lanes[self._group.rank, to], self._group.device
        while (outgoing := self._queues[to].get()) is not None:
            head, vectors, taken = outgoing
            dist.send(torch.tensor([len(head)]), to, group=heads)
            dist.send(torch.frombuffer(bytearray(head), dtype=torch.uint8), to, group=heads)
            for vector in vectors:
                dist.send(vector.to(device), to, group=lane)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._loop.call_soon_threadsafe(self._sent, to, taken)
            del outgoing, vectors
        dist.send(torch.tensor([GOODBYE]), to, group=heads)

    def _sent(self, to: int, taken: "asyncio.Future[bool]") -> None:
        self._unsent[to] -= 1
        if not taken.done():
            taken.set_result(True)

    def _hear(self, source: int) -> None:
        heads, length = self._group.heads, torch.empty(1, dtype=torch.int64)
        while True:
            dist.recv(length, source, group=heads)
            size = int(length)
            if size == GOODBYE:
                return
            if not 0 < size <= MAX_HEAD_BYTES:
                raise MalformedFrame(f"a head of {size} bytes was announced")
            head = torch.empty(size, dtype=torch.uint8)
            dist.recv(head, source, group=heads)
            envelope = self._receive_body(Arriving(head.numpy().tobytes()), source)
            if envelope.source != source:
                raise MalformedFrame(f"it sent a message of peer {envelope.source}")
            self._loop.call_soon_threadsafe(self._deliver, envelope)

    def _receive_body(self, arriving: Arriving, source: int) -> Envelope:
        lane, device = self._group.lanes[source, self._group.rank], self._group.device
        if arriving.size > self._most_bytes:
            raise MalformedFrame(f"a message of {arriving.size} bytes came, but {self._most_bytes} are allowed")
        body = self._pool.take(arriving.size)
        for start, num_bytes in arriving.spans:
            target = torch.from_numpy(body[start:start + num_bytes])
            if device.type == "cpu":
                dist.recv(target, source, group=lane)
            else:
                landed = torch.empty(num_bytes, dtype=torch.uint8, device=device)
                dist.recv(landed, source, group=lane)
                target.copy_(landed)
        return arriving.build(body)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
