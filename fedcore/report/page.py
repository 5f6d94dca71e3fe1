"""The report of one run: `report.html`, one file with everything inside."""
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedcore.measures import smaller_is_better
from fedcore.recorder import REPORT_FILE, write_atomically
from fedcore.report.charts import Line, Plot, histogram, line_chart
from fedcore.report.compression import ERROR, MISMATCH, compression
from fedcore.report.facts import Client, Facts, busiest_share, facts_of, histogram_bins
from fedcore.report.gantt import timeline
from fedcore.report.peers import DRAWN as DRAWN_OF_PEERS
from fedcore.report.peers import peers
from fedcore.report.privacy import FIGURES as PRIVACY_FIGURES
from fedcore.report.privacy import privacy
from fedcore.report.queries import DRAWN, queries
from fedcore.report.scales import (
    BYTES,
    COUNT,
    NO_FIGURE,
    SECONDS,
    metric_figure,
    metric_kind,
    metric_words,
    percent,
    seconds,
)
from fedcore.report.section import Section, part, render
from fedcore.report.words import (
    cards,
    clock_of,
    headline,
    main_metric,
    opening,
    plain_rows,
    title_of,
    warnings_of,
)
from fedcore.runs import Row, Run, finite, target_of

MOST_ROWS = 40              # clients in a table; of more, those at both ends are shown
MOST_LABELS = 120           # columns of the label heat map
NUMBERED_LABELS = 14        # columns up to which the heat map shows its counts
MOST_REASONS = 60           # rows of the failures table
LONGEST_REASON = 400        # characters of a reason that are shown
MOST_EXTRA_CURVES = 12
EVALUATION_KEYS = {"time_s", "wall_s", "version", "where", "event", "client_updates", "client_steps", "bytes_up",
                   "bytes_down", "num_examples", "num-examples"}
UPDATE_KEYS = EVALUATION_KEYS | {"node", "nodes", "staleness", "weights", "num_params", "group", ERROR, MISMATCH}
UPDATE_KEYS |= PRIVACY_FIGURES | DRAWN | DRAWN_OF_PEERS
# What only some methods have to show; each returns None for the runs of others.
EXTRA_SECTIONS: tuple[Callable[[Run, Facts], Section | None], ...] = (compression, privacy, queries, peers)
AXES = (("client_updates", "client updates", COUNT), ("bytes", "bytes, up and down", BYTES))


def write_report(folder: str | Path) -> Path:
    """Write a run's report.html into its folder.

    Args:
        folder: the folder of a run; one that was killed in the middle will do.

    Returns:
        Path of the report.

    Raises:
        NotARun: the folder is not a run's.
        DamagedRun: a file in it cannot be read.
    """
    run = Run(folder)
    path = run.folder / REPORT_FILE
    write_atomically(path, report_html(run))
    return path


def report_html(run: Run) -> str:
    """Return the whole report as one HTML document."""
    facts = facts_of(run)
    strategy, task = title_of(run)
    extra = [section for make in EXTRA_SECTIONS if (section := make(run, facts)) is not None]
    sections = [learning(run), *extra, clients_in_time(run, facts), staleness_of(run, facts), contributions(facts),
                data_of(facts), other_figures(run), failures_of(run), settings_of(run)]
    return render("report.html", title=f"{strategy} on {task}", headline=headline(run),
                  opening=opening(run, facts), warnings=warnings_of(run), cards=cards(run, facts), sections=sections,
                  folder=run.folder.resolve().name, seed=run.summary.get("seed"))


def learning(run: Run) -> Section:
    """Return accuracy and loss over time, client updates and bytes."""
    metrics = [metric for metric in ("accuracy", "loss") if any(finite(value) is not None
                                                                for value in run.curve(metric)[1])]
    if not metrics:
        return Section("learning", "Learning", missing="The run has no evaluations.")
    clock = clock_of(run)
    main = main_metric(run)
    charts = [line_chart(Plot(
        f"{metric_words(metric).capitalize()} over {clock}", [_line(run, metric, "time_s")], clock,
        metric_words(metric), SECONDS, metric_kind(metric), **_target_marks(run, metric, main)))
        for metric in metrics]
    small = [line_chart(Plot(f"{metric_words(metric).capitalize()} over {label.split(',')[0]}",
                             [_line(run, metric, over)], label, metric_words(metric), kind, metric_kind(metric),
                             small=True))
             for metric in metrics for over, label, kind in AXES]
    where = {str(row.get("where")) for row in run.rows("evaluate") if row.get("where")}
    held = {"server": "the server's test data", "clients": "the clients' own validation data"}
    on = " and ".join(held.get(place, place) for place in sorted(where))
    return Section("learning", "Learning", Markup('<div class="charts two">{}</div><div class="charts four">{}</div>'
                                                  ).format(Markup().join(charts), Markup().join(small)),
                   intro=f"{len(run.rows('evaluate'))} evaluations" + (f" on {on}." if on else "."))


def _line(run: Run, metric: str, over: str) -> Line:
    xs, ys = run.curve(metric, over)
    return Line(list(zip(xs, ys, strict=True)), 0 if metric != "loss" else 1)


def _target_marks(run: Run, metric: str, main: str | None) -> Row:
    value = target_of(run.config).get(metric)
    if value is None or metric != main:
        return {}
    reached = run.time_to(metric, value)
    words = f"target {metric_figure(metric, value)}"
    return {"level": (value, words), "marks": [(reached, f"after {seconds(reached)}")] if reached is not None else []}


def clients_in_time(run: Run, facts: Facts) -> Section:
    """Return the Gantt chart of every client, and how client time was spent."""
    if not facts.tasks:
        return Section("timeline", "Every client in time", missing="No task of any client was recorded.")
    times = [at for row in run.rows("update") if (at := finite(row.get("time_s"))) is not None]
    charts, remarks = timeline(facts, times, clock_of(run))
    spent = facts.spent
    parts = [] if spent is None else [(name, spent.share(name)) for name in ("training", "evaluating", "transfer",
                                                                             "waiting")]
    return Section("timeline", "Every client in time",
                   part("spent", parts=[(name, share) for name, share in parts if share > 0.0005]) + charts,
                   intro=" ".join(remarks))


def staleness_of(run: Run, facts: Facts) -> Section:
    """Return how old updates were when they were used."""
    title = "Staleness"
    if not facts.staleness:
        return Section("staleness", title, missing="The update rows of this run carry no staleness.")
    values = facts.staleness
    if max(values) == 0:
        return Section("staleness", title, missing=f"All {len(values):,} updates were fresh: each was computed from "
                                                   "the newest model, as in every synchronous method.")
    fresh = sum(1 for value in values if value == 0) / len(values)
    intro = (f"Model versions that had passed when an update was used: median {statistics.median(values):g}, "
             f"largest {max(values)}; {percent(fresh)} were fresh.")
    chart = histogram("Staleness of the updates used", histogram_bins(values), "versions passed", "updates")
    return Section("staleness", title, Markup('<div class="charts half">{}</div>').format(chart), intro)


def contributions(facts: Facts) -> Section:
    """Return the table of who did how much, with bars to compare shares."""
    title = "Who contributed how much"
    clients = facts.clients
    if not any(client.updates or client.steps for client in clients):
        return Section("contributions", title, missing="No applied update was recorded.")
    totals = {name: sum(getattr(client, name) or 0 for client in clients) for name in ("examples", "steps", "weight")}
    shares = {name: {client.node: (getattr(client, name) or 0) / total for client in clients} if total else {}
              for name, total in totals.items()}
    shown, left_out = ends_of(clients, lambda client: client.steps)
    top = max((share for column in shares.values() for share in column.values()), default=1.0)
    columns = {"timed": any(client.seconds_per_step for client in clients),
               "stale": any(client.staleness for client in clients),
               "failed": any(client.failures for client in clients),
               "waited": facts.spent is not None}
    said = [_over_represented(clients, shares)]
    if len(clients) >= 20 and (tenth := busiest_share([float(client.steps) for client in clients])) is not None:
        said.append(f"The busiest tenth of the clients did {percent(tenth)} of the local steps.")
    if not shares["weight"]:
        said.append("The weight of each update in the model was not recorded.")
    return Section("contributions", title, part("contributions", clients=shown, left_out=left_out, shares=shares,
                                                top=top, columns=columns), " ".join(line for line in said if line))


def _over_represented(clients: list[Client], shares: dict[str, dict[int, float]]) -> str:
    """Return the client whose say differs most from its share of the examples."""
    by = "weight" if shares["weight"] else "steps"
    if not shares[by] or not shares["examples"] or len(clients) < 2:
        return ""
    most = max(clients, key=lambda client: shares[by][client.node] - shares["examples"][client.node])
    mine, due = shares[by][most.node], shares["examples"][most.node]
    what = "applied weight" if by == "weight" else "local steps"
    if mine - due < 0.01:
        return f"Every client's share of the {what} matches its share of the examples."
    return (f"Most over-represented is client {most.node}: {percent(mine)} of the {what} with {percent(due)} of the "
            "examples.")


def ends_of(clients: list[Client], key: Any) -> tuple[list[Client | None], int]:
    """Return all clients, or those with most and least of `key` with None between them; and how many are left out."""
    if len(clients) <= MOST_ROWS:
        return list(clients), 0
    order = sorted(clients, key=key, reverse=True)
    half = MOST_ROWS // 2
    return [*order[:half], None, *order[-half:]], len(clients) - MOST_ROWS


def data_of(facts: Facts) -> Section:
    """Return which client holds how many examples of which label."""
    title = "Who holds which data"
    sized = [client for client in facts.clients if client.examples is not None]
    if not sized:
        return Section("data", title, missing="The run recorded no data sizes.")
    shown, left_out = ends_of(sized, lambda client: client.examples)
    rows = [client for client in shown if client is not None]
    labels = max((len(client.labels or ()) for client in sized), default=0)
    sizes = sorted(client.examples or 0 for client in sized)
    intro = (f"{sum(sizes):,} examples on {len(sizes)} clients: {sizes[0]:,} to {sizes[-1]:,} each, "
             f"median {statistics.median(sizes):,g}.")
    if left_out:
        intro += f" The {len(rows) // 2} largest and the {len(rows) // 2} smallest clients are shown."
    if labels > MOST_LABELS:
        intro += f" The first {MOST_LABELS} of {labels} labels are shown."
    if labels == 0:
        intro += " There are no labels to count: the task's targets are not classes, or were not reported."
    deepest = max((max(client.labels, default=0) for client in rows if client.labels), default=0)
    body = part("heat", clients=rows, labels=min(labels, MOST_LABELS), deepest=max(deepest, 1),
                largest=max(sizes[-1], 1), numbered=labels <= NUMBERED_LABELS)
    return Section("data", title, body, intro)


def other_figures(run: Run) -> Section:
    """Return curves of whatever else the rows carry: privacy spent, queries, consensus distance, excess loss, ..."""
    charts: list[Markup] = []
    clock = clock_of(run)
    for events, known in ((("evaluate",), EVALUATION_KEYS | DRAWN_OF_PEERS | {"accuracy", "loss"}),
                          (("update", "log"), UPDATE_KEYS)):
        rows = [row for row in run.metrics if row.get("event") in events]
        keys = dict.fromkeys(key for row in rows for key, value in row.items()
                             if key not in known and finite(value) is not None)
        for key in keys:
            points = [(at, value) for row in rows if (at := finite(row.get("time_s"))) is not None
                      and (value := finite(row.get(key))) is not None]
            if len(points) > 1 and len({value for _, value in points}) > 1:
                words, log_y = metric_words(key), None if smaller_is_better(key) else False
                charts.append(line_chart(Plot(words.capitalize(), [Line(points, len(charts) + 2)], clock, words,
                                              SECONDS, metric_kind(key), log_y=log_y, small=True)))
    if not charts:
        return Section("figures", "Other figures", missing="The method recorded no figures of its own.")
    return Section("figures", "Other figures",
                   Markup('<div class="charts four">{}</div>').format(Markup().join(charts[:MOST_EXTRA_CURVES])),
                   intro="What else the method and the evaluations recorded, over time."
                   + (f" {MOST_EXTRA_CURVES} of {len(charts)} are drawn." if len(charts) > MOST_EXTRA_CURVES else ""))


def failures_of(run: Run) -> Section:
    """Return what went wrong, by client and reason; every word of a reason may come from a stranger."""
    title = "Failures and refused replies"
    rows = [row for row in run.metrics if row.get("event") in ("failure", "refused", "incident")]
    if not rows:
        return Section("failures", title, missing="None: every task was answered, and every answer was usable.")
    counted: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], float | None] = {}
    for row in rows:
        key = (*(str(row.get(name, "")) for name in ("event", "node", "code")), _short(str(row.get("reason", ""))))
        counted[key] += 1
        first.setdefault(key, finite(row.get("time_s")))
    listed = [(*key, amount, first[key]) for key, amount in counted.most_common(MOST_REASONS)]
    left_out = len(counted) - len(listed)
    intro = f"{len(rows):,} in all" + (f"; the {MOST_REASONS} most frequent of {len(counted):,} kinds are shown."
                                      if left_out else ".")
    return Section("failures", title, part("failures", rows=listed), intro)


def settings_of(run: Run) -> Section:
    """Return the resolved experiment and the summary."""
    config, summary = ([row for row in plain_rows(content) if row[1] != NO_FIGURE]
                       for content in (run.config, run.summary))
    return Section("settings", "Settings and summary", part("settings", config=config, summary=summary),
                   "What was not set or does not apply is left out." if run.config else
                   "The folder holds no config.yaml, so only the summary is shown.")


def _short(reason: str) -> str:
    lines = " ".join(reason.split())
    return lines if len(lines) <= LONGEST_REASON else lines[:LONGEST_REASON] + " …"

