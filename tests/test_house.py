"""How the four source folders become one package, and which of them may know which."""
import ast
import fnmatch
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

import fedcore

ROOT = Path(__file__).parents[1]
FOLDERS = {"fedcore": "fedcore", "fedcore.strategies": "strategies", "fedcore.clients": "clients",
           "fedcore.simulations": "simulations"}
# A floor may import those named here, and itself.
BELOW = {
    "fedcore": (),
    "fedcore.strategies": ("fedcore",),
    "fedcore.clients": ("fedcore", "fedcore.strategies"),
    "fedcore.simulations": ("fedcore", "fedcore.strategies", "fedcore.clients"),
}
# What a user types stands on everything; it imports when it is used.
ROOF = ("__init__.py", "cli.py", "commands.py", "launch.py", "superlink.py", "deploy.py",
        "deploy_commands.py", "budget_table.py", "peer_commands.py")
FLOWERS_PRIVATE = ("flwr.supercore", "flwr.proto", "flwr.common", "flwr.server.", "flwr.simulation", "flwr.superlink")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [(package, path) for package, folder in FOLDERS.items() for path in sorted((ROOT / folder).rglob("*.py"))]


def floor_of(module: str) -> str | None:
    """Return the floor that a module belongs to; None for a stranger."""
    return next((package for package in sorted(FOLDERS, key=len, reverse=True)
                 if module == package or module.startswith(f"{package}.")), None)


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports; those under `if TYPE_CHECKING` do not count as top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("package, path", SOURCES, ids=[str(path.relative_to(ROOT)) for _, path in SOURCES])
def test_imports_run_downhill(package, path):
    roof = package == "fedcore" and path.name in ROOF and path.parent == ROOT / "fedcore"
    for module in imports(path, top_level_only=roof):
        floor = floor_of(module)
        assert floor in (None, package, *BELOW[package]), f"{module} is above {package}"
        assert module.split(".")[0] not in ("strategies", "clients", "simulations"), f"{module}: write fedcore.{module}"


def test_flowers_private_modules_are_touched_in_one_file_only():
    touching = {str(path.relative_to(ROOT)) for _, path in SOURCES
                if any(module.startswith(FLOWERS_PRIVATE) for module in imports(path))}
    assert touching <= {"fedcore/flower.py"}


def packaged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the packages that an installation has."""
    found: dict[str, list[str]] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: found.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return found["packages"]


def test_an_installation_has_every_folder_with_code_in_it(monkeypatch):
    names = packaged(monkeypatch)
    for package, path in SOURCES:
        inside = path.parent.relative_to(ROOT / FOLDERS[package]).parts
        assert ".".join([package, *inside]) in names, f"{path.parent} has no __init__.py"
    assert PROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS


def test_an_installation_has_every_file_that_is_no_code():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(fnmatch.fnmatch(path.name, pattern.removeprefix("**/")) for pattern in patterns), path


@pytest.mark.parametrize("folder", ["strategies", "clients", "simulations"])
def test_a_source_folder_imported_by_its_own_name_is_refused(folder):
    result = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, text=True, capture_output=True,
                            check=False)
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert f"import fedcore.{folder}" in result.stderr or f"is fedcore.{folder}" in result.stderr


def test_the_floors_can_be_imported_in_any_process():
    # cwd is the checkout, and nothing else is on the path.
    code = "import fedcore.simulations.run, fedcore.cli, fedcore.commands; print(fedcore.__version__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert result.stdout.strip() == fedcore.__version__


def test_importing_fedcore_imports_nothing_heavy():
    code = "import fedcore, sys; print([name for name in ('torch', 'flwr', 'pydantic') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_dependency_is_pinned_in_the_tested_set():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    project = PROJECT["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    for requirement in [*project["dependencies"], *extras]:
        name = requirement.split(">")[0].split("[")[0].split("=")[0].strip().lower()
        assert name in pinned, requirement
