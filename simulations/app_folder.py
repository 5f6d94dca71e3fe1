"""A Flower app in its folder: what its pyproject.toml says, and its ServerApp and ClientApp."""
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedcore.config import Count, Section, Simulation
from fedcore.errors import InvalidSetting, UnknownSetting, UnusableApp
from fedcore.flower import load_object, read_app, read_run_config
from fedcore.schema import nearest
from fedcore.seeds import derive_seed
from fedcore.simulations.randomness import global_randomness
from fedcore.yaml_file import explain, parse

App = TypeVar("App", ServerApp, ClientApp)

RUN_CONFIG = "run-config"
# Clients of an app that does not say how many it wants; as many as an experiment has by default.
DEFAULT_NUM_NODES = 10
# Of a stranger's traceback, so that a message fits on a screen.
MOST_TRACEBACK_LINES = 16


class AppClients(Section):
    """How many clients there are; null: as many as the app's pyproject.toml says."""

    count: Count | None = None


class AppSettings(Section):
    """What a settings file for a Flower app may hold: the world that it runs in. The rest is the app's own affair."""

    clients: AppClients = AppClients()
    seed: int = 0
    simulation: Simulation = Simulation()


@dataclass(frozen=True)
class FlowerApp:
    """What an app's pyproject.toml says.

    Attributes:
        folder: absolute path.
        server_reference, client_reference: `module:attribute` of the ServerApp and the ClientApp.
        run_config: flat, with overrides in place.
        num_supernodes: of the app's default federation, None when it says nothing.
    """

    folder: Path
    name: str
    server_reference: str
    client_reference: str
    run_config: dict[str, Any]
    num_supernodes: int | None

    @classmethod
    def read(cls, folder: str | Path, overrides: Mapping[str, Any] | None = None) -> "FlowerApp":
        """Return the app in a folder.

        Args:
            overrides: values of its run config, by flat key.

        Raises:
            UnusableApp: there is no Flower app, or its pyproject.toml is wrong.
            InvalidSetting: an override of a key that the app does not have, or of another type.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UnusableApp(f"{folder} is not a folder. Give the folder that holds the app's pyproject.toml.")
        try:
            content = read_app(folder)
            defaults = read_run_config(folder, {})
            app = content["tool"]["flwr"]["app"]
            server, client = app["components"]["serverapp"], app["components"]["clientapp"]
            name = str(content["project"]["name"])
        except FileNotFoundError as error:
            raise UnusableApp(f"{folder} has no pyproject.toml, so it is no Flower app.") from error
        except (ValueError, OSError) as error:
            raise UnusableApp(f"{folder / 'pyproject.toml'} describes no Flower app. {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            reason = "[tool.flwr.app.components] must name a serverapp and a clientapp"
            raise UnusableApp(f"{folder / 'pyproject.toml'} describes no Flower app: {reason}.") from error
        config = _with_overrides(defaults, overrides or {})
        return cls(folder.resolve(), name, str(server), str(client), config, _num_supernodes(content))

    def load_server(self) -> ServerApp:
        """Import the ServerApp.

        Raises:
            UnusableApp: it cannot be imported, or is something else.
        """
        return self._load(self.server_reference, ServerApp, "serverapp")

    def load_client(self) -> ClientApp:
        """Import the ClientApp.

        Raises:
            UnusableApp: it cannot be imported, or is something else.
        """
        return self._load(self.client_reference, ClientApp, "clientapp")

    def _load(self, reference: str, kind: type[App], key: str) -> App:
        try:
            found = load_object(reference, self.folder)
        except (Exception, SystemExit) as error:    # a stranger's module may raise anything
            raise UnusableApp(f"The {key} {reference!r} of {self.folder} cannot be loaded.{self._advice(error)}\n"
                              f"{app_traceback(error, self.folder)}") from error
        if not isinstance(found, kind):
            raise UnusableApp(f"The {key} {reference!r} of {self.folder} is a {type(found).__name__}, not a "
                              f"{kind.__name__}. Name the object itself, e.g. {key} = \"my_app.{key[:6]}_app:app\".")
        return found

    def _advice(self, error: BaseException) -> str:
        if not isinstance(error, ModuleNotFoundError) or error.name is None:
            return ""
        if error.name.split(".")[0] in own_names(self.folder):
            return ""
        return f" There is no module {error.name}: install it, or correct the app's pyproject.toml."

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Import from the app's folder first; afterwards everything is as before.

        Modules of another app with the same names (`client_app`, `task`, ...) step aside.
        """
        names = own_names(self.folder)
        aside = {name: module for name, module in sys.modules.items()
                 if name.split(".")[0] in names and _is_some_app(module) and not _lies_in(module, self.folder)}
        known = sys.modules.keys() - aside.keys()
        for name in aside:
            del sys.modules[name]
        path = sys.path[:]
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            sys.path[:] = path
            for name in sys.modules.keys() - known:
                if _lies_in(sys.modules[name], self.folder):
                    del sys.modules[name]
            sys.modules.update(aside)


def own_names(folder: Path) -> set[str]:
    """Return the top-level modules and packages of a folder."""
    return {entry.stem for entry in folder.iterdir()
            if entry.suffix == ".py" or (entry.is_dir() and next(entry.glob("*.py"), None) is not None)}


def _is_some_app(module: ModuleType) -> bool:
    """Say whether a module is a user's own, and not installed."""
    file = getattr(module, "__file__", None)
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return file is not None and not any(Path(file).is_relative_to(place) for place in installed)


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(folder)


def _num_supernodes(content: Mapping[str, Any]) -> int | None:
    """Return options.num-supernodes of the default federation, as pyproject.toml files before Flower 1.25 hold it."""
    federations = content["tool"]["flwr"].get("federations")
    if not isinstance(federations, Mapping):
        return None
    federation = federations.get(federations.get("default"))
    options = federation.get("options") if isinstance(federation, Mapping) else None
    number = options.get("num-supernodes") if isinstance(options, Mapping) else None
    return number if isinstance(number, int) and number > 0 else None


def _with_overrides(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(defaults)
    for key, value in overrides.items():
        where = f"{RUN_CONFIG}.{key}"
        if key not in config:
            raise UnknownSetting(where, value, ", ".join(config) or "nothing: the app has no config",
                                 nearest(key, config))
        kind = type(config[key])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            raise InvalidSetting(where, value, words[kind], f"The app's own value is {config[key]!r}.")
        config[key] = value
    return config


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part `key=value` texts into those of the settings file and those of the app's run config.

    `seed`, `clients.*` and `simulation.*` are settings. All others are the app's, as is `run-config.seed`.

    Raises:
        InvalidSetting: one is not of that form.
    """
    settings, config = [], {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InvalidSetting("--set", text, "of the form key=value", "For example num-server-rounds=3.")
        if key.split(".")[0] in AppSettings.model_fields:
            settings.append(text)
            continue
        try:
            config[key.removeprefix(f"{RUN_CONFIG}.")] = parse(value)
        except (yaml.YAMLError, ValueError) as error:
            reason = explain(error) if isinstance(error, yaml.YAMLError) else str(error)
            raise InvalidSetting("--set", text, "of the form key=value", reason) from error
    return settings, config


def app_traceback(error: BaseException | str, folder: Path) -> str:
    """Return the end of a traceback, from the first line of the app's own code on."""
    text = error if isinstance(error, str) else "".join(traceback.format_exception(error))
    lines = text.rstrip().splitlines()
    first = next((i for i, line in enumerate(lines) if re.match(rf' *File "{re.escape(str(folder))}', line)), None)
    if first is None:
        return "\n".join(lines[-MOST_TRACEBACK_LINES:]) if isinstance(error, str) else _sentence(error)
    shown = lines[first:]
    if len(shown) > MOST_TRACEBACK_LINES:
        shown = [*shown[:2], "  ...", *shown[3 - MOST_TRACEBACK_LINES:]]
    return "\n".join(shown)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


class SeededClientApp(ClientApp):
    """A ClientApp that begins each message with global random generators of its own.

    Strangers draw from Python's, NumPy's and torch's global generators. Seeding them from (seed, node, message) makes a
    client's work the same in whichever process and order it is done, and leaves the ServerApp's draws alone.
    """

    def __init__(self, app: ClientApp, seed: int):
        super().__init__()
        self._app, self._seed = app, seed
        if hasattr(app, "estimate"):
            self.estimate = app.estimate

    def __call__(self, message: Message, context: Context) -> Message:
        """Execute a message."""
        node, number = context.node_config.get("partition-id", 0), message.metadata.message_id
        with global_randomness(derive_seed(self._seed, "client", int(node), number)):
            return self._app(message, context)


@dataclass(frozen=True)
class LoadClient:
    """Loads an app's ClientApp, here or in a worker process."""

    app: FlowerApp
    seed: int

    def __call__(self) -> ClientApp:
        return SeededClientApp(self.app.load_client(), self.seed)
