"""What can be named in an experiment file: the tables of `fedcore list`."""
import inspect
import re
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from fedcore.catalogue import CATALOGUE, PATHS, Entry
from fedcore.errors import UnknownName
from fedcore.registry import KINDS, Argument, names, resolve, signature
from fedcore.schema import describe, nearest
from fedcore.terminal import table

# Settings of Flower's strategies that name records and matter to few; `fedcore list strategies NAME` shows them.
WIDE = 140      # columns from which strategies fit into a table
SELDOM = ("weighted_by_key", "arrayrecord_key", "configrecord_key", "min_evaluate_nodes", "min_available_nodes",
          "train_loss_key", "foreach", "fused", "capturable", "differentiable", "maximize")
OWN = "Your own: package.module:Class, with its constructor's arguments as settings."


def kind_of(word: str) -> str:
    """Return the kind that a word means, in the singular or the plural.

    Raises:
        UnknownName: there is none.
    """
    plain = word.lower().replace("-", "_")
    for kind in KINDS:
        if plain in (kind, kind.removesuffix("s"), f"{kind.removesuffix('ies')}y"):
            return kind
    raise UnknownName("KIND", word, ", ".join(KINDS), nearest(plain, KINDS))


def show_kinds(console: Console) -> None:
    """Print the kinds of plug-ins and their names."""
    rows = [(kind, PATHS[kind], ", ".join(names(kind))) for kind in KINDS if names(kind)]
    console.print(table(None, ("kind", "setting", "names"), rows))
    console.print(f"\n{OWN}\nMore: fedcore list KIND, fedcore list KIND NAME", markup=False)


def show_kind(console: Console, word: str) -> None:
    """Print the plug-ins of a kind with their main settings and defaults."""
    kind = kind_of(word)
    found = names(kind)
    if not found:
        console.print(f"There are no {kind} yet. {OWN}", markup=False)
        return
    title = f"{kind}, named under {PATHS[kind]}"
    if kind == "strategies" and console.width < WIDE:
        console.print(title, style="bold", markup=False)
        for name in found:
            _show_strategy(console, name)
    else:
        rows = [_row(kind, name) for name in found]
        columns = ("name", "kind", "what it does", "paper", "main settings") if kind == "strategies" else (
            "name", "what it is", "settings")
        console.print(table(title, columns, rows))
    console.print(f"\n{OWN}\nMore: fedcore list {kind} NAME", markup=False)


def _row(kind: str, name: str) -> tuple[str, ...]:
    factory, entry = resolve(kind, name), CATALOGUE[kind].get(name, Entry(""))
    text, settings = summary_of(entry, factory), main_settings(kind, factory)
    return (name, entry.kind, text, entry.paper, settings) if kind == "strategies" else (name, text, settings)


def _show_strategy(console: Console, name: str) -> None:
    """Print a strategy in a few lines, for terminals too narrow for the table."""
    _, kind, text, paper, settings = _row("strategies", name)
    console.print(Text.assemble("\n", (name, "bold"), f"  {kind}".rstrip(), f"  {paper}" if paper else ""))
    for line in (text, settings):
        if line:
            console.print(Padding(Text(line), (0, 0, 0, 4)))


def show_plugin(console: Console, word: str, name: str) -> None:
    """Print one plug-in with all its settings."""
    kind = kind_of(word)
    factory = resolve(kind, name, "NAME")
    entry = CATALOGUE[kind].get(name, Entry(""))
    console.print(f"{name}: {summary_of(entry, factory)}", markup=False)
    if entry.paper:
        console.print(entry.paper, markup=False)
    documented = argument_docs(factory)
    rows = [
        (argument.name, default_of(argument), ": ".join(
            part for part in (describe(argument.annotation), documented.get(argument.name, "")) if part
        ))
        for argument in signature(kind, factory).settings.values()
    ]
    if rows:
        console.print()
        console.print(table(None, ("setting", "default", "meaning"), rows))
    example = f"{{name: {name}, {rows[0][0]}: {rows[0][1]}}}" if rows and rows[0][1] != "required" else name
    console.print(f"\n{PATHS[kind].rsplit('.', 1)[-1]}: {example}", markup=False)


def summary_of(entry: Entry, factory: Callable[..., Any]) -> str:
    """Return what a plug-in does, in one sentence."""
    text = entry.summary or (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
    return text.replace("`", "")


def main_settings(kind: str, factory: Callable[..., Any]) -> str:
    """Return the settings that people change, with their defaults."""
    settings = signature(kind, factory).settings.values()
    return ", ".join(
        argument.name if argument.required else f"{argument.name}={default_of(argument)}"
        for argument in settings if argument.name not in SELDOM
    )


def default_of(argument: Argument) -> str:
    """Return a default as a file would say it."""
    if argument.required:
        return "required"
    if argument.default is None:
        return "null"
    if isinstance(argument.default, bool):
        return str(argument.default).lower()
    if isinstance(argument.default, float):
        return f"{argument.default:g}"
    if isinstance(argument.default, (tuple, list)):
        return f"[{', '.join(map(str, argument.default))}]"
    return str(argument.default)


def argument_docs(factory: Callable[..., Any]) -> dict[str, str]:
    """Return what a class's docstring says about its arguments, in Google's or NumPy's layout."""
    text = inspect.getdoc(factory) or ""
    found: dict[str, str] = {}
    if match := re.search(r"^(?:Args|Arguments|Attributes):\n((?: +.*\n?|\n)+)", text, re.MULTILINE):
        for name, words in re.findall(r"^    (\w+)(?: \([^)]*\))?: (.*(?:\n     +.*)*)", match[1], re.MULTILINE):
            found[name] = " ".join(words.replace("`", "").split())
    elif match := re.search(r"^Parameters\n-+\n((?:.*\n?)+)", text, re.MULTILINE):
        for name, words in re.findall(r"^(\w+) ?:.*\n((?: +.*\n?)+)", match[1], re.MULTILINE):
            found[name] = " ".join(words.split())
    return found
