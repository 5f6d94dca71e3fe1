"""The same app in Flower's own simulation (Ray) and in ours."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from fedcore.export import export_app
from fedcore.runs import Run
from fedcore.simulations.flower_app import simulate_app
from fedcore.simulations.run import simulate

APP = Path(__file__).parents[2] / "examples" / "flower_app"
BIN = Path(sys.executable).parent
NUM_NODES, ROUNDS = 4, 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def superlink(tmp_path):
    """Start a SuperLink that simulates; returns the environment in which `flwr run` finds it."""
    port, home = free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f"""
[superlink]
default = "test"
[superlink.test]
address = "127.0.0.1:{port}"
insecure = true
""")
    environment = {
        **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "PYTHONPATH": str(APP.parents[1]),
    }
    command = [BIN / "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
               "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    with open(tmp_path / "superlink.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "superlink.log").read_text()
            time.sleep(0.3)
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def is_up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None or not (BIN / "flwr").exists(), reason="Flower's simulation needs Ray")
def test_fedavg_ends_in_the_same_model_in_flowers_simulation_and_in_ours(superlink, tmp_path):
    app, model = tmp_path / "app", tmp_path / "ray.pt"
    shutil.copytree(APP, app)
    federation = f"num-supernodes={NUM_NODES} client-resources-num-cpus=1 init-args-num-cpus=1"
    command = [BIN / "flwr", "run", str(app), "--stream", "--federation-config", federation,
               "-c", f'num-server-rounds={ROUNDS} save-model="{model}"']
    flower = subprocess.run(command, env=superlink, capture_output=True, text=True, timeout=240)
    assert model.exists(), flower.stdout[-3000:] + flower.stderr[-3000:]
    theirs = torch.load(model, weights_only=True)
    run = simulate_app(app, num_nodes=NUM_NODES, out=tmp_path / "run", overrides=[f"num-server-rounds={ROUNDS}"])
    ours = run.model()
    assert run.summary["client_updates"] == ROUNDS * NUM_NODES
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.allclose(values, theirs[name], rtol=0, atol=1e-6), name
    # Training moved the model much further than that.
    assert run.summary["final_accuracy"] > 0.85


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None or not (BIN / "flwr").exists(), reason="Flower's simulation needs Ray")
def test_an_exported_experiment_ends_in_the_same_model_in_flowers_simulation(superlink, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({
        "task": "digits", "strategy": "fedavg", "clients": {"count": 2}, "train": {"local_steps": 5, "lr": 0.1},
        "stop": {"rounds": 3},
    }))
    app, out = export_app(file, tmp_path / "app"), tmp_path / "ray"
    federation = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=1"
    command = [BIN / "flwr", "run", str(app), "--stream", "--federation-config", federation, "-c", f'out="{out}"']
    flower = subprocess.run(command, env=superlink, capture_output=True, text=True, timeout=240)
    assert (out / "summary.json").exists(), flower.stdout[-3000:] + flower.stderr[-3000:]
    theirs, ours = Run(out), simulate(file, out=tmp_path / "virtual")
    assert theirs.summary["client_updates"] == ours.summary["client_updates"] == 6
    for name, values in ours.model().items():
        assert torch.allclose(values, theirs.model()[name], rtol=0, atol=1e-6), name
