"""One server and five clients, each a process: every strategy that has a server ends its run on the wall clock."""
import json

import pytest
from safetensors.torch import load_file

from fedcore.peers.strategy import PeerStrategy
from fedcore.registry import names, resolve

CLIENTS = 5
PRIVATE = {"epsilon": 8.0, "delta": 1e-5, "clip_gradient": 1.0}
DP = {"strategy": "fedavg", "noise_multiplier": 0.1, "num_sampled_clients": CLIENTS}
QUERIES = {"directions": 2, "local_iterations": 2}
SETTINGS = {
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "bulyan": {"num_malicious_nodes": 0},
    "fedcompass": {"min_local_steps": 2, "max_local_steps": 6},
    "qfedavg": {"client_learning_rate": 0.1, "train_loss_key": "loss"},
    "diff2": PRIVATE, "dp_gd": PRIVATE, "dp_sgd": {**PRIVATE, "sample_rate": 0.5}, "dp_srm": PRIVATE,
    "dp_server_fixed_clipping": {**DP, "clipping_norm": 1.0},
    "dp_client_fixed_clipping": {**DP, "clipping_norm": 1.0},
    "dp_server_adaptive_clipping": DP, "dp_client_adaptive_clipping": DP,
    **dict.fromkeys(("fedzo", "fedprox_zo", "scaffold_zo_1", "scaffold_zo_2"), QUERIES),
    "fzoos": {"local_iterations": 2, "features": 20, "nearest": 6, "feature_queries": 8, "initial_queries": 3,
              "active_queries": 1, "active_candidates": 3, "end_queries": 2, "end_candidates": 4, "memory": 40},
}
STRATEGIES = [name for name in names("strategies") if not issubclass(resolve("strategies", name), PeerStrategy)]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_server_and_five_clients_finish(machines, tmp_path, name):
    only_evaluates = getattr(resolve("strategies", name), "needs_black_box", False)
    machines.write({
        "task": {"name": "blackbox_quadratics", "dimension": 4} if only_evaluates else "digits",
        "strategy": {"name": name, **SETTINGS.get(name, {})}, "clients": {"count": CLIENTS}, "stop": {"rounds": 2},
        "train": {"lr": 0.05, "local_steps": 2, "dtype": "float64" if only_evaluates else "float32"},
        "evaluate": {"where": "server"},
    })
    server, clients = machines.server(), machines.clients(CLIENTS)
    assert machines.wait(server) == 0, machines.said(server)
    assert machines.wait_all(clients) == [0] * CLIENTS
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stop_reason"] == "rounds" and summary["versions"] >= 2 and summary["refused"] == 0
    assert all(values.isfinite().all() for values in load_file(tmp_path / "run" / "model.safetensors").values())
