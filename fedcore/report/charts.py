"""Charts as inline SVG that stay legible at every width.

The drawing is an SVG stretched over its box; all text around it is HTML placed in per cent. A chart therefore fills
400 pixels or 1400 with text of the same size, follows the reader's light or dark theme, and needs no script.
Every piece is `Markup`, so whatever is put into it is escaped unless it is `Markup` itself.
"""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedcore.report.scales import BYTES, COUNT, NUMBER, SECONDS, SHARE, Scale, scale_over

WIDTH = 10_000          # units of the stretched drawing, both ways; whole numbers keep the file small
MOST_POINTS = 600       # per line; beyond, four points per bucket (first, lowest, highest, last) look the same
DOTTED_UP_TO = 32       # points of a line that are drawn as dots too
LOG_FROM_RATIO = 40.0   # a loss that falls by more than this is drawn on a logarithmic axis
COLOURS = 7             # colours c0 .. c6 in report.css

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart: `colour` counts through the palette, `label` appears in the legend."""

    points: Sequence[Point]
    colour: int = 0
    label: str = ""
    faint: bool = False


@dataclass(frozen=True)
class Plot:
    """What one line chart shows.

    Args:
        title: the heading over the chart.
        x_label, y_label: axis labels; the unit is added from the scale.
        x_kind, y_kind: what the values are (see scales).
        level: a value of y to mark with a dashed line, with its words.
        marks: values of x to mark with a hairline, with their words.
        log_x, log_y: logarithmic axes; y chooses by itself when None.
        small: one of several small charts that share one legend.
    """

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    x_kind: str = SECONDS
    y_kind: str = NUMBER
    level: tuple[float, str] | None = None
    marks: Sequence[Point | tuple[float, str]] = ()
    log_x: bool = False
    log_y: bool | None = None
    small: bool = False


def line_chart(plot: Plot) -> Markup:
    """Return one line chart; empty when no line has a finite point."""
    lines = [Line(thinned([p for p in line.points if math.isfinite(p[0])]), line.colour, line.label, line.faint)
             for line in plot.lines]
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return Markup()
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log_y = plot.log_y if plot.log_y is not None else worth_a_log_axis(ys)
    x_scale = scale_over(xs, plot.x_kind, plot.log_x, from_zero=not plot.log_x)
    y_scale = scale_over([*ys, plot.level[0]] if plot.level else ys, plot.y_kind, log_y)
    body = Markup().join([gridlines(x_scale, y_scale), *(_drawn(line, x_scale, y_scale) for line in lines)])
    overlay = Markup()
    if plot.level:
        height = y_scale.place(plot.level[0])
        body += Markup('<path class="level" d="M0 {0}H{1}"/>').format(_y(height), WIDTH)
        overlay += Markup('<span class="flag level-flag {}" style="bottom:{:.2f}%">{}</span>').format(
            _free_side(ys, plot.level[0], y_scale), height * 100, plot.level[1])
    for at, words in plot.marks:
        place = x_scale.place(at)
        body += Markup('<path class="mark" d="M{} 0V{}"/>').format(_x(place), WIDTH)
        side = " left" if place > 0.6 else ""
        overlay += Markup('<span class="flag mark-flag{}" style="left:{:.2f}%">{}</span>').format(
            side, place * 100, words)
    data = Markup(' data-hover="{},{},{},{},{:d},{:d}" data-x="{}" data-y="{}"').format(
        x_scale.low, x_scale.high, y_scale.low, y_scale.high, x_scale.log, y_scale.log, plot.x_kind, plot.y_kind)
    words = f"{plot.title}: {plot.y_label} from {ys[0]:.4g} to {ys[-1]:.4g}"
    legend = legend_of([(line.colour, line.label) for line in lines
                        if line.label and not line.faint and not plot.small])
    drawing = frame(body, overlay, x_scale, y_scale, words, data)
    return Markup('<figure class="chart{}"><figcaption>{}</figcaption>{}<p class="axis-y">{}</p>{}'
                  '<p class="axis-x">{}</p></figure>').format(
        " small" if plot.small else "", plot.title, legend, with_unit(plot.y_label, y_scale), drawing,
        with_unit(plot.x_label, x_scale))


def histogram(title: str, counts: Sequence[tuple[str, int]], x_label: str, y_label: str) -> Markup:
    """Return a bar chart of counts, one bar per (label, count)."""
    total = max(sum(amount for _, amount in counts), 1)
    scale = scale_over([float(amount) for _, amount in counts], COUNT, from_zero=True)
    bars = Markup().join(
        Markup('<div class="bar" title="{0}: {1} ({2:.1f} %)"><i style="height:{3:.2f}%"></i></div>').format(
            label, amount, 100 * amount / total, 100 * scale.place(amount))
        for label, amount in counts)
    every = math.ceil(len(counts) * max(len(label) for label, _ in counts) / 40)
    labels = Markup().join(Markup("<span>{}</span>").format(label if index % every == 0 else "")
                           for index, (label, _) in enumerate(counts))
    ticks = _y_ticks(scale)
    return Markup('<figure class="chart bars"><figcaption>{}</figcaption><p class="axis-y">{}</p>'
                  '<div class="plot"><div class="area" role="img" aria-label="{}">{}<div class="columns">{}</div></div>'
                  '</div><div class="column-labels">{}</div><p class="axis-x">{}</p></figure>').format(
        title, y_label, title, ticks, bars, labels, x_label)


def frame(body: Markup, overlay: Markup, x_scale: Scale, y_scale: Scale, words: str, data: Markup) -> Markup:
    """Return the box around a stretched drawing, with the tick labels of both axes."""
    labels = Markup().join(
        Markup('<span class="tick x" style="left:{:.2f}%">{}</span>').format(at * 100, label)
        for at, label in x_scale.ticks())
    return Markup('<div class="plot"><div class="area"{}><svg viewBox="0 0 {} {}" preserveAspectRatio="none" '
                  'role="img" aria-label="{}">{}</svg>{}{}{}</div></div>').format(
        data, WIDTH, WIDTH, words, body, labels, _y_ticks(y_scale), overlay)


def gridlines(x_scale: Scale, y_scale: Scale) -> Markup:
    """Return the grid: a line per tick."""
    across = "".join(f"M0 {_y(at)}H{WIDTH}" for at, _ in y_scale.ticks())
    down = "".join(f"M{_x(at)} 0V{WIDTH}" for at, _ in x_scale.ticks())
    return Markup('<path class="grid" d="{}"/>').format(across + down)


def legend_of(entries: Iterable[tuple[int | str, str]]) -> Markup:
    """Return a legend of (palette number or class, label); empty for none."""
    items = Markup().join(Markup('<li><i class="{}"></i>{}</li>').format(
        f"c{key % COLOURS}" if isinstance(key, int) else f"key-{key}", label) for key, label in entries)
    return Markup('<ul class="legend">{}</ul>').format(items) if items else Markup()


def with_unit(label: str, scale: Scale) -> str:
    """Return an axis label with the unit of its ticks: `virtual time (min)`."""
    unit = scale.unit[1] if scale.kind in (SECONDS, BYTES, SHARE) else ""
    parts = [part for part in (unit, "log scale" if scale.log else "") if part]
    return f"{label} ({', '.join(parts)})" if parts else label


def worth_a_log_axis(values: Sequence[float]) -> bool:
    """Return whether positive values span so much that a linear axis would hide most of them."""
    return min(values) > 0 and max(values) / min(values) > LOG_FROM_RATIO


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most about `most` points that draw the same line: first, lowest, highest, last of each bucket."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(4 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start:start + size]
        by_height = sorted((y, index) for index, (_, y) in enumerate(bucket) if math.isfinite(y))
        ends = {by_height[0][1], by_height[-1][1]} if by_height else set()
        kept += [bucket[index] for index in sorted({0, *ends, len(bucket) - 1})]
    return kept


def _drawn(line: Line, x_scale: Scale, y_scale: Scale) -> Markup:
    """Return a line broken where its values are not finite, with dots when it has few points."""
    path, dots, pen_down = [], [], False
    for x, y in line.points:
        if not math.isfinite(y) or (x_scale.log and x <= 0) or (y_scale.log and y <= 0):
            pen_down = False
            continue
        at = f"{_x(x_scale.place(x))} {_y(y_scale.place(y))}"
        path.append(f"{'L' if pen_down else 'M'}{at}")
        dots.append(f"M{at}h0")
        pen_down = True
    tint = f"c{line.colour % COLOURS}{' faint' if line.faint else ''}"
    drawn = Markup('<path class="line {}" data-label="{}" d="{}"/>').format(tint, line.label, "".join(path))
    if len(dots) <= DOTTED_UP_TO:
        drawn += Markup('<path class="dots {}" d="{}"/>').format(tint, "".join(dots))
    return drawn


def _free_side(ys: Sequence[float], level: float, scale: Scale) -> str:
    """Return where words at a level are not in the way of a curve.

    That is beyond the level, or where a curve goes on beyond it, at the end on the side that it came from.
    """
    rising = ys[0] < level
    passed = max(ys) if rising else min(ys)
    beyond = abs(scale.place(passed) - scale.place(level)) > 0.03 and (passed > level) == rising
    above = rising != beyond
    return f"{'above' if above else 'below'}{' end' if beyond else ''}"


def _y_ticks(scale: Scale) -> Markup:
    return Markup().join(Markup('<span class="tick y" style="bottom:{:.2f}%">{}</span>').format(at * 100, label)
                         for at, label in scale.ticks())


def _x(share: float) -> int:
    return round(share * WIDTH)


def _y(share: float) -> int:
    return round((1 - share) * WIDTH)
