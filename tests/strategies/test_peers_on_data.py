"""Every strategy without a server trains on images and on text, from files; DADAO says why it does not."""
import numpy as np
import pytest

from fedcore.errors import BadExperiment
from fedcore.peers.strategy import PeerStrategy
from fedcore.registry import names, resolve
from fedcore.simulations.run import simulate

INNER = {name: {"inner_steps": 2} for name in ("noloco", "diloco", "co2", "slowmo", "local_sgd")}
STRATEGIES = [name for name in names("strategies") if issubclass(resolve("strategies", name), PeerStrategy)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a tiny file of each kind, as the real ones are."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    arrays = {f"x_{part}": draw.integers(0, 256, (size, 28, 28), dtype=np.uint8)
              for part, size in (("train", 60), ("test", 10))}
    labels = {f"y_{part}": np.arange(len(arrays[f"x_{part}"]), dtype=np.uint8) % 10 for part in ("train", "test")}
    np.savez(folder / "images.npz", **arrays, **labels)
    (folder / "play.txt").write_text("\n\n".join(
        f"{speaker}:\n{' '.join(['to be or not to be'] * 12)}" for speaker in ("HAMLET", "OPHELIA", "GHOST") * 4))
    return {"mnist": folder / "images.npz", "shakespeare": folder / "play.txt"}


def experiment(name, task, path):
    return {"task": {"name": task, "path": str(path)}, "strategy": {"name": name, **INNER.get(name, {})},
            "clients": {"count": 3}, "stop": {"rounds": 2}, "train": {"lr": 0.05, "batch_size": 4},
            "evaluate": {"where": "server", "every": 30}}


@pytest.mark.parametrize("task", ["mnist", "shakespeare"])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "dadao"])
def test_peers_train_on_images_and_on_text(name, task, files, tmp_path):
    summary = simulate(experiment(name, task, files[task]), out=tmp_path / "run").summary
    assert summary["gradients"] >= 3 and summary["exchanges"] > 0 and summary["consensus_distance"] >= 0
    assert summary["final_loss"] is not None and np.isfinite(summary["final_loss"])


@pytest.mark.parametrize("task", ["mnist", "shakespeare"])
def test_dadao_refuses_what_is_not_strongly_convex(task, files, tmp_path):
    with pytest.raises(BadExperiment, match="strongly convex.*take a2cid2"):
        simulate(experiment("dadao", task, files[task]), out=tmp_path / "run")
