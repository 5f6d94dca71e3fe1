"""What a run without a server shows: how far apart the peers are, how they compare, and how long they waited."""
from collections import defaultdict

from markupsafe import Markup

from fedcore.report.charts import Line, Plot, histogram, line_chart
from fedcore.report.facts import Facts
from fedcore.report.graph import graph_drawing
from fedcore.report.scales import SECONDS, SHARE, data_size, metric_kind, percent
from fedcore.report.section import Section
from fedcore.runs import Row, Run, finite, number

# Figures of rows that this section draws.
DRAWN = {"exchanges", "consensus_distance", "peer_loss_min", "peer_loss_mean", "peer_loss_max"}
MOST_PEERS = 40     # with a bar of their own
LOSSES = (("loss", "mean of all models"), ("peer_loss_min", "best peer"), ("peer_loss_mean", "mean of the peers"),
          ("peer_loss_max", "worst peer"))


def peers(run: Run, facts: Facts) -> Section | None:
    """Return distance from the mean, peers' losses, computing against waiting, exchanges and bytes of each peer."""
    exchanges = number(run.summary.get("exchanges"))
    if exchanges is None or run.summary.get("consensus_distance") is None:
        return None
    intro = (f"{int(exchanges):,} exchanges, each counted at every peer that took part; "
             f"{data_size(run.summary.get('bytes_up'))} sent by all peers together.")
    share = number(run.summary.get("waiting_share"))
    if share is not None:
        intro += f" Peers spent {percent(share)} of their time waiting for each other."
    silent = number(run.summary.get("silent"))
    if silent:
        intro += f" {int(silent):,} times a partner did not answer in time."
    body = Markup('<div class="charts two">{}</div><div class="charts two">{}</div>').format(
        Markup().join([_distance(run), _losses(run), _waiting(run)]), Markup().join([*_by_peer(run), _graph(run)]))
    return Section("peers", "Peers", body, intro)


def _graph(run: Run) -> Markup:
    """Return the latest graph that the peers wrote down, drawn; empty for strategies without one."""
    graphs = [row["graph"] for row in run.rows("log") if isinstance(row.get("graph"), list)]
    if not graphs:
        return Markup()
    return Markup('<figure class="chart"><figcaption>Who talks to whom, and how often</figcaption>{}</figure>').format(
        graph_drawing([tuple(edge) for edge in graphs[-1]]))


def _points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    return [(at, value) for row in rows if (at := finite(row.get("time_s"))) is not None
            and (value := finite(row.get(name))) is not None]


def _distance(run: Run) -> Markup:
    points = _points(run.rows("evaluate"), "consensus_distance")
    if not any(value for _, value in points):
        return Markup()
    return line_chart(Plot("Distance of the peers from their mean", [Line(points, 0)], "time", "root mean square"))


def _losses(run: Run) -> Markup:
    rows = run.rows("evaluate")
    lines = [Line(points, colour, words) for colour, (name, words) in enumerate(LOSSES)
             if (points := _points(rows, name))]
    return line_chart(Plot("Loss of the mean model and of the peers' own", lines, "time", "loss", SECONDS,
                           metric_kind("loss"))) if len(lines) > 1 else Markup()


def _waiting(run: Run) -> Markup:
    """Draw the share of each step that the peers computed and waited."""
    computed: dict[int, float] = defaultdict(float)
    waited: dict[int, float] = defaultdict(float)
    ends: dict[int, float] = defaultdict(float)
    for row in run.timeline:
        step, end = row.get("base_version"), finite(row.get("end_s"))
        if isinstance(step, int) and end is not None:
            computed[step] += finite(row.get("compute_s")) or 0.0
            waited[step] += finite(row.get("upload_s")) or 0.0
            ends[step] = max(ends[step], end)
    points = [(ends[step], waited[step] / (waited[step] + computed[step])) for step in sorted(ends)
              if waited[step] + computed[step] > 0]
    return line_chart(Plot("Waiting that computing did not hide", [Line(points, 2)], "time", "share of a step",
                           SECONDS, SHARE, log_y=False)) if points else Markup()


def _by_peer(run: Run) -> list[Markup]:
    sent: dict[int, int] = defaultdict(int)
    made: dict[int, int] = defaultdict(int)
    for row in run.timeline:
        node = row.get("node")
        if isinstance(node, int):
            sent[node] += int(finite(row.get("bytes_up")) or 0)
            made[node] += int(finite(row.get("exchanges")) or 0)
    charts = []
    for title, counts, unit in (("Exchanges of each peer", made, "exchanges"),
                                ("Bytes sent by each peer", sent, "bytes")):
        if 0 < len(counts) <= MOST_PEERS and any(counts.values()):
            charts.append(histogram(title, [(str(node), counts[node]) for node in sorted(counts)], "peer", unit))
    return charts
