"""Reading a settings file: YAML with the surprises taken out, and errors that say where.

Numbers, `true`, `false` and `null` are those of YAML 1.2: `1e-3` is a number, and `no`, `on` and `12:30` are text. A
key that stands twice in one mapping is an error, because one of the two would be lost.
"""
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fedcore.errors import BadInput

DEEPEST = 32    # levels of nesting; settings need five


class UnreadableFile(BadInput):
    """A settings file that is not there, not text, or not YAML."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values; refuses a mapping with the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; keep one of them", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
):
    _firsts: list[str | None] = [*_first, ""] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _firsts)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))       # YAML 1.1 would read 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def parse(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UnreadableFile: with the reason, and where there is one the line and column.
    """
    text = _read_text(path)
    try:
        content = parse(text)
    except yaml.YAMLError as error:
        raise UnreadableFile(f"{path} is not valid YAML: {explain(error)}") from error
    except (RecursionError, ValueError) as error:
        raise UnreadableFile(f"{path} cannot be read as YAML: {error}.") from error
    if content is None:
        raise UnreadableFile(f"{path} is empty. {_EXAMPLE}")
    if not isinstance(content, dict):
        raise UnreadableFile(
            f"{path} holds {_kind(content)}, but must hold settings, one `key: value` a line. {_EXAMPLE}"
        )
    if _depth(content) > DEEPEST:
        raise UnreadableFile(f"{path} nests its settings too deeply, or an alias refers to itself.")
    return content


_EXAMPLE = "The shortest experiment is `strategy: fedavg`; `examples/quickstart/experiment.yaml` shows more."


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableFile(f"{path} does not exist.{_beside(path)}") from error
    except IsADirectoryError as error:
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
        advice = f" Did you mean {path / inside[0]}?" if inside else ""
        raise UnreadableFile(f"{path} is a folder, but a file is needed.{advice}") from error
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            f"{path} is not a text file in UTF-8: byte {raw[error.start]:#04x} at position {error.start}."
        ) from error


def _beside(path: Path) -> str:
    """Return a hint at the YAML files where one was looked for."""
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    return f" The folder has: {', '.join(others[:8])}." if others else ""


def explain(error: yaml.YAMLError) -> str:
    """Return what is wrong with a YAML text, and where, in one sentence."""
    if isinstance(error, yaml.reader.ReaderError):
        character = chr(error.character)
        return f"it holds the character {character!r} at position {error.position}, which YAML does not allow."
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{error}."
    mark = error.problem_mark
    problem = error.problem or "it cannot be parsed"
    advice = ""
    if "'\\t'" in problem:
        advice = " Indent with spaces, not with tabs."
    elif "mapping values are not allowed" in problem:
        advice = " A value with a colon in it needs quotes, and keys of one level need the same indentation."
    elif "could not determine a constructor" in problem:
        advice = " Tags (!...) are not used in experiment files."
    where = f"line {mark.line + 1}, column {mark.column + 1}"
    text = mark.get_snippet(indent=4, max_length=76)
    return f"{where}: {problem}.{advice}" + (f"\n{text}" if text else "")


def _kind(content: Any) -> str:
    words = {str: "only a text", list: "a list", bool: "only true or false"}
    return words.get(type(content), "only a number")


def _depth(value: Any, level: int = 1) -> int:
    if level > DEEPEST or not isinstance(value, (dict, list)):
        return level
    inside = value.values() if isinstance(value, dict) else value
    return max((_depth(item, level + 1) for item in inside), default=level)
