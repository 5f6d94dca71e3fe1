"""Whoever stops a script that simulates stops the script: the run is saved and ends well first."""
import signal

import pytest

import fedcore
from fedcore.runs import Run

EXPERIMENT = {"task": "digits", "strategy": "fedavg", "clients": {"count": 2}, "train": {"local_steps": 1},
              "stop": {"rounds": 6}}
PEERS = {**EXPERIMENT, "strategy": "noloco", "train": {"local_steps": 2}}


@pytest.fixture(autouse=True)
def listening():
    """Heed Ctrl-C: what a shell starts in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopping(number):
    """Return what sends this process a signal once the run has begun to move."""
    left = [1]

    def on_row(row):
        if row["event"] in ("update", "sync", "evaluate") and row.get("version", 1) and left:
            left.clear()
            signal.raise_signal(number)

    return on_row


@pytest.mark.parametrize("experiment", [EXPERIMENT, PEERS], ids=["fedavg", "noloco"])
def test_ctrl_c_ends_the_run_well_and_then_the_script_that_would_start_the_next(experiment, tmp_path):
    begun = []
    with pytest.raises(KeyboardInterrupt):
        for seed in range(3):
            begun.append(seed)
            fedcore.simulate({**experiment, "seed": seed}, out=tmp_path / str(seed), on_row=stopping(signal.SIGINT))
    assert begun == [0]
    stopped = Run(tmp_path / "0")
    assert stopped.summary["stop_reason"] == "interrupted" and (stopped.folder / "report.html").is_file()
    whole = fedcore.simulate({**experiment, "seed": 0}, out=tmp_path / "whole")
    resumed = fedcore.simulate(resume=stopped.folder)
    assert (resumed.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_a_callers_own_handler_of_a_signal_is_called_once_the_run_has_ended(tmp_path):
    heard, summary = [], tmp_path / "run" / "summary.json"
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(summary.is_file()))
    try:
        run = fedcore.simulate(EXPERIMENT, out=tmp_path / "run", on_row=stopping(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [True] and run.summary["stop_reason"] == "interrupted"
