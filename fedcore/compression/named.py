"""Compressors that both ends know by name: what a server may ask of its clients."""
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fedcore.compression.base import Codec, Compressor
from fedcore.errors import BadInput, InvalidSetting, MalformedRequest, UnknownSetting
from fedcore.registry import build, names
from fedcore.vectors import Layout


def registered_compressor(spec: Mapping[str, Any], path: str = "strategy.compressor") -> Compressor:
    """Build a compressor that every client knows by its name.

    Args:
        spec: its name, under `name`, and its settings.
        path: the setting that holds it, for messages.

    Raises:
        InvalidSetting: it is none, or has a wrong setting.
    """
    name = spec.get("name")
    if isinstance(name, str) and ":" in name:
        raise InvalidSetting(path, name, f"one of {', '.join(names('compressors'))}",
                             "Clients import nothing that a server names: register your own under the entry-point "
                             "group fedcore.compressors.")
    if "error_feedback" in spec:
        raise UnknownSetting(f"{path}.error_feedback", spec["error_feedback"], "the compressor's own settings",
                             "It belongs to the experiment's section compression.")
    compressor: Compressor = build("compressors", dict(spec), path)
    return compressor


@lru_cache(maxsize=16)
def codec_asked_for(compressor: str, layout: Layout) -> Codec:
    """Return the codec that a request names, fitted to a model.

    Args:
        compressor: its name and settings, as JSON.

    Raises:
        MalformedRequest: it is none that this client knows.
    """
    try:
        spec = json.loads(compressor)
        if not isinstance(spec, dict):
            raise MalformedRequest(f"The request's compressor is {compressor[:80]!r}, which has no name.")
        built = registered_compressor(spec)
    except (ValueError, BadInput) as error:
        raise MalformedRequest(f"The request's compressor cannot be built: {error}") from error
    return built.codec([spec.shape for spec in layout.params], layout.dtype)
