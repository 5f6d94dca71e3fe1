"""Plug-ins by name: built-in ones, those of installed packages, and classes of the user's own.

A plug-in is named `fedcompass` (built in, or registered by an installed package under the entry-point group
`fedcore.<kind>`) or `package.module:Class`. Its constructor's arguments, by their own names and annotations, are its
settings in the experiment file:

    strategy: {name: my_package.my_module:MyStrategy, server_lr: 0.5}

An argument that is annotated `Path`, or called `path`, names a file or folder that must exist, relative to the
experiment file or to the current folder; one annotated with Flower's `Strategy` is itself the name or the settings of a
strategy.
"""
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedcore.catalogue import BESIDES, CATALOGUE, EXPECTED, PATHS, PROVIDED
from fedcore.errors import (
    BadInput,
    BrokenPlugin,
    InvalidSetting,
    MissingData,
    MissingSetting,
    UnknownName,
    UnknownSetting,
)
from fedcore.schema import convert, describe, members, mentions, nearest

KINDS = tuple(CATALOGUE)
Spec = dict[str, Any]


@dataclass(frozen=True)
class Argument:
    """One setting of a plug-in: a constructor argument that a file can give.

    Attributes:
        annotation: its type; `Any` when it has none, or one that cannot be evaluated.
        default: its default value; `Argument.REQUIRED` when it must be given.
    """

    name: str
    annotation: Any
    default: Any

    REQUIRED: typing.ClassVar[object] = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is Argument.REQUIRED


@dataclass(frozen=True)
class Signature:
    """What a plug-in's constructor takes.

    Attributes:
        settings: the arguments that a file can give.
        accepted: names of all arguments, those that fedcore provides among them.
        open_ended: whether it takes any others too.
    """

    settings: dict[str, Argument]
    accepted: frozenset[str]
    open_ended: bool


# ---- names --------------------------------------------------------------------------------------------------------


def _installed(kind: str) -> dict[str, EntryPoint]:
    return _scan(f"fedcore.{kind}", tuple(sys.path))


@lru_cache(maxsize=64)
def _scan(group: str, places: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return what packages in these places register; reading their metadata takes milliseconds, so it is done once."""
    return {entry.name: entry for entry in entry_points(group=group)}


def names(kind: str) -> list[str]:
    """Return the registered names of a kind: the built-in ones, then those of installed packages."""
    return [*CATALOGUE[kind], *sorted(_installed(kind).keys() - CATALOGUE[kind].keys())]


def resolve(kind: str, name: str, path: str | None = None) -> Any:
    """Return the class (or another callable) that a name stands for.

    Args:
        kind: one of `KINDS`.
        name: registered name, or `package.module:Class`.
        path: the setting that holds the name, for error messages.

    Raises:
        UnknownName: there is none.
        BrokenPlugin: its module raises an exception when it is imported.
    """
    path = path or PATHS[kind]
    if name in CATALOGUE[kind]:
        return load(CATALOGUE[kind][name].target)
    installed = _installed(kind)
    if name in installed:
        return _load(installed[name].value, path)
    if ":" in name:
        return _load(name, path)
    known = names(kind)
    hint = nearest(name, known) or "One of your own is written package.module:Class."
    raise UnknownName(path, name, ", ".join(known), hint)


def load(target: str) -> Any:
    """Return fedcore's own `module:Class`."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _load(target: str, path: str) -> Any:
    """Import the user's `package.module:Class`."""
    module_name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise InvalidSetting(path, target, "written package.module:Class", "For example my_strategy:MyStrategy.")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            searched = ", ".join(entry or "." for entry in sys.path[:2])
            advice = f"No module {error.name} was found; the first places searched are {searched}."
            raise InvalidSetting(path, target, "the module and the name of a class", advice) from error
        raise BrokenPlugin(f"{path}={target!r} needs the module {error.name}, which is not installed.") from error
    except Exception as error:      # the user's module may raise anything
        raise BrokenPlugin(f"{path}={target!r} cannot be imported: {_where(error)}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name, value in vars(found).items() if isinstance(value, type)]
            advice = f"{module_name} has no {part}. {nearest(part, public)}".rstrip()
            raise InvalidSetting(path, target, "the module and the name of a class in it", advice)
        found = getattr(found, part)
    if not callable(found):
        raise InvalidSetting(path, target, "a class", f"It is a {type(found).__name__}.")
    return found


def _where(error: Exception) -> str:
    """Return an exception with the line of code that raised it."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"
    return f"{type(error).__name__}: {error}{place}"


# ---- settings -----------------------------------------------------------------------------------------------------


def signature(kind: str, factory: Callable[..., Any]) -> Signature:
    """Return what a plug-in's constructor takes.

    Arguments that fedcore provides, and callables, which a file cannot hold, are no settings.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:      # a class written in C does not say what it takes
        return Signature({}, frozenset(), open_ended=True)
    constructor = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(constructor, include_extras=True)
    except (NameError, TypeError):      # an annotation that only a type checker can evaluate
        hints = {}
    settings, open_ended = {}, False
    for parameter in parameters.values():
        open_ended |= parameter.kind is parameter.VAR_KEYWORD
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name.startswith("_"):
            continue
        argument = Argument(parameter.name, hints.get(parameter.name, Any), parameter.default)
        if parameter.name not in PROVIDED.get(kind, ()) and _fits_a_file(argument.annotation):
            settings[parameter.name] = argument
    return Signature(settings, frozenset(parameters), open_ended)


def _fits_a_file(annotation: Any) -> bool:
    """Say whether a file can hold such a value: a function or an object of some class it cannot."""
    given = [part for part in members(annotation) if part is not type(None)]
    return not given or any(_is_plain(part) or _is_strategy(part) for part in given)


def _is_plain(part: Any) -> bool:
    origin = typing.get_origin(part) or part
    if origin is Callable:
        return False
    if origin is Any:       # a class since Python 3.11; what has no annotation may be anything
        return True
    plain = (int, float, complex, str, bytes, bool, Path, Enum, Mapping, Sequence, Set, BaseModel)
    return not isinstance(origin, type) or origin is object or issubclass(origin, plain) or is_dataclass(origin)


def split_spec(kind: str, spec: Any, path: str) -> tuple[str, Spec]:
    """Return name and settings of what a file gives as `name` or `{name: ..., setting: ...}`."""
    example = f"Write a name, or {{name: {next(iter(names(kind)), 'my_module:MyClass')}, ...}}."
    if isinstance(spec, str) and spec:
        return spec, {}
    if not isinstance(spec, Mapping):
        raise InvalidSetting(path, spec, "a name, or a mapping with a name and settings", example)
    settings = dict(spec)
    if "name" not in settings:
        # Perhaps the key is there, but misspelt.
        raise MissingSetting(f"{path}.name", None, f"one of {', '.join(names(kind))}", example)
    name = settings.pop("name")
    if not isinstance(name, str) or not name:
        raise InvalidSetting(f"{path}.name", name, f"one of {', '.join(names(kind))}", example)
    return name, settings


def check(kind: str, spec: Any, path: str, folder: Path | None = None) -> tuple[Spec, list[BadInput]]:
    """Check a spec without building anything.

    Args:
        kind: one of `KINDS`.
        spec: registered name or `package.module:Class`, alone or under `name` among its settings.
        path: the setting that holds it, e.g. `clients.partition`.
        folder: of the experiment file, where relative paths start.

    Returns:
        The spec as a mapping with converted values, and everything that is wrong with it.
    """
    try:
        name, settings = split_spec(kind, spec, path)
        factory = resolve(kind, name, f"{path}.name" if isinstance(spec, Mapping) else path)
    except BadInput as error:
        return {}, [error]
    takes = signature(kind, factory)
    known = takes.settings
    checked: Spec = {"name": name}
    problems: list[BadInput] = []
    for key, value in settings.items():
        where = f"{path}.{key}"
        if key in BESIDES.get(kind, ()):
            checked[key] = value
        elif key in known:
            try:
                checked[key] = _value(known[key], value, where, folder, problems)
            except BadInput as error:
                problems.append(error)
        elif takes.open_ended and isinstance(key, str) and key not in PROVIDED.get(kind, ()):
            checked[key] = value
        else:
            problems.append(_unknown(key, value, where, name, kind, known))
    problems += [
        MissingSetting(f"{path}.{argument.name}", None, describe(argument.annotation), f"{name} has no default for it.")
        for argument in known.values() if argument.required and argument.name not in settings
    ]
    return checked, problems


def _unknown(key: object, value: Any, where: str, name: str, kind: str, known: Mapping[str, Argument]) -> BadInput:
    if key in PROVIDED.get(kind, ()):
        advice = "Give it as train.lr." if (kind, key) == ("optimizers", "lr") else "fedcore fills it in itself."
    else:
        advice = nearest(key, known)
    settings = ", ".join([*known, *BESIDES.get(kind, ())])
    return UnknownSetting(where, value, settings or f"nothing: {name} has no settings", advice)


def _value(argument: Argument, value: Any, where: str, folder: Path | None, problems: list[BadInput]) -> Any:
    if _is_strategy(argument.annotation):
        nested, found = check("strategies", value, where, folder)
        problems += found
        return nested
    if where == PATHS["graphs"] and mentions(argument.annotation, (Mapping,)):
        # Checked here because a graph may be a file beside the experiment.
        nested, found = check("graphs", value, where, folder)
        problems += found
        return nested
    converted = convert(argument.annotation, value, where)
    if (argument.name == "path" or mentions(argument.annotation, (Path,))) and isinstance(converted, (str, Path)):
        return str(find_file(Path(converted), where, folder))
    return _plain(converted)


def _is_strategy(annotation: Any) -> bool:
    return any(isinstance(part, type) and f"{part.__module__}.{part.__qualname__}" ==
               "flwr.serverapp.strategy.strategy.Strategy" for part in members(annotation))


def find_file(path: Path, where: str, folder: Path | None) -> Path:
    """Return the absolute path of a file or folder named in an experiment.

    Args:
        path: as the user wrote it; relative to `folder` or to the current folder.
        where: the setting that names it.

    Raises:
        MissingData: it is in neither.
    """
    path = path.expanduser()
    tried = list(dict.fromkeys([(folder or Path()).absolute() / path, Path().absolute() / path]))
    for candidate in tried:
        if candidate.exists():
            return candidate
    places = " nor ".join(str(candidate) for candidate in tried)
    raise MissingData(f"{where}={str(path)!r}, but it must be the path of a file; there is no {places}.")


def _plain(value: Any) -> Any:
    """Return a converted value as YAML can hold it."""
    if isinstance(value, (tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# ---- building -----------------------------------------------------------------------------------------------------


def build(kind: str, spec: Any, path: str | None = None, **extra: Any) -> Any:
    """Build the plug-in that a spec names.

    Args:
        kind: one of `KINDS`.
        spec: registered name or `package.module:Class`, alone or under `name` among its settings.
        path: the setting that holds the spec, for error messages.
        extra: arguments that fedcore provides; those that the constructor does not take are dropped.

    Raises:
        InvalidSetting: no such plug-in, a wrong setting, or a value outside its range; with the setting's full path.
        BrokenPlugin: the constructor failed in another way.
    """
    path = path or PATHS[kind]
    checked, problems = check(kind, spec, path)
    if problems:
        raise problems[0]
    name = checked.pop("name")
    factory = resolve(kind, name, path)
    takes = signature(kind, factory)
    for key in BESIDES.get(kind, ()):
        checked.pop(key, None)
    for key in checked.keys() & takes.settings.keys():
        annotation, where = takes.settings[key].annotation, f"{path}.{key}"
        if _is_strategy(annotation):
            checked[key] = build("strategies", checked[key], where)
        else:
            checked[key] = convert(annotation, checked[key], where)
    checked |= {key: value for key, value in extra.items() if key in takes.accepted or takes.open_ended}
    try:
        plugin = factory(**checked)
    except InvalidSetting as error:
        # A constructor knows its arguments' names, not where they stand in the file.
        first = re.split(r"[.,\[]", error.name)[0]
        raise (error.under(path) if first in takes.accepted else error) from error
    except (TypeError, ValueError) as error:
        raise BrokenPlugin(f"{path}: {name} does not accept its settings: {error}") from error
    return _as_expected(kind, plugin, path, name)


def _as_expected(kind: str, plugin: Any, path: str, name: str) -> Any:
    if kind in EXPECTED:
        target, words = EXPECTED[kind]
        if not isinstance(plugin, load(target)):
            raise InvalidSetting(path, name, words, f"It is a {type(plugin).__name__}.")
    return plugin
