"""What a black-box run asked: the objective against what it cost, and who asked how much."""
from markupsafe import Markup

from fedcore.report.charts import Line, Plot, histogram, line_chart
from fedcore.report.facts import Facts
from fedcore.report.scales import BYTES, COUNT, metric_kind, metric_words
from fedcore.report.section import Section
from fedcore.runs import Row, Run, finite

# Figures of update rows that this section draws.
DRAWN = {"queries", "clients", "client_queries", "surrogate_error", "gradient_error", "value", "start_value",
         "surrogates"}
ERRORS = (("surrogate_error", "a client's estimate, against its own gradient"),
          ("gradient_error", "what it stepped along, against the mean's gradient"))


def queries(run: Run, facts: Facts) -> Section | None:
    """Return objective against queries, rounds and bytes, errors of estimates, and each client's queries."""
    rows = [row for row in run.rows("update") if finite(row.get("queries")) is not None]
    if not rows:
        return None
    made = {row.get("version"): row for row in rows}
    total = int(rows[-1]["queries"])
    intro = f"{total:,} evaluations of the clients' functions in {len(rows)} rounds."
    budget = _budget(run)
    if budget is not None:
        clients = max(1, len(rows[-1].get("client_queries") or ()))
        intro += f" The budget is {budget:,} for each client; {total / (budget * clients):.0%} of it is used."
    body = Markup('<div class="charts four">{}</div><div class="charts two">{}</div>').format(
        Markup().join(_objective(run, made)), Markup().join([*_errors(rows), *_by_client(rows[-1])]))
    return Section("queries", "Queries", body, intro)


def _objective(run: Run, made: dict[object, Row]) -> list[Markup]:
    """Draw what evaluations measured, or where nobody evaluated, what clients said."""
    points = [(row, value) for row in run.rows("evaluate") if (value := finite(row.get("loss"))) is not None]
    name = "loss"
    if len(points) < 2:
        # Finite differences know it at the point that a round began with.
        name = next((key for key in ("value", "start_value") if any(key in row for row in made.values())), "value")
        points = [(row, value) for row in made.values() if (value := finite(row.get(name))) is not None]
    charts = []
    for key, label, kind in (("queries", "queries of all clients", COUNT), ("round", "rounds", COUNT),
                             ("bytes", "bytes, up and down", BYTES)):
        line = [(at, value) for row, value in points if (at := _cost(row, made, key)) is not None]
        charts.append(line_chart(Plot(f"Objective over {label.split(',')[0]}", [Line(line, 1)], label,
                                      metric_words(name), kind, metric_kind(name), small=True)))
    return charts


def _cost(row: Row, made: dict[object, Row], key: str) -> float | None:
    """Return what was spent until a row; nothing before the first round."""
    if key == "bytes":
        up, down = finite(row.get("bytes_up")), finite(row.get("bytes_down"))
        return None if up is None or down is None else up + down
    if row.get("version") == 0:
        return 0.0
    return finite(made.get(row.get("version"), {}).get(key))


def _errors(rows: list[Row]) -> list[Markup]:
    lines = []
    for colour, (key, words) in enumerate(ERRORS):
        points = [(float(row["round"]), value) for row in rows if (value := finite(row.get(key))) is not None]
        if points:
            lines.append(Line(points, colour, words))
    if not lines:
        return []
    return [line_chart(Plot("Relative error of gradients", lines, "rounds", "error", COUNT, log_y=False))]


def _by_client(row: Row) -> list[Markup]:
    counts = row.get("client_queries") or []
    names = row.get("clients") or range(len(counts))
    pairs = [(str(name), int(count)) for name, count in zip(names, counts, strict=False)]
    return [histogram("Queries of each client", pairs, "client", "queries")] if pairs else []


def _budget(run: Run) -> int | None:
    task = run.config.get("task")
    budget = task.get("budget") if isinstance(task, dict) else None
    return budget if isinstance(budget, int) and budget > 0 else None
