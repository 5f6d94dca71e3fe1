"""Several runs side by side: the table of `fedcore compare`, and a page that overlays them.

Runs that differ in nothing but their seed form one group, told by its median and range.
"""
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedcore.errors import InvalidSetting
from fedcore.measures import smaller_is_better
from fedcore.recorder import write_atomically
from fedcore.report.charts import COLOURS, Line, Plot, line_chart
from fedcore.report.facts import Facts, facts_of
from fedcore.report.gantt import MOST_TASKS, Window, chart, chosen_nodes, legend_for
from fedcore.report.page import AXES
from fedcore.report.scales import (
    SECONDS,
    THIN,
    count,
    data_size,
    figure,
    goal_words,
    metric_kind,
    metric_words,
    percent,
    seconds,
)
from fedcore.report.section import Section, part, render
from fedcore.report.words import clock_of, main_metric, plain_rows, title_of
from fedcore.runs import Row, Run, best_of, finite, target_of

FIGURES = ("time_to_target_s", "updates_to_target", "bytes_to_target", "client_updates", "client_steps", "bytes_up",
           "bytes_down", "best_accuracy", "final_loss", "versions", "time_s")
MOST_LABEL_SETTINGS = 3         # settings named in a label; with more, the folder's name says it better
MOST_TIMELINES = 6
LOG_TIME_FROM = 8.0             # ratio of slowest to fastest from which time is also drawn on a logarithmic axis
CHOSEN_STEPS = 100              # a target chosen by itself is a whole percentage of the metric


@dataclass(frozen=True)
class Group:
    """Runs of one experiment with different seeds."""

    label: str
    runs: Sequence[Run]
    settings: Mapping[str, str]

    @cached_property
    def facts(self) -> Facts:
        """The derived figures of the group's first run."""
        return facts_of(self.runs[0])


@dataclass(frozen=True)
class Target:
    """What runs are measured by; `chosen` when nobody demanded it."""

    metric: str
    value: float
    chosen: bool = False

    @property
    def words(self) -> str:
        return goal_words(self.metric, self.value)


def comparison_rows(folders: Sequence[str | Path], target: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Return one row per group of runs that differ only in their seed, the soonest at the target first.

    Args:
        folders: run folders.
        target: metric -> value that runs are timed to; None takes the one that all experiments name, else the best
            whole percentage (or lowest loss) that every run reached.

    Returns:
        Rows with `label`, `strategy`, `task`, `runs`, `seeds`, `target` (words), `reached` (how many runs met it) and,
        for each of `FIGURES`, the median (None when unknown or not reached) and under `<name>_range` the lowest and
        highest of several seeds (else None).

    Raises:
        NotARun, DamagedRun: a folder cannot be read.
        InvalidSetting: no folders, or a target that is not one metric.
    """
    groups = groups_of(folders)
    return rows_of(groups, target_for(groups, target))


def write_comparison(folders: Sequence[str | Path], out: str | Path, target: Mapping[str, float] | None = None) -> Path:
    """Write a page that overlays runs; arguments and errors as for `comparison_rows`.

    Args:
        out: the HTML file to write; a folder gets `comparison.html`.

    Returns:
        Path of the page.
    """
    groups = groups_of(folders)
    path = Path(out)
    if path.is_dir():
        path = path / "comparison.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, comparison_html(groups, target_for(groups, target)))
    return path


def groups_of(folders: Sequence[str | Path]) -> list[Group]:
    """Return the runs grouped by everything in their settings but the seed, in the order given."""
    if not folders:
        raise InvalidSetting("folders", list(folders), "at least one run folder", "Name the folders to compare.")
    together: dict[tuple, list[Run]] = defaultdict(list)
    settings: dict[tuple, dict[str, str]] = {}
    for folder in folders:
        run = Run(folder)
        own = {path: value for path, value in plain_rows(spelt_out(run.config)) if path != "seed"}
        key = (*title_of(run), *sorted(own.items()))
        together[key].append(run)
        settings[key] = own
    named = labels_for([(key, runs, settings[key]) for key, runs in together.items()])
    return [Group(named[key], runs, settings[key]) for key, runs in together.items()]


def spelt_out(config: Row) -> Row:
    """Return settings with `strategy: fedavg` written as `strategy: {name: fedavg}`, so that both compare equal."""
    return {key: {"name": value} if key in ("strategy", "task") and isinstance(value, str) else value
            for key, value in config.items()}


def labels_for(groups: Sequence[tuple[tuple, list[Run], Mapping[str, str]]]) -> dict[tuple, str]:
    """Return a name per group: its strategy, and the settings that tell it from others of the same strategy."""
    by_strategy: dict[str, list[tuple[tuple, list[Run], Mapping[str, str]]]] = defaultdict(list)
    for group in groups:
        by_strategy[title_of(group[1][0])[0]].append(group)
    named = {}
    for strategy, same in by_strategy.items():
        differing = differing_settings([settings for _, _, settings in same])
        for key, runs, settings in same:
            told = ", ".join(f"{path.rsplit('.', 1)[-1]}={settings.get(path, 'none')}" for path in differing)
            if len(same) == 1:
                named[key] = strategy
            elif differing and len(differing) <= MOST_LABEL_SETTINGS:
                named[key] = f"{strategy} ({told})"
            else:
                named[key] = f"{strategy} ({runs[0].folder.resolve().name})"
    return named


def differing_settings(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the paths whose values are not the same everywhere."""
    paths = dict.fromkeys(path for own in settings for path in own)
    return [path for path in paths if len({own.get(path) for own in settings}) > 1]


def target_for(groups: Sequence[Group], target: Mapping[str, float] | None) -> Target | None:
    """Return the target to measure by: the given one, the experiments' common one, or the best that all reached."""
    if target is not None:
        if len(target) != 1:
            raise InvalidSetting("target", dict(target), "one metric with its value", "For example accuracy=0.93.")
        metric, value = next(iter(target.items()))
        return Target(metric, float(value))
    runs = [run for group in groups for run in group.runs]
    demanded = {tuple(sorted(target_of(run.config).items())) for run in runs}
    common = next(iter(demanded))
    if len(demanded) == 1 and len(common) == 1:
        return Target(*common[0])
    shared = main_metric(runs[0])
    if shared is None:
        return None
    bests = [best_of(shared, run.curve(shared)[1]) for run in runs]
    known = [best for best in bests if best is not None]
    if len(known) < len(bests):
        return None
    if smaller_is_better(shared):
        return Target(shared, max(known), chosen=True)
    return Target(shared, math.floor(min(known) * CHOSEN_STEPS) / CHOSEN_STEPS, chosen=True)


def rows_of(groups: Sequence[Group], target: Target | None) -> list[dict[str, Any]]:
    """Return the rows of `comparison_rows`."""
    rows = []
    for group in groups:
        measured = [_figures(run, target) for run in group.runs]
        strategy, task = title_of(group.runs[0])
        row: dict[str, Any] = {
            "label": group.label, "strategy": strategy, "task": task, "runs": len(group.runs),
            "seeds": [run.summary.get("seed") for run in group.runs],
            "target": None if target is None else target.words,
            "reached": sum(figures["time_to_target_s"] is not None for figures in measured)}
        for name in FIGURES:
            row[name], row[f"{name}_range"] = _middle([figures[name] for figures in measured], name.endswith("_target")
                                                      or name == "time_to_target_s")
        rows.append(row)
    return sorted(rows, key=lambda row: math.inf if row["time_to_target_s"] is None else row["time_to_target_s"])


def _figures(run: Run, target: Target | None) -> dict[str, float | None]:
    figures = {name: finite(run.summary.get(name)) for name in FIGURES}
    if figures["best_accuracy"] is None:
        figures["best_accuracy"] = best_of("accuracy", run.curve("accuracy")[1])
    for name, over in (("time_to_target_s", "time_s"), ("updates_to_target", "client_updates"),
                       ("bytes_to_target", "bytes")):
        figures[name] = None if target is None else run.cost_to(target.metric, target.value, over)
    return figures


def _middle(values: Sequence[float | None], missing_is_worst: bool) -> tuple[float | None, tuple[float, float] | None]:
    """Return median and range; where a missing value means "never", it counts as infinitely late."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    counted = [math.inf if value is None else value for value in values] if missing_is_worst else known
    middle = statistics.median(counted)
    return (middle if math.isfinite(middle) else None), ((min(known), max(known)) if len(values) > 1 else None)


def comparison_html(groups: Sequence[Group], target: Target | None) -> str:
    """Return the page that overlays runs as one HTML document."""
    rows = rows_of(groups, target)
    colours = {group.label: index % COLOURS for index, group in enumerate(groups)}
    sections = [table_section(rows, target, colours), curves(groups, target, colours), timelines(groups, target),
                differences(groups)]
    runs = sum(len(group.runs) for group in groups)
    tasks = sorted({row["task"] for row in rows})
    return render("comparison.html", title=f"{len(rows)} experiments compared", headline=verdict(rows, target),
                  opening=basis(rows, target, runs), sections=sections, tasks=tasks,
                  warnings=["These runs are of different tasks: " + ", ".join(tasks) + "."] if len(tasks) > 1 else [])


def verdict(rows: Sequence[Mapping[str, Any]], target: Target | None) -> str:
    """Return the comparison in one line."""
    met = [row for row in rows if row["time_to_target_s"] is not None]
    if target is None or not rows:
        return " and ".join(row["label"] for row in rows) + " side by side"
    if not met:
        return f"Nobody reached {target.words}"
    first = met[0]
    line = f"{first['label']} reached {target.words} first: after {seconds(first['time_to_target_s'])}"
    if len(met) > 1 and first["time_to_target_s"] > 0:
        ratio = met[1]["time_to_target_s"] / first["time_to_target_s"]
        line += f", {ratio:.3g} times sooner than {met[1]['label']}" if ratio >= 1.05 else \
            f", about as soon as {met[1]['label']}"
    return line


def basis(rows: Sequence[Mapping[str, Any]], target: Target | None, runs: int) -> str:
    """Return the sentences that say what the comparison rests on."""
    several = max((row["runs"] for row in rows), default=1) > 1
    said = [f"{runs} runs of {len(rows)} experiment{'s' if len(rows) != 1 else ''}"
            + (", medians over seeds, with their ranges." if several else ", one seed each: differences of a few "
               "per cent may be chance.")]
    missed = [row for row in rows if target is not None and row["reached"] < row["runs"]]
    if missed:
        said.append("Not every run met the target: " + ", ".join(
            f"{row['label']} in {row['reached']} of {row['runs']}" for row in missed)
            + ". A run that missed it counts as infinitely late.")
    if target is not None and target.chosen:
        said.append(f"No common target was set, so the runs are timed to {target.words}, which all of them reached.")
    return " ".join(said)


def table_section(rows: Sequence[Mapping[str, Any]], target: Target | None, colours: Mapping[str, int]) -> Section:
    """Return the table, with bars for the time to the target."""
    times = [row["time_to_target_s"] for row in rows if row["time_to_target_s"] is not None]
    ends = [row["time_to_target_s_range"][1] for row in rows if row["time_to_target_s_range"]]
    return Section("table", "What it took", part(
        "comparison", rows=rows, target=target, colours=colours, longest=max([*times, *ends], default=1.0) or 1.0,
        best=min(times, default=None), with_range=with_range, formats={
            "seconds": seconds, "count": count, "size": data_size, "figure": figure,
            "accuracy": percent}))


def with_range(row: Mapping[str, Any], name: str, words: Callable[[float | None], str]) -> Markup:
    """Return a median with its range in small print under it."""
    span = row[f"{name}_range"]
    if span is None or span[0] == span[1]:
        return Markup("{}").format(words(row[name]))
    low, high = words(span[0]), words(span[1])
    if low.partition(THIN)[2] == high.partition(THIN)[2]:        # the unit once is enough
        low = low.partition(THIN)[0]
    return Markup("{} <small>{}–{}</small>").format(words(row[name]), low, high)


def curves(groups: Sequence[Group], target: Target | None, colours: Mapping[str, int]) -> Section:
    """Return the overlaid learning curves: over time, client updates and bytes."""
    metrics = [metric for metric in dict.fromkeys((target.metric if target else "accuracy", "accuracy", "loss"))
               if any(group.runs[0].curve(metric)[1] for group in groups)]
    if not metrics:
        return Section("curves", "Learning", missing="None of the runs has evaluations.")
    clock = clock_of(groups[0].runs[0])
    charts = []
    for metric in metrics:
        level = (target.value, target.words) if target is not None and metric == target.metric else None
        words = metric_words(metric)
        lines = _lines(groups, metric, "time_s", colours)
        charts.append(line_chart(Plot(f"{words.capitalize()} over {clock}", lines, clock, words, SECONDS,
                                      metric_kind(metric), level)))
        ends = [max(x for x, _ in line.points) for line in lines if line.points]
        starts = [min((x for x, _ in line.points if x > 0), default=0.0) for line in lines]
        if ends and max(ends) / max(min(ends), 1e-9) > LOG_TIME_FROM and min(starts) > 0:
            charts.append(line_chart(Plot(f"{words.capitalize()} over {clock}, logarithmic", lines, clock, words,
                                          SECONDS, metric_kind(metric), level, log_x=True)))
    small = [line_chart(Plot(f"{metric_words(metric).capitalize()} over {label.split(',')[0]}",
                             _lines(groups, metric, over, colours), label, metric_words(metric), kind,
                             metric_kind(metric), small=True))
             for metric in metrics for over, label, kind in AXES]
    several = any(len(group.runs) > 1 for group in groups)
    return Section("curves", "Learning", Markup('<div class="charts two">{}</div><div class="charts four">{}</div>'
                                                ).format(Markup().join(charts), Markup().join(small)),
                   "The first seed of each is drawn strongly, the others faintly." if several else "")


def _lines(groups: Sequence[Group], metric: str, over: str, colours: Mapping[str, int]) -> list[Line]:
    lines = []
    for group in groups:
        for index, run in enumerate(group.runs):
            points = list(zip(*run.curve(metric, over), strict=True))
            lines.append(Line(points, colours[group.label], group.label, faint=index > 0))
    return lines


def timelines(groups: Sequence[Group], target: Target | None) -> Section:
    """Return the beginning of each group's first run as timelines with one time axis."""
    shown = [group for group in groups if group.facts.tasks][:MOST_TIMELINES]
    if not shown:
        return Section("timelines", "Clients in time", missing="None of the runs has a timeline.")
    reached = [run.time_to(target.metric, target.value) for group in shown for run in group.runs[:1]] if target else []
    known = [at for at in reached if at]
    end = min(min(known, default=math.inf), *(group.facts.end for group in shown))
    charts = []
    for group in shown:
        nodes, _ = chosen_nodes(group.facts)
        near = [task for task in group.facts.tasks if task.node in set(nodes) and task.start < end]
        updates = [at for row in group.runs[0].rows("update") if (at := finite(row.get("time_s"))) is not None]
        charts.append(chart(group.label, group.facts, near, Window(nodes, 0.0, end, clock_of(group.runs[0])), updates,
                            as_strips=len(near) > MOST_TASKS))
    drawn = Markup().join(charts)
    waits = ", ".join(f"{group.label} {percent(group.facts.spent.share('waiting'))}"
                      for group in shown if group.facts.spent is not None)
    return Section("timelines", "Clients in time", legend_for(drawn) + drawn,
                   f"The first {seconds(end)} of each (first seed): until the soonest met the target or ended. "
                   f"Share of client time spent waiting over the whole run: {waits}.")


def differences(groups: Sequence[Group]) -> Section:
    """Return the table of settings that are not the same in all groups."""
    paths = differing_settings([group.settings for group in groups])
    if not paths:
        return Section("settings", "Settings that differ", missing="None but the seeds.")
    rows = [(path, [group.settings.get(path) for group in groups]) for path in paths]
    return Section("settings", "Settings that differ", part("differences", labels=[group.label for group in groups],
                                                            rows=rows))
