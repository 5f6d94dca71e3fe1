"""The live page in pieces: each is HTML for one place of it, drawn with the report's charts, everything escaped."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from fedcore.dashboard.feed import Seen
from fedcore.report.charts import Line, Plot, legend_of, line_chart
from fedcore.report.facts import TRAINING, Facts, Task, tasks_of
from fedcore.report.gantt import Window, chart
from fedcore.report.scales import BYTES, SECONDS, count, data_size, metric_figure, metric_kind, metric_words, seconds
from fedcore.report.section import HERE as REPORT
from fedcore.report.section import environment
from fedcore.runs import finite

HERE = Path(__file__).parent
# How much of the run's end the timeline shows.
WINDOW_S = 120.0
WINDOW_TASKS = 400
MOST_CLIENTS = 40
LONGEST_REASON = 300
CURVES = ("accuracy", "loss", "excess_loss", "mae", "perplexity")
# Classes of the timeline's paths, and what they mean.
LEGEND = (("g", r"g\d", "training, coloured by arrival group"), ("training", "training", "training"),
          ("ungrouped", "ungrouped", "training outside any group"), ("transfer", "transfer", "download, upload"),
          ("evaluating", "evaluating", "evaluation and queries"),
          ("cancelled", "cancelled", "under way, or called off"),
          ("failed", "failed", "work that was lost"), ("version", "version", "model updated"))
STAGES = {"waiting": "is sent its work", "uploading": "sends its answer", "arrived": "waits for the server"}
ACTIONS = {"train": "trains", "evaluate": "evaluates", "query": "says who it is"}

Node = Mapping[str, Any]


def templates() -> Environment:
    """Return the template environment; everything that is not `Markup` is escaped."""
    return environment().overlay(loader=FileSystemLoader(HERE))


def page(pieces: Mapping[str, Markup], nonce: str) -> str:
    """Return the whole page, with its first content inside."""
    style = "".join((folder / name).read_text(encoding="utf-8")
                    for folder, name in ((REPORT, "report.css"), (HERE, "live.css")))
    script = "".join((folder / name).read_text(encoding="utf-8")
                     for folder, name in ((REPORT, "report.js"), (HERE, "live.js")))
    return templates().get_template("live.html").render(
        pieces=pieces, nonce=nonce, style=Markup(style), script=Markup(script))


def pieces(seen: Seen, silent_s: float, link: Mapping[str, Any]) -> dict[str, Markup]:
    """Return the HTML of every place of the page, by its id.

    Args:
        seen: the run's rows so far.
        silent_s: seconds since the newest row.
        link: a snapshot of who is connected.
    """
    now = seen.now_s + (silent_s if seen.started and seen.stop_reason is None else 0.0)
    nodes = sorted((node for node in link.get("nodes", ()) if isinstance(node, Mapping)),
                   key=lambda node: (finite(node.get("partition")) or 0, str(node.get("name"))))
    template = templates().get_template("pieces.html")
    made: Any = template.module
    return {
        "title": Markup("{}").format(title(seen)),
        "state": Markup("{}").format(" ".join(state(seen, nodes, now))),
        "cards": made.cards(cards(seen, nodes, now)),
        "learning": Markup().join(curves(seen)) or made.nothing("No model has been evaluated yet."),
        "clients": made.clients([client_row(node, seen) for node in nodes[:MOST_CLIENTS]], len(nodes) - MOST_CLIENTS)
        if nodes else made.nothing("No client has connected yet."),
        "timeline": timeline(seen, nodes, now) or made.nothing("No task has been given out yet."),
        "bytes": traffic(seen) or made.nothing("No version has been published yet."),
        "troubles": made.troubles([trouble_row(row) for row in reversed(seen.troubles)])
        if seen.troubles else made.nothing("None so far."),
    }


def title(seen: Seen) -> str:
    """Return what runs: `fedcompass on digits`."""
    strategy, task = (_name(seen.settings.get(key)) for key in ("strategy", "task"))
    return f"{strategy} on {task}" if strategy and task else "A run that has not begun"


def _name(spec: object) -> str:
    return str(spec.get("name", "")) if isinstance(spec, Mapping) else str(spec or "")


def state(seen: Seen, nodes: Sequence[Node], now: float) -> list[str]:
    """Return how the run is getting on, in sentences."""
    here = [node for node in nodes if node.get("connected")]
    wanted = finite((seen.settings.get("clients") or {}).get("count"))
    of = f" of {count(wanted)}" if wanted else ""
    words = f"{count(len(here))}{of} {'client is' if len(here) == 1 and not of else 'clients are'} connected."
    if seen.stop_reason is not None:
        return [f"The run is over after {seconds(now)}: {seen.stop_reason}."]
    if not seen.started:
        return ["The run begins when its clients are here:", words]
    busy = [node for node in here if node.get("doing") not in ("idle", None)]
    awaited = max(busy, key=lambda node: finite(node.get("doing_s")) or 0.0, default=None)
    sentences = [f"Running for {seconds(now)}, version {count(seen.version)};", words]
    if awaited is not None:
        since = seconds(finite(awaited.get("doing_s")))
        sentences.append(f"{awaited.get('name')} has been at its work longest: {since}.")
    return sentences


def cards(seen: Seen, nodes: Sequence[Node], now: float) -> list[tuple[str, str, str]]:
    """Return the key figures: value, what it is, and a remark."""
    shown = []
    for metric in CURVES:
        values = [value for row in seen.evaluations if (value := finite(row.get(metric))) is not None]
        if values:
            best = metric_figure(metric, max(values) if metric == "accuracy" else min(values))
            shown.append((metric_figure(metric, values[-1]), metric_words(metric), f"best {best}"))
    troubles = sum(seen.counts.values())
    totals = seen.totals
    return [
        *shown[:3],
        (seconds(now), "time", ""),
        (count(seen.version), "versions", f"{count(totals['client_updates'])} client updates"),
        (count(sum(bool(node.get("connected")) for node in nodes)), "clients connected", f"{count(len(nodes))} known"),
        (data_size(totals["bytes_up"]), "from clients", f"{data_size(totals['bytes_down'])} to them"),
        (count(troubles), "went wrong", ", ".join(f"{count(number)} {name}" for name, number in seen.counts.items()
                                                  if number)),
    ]


def curves(seen: Seen) -> list[Markup]:
    """Return accuracy and loss over time."""
    charts = []
    for metric in CURVES:
        points = [(finite(row.get("time_s")) or 0.0, value) for row in seen.evaluations
                  if (value := finite(row.get(metric))) is not None]
        if points:
            charts.append(line_chart(Plot(f"{metric_words(metric).capitalize()} over time",
                                          [Line(points, 0 if metric != "loss" else 1)], "time", metric_words(metric),
                                          SECONDS, metric_kind(metric))))
    return charts[:2]


def traffic(seen: Seen) -> Markup:
    """Return the bytes sent so far, both ways, over time."""
    if not seen.traffic:
        return Markup()
    up, down = ([(row[0], row[index]) for row in seen.traffic] for index in (1, 2))
    return line_chart(Plot("Bytes over time", [Line(up, 0, "from clients"), Line(down, 1, "to clients")], "time",
                           "bytes so far", SECONDS, BYTES, log_y=False))


def client_row(node: Node, seen: Seen) -> dict[str, Any]:
    """Return what the table says of a client."""
    connected, doing = bool(node.get("connected")), str(node.get("doing") or "idle")
    if not connected:
        now, since, mood = "away", finite(node.get("away_s")), "away"
    elif doing == "idle":
        now, since, mood = "idle", finite(node.get("doing_s")), "idle"
    else:
        action = str(node.get("action") or "")
        now = STAGES.get(doing) or ACTIONS.get(action.split(".")[0], action) or doing
        since, mood = finite(node.get("doing_s")), "busy"
    up, down = (finite(node.get(f"{way}_bytes_per_s")) or 0.0 for way in ("up", "down"))
    return {
        "name": str(node.get("name")), "partition": node.get("partition"), "now": now, "mood": mood,
        "since": seconds(since), "tasks": count(seen.finished.get(node.get("partition"), 0)),
        "up": data_size(finite(node.get("bytes_up"))), "down": data_size(finite(node.get("bytes_down"))),
        "rate": f"{data_size(up + down)}/s",
        "address": str(node.get("address") or "").removeprefix("ipv4:").removeprefix("ipv6:"),
    }


def trouble_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Return what the table says of something that went wrong."""
    reason = " ".join(str(row.get("reason") or "").split())
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON // 3]} ... {reason[-2 * LONGEST_REASON // 3:]}"
    node = row.get("node")
    return {"at": seconds(finite(row.get("time_s"))), "what": str(row.get("event")), "reason": reason,
            "node": "a stranger" if node is None else str(node)}


def timeline(seen: Seen, nodes: Sequence[Node], now: float) -> Markup:
    """Return the last minutes of every client, what it does now included."""
    tasks = tasks_of(seen.tasks)[-WINDOW_TASKS * MOST_CLIENTS:]
    running = [Task(node["partition"], TRAINING, max(now - since, 0.0), now, 0.0, 0.0, since, 0.0, 0, None, "cancelled")
               for node in nodes if isinstance(node.get("partition"), int) and node.get("connected")
               and node.get("doing") not in ("idle", None) and (since := finite(node.get("doing_s"))) is not None]
    tasks += running
    rows = sorted({task.node for task in tasks})[:MOST_CLIENTS]
    if not rows:
        return Markup()
    start = max(now - WINDOW_S, 0.0)
    recent = sorted((task.end for task in tasks), reverse=True)
    if len(recent) > WINDOW_TASKS:      # so many that bars could not be told apart
        start = max(start, recent[WINDOW_TASKS])
    inside = [task for task in tasks if task.end >= start and task.node in set(rows)]
    end = max(now, start + 1e-6)
    facts = Facts(end, inside, {}, [], [], None, 0)
    drawn = chart(f"The last {seconds(end - start)}", facts, inside, Window(rows, start, end, "time"),
                  [row[0] for row in seen.traffic])
    return legend_of((key, words) for key, name, words in LEGEND if re.search(f'<path class="{name}"', drawn)) + drawn
