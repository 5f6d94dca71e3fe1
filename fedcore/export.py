"""An experiment as a folder that `flwr run` takes: `fedcore export-app`."""
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedcore import __version__
from fedcore.config import load_experiment
from fedcore.errors import BadInput
from fedcore.peers.strategy import PeerStrategy
from fedcore.recorder import write_atomically

EXPERIMENT_FILE = "experiment.yaml"
# Settings that name files, each on the machine that reads it.
PATHS = ("path", "initial_model")
MOST_BYTES = 10 * 2**20     # of an app that Flower ships
LONGEST_NAME = 40

PYPROJECT = '''[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "{strategy} on {task}, exported by fedcore {version}"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["fedcore>={version}"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedcore"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
# More settings of the experiment, e.g. "train.lr=0.1 stop.rounds=5".
set = ""
# The folder for the results, on the SuperLink's machine; empty: a new one below runs/.
out = ""
'''
SERVER_APP = '''"""The server of experiment.yaml."""
from pathlib import Path

from fedcore.superlink import server_app

app = server_app(Path(__file__).with_name("experiment.yaml"))
'''
CLIENT_APP = '''"""The clients of experiment.yaml."""
from pathlib import Path

from fedcore.superlink import client_app

app = client_app(Path(__file__).with_name("experiment.yaml"))
'''
README = '''# {strategy} on {task}

A Flower app that fedcore {version} wrote from an experiment file. `experiment.yaml` holds every setting; fedcore must
be installed on the SuperLink's machine and on every node.

On {count} SuperNodes, with partitions 0 to {last} (`fedcore export-app` needs all of them to begin):

    flower-superlink --host 0.0.0.0 --port 8000 --ssl-ca-certfile ca.crt --ssl-certfile server.crt \\
        --ssl-keyfile server.key --disable-runtime-dependency-installation
    flower-supernode --superlink HOST:8000 --root-certificates ca.crt --node-config "partition-id=0"
    flwr run . YOUR-SUPERLINK --stream

In Flower's own simulation, on Ray:

    flwr run . YOUR-SIMULATION --stream --federation-config "num-supernodes={count}"

Settings: `-c 'set="train.lr=0.1 stop.rounds=5" out="/data/run-1"'`. A node's own, such as where its data are:
`--node-config "partition-id=0 set='task.path=/data/site.npz'"`.
{peers}{paths}'''
PEERS_NOTE = '''
The nodes talk to each other, not through the SuperLink: each says where the others can dial it and with which
certificate, `--node-config "partition-id=0 peer-listen='0.0.0.0:9444' peer-advertise='a.example.org:9444'
peer-tls='/etc/fedcore/tls'"`, and they all need to run at the same time.
'''
PATHS_NOTE = '''
These settings name files, which have to be there on the machines that read them: {names}.
'''


def export_app(file: str | Path, folder: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write an experiment as a Flower app.

    Modules beside the experiment file that it names (`my_task:MyTask`) are copied; data and models are not.

    Args:
        folder: new or empty; its name is the app's.
        overrides: `key.path=value`, as the command's `--set`.

    Raises:
        BadInput: the experiment or the folder cannot be used.
    """
    settings, folder = load_experiment(file, overrides), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not empty. Choose another folder, or remove it first.")
    resolved = settings.resolved()
    modules = sorted(set(own_modules(resolved, Path(file).absolute().parent)))
    words: dict[str, Any] = {
        "name": app_name(folder), "strategy": settings.strategy_name, "task": settings.task_name,
        "version": __version__, "count": settings.clients.count, "last": settings.clients.count - 1,
    }
    names = [path for path, _ in named_files(resolved, "")]
    words["peers"] = PEERS_NOTE if isinstance(settings.build_strategy(), PeerStrategy) else ""
    words["paths"] = PATHS_NOTE.format(names=", ".join(names)) if names else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for module in modules:
            copy = shutil.copytree if module.is_dir() else shutil.copy
            copy(module, folder / module.name)
        texts = {"pyproject.toml": PYPROJECT.format(**words), "server_app.py": SERVER_APP, "client_app.py": CLIENT_APP,
                 "README.md": README.format(**words), EXPERIMENT_FILE: yaml.safe_dump(resolved, sort_keys=False)}
        for name, text in texts.items():
            write_atomically(folder / name, text)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written to: {error.strerror}.") from error
    return folder


def app_name(folder: Path) -> str:
    """Return the name of an app in a folder, as Flower allows it: a letter, then letters, digits and hyphens."""
    name = re.sub(r"[^a-zA-Z0-9-]+", "-", folder.absolute().name).strip("-")[:LONGEST_NAME].rstrip("-")
    return name if name[:1].isalpha() else f"fedcore-{name}".rstrip("-")


def own_modules(settings: Any, folder: Path) -> Iterator[Path]:
    """Yield the modules and packages in a folder that settings name as `module:Class`."""
    if isinstance(settings, dict):
        for value in settings.values():
            yield from own_modules(value, folder)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from own_modules(value, folder)
    elif isinstance(settings, str) and (found := re.fullmatch(r"(\w+)(\.\w+)*:\w+", settings)):
        for path in (folder / f"{found[1]}.py", folder / found[1]):
            if path.exists():
                yield path


def named_files(settings: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the settings that name files, as pairs of key path and value."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            where = f"{path}.{key}" if path else str(key)
            if key in PATHS and isinstance(value, str):
                yield where, value
            else:
                yield from named_files(value, where)
