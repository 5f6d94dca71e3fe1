"""Each module has one name, is short enough to read, and takes from Flower only what Flower documents."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for floor in ("fedcore", "strategies", "clients", "simulations") for path in (ROOT / floor).rglob("*.py")]
# Everything else of Flower may change in any release.
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.clientapp.mod", "flwr.clientapp.typing", "flwr.serverapp",
          "flwr.serverapp.strategy"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sorted(FILES), ids=name_of)
def test_only_what_flower_documents_is_imported(path):
    if name_of(path) == "fedcore/flower.py":
        return    # the one place for the rest
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
            assert not (modules[0].startswith("flwr") and any(alias.name.startswith("_") for alias in node.names))
        for module in modules:
            assert not module.startswith("flwr") or module in PUBLIC, f"{module}: go through fedcore/flower.py"


@pytest.mark.parametrize("path", sorted(FILES), ids=name_of)
def test_files_and_functions_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_no_module_exists_twice():
    folders = tuple(f"{ROOT / name}/" for name in ("fedcore", "strategies", "clients", "simulations"))
    code = (
        "import fedcore.strategies.fedbuff, fedcore.clients.torch_client, fedcore.simulations.grid, sys\n"
        "files = [module.__file__ for module in list(sys.modules.values()) if getattr(module, '__file__', None)]\n"
        f"ours = [file for file in files if file.startswith({folders!r})]\n"
        "print(len(ours), len(set(ours)))"
    )
    count, distinct = map(int, python(code).stdout.split())
    assert count == distinct > 20


def test_what_is_exported_lazily_is_there():
    found = python("import fedcore; print(fedcore.Run.__module__, fedcore.simulate.__module__)")
    assert found.stdout.split() == ["fedcore.runs", "fedcore.simulations.run"], found.stderr
    assert "has no attribute 'nothing'" in python("import fedcore; fedcore.nothing").stderr
