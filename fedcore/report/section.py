"""What pages are made of: sections, and the templates that draw them."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedcore.report.scales import figure, percent, seconds

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One part of a page; `missing` says why there is nothing to show."""

    key: str
    title: str
    body: Markup = Markup()
    intro: str = ""
    missing: str = ""


def environment() -> Environment:
    """Return the template environment: everything that is not `Markup` is escaped."""
    made = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)
    made.filters.update(percent=percent, figure=figure, seconds=seconds)
    return made


def render(template: str, **content: Any) -> str:
    """Return a page made from a template, with style and script inside."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return environment().get_template(template).render(style=Markup(style), script=Markup(script), **content)


def part(name: str, **content: Any) -> Markup:
    """Return one part of a page (a macro of parts.html)."""
    module: Any = environment().get_template("parts.html").module
    return Markup(getattr(module, name)(**content))
