# %% [markdown]
# # Everything the commands do is a Python call
# Open this file in an editor that knows `# %%` cells (VS Code, PyCharm, Jupyter with Jupytext), or run it as it is:
# `python examples/python_api/uneven_digits.py`

# %%
import tempfile
from pathlib import Path

import fedcore
from fedcore.report import write_comparison

folder = Path(tempfile.mkdtemp(prefix="fedcore-"))

# %% [markdown]
# An experiment is the same mapping that a YAML file would hold.

# %%
experiment = {
    "task": "digits",
    "clients": {"count": 10, "partition": {"name": "dirichlet", "alpha": 0.3}},
    "train": {"lr": 0.05, "local_steps": 50},
    "stop": {"seconds": 600, "target": {"accuracy": 0.93}},
    "simulation": {
        "devices": {"seconds_per_step": {"name": "exponential", "mean": 0.1}},
        "network": {"latency_s": 0.05, "uplink_mbps": 20},
    },
}
strategies = {
    "fedavg": "fedavg",
    "fedcompass": {"name": "fedcompass", "min_local_steps": 20, "max_local_steps": 50},
}
runs = {
    name: fedcore.simulate({**experiment, "strategy": strategy}, out=folder / name)
    for name, strategy in strategies.items()
}

# %% [markdown]
# A run knows its summary, its metrics and its model.

# %%
for name, run in runs.items():
    summary = run.summary
    print(f"{name:11s} {summary['stop_reason']:8s} at {summary['time_s']:6.1f} virtual s, "
          f"best accuracy {summary['best_accuracy']:.3f}, {summary['client_updates']} client updates")

# %%
evaluations = [row for row in runs["fedcompass"].metrics if row["event"] == "evaluate"]
print("first and last evaluation:", evaluations[0]["accuracy"], evaluations[-1]["accuracy"])
weights = runs["fedcompass"].model()
print("model:", {tensor_name: tuple(tensor.shape) for tensor_name, tensor in weights.items()})

# %%
print("side by side:", write_comparison([run.folder for run in runs.values()], folder / "comparison.html"))
