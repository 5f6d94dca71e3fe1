import json
import math

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fedcore.errors import BadInput
from fedcore.runs import UNFINISHED, DamagedRun, NotARun, Run

EVALUATIONS = [(1.0, 2.0, 0.4), (2.0, None, 0.7), (3.0, 0.5, 0.6), (4.0, 0.3, 0.9)]     # time, loss, accuracy


@pytest.fixture
def folder(tmp_path):
    rows = [{"time_s": 0.0, "event": "start", "version": 0}]
    for version, (at, loss, accuracy) in enumerate(EVALUATIONS, start=1):
        counts = {"version": version, "client_updates": 2 * version, "client_steps": 20 * version,
                  "bytes_up": 100 * version, "bytes_down": 200 * version}
        rows.append({"time_s": at, "event": "update", **counts, "nodes": [0, 1], "staleness": [0, 1]})
        rows.append({"time_s": at, "event": "evaluate", "loss": loss, "accuracy": accuracy, **counts})
    rows.append({"time_s": 4.5, "event": "failure", "node": 1, "code": 2, "reason": "it broke"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(
        {"strategy": {"name": "fedavg"}, "task": "digits", "seed": 3, "stop": {"target": {"accuracy": 0.65}}}))
    return tmp_path


def test_a_curve_pairs_values_with_any_counter_of_the_same_row(folder):
    run = Run(folder)
    assert run.curve("accuracy") == ([1.0, 2.0, 3.0, 4.0], [0.4, 0.7, 0.6, 0.9])
    assert run.curve("accuracy", over="client_updates")[0] == [2.0, 4.0, 6.0, 8.0]
    assert run.curve("accuracy", over="bytes")[0] == [300.0, 600.0, 900.0, 1200.0]
    assert run.curve("perplexity") == ([], [])


def test_a_value_that_was_not_finite_is_a_gap_in_the_curve(folder):
    times, values = Run(folder).curve("loss")
    assert times == [1.0, 2.0, 3.0, 4.0]
    assert math.isnan(values[1])
    assert values[2:] == [0.5, 0.3]


def test_changing_a_curve_leaves_the_run_as_it_is(folder):
    run = Run(folder)
    run.curve("accuracy")[1].clear()
    assert len(run.curve("accuracy")[1]) == 4


def test_time_to_a_target_is_the_first_evaluation_that_meets_it(folder):
    run = Run(folder)
    assert run.time_to("accuracy", 0.65) == 2.0
    assert run.time_to("accuracy", 0.9) == 4.0
    assert run.time_to("accuracy", 0.95) is None


def test_losses_are_met_from_above_and_nan_meets_nothing(folder):
    assert Run(folder).time_to("loss", 0.5) == 3.0


def test_the_cost_of_a_target_is_read_from_the_same_row(folder):
    run = Run(folder)
    assert run.cost_to("accuracy", 0.65, "client_steps") == 40.0
    assert run.cost_to("accuracy", 0.65, "bytes") == 600.0


def test_a_run_without_summary_is_summed_up_from_its_rows(folder):
    run = Run(folder)
    assert not run.finished
    assert run.summary["stop_reason"] == UNFINISHED
    assert (run.summary["strategy"], run.summary["task"], run.summary["seed"]) == ("fedavg", "digits", 3)
    assert (run.summary["versions"], run.summary["client_updates"], run.summary["bytes_up"]) == (4, 8, 400)
    assert (run.summary["best_accuracy"], run.summary["final_loss"]) == (0.9, 0.3)
    assert (run.summary["time_to_target_s"], run.summary["time_s"], run.summary["failures"]) == (2.0, 4.5, 1)


def test_the_summary_that_the_run_wrote_wins(folder):
    (folder / "summary.json").write_text('{"best_accuracy": 0.5}')
    assert Run(folder).finished
    assert Run(folder).summary == {"best_accuracy": 0.5}


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_half_a_line_at_the_end_is_what_a_killed_run_leaves(folder, cut):
    path = folder / "metrics.jsonl"
    whole = len(Run(folder).metrics)
    path.write_bytes(path.read_bytes()[:-1 - cut])
    assert len(Run(folder).metrics) == whole - 1


def test_half_a_character_at_the_end_is_dropped_with_its_line(folder):
    path = folder / "metrics.jsonl"
    whole = len(Run(folder).metrics)
    path.write_bytes(path.read_bytes() + '{"reason": "é'.encode()[:-1])
    assert len(Run(folder).metrics) == whole


@pytest.mark.parametrize("name, content, word", [
    ("metrics.jsonl", '{"event": "start"}\n{"ev\n{"event": "stop"}\n', "line 2"),
    ("metrics.jsonl", '{"event": "start"}\n7\n', "line 2"),
    ("summary.json", '{"strategy": ', "not JSON"),
    ("summary.json", "[1]", "object"),
    ("clients.json", '{"node": 1}', "list of objects"),
    ("config.yaml", "a: [1", "not YAML"),
    ("config.yaml", "just words", "no settings"),
])
def test_a_damaged_file_is_named_with_what_is_wrong(folder, name, content, word):
    (folder / name).write_text(content)
    run = Run(folder)
    with pytest.raises(DamagedRun, match=word) as caught:
        _ = run.metrics, run.summary, run.clients, run.config
    assert name in str(caught.value)
    assert isinstance(caught.value, BadInput)


def test_bytes_that_are_not_text_are_a_damaged_file(folder):
    (folder / "timeline.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    with pytest.raises(DamagedRun, match="timeline.jsonl"):
        _ = Run(folder).timeline


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_folder_that_no_run_wrote_is_refused_with_advice(tmp_path, make):
    path = tmp_path / "elsewhere"
    make(path)
    with pytest.raises(NotARun, match="fedcore simulate") as caught:
        Run(path)
    assert isinstance(caught.value, BadInput)


def test_missing_timeline_and_clients_are_empty(folder):
    assert Run(folder).timeline == []
    assert Run(folder).clients == []


def test_the_model_is_read_by_tensor_name(folder):
    save_file({"weight": torch.arange(3.0)}, folder / "model.safetensors")
    assert torch.equal(Run(folder).model()["weight"], torch.arange(3.0))


def test_a_missing_or_broken_model_is_a_named_error(folder):
    with pytest.raises(DamagedRun, match="does not exist"):
        Run(folder).model()
    (folder / "model.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(DamagedRun, match="model.safetensors"):
        Run(folder).model()
