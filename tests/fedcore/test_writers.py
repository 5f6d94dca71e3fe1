import sys

import pytest

from fedcore.writers import MissingExtra, build_writer

ROWS = [{"time_s": 0.0, "event": "start", "version": 0, "num_params": 10},
        {"time_s": 1.5, "event": "update", "version": 1, "client_updates": 2, "nodes": [0, 1], "staleness": [0, 1]},
        {"time_s": 1.5, "event": "evaluate", "version": 1, "where": "server", "loss": 0.5, "accuracy": 0.75},
        {"time_s": 1.6, "event": "evaluate", "version": 2, "where": "server", "loss": None, "accuracy": 0.8},
        {"time_s": 2.0, "event": "failure", "version": 2, "node": 3, "code": 2, "reason": "it broke"},
        {"time_s": 2.0, "event": "stop", "version": 2, "reason": "target"}]


def test_a_missing_extra_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedcore\[tensorboard\]'"):
        build_writer("tensorboard", tmp_path)


def test_tensorboard_reads_back_what_was_measured(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="the extra `tensorboard` is not installed")
    write = build_writer("tensorboard", tmp_path)
    for row in ROWS:
        write(row)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    accuracies = [(event.step, round(event.value, 6)) for event in events.Scalars("evaluate/accuracy")]
    assert accuracies == [(1, 0.75), (2, 0.8)]
    assert [event.step for event in events.Scalars("evaluate/loss")] == [1]
    assert events.Scalars("update/mean_staleness")[0].value == 0.5
    assert events.Scalars("evaluate/virtual_time_s")[-1].value == pytest.approx(1.6)
