"""Starts `fedcore` commands as processes of their own, in milliseconds: all are forked from one that has imported.

    python nursery.py    # then one JSON object per line on stdin: {"start": [arguments], "log": path} or {"ended": pid}

It answers each with one line: {"pid": number}, or {"status": exit status, minus the signal, or null while it runs}.
`spawn` instead of `start` makes a process that has imported nothing yet.
"""
import json
import os
import select
import subprocess
import sys
import time

import torch  # noqa: F401 (what takes long to import is imported here, once)
from delivery import misbehave  # a neighbour, and what it imports

import fedcore.deploy_commands  # noqa: F401
import fedcore.simulations.run  # noqa: F401
from fedcore.cli import main


def start(arguments: list[str], log: str, folder: str, jump_s: float, repeats: bool) -> int:
    """Fork a process that runs a command, with a wall clock that is off by so many seconds; returns its number.

    Args:
        repeats: of a client: its replies come late, twice, and again.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, target)
        if jump_s:
            right = time.time
            time.time = lambda: right() + jump_s
        if repeats:
            misbehave()
        sys.argv = ["fedcore", *arguments]
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Answer requests until stdin closes."""
    ended: dict[int, int] = {}
    spawned: list[subprocess.Popen[bytes]] = []
    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
        if not ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        buffer += data
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            request = json.loads(line)
            if "start" in request:
                answer = {"pid": start(request["start"], request["log"], request["folder"], request["jump_s"],
                                       request["repeats"])}
            elif "spawn" in request:
                command = [sys.executable, "-m", "fedcore", *request["spawn"]]
                with open(request["log"], "ab") as log:
                    started = subprocess.Popen(command, cwd=request["folder"], stdin=subprocess.DEVNULL, stdout=log,
                                               stderr=log, start_new_session=True)
                spawned.append(started)    # it is waited for below, like the others
                answer = {"pid": started.pid}
            else:
                answer = {"status": ended.get(request["ended"])}
            # Numbers come again after some ten thousand processes: this one is not that which ended.
            ended.pop(answer.get("pid") or 0, None)
            os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
