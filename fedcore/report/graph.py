"""The graph of a run without a server, drawn: peers in a circle, edges as thick as they are used."""
import math
from collections.abc import Sequence

from markupsafe import Markup

SIZE = 400              # units of the drawing, both ways
MARGIN = 40             # around the circle, for the ranks
DOT = 9.0               # radius of a peer when there are few
LABELLED_UP_TO = 48     # peers whose ranks are written beside them
THINNEST, THICKEST = 0.75, 6.0

# (rank, rank, exchanges per second); None: the edge is used at every step.
RatedEdge = tuple[int, int, float | None]


def graph_drawing(edges: Sequence[RatedEdge], unit: str = "exchanges per second") -> Markup:
    """Return a graph as inline SVG; empty without edges.

    A row `graph` of a run's metrics holds the edges of an epoch. The width of an edge grows with the root of its rate,
    and hovering over it says the rate.

    Args:
        unit: of the rates.
    """
    ranks = sorted({rank for first, second, _ in edges for rank in (first, second)})
    if not ranks:
        return Markup()
    places = {rank: _place(number, len(ranks)) for number, rank in enumerate(ranks)}
    fastest = max((rate for _, _, rate in edges if rate), default=0.0)
    lines = Markup().join(_line(edge, places, fastest, unit) for edge in sorted(edges, key=lambda edge: edge[2] or 0.0))
    radius = min(DOT, 1.2 * SIZE / len(ranks))
    dots = Markup().join(Markup('<circle class="c0 peer" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>peer {}</title>'
                                '</circle>').format(*places[rank], radius, rank) for rank in ranks)
    labels = Markup()
    if len(ranks) <= LABELLED_UP_TO:
        labels = Markup().join(Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(
            *_place(number, len(ranks), outwards=DOT + 12), rank) for number, rank in enumerate(ranks))
    return Markup(
        '<svg class="graph" viewBox="0 0 {0} {0}" role="img" aria-label="{1} peers and {2} edges" '
        'style="max-width:30rem;width:100%" fill="currentColor" font-size="13" text-anchor="middle" '
        'dominant-baseline="central"><g stroke="currentColor" opacity="0.45">{3}</g>{4}{5}</svg>'
    ).format(SIZE, len(ranks), len(edges), lines, dots, labels)


def _line(
    edge: RatedEdge, places: dict[int, tuple[float, float]], fastest: float, unit: str
) -> Markup:
    first, second, rate = edge
    width = THICKEST * math.sqrt(rate / fastest) if rate and fastest else THINNEST
    words = f"{first} to {second}" + (f": {rate:.3g} {unit}" if rate is not None else "")
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke-width="{:.2f}"{}>'
                  '<title>{}</title></line>').format(
        *places[first], *places[second], max(width, THINNEST), Markup(' stroke-dasharray="2 4"') if rate == 0 else "",
        words)


def _place(number: int, count: int, outwards: float = 0.0) -> tuple[float, float]:
    """Return where a peer stands: clockwise from the top."""
    angle = 2 * math.pi * number / count
    radius = SIZE / 2 - MARGIN + outwards
    return SIZE / 2 + radius * math.sin(angle), SIZE / 2 - radius * math.cos(angle)
