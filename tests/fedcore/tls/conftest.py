"""A certificate authority with a server and two nodes."""
from pathlib import Path

import pytest

from fedcore.authority import Authority, init_ca
from fedcore.certs import host_names


@pytest.fixture
def pki(tmp_path) -> Path:
    """Make the folders ca, server, alice and bob; returns what they are in."""
    init_ca(tmp_path / "ca")
    authority = Authority(tmp_path / "ca")
    authority.issue_server(host_names("fl.example.org"), tmp_path / "server")
    for name in ("alice", "bob"):
        authority.issue_node(name, tmp_path / name)
    return tmp_path
