"""What the deployment pages and files say can be done."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from typer.main import get_command

from fedcore.cli import app
from fedcore.runs import Run

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
PAGES = sorted(DEPLOY.glob("*.md"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SERVE = ROOT / "docker" / "serve.sh"


def check_command(words: list[str]) -> None:
    """Parse a fedcore command as the command line does, without running it."""
    if words[0].endswith("fedcore-serve"):     # begins or resumes: all but the first two words are the server's options
        words = ["fedcore", "server", words[1], "--out", *words[2:]]
    command = get_command(app)
    context = click.Context(command, info_name="fedcore")
    names = words[1:]
    while isinstance(command, click.Group):
        name, command, names = command.resolve_command(context, names)
        assert command is not None, words
    try:
        command.make_context(name, names)
    except click.exceptions.Exit:
        pass    # --help
    except click.ClickException as error:
        pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


def commands_in(page: Path) -> Iterator[list[str]]:
    """Yield the fedcore commands in a page's blocks, and in its sentences where they are complete enough."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fedcore"]:
                yield words
    for code in re.findall(r"`(fedcore (?:certs \w+|server|client|doctor|status|simulate)\b[^`]*)`", text):
        if "..." not in code and re.search(r"certs (revoke|node|server) .*--ca|--resume", code):
            yield shlex.split(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_fedcore_takes(page):
    for words in commands_in(page):
        check_command(words)


def test_the_pages_show_every_command_of_a_deployment():
    shown = {tuple(words[1:3]) if words[1] == "certs" else (words[1],) for page in PAGES for words in commands_in(page)}
    assert {("server",), ("client",), ("doctor",), ("status",), ("export-app",), ("certs", "init"), ("certs", "server"),
            ("certs", "request"), ("certs", "node"), ("certs", "revoke")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(\s*([^)#\s]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert not target or target.startswith("https://") or (page.parent / target).exists(), target


def test_the_compose_file_runs_commands_that_exist_on_files_that_exist():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for service in compose["services"].values():
        check_command([*service.get("entrypoint", ["fedcore"]), *service["command"]])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("../") or (ROOT / "docker" / source).is_file(), source
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert (ROOT / "docker" / compose["x-common"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / compose["x-common"]["build"]["dockerfile"]).is_file()


def test_the_kubernetes_sketch_runs_commands_that_exist():
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "StatefulSet", "StatefulSet"]
    for document in documents[1:]:
        pod = document["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        check_command(container["command"])
        assert document["spec"]["selector"]["matchLabels"] == document["spec"]["template"]["metadata"]["labels"]
        claims = [claim["metadata"] for claim in document["spec"]["volumeClaimTemplates"]]
        provided = {volume["name"] for volume in [*pod["volumes"], *claims]}
        assert {mount["name"] for mount in container["volumeMounts"]} == provided
        # Others than owner and group must not read the key.
        assert [volume["secret"]["defaultMode"] for volume in pod["volumes"] if "secret" in volume] == [0o440]


def test_the_dockerfile_copies_what_exists_and_is_let_into_the_build():
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
               if line.startswith("!")}
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE)
               for word in line.split()[:-1] if not word.startswith("--")]
    assert len(sources) >= 10
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, source
    assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_run_commands_that_exist(unit):
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    words = shlex.split(line.replace("${SERVER}", "fl.example.org:9400").replace("${NODE_CONFIG}", "partition-id=0"))
    check_command(words if words[0].endswith("fedcore-serve") else ["fedcore", *words[1:]])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault_with_the_units(unit):
    result = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    faults = [line for line in result.stderr.splitlines() if "is not executable" not in line]
    assert [line for line in faults if unit.name in line] == []


# ---- serve.sh: begin, or continue -----------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path):
    """Put this checkout's fedcore on the path, as an installation would."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "fedcore"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedcore "$@"\n')
    script.chmod(0o755)
    return os.environ | {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                         "OMP_NUM_THREADS": "1"}


def wait_until(condition, what) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


@pytest.mark.slow
def test_serve_begins_a_run_continues_it_after_a_crash_and_ends_it(tmp_path, environment, free_port):
    experiment = {"task": "digits", "strategy": "fedasync", "clients": {"count": 1}, "checkpoint": {"every_s": 0},
                  "train": {"local_steps": 20}, "stop": {"rounds": 150}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    address, run = f"127.0.0.1:{free_port}", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: digits\n")      # of a server that died before its first checkpoint
    serve = [str(SERVE), "experiment.yaml", "run", "--listen", address, "--insecure"]
    log = open(tmp_path / "log.txt", "w")  # noqa: SIM115 (for all processes)

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log, text=True)

    client = start("fedcore", "client", "experiment.yaml", "--server", address, "--insecure", "--name", "site-0",
                   "--node-config", "partition-id=0", "--state", "state")
    server = start(*serve)
    try:
        wait_until(lambda: len(list(run.glob("checkpoints/*.safetensors"))) >= 2, (tmp_path / "log.txt").read_text)
        server.send_signal(signal.SIGKILL)
        server.wait()
        server = start(*serve)
        assert server.wait(timeout=200) == 0, (tmp_path / "log.txt").read_text()
        assert client.wait(timeout=60) == 0
    finally:
        for process in (server, client):
            process.kill()
            process.wait()
        log.close()
    summary = Run(run).summary
    assert (summary["stop_reason"], summary["versions"], summary["client_updates"]) == ("rounds", 150, 150)
    (aside,) = tmp_path.glob("run-broken-off-*")
    assert (aside / "config.yaml").is_file()
