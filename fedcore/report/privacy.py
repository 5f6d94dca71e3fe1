"""The privacy section of a report: what was spent, for whom, against whom, and what it bought."""
from typing import Any

from markupsafe import Markup

from fedcore.measures import smaller_is_better
from fedcore.privacy.words import ADVERSARIES, NOT_PROTECTED, RELATIONS, meaning
from fedcore.report.charts import Line, Plot, line_chart
from fedcore.report.facts import Facts
from fedcore.report.scales import COUNT, NUMBER, metric_kind, metric_words
from fedcore.report.section import Section, part
from fedcore.runs import Row, Run, finite

KEY, TITLE = "privacy", "Privacy spent"
# Rows of an update that this section draws; the section of other figures leaves them out.
FIGURES = frozenset(("epsilon", "noise_std", "clip_norm", "noise_multiplier", "restart"))
# Default of the settings that a promise is made of, where the experiment leaves them out.
DEFAULTS = {"noise_mode": "local", "neighbouring": "replace-one"}
SAMPLED = {"name": "dp_sgd", "neighbouring": "add-remove", "sample_rate": 0.1}


def privacy(run: Run, facts: Facts) -> Section | None:
    """Return the section of a run with a privacy budget, None for any other."""
    epsilon, delta = finite(run.summary.get("epsilon")), finite(run.summary.get("delta"))
    if epsilon is None or delta is None:
        return None
    settings = _settings(run)
    sampled = float(settings.get("sample_rate", 1.0)) < 1
    budget = finite(run.summary.get("epsilon_budget"))
    rows = [("epsilon spent", f"{epsilon:.4g}" + ("" if budget is None else f" of {budget:.4g}")),
            ("delta", f"{delta:g}"),
            ("for whom", "every single record of every client; the figure is that of the client that spent most"),
            ("against whom", ADVERSARIES.get(settings["noise_mode"], str(settings["noise_mode"]))),
            ("two data sets are neighbours when", RELATIONS.get(settings["neighbouring"], settings["neighbouring"])),
            ("accounting", "privacy loss distributions of sampled Gaussian releases (dp-accounting)" if sampled else
             "exact, as Gaussian releases compose (Gaussian differential privacy)"),
            ("releases about each client", f"{len(_spending(run)):,}"),
            ("clipped to", _clipping(settings))]
    charts = [chart for chart in (_epsilon_chart(run, budget), _noise_chart(run), *_utility_charts(run)) if chart]
    body = part("promise", rows=rows, paragraphs=[meaning(epsilon, delta, sampled), NOT_PROTECTED])
    if charts:
        body += Markup('<div class="charts two">{}</div>').format(Markup().join(charts))
    intro = (f"Everything that this run released about any one record is ({epsilon:.4g}, {delta:g})-differentially "
             "private." + ("" if budget is None or epsilon >= 0.999 * budget
                           else f" It was planned for epsilon {budget:.4g} and ended before."))
    return Section(KEY, TITLE, body, intro)


def _settings(run: Run) -> Row:
    given: Any = run.config.get("strategy")
    settings = dict(given) if isinstance(given, dict) else {"name": given}
    defaults = {**DEFAULTS, **(SAMPLED if settings.get("name") == SAMPLED["name"] else {})}
    return {**defaults, **settings}


def _clipping(settings: Row) -> str:
    given = f"gradients of {settings.get('clip_gradient', 1.0)}"
    if settings.get("name") in ("diff2", "dp_srm"):
        given += f", differences of {settings.get('clip_difference', 3.0)} times the step"
    return f"{given}, over all parameters of one record together"


def _spending(run: Run) -> list[Row]:
    """Return the rows of rounds in which the clients were asked for something."""
    return [row for row in run.metrics if row.get("event") in ("update", "log") and "epsilon" in row]


def _points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    found = [(finite(row.get("round")), finite(row.get(name))) for row in rows]
    return [(at, value) for at, value in found if at is not None and value is not None]


def _epsilon_chart(run: Run, budget: float | None) -> Markup:
    level = None if budget is None else (budget, f"budget {budget:.4g}")
    return line_chart(Plot("Epsilon spent over rounds", [Line(_points(_spending(run), "epsilon"), 3)], "round",
                           "epsilon", COUNT, NUMBER, level=level, log_y=False))


def _noise_chart(run: Run) -> Markup:
    rows = run.rows("update")
    lines = [Line(_points(rows, "clip_norm"), 0, "clip norm of one record"),
             Line(_points(rows, "noise_std"), 1, "noise on the mean, each coordinate")]
    return line_chart(Plot("Clip norm and noise", lines, "round", "gradient units", COUNT, NUMBER, log_y=True))


def _utility_charts(run: Run) -> list[Markup]:
    """Return what was measured, over the epsilon that had been spent by then."""
    spent = {row.get("version"): finite(row.get("epsilon")) for row in run.rows("update")}
    charts = []
    for metric in ("accuracy", "loss"):
        points = [(epsilon, value) for row in run.rows("evaluate")
                  if (epsilon := spent.get(row.get("version"))) is not None
                  and (value := finite(row.get(metric))) is not None]
        if len(points) > 1:
            words = metric_words(metric)
            charts.append(line_chart(Plot(
                f"{words.capitalize()} against epsilon", [Line(points, 0 if metric == "accuracy" else 1)],
                "epsilon spent", words, NUMBER, metric_kind(metric),
                log_y=None if smaller_is_better(metric) else False)))
    return charts
