"""Worker processes that compute clients' tasks.

A worker is a fresh Python process that builds the ClientApp by itself, so no lock, thread or random state of this
process reaches it. Arrays travel as raw buffers beside the pickled rest. Which worker computes a task, and when,
changes nothing in the result.
"""
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from fedcore.errors import BadInput, WorkerDied

# What pickle raises about an object that cannot leave its process.
NOT_SENDABLE = (pickle.PicklingError, AttributeError, TypeError)


def send(link: Connection, value: Any) -> None:
    """Send a value: the pickle, then each of its buffers as it lies in memory."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    link.send_bytes(pickle.dumps([len(view) for view in views]))
    link.send_bytes(body)
    for view in views:
        if len(view):
            link.send_bytes(view)


def receive(link: Connection) -> Any:
    """Receive what `send` sent; arrays lie in memory of their own."""
    sizes = pickle.loads(link.recv_bytes())
    body = link.recv_bytes()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if buffer:
            link.recv_bytes_into(buffer)
    return pickle.loads(body, buffers=buffers)


class WorkerPool:
    """A few worker processes, each computing one task at a time.

    Args:
        make_app: builds the ClientApp; pickled into each worker, so a module-level function or object.
        size: number of processes, at least 1.

    Raises:
        BadInput: `make_app` cannot be sent to another process.
    """

    def __init__(self, make_app: Any, size: int):
        try:
            recipe = pickle.dumps(make_app)
        except NOT_SENDABLE as error:
            raise BadInput(
                f"This client cannot be built in a worker process: {error}. Name its task in a file "
                "(module:Class), or run with workers=0."
            ) from error
        self.size = size
        self._jobs: queue.PriorityQueue[tuple[float, int, Any, Future[Any] | None]] = queue.PriorityQueue()
        self._count = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = [threading.Thread(target=self._serve, args=(self._start(recipe),), daemon=True)
                         for _ in range(size)]
        for thread in self._threads:
            thread.start()

    def _start(self, recipe: bytes) -> Connection:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER_COMMAND, str(theirs.fileno())]
        self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment))
        theirs.close()
        link = Connection(ours.detach())
        send(link, sys.path)
        send(link, recipe)
        return link

    def _serve(self, link: Connection) -> None:
        """Hand one worker its tasks, earliest first, until the pool closes."""
        problem: str | None = ""    # until the worker says that it could build the app
        while True:
            _, _, job, future = self._jobs.get()
            if future is None:
                link.close()
                return
            try:
                problem = receive(link) if problem == "" else problem
                if problem is None:
                    send(link, job)
                    future.set_result(receive(link))
                    continue
            except NOT_SENDABLE as error:
                future.set_exception(WorkerDied(f"A task cannot be sent to a worker process: {error}. Use workers=0."))
                continue
            except (EOFError, OSError) as error:
                kind = type(error).__name__
                problem = f"it ended while computing a client's task ({kind}); perhaps it ran out of memory"
            future.set_exception(WorkerDied(f"A worker process is of no use: {problem}"))

    def submit(self, job: tuple[Any, ...], wanted_at: float) -> "Future[Any]":
        """Compute a task `(message, info, state)`; those wanted earlier are computed first."""
        future: Future[Any] = Future()
        self._count += 1
        self._jobs.put((wanted_at, self._count, job, future))
        return future

    def close(self) -> None:
        """End the processes; nobody wants what they are computing any more."""
        for _ in self._threads:
            self._jobs.put((float("-inf"), self._count + 1, None, None))    # before any task that still waits
            self._count += 1
        for process in self._processes:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join()


WORKER_COMMAND = """
import sys
from multiprocessing.connection import Connection
import pickle
link = Connection(int(sys.argv[1]))
pickle.loads(link.recv_bytes())
sys.path[:] = pickle.loads(link.recv_bytes())
from fedcore.simulations.workers import serve
serve(link)
"""


def serve(link: Connection) -> None:
    """Compute tasks that come over a link until it closes (the life of a worker process)."""
    import signal

    import torch
    from flwr.app import Error

    from fedcore.flower import adopt_identity
    from fedcore.simulations.execute import APP_RAISED, execute
    from fedcore.simulations.memory import exempt_what_is_loaded

    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the parent, which ends the run cleanly
    torch.set_num_threads(1)
    adopt_identity()
    try:
        app = pickle.loads(receive(link))()
        exempt_what_is_loaded()
    except (Exception, SystemExit):  # whatever the user's code raises, the parent shows it
        send(link, f"the ClientApp could not be built there:\n{traceback.format_exc()}")
        return
    send(link, None)
    while True:
        try:
            message, info, state = receive(link)
        except (EOFError, OSError):
            return
        outcome = execute(app, message, info, state)
        try:
            send(link, outcome)
        except NOT_SENDABLE as error:
            send(link, (Error(APP_RAISED, f"the ClientApp's reply cannot be sent: {error}"), state))
