"""Whole runs with compressed updates end in the same bits when they are broken off, or computed by other processes."""
import pytest
import torch

import fedcore

EXPERIMENT = {
    "task": "digits", "clients": {"count": 5, "partition": {"name": "classes", "classes_per_client": 4}},
    "train": {"lr": 0.1, "local_steps": 3}, "stop": {"seconds": 8}, "evaluate": {"every": 5},
    "compression": {"name": "rand_k", "fraction": 0.05}, "round": {"deadline_s": 2.0, "min_replies_share": 0.5},
    "simulation": {
        "devices": {"seconds_per_step": {"name": "exponential", "mean": 0.1}, "jitter": 0.2},
        "network": {"latency_s": 0.05, "uplink_mbps": 0.1, "downlink_mbps": 5},
        "failures": {"crash_probability": 0.05, "reply_loss": 0.05},
    },
}


def run(tmp_path, name, strategy, **options):
    overrides = ["checkpoint.every_s=0"]
    return fedcore.simulate({**EXPERIMENT, "strategy": strategy}, out=tmp_path / name, **options, overrides=overrides)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [
    "fedavg", "fedbuff", {"name": "fedcompass", "min_local_steps": 2, "max_local_steps": 6},
], ids=str)
def test_compressed_runs_resume_to_the_same_bits_with_any_workers(tmp_path, strategy):
    whole = run(tmp_path, "whole", strategy)
    assert whole.summary["failures"] + whole.summary["lost"] > 0 and whole.summary["refused"] == 0
    fedcore.simulate({**EXPERIMENT, "strategy": strategy, "stop": {"seconds": 4}}, out=tmp_path / "parts",
                     overrides=["checkpoint.every_s=0"])
    resumed = fedcore.simulate(resume=tmp_path / "parts", overrides=["stop.seconds=8"], workers=1)
    for name, values in whole.model().items():
        assert torch.equal(values, resumed.model()[name])
    assert whole.summary["bytes_up"] == resumed.summary["bytes_up"]
