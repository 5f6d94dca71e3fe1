"""What compression saved and what it cost: bytes each way, learning against bytes, and what payloads left out."""
from markupsafe import Markup

from fedcore.report.charts import Line, Plot, line_chart
from fedcore.report.facts import Facts
from fedcore.report.scales import BYTES, COUNT, SECONDS, SHARE, Scale, metric_kind, metric_words
from fedcore.report.section import Section
from fedcore.report.words import clock_of
from fedcore.runs import Row, Run, finite

ERROR, MISMATCH = "compression_error", "h_mismatch"
ITEM_BYTES = {"float32": 4, "float64": 8}


def compression(run: Run, facts: Facts) -> Section | None:
    """Return the section; None for runs whose clients compressed nothing."""
    rows = [row for row in run.rows("update") if finite(row.get(ERROR)) is not None]
    if not rows:
        return None
    charts = [_traffic(run), *(_learning(run, metric) for metric in ("accuracy", "loss")), _left_out(rows)]
    body = Markup('<div class="charts two">{}</div>').format(Markup().join(chart for chart in charts if chart))
    return Section("compression", "Compression", body, " ".join([_saved(run), _agreed(run)]).strip())


def _saved(run: Run) -> str:
    """Return how many bytes went each way, and how many the same updates would have been."""
    up, down = (finite(run.summary.get(f"bytes_{way}")) for way in ("up", "down"))
    if up is None or down is None:
        return ""
    words = f"Clients sent {_size(up)} and received {_size(down)}, headers and everything else included."
    size, updates = finite(run.summary.get("num_params")), finite(run.summary.get("client_updates"))
    train = run.config.get("train")
    item = ITEM_BYTES.get(str(train.get("dtype")), 0) if isinstance(train, dict) else 0
    if size and updates and item and up:
        whole = size * updates * item
        words += (f" Their {updates:,.0f} updates hold {_size(whole)} of parameters: {whole / up:.3g} times what was "
                  "sent up.")
    return words


def _agreed(run: Run) -> str:
    """Return whether server and clients always held the same gradient estimates, where the method has any."""
    counts = [count for row in run.rows("update") if (count := finite(row.get(MISMATCH))) is not None]
    if not counts:
        return ""
    total = int(finite(run.summary.get(MISMATCH)) or sum(counts))
    if total == 0:
        return "Server and clients held the same gradient estimates in every round (h mismatch 0)."
    return (f"In {total} cases a client's gradient estimate was not the server's (h mismatch {total}, where 0 is "
            "right); its answer was refused, and it began anew.")


def _size(amount: float) -> str:
    unit, name = Scale(0.0, max(amount, 1.0), BYTES).unit
    return f"{amount / unit:.4g} {name}"


def _traffic(run: Run) -> Markup:
    lines = []
    for index, (way, words) in enumerate((("bytes_up", "up"), ("bytes_down", "down"))):
        points = [(at, amount) for row in run.rows("update") if (at := finite(row.get("time_s"))) is not None
                  and (amount := finite(row.get(way))) is not None]
        lines.append(Line(points, index, words))
    clock = clock_of(run)
    return line_chart(Plot(f"Bytes over {clock}", lines, clock, "bytes in all", SECONDS, BYTES))


def _learning(run: Run, metric: str) -> Markup:
    sent, values = run.curve(metric, "bytes_up")
    words = metric_words(metric)
    line = Line(list(zip(sent, values, strict=True)), 0 if metric != "loss" else 1)
    return line_chart(Plot(f"{words.capitalize()} over bytes up", [line], "bytes up", words, BYTES,
                           metric_kind(metric)))


def _left_out(rows: list[Row]) -> Markup:
    points = [(at, error) for row in rows if (at := finite(row.get("version"))) is not None
              and (error := finite(row.get(ERROR))) is not None]
    return line_chart(Plot("Compression error", [Line(points, 2)], "version",
                           "squared norm that payloads left out", COUNT, SHARE, log_y=False))
