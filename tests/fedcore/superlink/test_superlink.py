"""An exported app on a real SuperLink with two SuperNodes: the same strategies, the same clients, the same figures."""
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fedcore.export import export_app
from fedcore.runs import Run
from fedcore.simulations.run import simulate

BIN = Path(sys.executable).parent
EXPERIMENT = {
    "task": "digits", "clients": {"count": 2}, "train": {"local_steps": 5, "lr": 0.1}, "stop": {"rounds": 3},
    "seed": 4,
}
ECONTROL = {"name": "econtrol", "compressor": {"name": "top_k", "fraction": 0.1}, "init": "compressed"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600),
              pytest.mark.skipif(not (BIN / "flwr").exists(), reason="Flower's commands are absent")]


def exported(tmp_path: Path, **settings: object) -> tuple[Path, Path]:
    """Write an experiment and its app; returns both."""
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT | settings))
    return file, export_app(file, tmp_path / "app")


def test_fedavg_ends_where_it_ends_in_virtual_time(federation, tmp_path):
    file, app = exported(tmp_path, strategy="fedavg")
    said = federation.run(app, "-c", f'out="{tmp_path / "run"}"')
    assert (tmp_path / "run" / "summary.json").is_file(), said[-3000:]
    theirs, ours = Run(tmp_path / "run"), simulate(file, out=tmp_path / "virtual")
    assert theirs.summary["engine"] == "superlink"
    assert (theirs.summary["versions"], theirs.summary["client_updates"]) == (3, 6)
    for name, values in ours.model().items():
        assert torch.allclose(values, theirs.model()[name], rtol=0, atol=1e-6), name
    assert theirs.summary["final_accuracy"] == ours.summary["final_accuracy"] > 0.5
    assert (tmp_path / "run" / "report.html").is_file()


def test_peers_talk_to_each_other_and_end_with_the_bits_of_virtual_time(federation, tmp_path):
    """Every segment has processes of its own: what a peer must not forget is in Flower's `Context.state`."""
    file, app = exported(tmp_path, strategy={"name": "noloco", "inner_steps": 5}, stop={"rounds": 4},
                         peers={"segment": 2})
    said = federation.run(app, "-c", f'out="{tmp_path / "run"}"')
    assert (tmp_path / "run" / "summary.json").is_file(), said[-3000:]
    theirs, ours = Run(tmp_path / "run"), simulate(file, out=tmp_path / "virtual")
    assert all(torch.equal(values, theirs.model()[name]) for name, values in ours.model().items())
    assert [row["version"] for row in theirs.rows("evaluate")] == [0, 2, 4]
    assert theirs.summary["exchanges"] == ours.summary["exchanges"] == 8


def test_econtrol_has_the_figures_of_virtual_time_and_takes_a_node_in_anew_that_was_started_again(
    federation, tmp_path
):
    """A SuperNode that starts again has forgotten e and h: it begins as at first, and the other goes on."""
    file, app = exported(tmp_path, strategy=ECONTROL, stop={"rounds": 4})
    folder = tmp_path / "run"
    running = federation.start(app, "-c", f'out="{folder}"')
    while federation.said(1).count("Receiving: train.gradient message") < 2:
        assert running.poll() is None
        time.sleep(0.1)
    federation.start_node(1)
    said = running.communicate(timeout=500)[0]
    assert (folder / "summary.json").is_file(), said[-3000:]
    theirs, ours = Run(folder), simulate(file, out=tmp_path / "virtual")
    assert theirs.summary["engine"] == "superlink" and (folder / "report.html").is_file()
    # Until the node went, the same models, and therefore the same answers.
    for row, virtual in zip(theirs.rows("evaluate")[:2], ours.rows("evaluate")[:2], strict=True):
        assert (row["version"], row["accuracy"]) == (virtual["version"], virtual["accuracy"])
        assert row["loss"] == pytest.approx(virtual["loss"], abs=1e-6)
    sent = {node: [task["bytes_up"] for task in theirs.timeline if (task["node"], task["outcome"]) == (node, "ok")]
            for node in (0, 1)}
    begins, later = sent[0][:2]
    assert begins > 1.5 * later and sent[0] == [begins, later, later, later]
    # Its second answer may have come before it went.
    again = sent[1].index(begins, 1)
    assert sent[1] == [begins if index in (0, again) else later for index in range(len(sent[1]))]
    assert (theirs.summary["versions"], theirs.summary["h_mismatch"]) == (4, 0)


# The last one: it ends while clients still work, and Flower's SuperNode then loses a message of the next run at times.
def test_fedcompass_finishes_and_settings_can_be_changed_at_the_start_of_a_run(federation, tmp_path):
    _, app = exported(tmp_path, strategy={"name": "fedcompass", "min_local_steps": 5, "max_local_steps": 10})
    said = federation.run(app, "-c", f'out="{tmp_path / "run"}" set="train.lr=0.2 seed=5"')
    assert (tmp_path / "run" / "summary.json").is_file(), said[-3000:]
    run = Run(tmp_path / "run")
    assert (run.config["train"]["lr"], run.config["seed"]) == (0.2, 5)
    assert run.summary["stop_reason"] == "rounds"
    assert run.summary["client_updates"] >= 6
    assert run.summary["final_accuracy"] > 0.5
    assert [client["num_examples"] > 100 for client in run.clients] == [True, True]
