"""The command line, in this process and as a real one."""
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore.cli import app

ROOT = Path(__file__).parents[2]
Fedcore = Callable[..., Result]


@pytest.fixture
def fedcore(tmp_path, monkeypatch) -> Fedcore:
    """Run the command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # On a terminal of 80 columns, whatever the tests run in.
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def process(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a user's shell would."""
    def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"} | variables
        return subprocess.run([sys.executable, "-m", "fedcore", *map(str, words)], cwd=tmp_path, env=environment,
                              text=True, capture_output=True, timeout=200, check=False)
    return run
