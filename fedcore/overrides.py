"""Settings given on the command line: `key.path=value` on top of an experiment file."""
import copy
from collections.abc import Sequence
from typing import Any

import yaml

from fedcore.errors import BadInput, InvalidSetting, shown
from fedcore.yaml_file import explain, parse


class BadOverride(BadInput):
    """A `--set` that is not of the form `key.path=value`."""


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[BadInput]]:
    """Return settings with each `key.path=value` put in its place, later ones last, and what is wrong with any.

    Values are YAML: `--set "strategy={name: fedbuff, buffer_size: 5}"`. A setting below a plug-in's name keeps the
    name: `strategy.server_lr=0.5` changes `strategy: fedbuff` into `strategy: {name: fedbuff, server_lr: 0.5}`.
    """
    settings, problems = copy.deepcopy(settings), []
    for override in overrides:
        try:
            _apply(settings, override)
        except BadInput as error:
            problems.append(error)
    return settings, problems


def _apply(settings: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(key.replace("-", "_").isidentifier() for key in keys):
        raise BadOverride(f"--set {shown(override)} is not of the form key.path=value, for example train.lr=0.1.")
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = explain(error).split("\n")[0] if isinstance(error, yaml.YAMLError) else str(error)
        raise BadOverride(f"--set {shown(override)}: the value is not valid YAML: {reason}") from error
    place = settings
    for depth, key in enumerate(keys[:-1], start=1):
        below = place.get(key)
        if below is None:
            below = {}
        elif isinstance(below, str):
            below = {"name": below}
        elif not isinstance(below, dict):
            where = ".".join(keys[:depth])
            raise InvalidSetting(where, below, "a section or a plug-in", f"--set {path} would need one.")
        place[key] = below
        place = below
    place[keys[-1]] = value
