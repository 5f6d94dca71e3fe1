"""How a run is getting on: a live bar on a terminal, a plain line every few seconds elsewhere."""
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedcore.config import Experiment
from fedcore.report.scales import count, data_size, metric_figure, seconds
from fedcore.terminal import plain_spaces

LINE_EVERY_S = 5.0
FIRST_LINE_S = 1.0
REFRESHES_PER_S = 4.0
TOTALS = ("client_updates", "bytes_up", "bytes_down")
# Figures of an evaluation that are shown, in this order, as far as there are any.
SHOWN_METRICS = ("loss", "accuracy", "excess_loss", "mae")


class Figures:
    """The latest figures of a run, taken from its rows of metrics.

    Args:
        limits: the run's limits: `seconds`, `rounds`, `client_updates`, as far as there are any.
        updates_per_round: client updates that count as one round; None for strategies whose versions are rounds.
    """

    def __init__(self, limits: Mapping[str, float], updates_per_round: int | None = None):
        self.limits, self.updates_per_round = dict(limits), updates_per_round
        self.time_s = 0.0
        self.version = 0
        self.totals: dict[str, float] = dict.fromkeys(TOTALS, 0)
        self.metrics: dict[str, float] = {}
        self.failures = 0

    def take(self, row: Mapping[str, Any]) -> None:
        """Take note of a row of metrics."""
        self.time_s = row["time_s"]
        self.version = max(self.version, row.get("version", 0))
        for name in TOTALS:
            self.totals[name] = row.get(name, self.totals[name])
        if row["event"] == "evaluate":
            self.metrics = {name: row[name] for name in SHOWN_METRICS if isinstance(row.get(name), (int, float))}
        self.failures += row["event"] in ("failure", "refused")

    def share_done(self) -> tuple[float, str]:
        """Return how much of the nearest limit is used up, in [0, 1], and that limit in words."""
        updates = self.totals["client_updates"]
        rounds = self.version if self.updates_per_round is None else updates / self.updates_per_round
        used = {"seconds": self.time_s, "rounds": rounds, "client_updates": updates}
        share, name = max(((used[name] / limit, name) for name, limit in self.limits.items()), default=(0.0, ""))
        if not name:
            return 0.0, ""
        limit = self.limits[name]
        words = seconds(limit) if name == "seconds" else f"{count(limit)} {name.replace('_', ' ')}"
        return min(1.0, share), plain_spaces(words)

    def words(self) -> list[str]:
        """Return the figures as short texts."""
        up, down = self.totals["bytes_up"], self.totals["bytes_down"]
        texts = [
            f"t {seconds(self.time_s)}", f"v {count(self.version)}",
            *(f"{name.replace('_', ' ')} {metric_figure(name, value)}" for name, value in self.metrics.items()),
            f"{count(self.totals['client_updates'])} updates", f"{data_size(up)} up, {data_size(down)} down",
        ]
        if self.failures:
            texts.append(f"{count(self.failures)} failures")
        return [plain_spaces(text) for text in texts]


class Progress:
    """Shows a run's progress while its context is open; give `on_row` to `simulate`.

    Args:
        console: where to; a live bar if that is a terminal.
        title: what runs.
        figures: of the run.
        remarks: asked for lines that are shown below the figures, such as who is waited for.
    """

    def __init__(
        self, console: Console, title: str, figures: Figures, remarks: Callable[[], Sequence[str]] = tuple
    ):
        self.console, self.title, self.figures, self.remarks = console, title, figures, remarks
        self._live: Live | None = None
        self._next_line = 0.0
        self._rows = 0

    @classmethod
    def of(cls, console: Console, experiment: Experiment) -> Self:
        """Return the progress of an experiment."""
        from fedcore.events import EventStrategy

        stop = experiment.stop
        limits = {name: getattr(stop, name) for name in ("seconds", "rounds", "client_updates")
                  if getattr(stop, name) is not None}
        event_driven = isinstance(experiment.build_strategy(), EventStrategy)
        per_round = experiment.clients.count if event_driven else None
        title = f"{experiment.strategy_name} on {experiment.task_name}"
        return cls(console, title, Figures(limits, per_round))

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._bar, console=self.console, refresh_per_second=REFRESHES_PER_S)
            self._live.start()
        else:
            self._next_line = time.monotonic() + FIRST_LINE_S
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._rows:
            self._print_line()

    def on_row(self, row: dict[str, Any]) -> None:
        """Take note of a row of metrics, and print a line if it is time to."""
        self.figures.take(row)
        self._rows += 1
        if self._live is None and time.monotonic() >= self._next_line:
            self._print_line()
            self._next_line = time.monotonic() + LINE_EVERY_S

    def print_remarks(self) -> None:
        """Print the remarks as plain lines, where no live bar shows them anyway."""
        if self._live is None:
            for line in self.remarks():
                self.console.print(Text(line), soft_wrap=True)

    def _print_line(self) -> None:
        share, limit = self.figures.share_done()
        line = "  ".join([f"{100 * share:3.0f} %"] * bool(limit) + self.figures.words())
        self.console.print(Text(line), soft_wrap=True)

    def _bar(self) -> Group:
        share, limit = self.figures.share_done()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self.title, style="bold"), ProgressBar(total=1.0, completed=share, width=30, pulse=not limit),
            Text(f"{100 * share:.0f} % of {limit}" if limit else ""),
        )
        return Group(bar, Text(" · ".join(self.figures.words())), *map(Text, self.remarks()))
