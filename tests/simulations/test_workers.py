"""Worker processes: the same results from any number of them, and a named error when one dies."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.errors import BadInput, WorkerDied
from fedcore.options import RunOptions, StopRule
from fedcore.recorder import Recorder
from fedcore.simulations.grid import VirtualGrid
from fedcore.simulations.workers import WorkerPool, receive, send
from tests.support import Adding, Federation, TableDevices, Toy, files_of, train_request, vector_model

ROOT = Path(__file__).parents[2]
OPTIONS = RunOptions(seed=3, stop=StopRule(client_updates=12))


def result(app, folder, workers):
    run = Federation(Adding(), options=OPTIONS, app=app, recorder=Recorder(folder), grid={"workers": workers}).run()
    return run.hub.model.params, files_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("lazy", "counts"), [(True, (1, 2)), (False, (2,))])
def test_results_do_not_depend_on_the_number_of_workers(tmp_path, lazy, counts):
    app = Toy(lazy=lazy, keeps_state=True, fails=(1,), num_examples=(4, 5, 6))
    params, files = result(app, tmp_path / "0", 0)
    for workers in counts:
        other_params, other_files = result(app, tmp_path / str(workers), workers)
        assert torch.equal(other_params, params)
        assert {name: _without_traces(body) for name, body in other_files.items()} == {
            name: _without_traces(body) for name, body in files.items()
        }


def _without_traces(body):
    """Drop tracebacks: they name the line that called the client, which is another one in a worker."""
    return [line for line in body.splitlines() if b"Traceback" not in line]


def test_a_worker_that_is_killed_is_a_named_error_and_not_a_hang():
    grid = VirtualGrid(Toy(), 3, workers=1)
    (process,) = grid.engine.labour.pool._processes
    ids = grid.push_messages([train_request(vector_model(), 1000 + node) for node in range(3)])
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="ran out of memory"):
        while True:
            grid.pull_messages(ids)
    grid.close()


class SelfKilling(Toy):
    """A client whose process is killed while it trains."""

    def train(self, message, context):
        os.kill(os.getpid(), signal.SIGKILL)


class Unpicklable(Toy):
    """A client whose reply cannot leave its process."""

    def train(self, message, context):
        class Local(RecordDict):
            pass

        return Message(Local(), reply_to=message)


def refuses_elsewhere(pid):
    if os.getpid() != pid:
        raise RuntimeError("not in this process")
    return Toy()()


def only_reply(app):
    grid = VirtualGrid(app, 1, workers=1, devices=TableDevices([1.0]))
    try:
        (reply,) = grid.send_and_receive([train_request(vector_model())])
        return reply
    finally:
        grid.close()


@pytest.mark.slow
def test_every_way_a_worker_can_fail_has_its_words():
    with pytest.raises(WorkerDied, match="ended while computing"):
        only_reply(SelfKilling())
    with pytest.raises(WorkerDied, match="(?s)could not be built there.*not in this process"):
        only_reply(partial(refuses_elsewhere, os.getpid()))
    reply = only_reply(Unpicklable())
    assert reply.has_error() and "cannot be sent" in reply.error.reason


def test_an_app_that_cannot_be_sent_is_bad_input_before_anything_starts():
    with pytest.raises(BadInput, match="cannot be built in a worker process.*workers=0"):
        VirtualGrid(lambda: Toy()(), 1, workers=1)
    with pytest.raises(BadInput, match="A ClientApp cannot be sent.*function that makes it"):
        VirtualGrid(ClientApp(), 1, workers=1)


def test_a_job_that_cannot_be_sent_is_an_error_of_its_own_and_not_a_hang():
    pool = WorkerPool(Toy(), 1)
    try:
        with pytest.raises(WorkerDied, match="cannot be sent"):
            pool.submit((lambda: 0, None, None), 0.0).result(timeout=60)
    finally:
        pool.close()


def test_closing_ends_the_processes_even_with_work_left():
    pool = WorkerPool(Toy(), 2)
    futures = [pool.submit((lambda: 0, None, None), float(at)) for at in range(50)]
    processes = [psutil.Process(process.pid) for process in pool._processes]
    pool.close()
    assert not any(process.is_running() for process in processes)
    assert not any(thread.is_alive() for thread in pool._threads)
    assert len(futures) == 50


PARENT = """
import sys, time
from fedcore.simulations.workers import WorkerPool
from tests.support import Toy
pool = WorkerPool(Toy(), 1)
print(pool._processes[0].pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_do_not_outlive_a_parent_that_was_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    for _ in range(600):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there a minute later")


def test_values_travel_over_a_link_with_their_arrays_beside_them():
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    message = train_request(vector_model(1000), **{"local-steps": 3})
    send(ours, (message, {"a": [1, None]}, torch.zeros(0).numpy()))
    found, plain, empty = receive(theirs)
    assert found.content == message.content and plain == {"a": [1, None]} and empty.shape == (0,)
    assert found.content["arrays"].model.params.numpy().flags.writeable, "memory of its own"
