"""What a terminal shows: text that cannot break it, tables, and errors that fit on one screen."""
import logging
import sys
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedcore.errors import BadExperiment

ERROR_ROWS = 20     # of a screen of 24, so that the command above stays in sight
ERROR_WIDTH = 100
THIN = "\u202f"     # what reports put between digits and unit


def make_console(stderr: bool = False) -> Console:
    """Return the console for results, or for errors."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def plain_spaces(text: str) -> str:
    """Return a figure with ordinary spaces, for terminals that are not in UTF-8."""
    return text.replace(THIN, " ").replace("–", "-")


def show_error(text: str) -> None:
    """Print an error to stderr."""
    console = make_console(stderr=True)
    first, newline, rest = text.partition("\n")
    console.print(f"[bold red]Error:[/] {escape(first)}{newline}{escape(rest)}", soft_wrap=True)


def one_screen(error: Exception, width: int | None = None) -> str:
    """Return an error's message wrapped to the terminal, and cut to what fits on a screen."""
    width = min(ERROR_WIDTH, width or make_console(stderr=True).width)
    if not isinstance(error, BadExperiment):
        lines = [row for line in str(error).splitlines() for row in _wrapped(line, width, "")]
        # A client's traceback says most at its end.
        return "\n".join(lines if len(lines) <= ERROR_ROWS else [*lines[:4], "...", *lines[5 - ERROR_ROWS:]])
    lines = _wrapped(str(error).splitlines()[0], width - len("Error: "), "")
    for index, problem in enumerate(error.problems):
        rows = _wrapped(f"- {problem}", width, "  ")
        left = len(error.problems) - index
        if len(lines) + len(rows) > ERROR_ROWS - (1 if left > 1 else 0):
            rest = ERROR_ROWS - len(lines) - 1
            lines += [f"... and {left} more."] if index else [*rows[:rest - 1], "..."]
            break
        lines += rows
    return "\n".join(lines)


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    # Paths stay in one piece, however long, so that they can be copied.
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
                         replace_whitespace=False) or [""]


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Return a table of names and values, without a header."""
    made = Table.grid(padding=(0, 2, 0, 0))
    for name, value in rows:
        made.add_row(f"[bold]{escape(name)}[/]", escape(value))
    return made


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """Return a table of plain texts.

    Args:
        right: indices of the columns that are aligned right.
    """
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None,
                 pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        made.add_column(escape(name), justify="right" if index in right else "left",
                        overflow="fold", no_wrap=index == 0)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


class _Handler(logging.Handler):
    """Prints log records to whatever stderr is at the moment, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show_logs(verbose: bool) -> None:
    """Show fedcore's warnings, and with `verbose` everything that fedcore and Flower log."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("fedcore")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # A filter, because Flower sets its logger's level when it is imported, and that is later.
        logging.getLogger("flwr").addFilter(lambda record: record.levelno >= logging.ERROR)
