"""The timeline of a run: one row per client, what it did and when, and a row of ticks where the model changed.

Thousands of tasks become a handful of SVG paths (one per colour), so a timeline stays small. Where even that would be
too much to look at, clients are sampled, and the whole run is drawn as strips of busy time beside a closer look.
"""
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedcore.report.charts import WIDTH, legend_of, with_unit
from fedcore.report.facts import EVALUATING, OTHER, TRAINING, Facts, Task
from fedcore.report.scales import SECONDS, Scale, seconds

MOST_CLIENTS = 40
MOST_TASKS = 2_000          # drawn one by one; more become strips of busy time
TICK_PLACES = 1_250         # places on the model's row where a tick can stand when there are very many updates
STRIP_BINS, STRIP_SHADES = 240, 6
GROUP_COLOURS = 6
CLOSER_LOOK_FROM = 14       # tasks per client from which the beginning is shown enlarged
CLOSER_LOOK_TASKS = 7       # tasks of the median client in that enlarged part
LEGEND = (("g", "training, coloured by arrival group"), ("training", "training"),
          ("ungrouped", "training outside any group"), ("transfer", "download, upload"),
          ("evaluating", "evaluation and queries"), ("waiting", "waiting"), ("offline", "away"),
          ("cancelled", "called off unfinished"), ("failed", "work that was lost"), ("version", "model updated"))
LABELLED_FROM = 0.045       # width of a task, as a share of the chart, from which its steps are written on it
ROW = 10                    # height of a row in drawing units
FULL_NAMES = 16             # clients up to which rows are tall and named in full
ROW_PIXELS = (24, 11)       # height of a row on screen with few and with many clients


@dataclass(frozen=True)
class Window:
    """Which part of a run one timeline shows: clients, and times in seconds."""

    nodes: Sequence[int]
    start: float
    end: float
    clock: str = "virtual time"


def timeline(facts: Facts, updates: Sequence[float], clock: str) -> tuple[Markup, list[str]]:
    """Return the timeline charts of a run and remarks on what they leave out.

    Args:
        facts: the derived figures of the run, with at least one task.
        updates: times at which the global model changed.
        clock: what the time axis is called.
    """
    nodes, remarks = chosen_nodes(facts)
    tasks = [task for task in facts.tasks if task.node in set(nodes)]
    whole = Window(nodes, 0.0, facts.end, clock)
    strips = len(tasks) > MOST_TASKS
    if strips:
        remarks.append(f"{len(tasks):,} tasks are too many to tell apart here, so the whole run is drawn as strips: "
                       "the darker, the larger the share of that moment spent training.")
    charts = [chart("The whole run", facts, tasks, whole, updates, as_strips=strips)]
    closer = closer_window(tasks, whole)
    if closer is not None:
        near = [task for task in tasks if task.start < closer.end]
        remarks.append(f"The closer look shows the first {seconds(closer.end)}; numbers on bars are local steps.")
        charts.append(chart("A closer look at the beginning", facts, near, closer, updates))
    drawn = Markup().join(charts)
    return legend_for(drawn) + drawn, remarks


def chosen_nodes(facts: Facts) -> tuple[list[int], list[str]]:
    """Return the clients to draw, and a remark when they are a sample: spread evenly from fastest to slowest."""
    with_tasks = {task.node for task in facts.tasks}
    drawn = [client for client in facts.clients if client.node in with_tasks or len(facts.clients) <= MOST_CLIENTS]
    if len(drawn) <= MOST_CLIENTS:
        return [client.node for client in drawn], []
    by_speed = all(client.seconds_per_step is not None for client in drawn)
    order = sorted(drawn, key=lambda client: client.seconds_per_step or 0.0) if by_speed else drawn
    picked = [order[round(index * (len(order) - 1) / (MOST_CLIENTS - 1))].node for index in range(MOST_CLIENTS)]
    how = "spread evenly from the fastest to the slowest, in that order" if by_speed else "spread evenly by number"
    return picked, [f"{MOST_CLIENTS} of the {len(drawn)} clients that were given work are drawn, {how}."]


def closer_window(tasks: Sequence[Task], whole: Window) -> Window | None:
    """Return the beginning of a run that is too dense to read as a whole, or None when it is not."""
    per_node: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        per_node[task.node].append(task)
    counts = sorted(len(own) for own in per_node.values())
    if not counts or counts[len(counts) // 2] < CLOSER_LOOK_FROM:
        return None
    ends = sorted(own[min(CLOSER_LOOK_TASKS, len(own)) - 1].end for own in per_node.values())
    end = ends[len(ends) // 2]
    start = min(task.start for task in tasks)
    return Window(whole.nodes, start, end, whole.clock) if end < 0.6 * whole.end else None


def legend_for(drawn: Markup) -> Markup:
    """Return what the colours mean, for the colours that occur in the charts."""
    # Groups are g0, g1, ...; "grid" is none of them.
    return legend_of((name, words) for name, words in LEGEND
                     if re.search(rf'<path class="{name}(\d*)"', drawn) or name == "waiting")


def chart(title: str, facts: Facts, tasks: Sequence[Task], window: Window, updates: Sequence[float],
          as_strips: bool = False) -> Markup:
    """Return one timeline: HTML labels around a stretched SVG with one path per colour."""
    scale = Scale(window.start, max(window.end, window.start + 1e-9), SECONDS)
    rows = {node: index for index, node in enumerate(window.nodes)}
    height = ROW * len(rows)
    body = gridlines_down(scale, height) + _paths("offline", (
        _box(scale, rows[node], since, until, 1, 8) for node, spans in facts.offline.items() if node in rows
        for since, until in spans))
    if as_strips:
        body += strips(tasks, rows, scale)
    else:
        body += bars(tasks, rows, scale)
    pixels = ROW_PIXELS[0] if len(rows) <= FULL_NAMES else ROW_PIXELS[1]
    labels = Markup().join(Markup('<span style="top:{:.3f}%">{}</span>').format(
        100 * (index + 0.5) / len(rows), f"client {node}" if len(rows) <= FULL_NAMES else node)
        for node, index in rows.items())
    on_bars = Markup() if as_strips or len(rows) > FULL_NAMES else step_labels(tasks, rows, scale)
    ticks = Markup().join(Markup('<span class="tick x" style="left:{:.2f}%">{}</span>').format(at * 100, label)
                          for at, label in scale.ticks(8))
    data = hover_data(tasks, rows) if not as_strips else Markup()
    words = f"{title}: {len(tasks)} tasks of {len(rows)} clients from {seconds(window.start)} to {seconds(window.end)}"
    return Markup(
        '<figure class="chart gantt{}"><figcaption>{}</figcaption><div class="scroll"><div class="gantt-box">'
        '{}<div class="names" style="height:{}px">{}</div>'
        '<div class="area" style="height:{}px" data-window="{},{}" data-rows="{}">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>{}{}{}</div></div>'
        '</div><p class="axis-x">{}</p></figure>').format(
        " dense" if len(rows) > FULL_NAMES else "", title, server_row(updates, scale), pixels * len(rows), labels,
        pixels * len(rows), scale.low, scale.high, len(rows), WIDTH, height, words, body, on_bars, ticks, data,
        with_unit(window.clock, scale))


def server_row(updates: Sequence[float], scale: Scale) -> Markup:
    """Return the row above the clients with a tick wherever the global model changed."""
    inside = sorted(at for at in updates if scale.low <= at <= scale.high)
    step = WIDTH // TICK_PLACES if len(inside) > TICK_PLACES else 1   # nearer is one black bar anyway
    places = sorted({_x(scale, at) // step * step for at in inside})
    if not places:
        return Markup()
    return Markup('<div class="names server"><span>model</span></div><div class="area server" title="{} updates">'
                  '<svg viewBox="0 0 {} 10" preserveAspectRatio="none"><path class="version" d="{}"/></svg></div>'
                  ).format(f"{len(inside):,}", WIDTH, "".join(f"M{place} 0V10" for place in places))


def bars(tasks: Sequence[Task], rows: dict[int, int], scale: Scale) -> Markup:
    """Return every task as bars: transfers thin, work tall and coloured by kind or group."""
    boxes: dict[str, list[str]] = defaultdict(list)
    grouped = any(task.group is not None for task in tasks)
    for task in tasks:
        if task.end < scale.low or task.start > scale.high or task.end == task.start:
            continue
        row = rows[task.node]
        if task.download:
            boxes["transfer"].append(_box(scale, row, task.start, min(task.start + task.download, task.end), 3, 4))
        if task.compute:
            boxes[_colour(task, grouped)].append(_box(scale, row, task.worked_from, task.worked_until, 1, 8))
        if task.upload:
            boxes["transfer"].append(_box(scale, row, task.worked_until, task.end, 3, 4))
    groups = [f"g{index}" for index in range(GROUP_COLOURS)]
    order = ["transfer", "training", "ungrouped", *groups, "evaluating", "cancelled", "failed"]
    return Markup().join(_paths(name, boxes[name]) for name in order if name in boxes)


def strips(tasks: Sequence[Task], rows: dict[int, int], scale: Scale) -> Markup:
    """Return the share of time spent training, per client and moment, as bars of six shades."""
    width = (scale.high - scale.low) / STRIP_BINS
    busy: dict[tuple[int, int], float] = defaultdict(float)
    for task in tasks:
        if task.kind != TRAINING or task.outcome != "ok":
            continue
        since, until = max(task.worked_from, scale.low), min(task.worked_until, scale.high)
        for index in range(int((since - scale.low) / width), min(math.ceil((until - scale.low) / width), STRIP_BINS)):
            left = scale.low + index * width
            busy[rows[task.node], index] += max(0.0, min(until, left + width) - max(since, left))
    shades: dict[int, list[str]] = defaultdict(list)
    for (row, index), amount in sorted(busy.items()):
        if shade := min(STRIP_SHADES, math.ceil(STRIP_SHADES * amount / width)):
            left = scale.low + index * width
            shades[shade].append(_box(scale, row, left, left + width, 1, 8))
    return Markup().join(Markup('<path class="training" opacity="{:.2f}" d="{}"/>').format(
        shade / STRIP_SHADES, "".join(boxes)) for shade, boxes in sorted(shades.items()))


def step_labels(tasks: Sequence[Task], rows: dict[int, int], scale: Scale) -> Markup:
    """Return the number of local steps, written on each bar that is wide enough."""
    labels = []
    for task in tasks:
        since, until = scale.place(task.worked_from), scale.place(task.worked_until)
        if task.kind == TRAINING and task.steps and until - since >= LABELLED_FROM:
            labels.append(Markup('<b{} style="left:{:.2f}%;top:{:.2f}%">{}</b>').format(
                Markup(' class="pale"') if task.cancelled else "", 50 * (since + until),
                100 * (rows[task.node] + 0.5) / len(rows), task.steps))
    return Markup().join(labels)


def hover_data(tasks: Sequence[Task], rows: dict[int, int]) -> Markup:
    """Return the tasks as JSON for the pointer's tooltip: [row, start, end, what it was]."""
    listed = []
    for task in tasks:
        if task.end == task.start:
            continue
        words = {TRAINING: f"training, {task.steps} steps", EVALUATING: "evaluation", OTHER: "query"}[task.kind]
        more = [f"group {task.group}"] if task.group is not None else []
        more += [f"staleness {task.staleness}"] if task.staleness is not None else []
        more += [task.outcome] if task.outcome != "ok" else []
        listed.append([rows[task.node], round(task.start, 3), round(task.end, 3), f"client {task.node}",
                       ", ".join([words, *more])])
    text = json.dumps(listed, separators=(",", ":"))
    for sign in "<>&":      # nothing in here may end the script element
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup('<script type="application/json">{}</script>').format(Markup(text))


def gridlines_down(scale: Scale, height: int) -> Markup:
    """Return a grid line per tick of time."""
    return Markup('<path class="grid" d="{}"/>').format(
        "".join(f"M{round(at * WIDTH)} 0V{height}" for at, _ in scale.ticks(8)))


def _colour(task: Task, grouped: bool) -> str:
    if task.failed or task.cancelled:
        return "failed" if task.failed else "cancelled"
    if task.kind != TRAINING:
        return "evaluating"
    if task.group is None:
        return "ungrouped" if grouped else "training"
    number = task.group if isinstance(task.group, int) else zlib.crc32(str(task.group).encode())
    return f"g{number % GROUP_COLOURS}"


def _paths(name: str, boxes: Iterable[str]) -> Markup:
    joined = "".join(boxes)
    return Markup('<path class="{}" d="{}"/>').format(name, joined) if joined else Markup()


def _box(scale: Scale, row: int, since: float, until: float, top: int, height: int) -> str:
    left = _x(scale, since)
    width = max(_x(scale, until) - left, 4)
    return f"M{left} {row * ROW + top}h{width}v{height}h-{width}z"


def _x(scale: Scale, at: float) -> int:
    return round(scale.place(at) * WIDTH)
