"""What the README says to type does what the README says."""
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fedcore

ROOT = Path(__file__).parents[2]
EXPERIMENT = ROOT / "examples" / "two_machines" / "experiment.yaml"


def block_under(heading: str) -> list[str]:
    """Return the lines of the first code block under a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}$.*?```bash\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].strip().splitlines()


@pytest.mark.slow
def test_the_five_lines_for_separate_machines_reach_the_accuracy_of_the_simulation(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = block_under("On separate machines")
    assert len(lines) == 5
    script = "\n".join([*lines, "wait"]).replace("examples/two_machines/experiment.yaml", str(EXPERIMENT))
    script = script.replace("fedcore server", f"fedcore server --listen 127.0.0.1:{port}").replace("9400", str(port))
    script = re.sub(r"\bfedcore (?=[a-z])", f"{sys.executable} -m fedcore ", script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    simulated = fedcore.simulate(EXPERIMENT, out=tmp_path / "simulated").summary
    assert summary["final_accuracy"] == simulated["final_accuracy"] > 0.9
