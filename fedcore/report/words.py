"""A run told in sentences and key figures: what ran, why it stopped, what it cost, who waited."""
from dataclasses import dataclass

from fedcore.measures import smaller_is_better
from fedcore.report.facts import Client, Facts
from fedcore.report.scales import (
    count,
    data_size,
    figure,
    goal_words,
    metric_figure,
    metric_words,
    percent,
    seconds,
)
from fedcore.runs import Row, Run, best_of, finite, name_of, target_of

REAL_TIME_ENGINES = ("grpc", "superlink")
COUNTED = {"time_s", "wall_s", "versions", "client_updates", "client_steps", "bytes_up", "bytes_down", "final_loss",
           "final_accuracy", "best_accuracy", "time_to_target_s", "num_params", "failures", "refused", "lost", "late",
           "evaluations", "seed", "peak_rss_mb", "rounds"}
STOPPED = {"target": "The run stopped there.", "interrupted": "It was interrupted.",
           "error": "It ended with an error; the figures are those up to then.",
           "queries": "It stopped when a client had no queries left."}
SUMMARY_WORDS = {"epsilon": "privacy spent (ε)", "delta": "privacy (δ)", "queries": "function queries",
                 "gradients": "gradients", "exchanges": "exchanges", "consensus_distance": "consensus distance",
                 "excess_loss": "excess loss"}


@dataclass(frozen=True)
class Card:
    """One key figure: its value, what it is, and a remark under it."""

    value: str
    label: str
    remark: str = ""


def clock_of(run: Run) -> str:
    """Return what a run's clock is called: virtual time in simulation, time when it ran for real."""
    return "time" if run.summary.get("engine") in REAL_TIME_ENGINES else "virtual time"


def title_of(run: Run) -> tuple[str, str]:
    """Return the names of strategy and task, as the experiment spells them."""
    strategy = name_of(run.summary.get("strategy")) or name_of(run.config.get("strategy")) or "unnamed strategy"
    task = name_of(run.summary.get("task")) or name_of(run.config.get("task")) or "unnamed task"
    return strategy.rsplit(":", 1)[-1], task.rsplit(":", 1)[-1]


def main_metric(run: Run) -> str | None:
    """Return the metric that the report speaks of first: the target's, else accuracy, else loss, else any."""
    wanted = [*target_of(run.config), "accuracy", "excess_loss", "loss"]
    return next((metric for metric in wanted if best_of(metric, run.curve(metric)[1]) is not None), None)


def headline(run: Run) -> str:
    """Return the run in one line."""
    strategy, task = title_of(run)
    metric = main_metric(run)
    if metric is None:
        return f"{strategy} ran {task} for {seconds(finite(run.summary.get('time_s')))} of {clock_of(run)}"
    best = metric_figure(metric, best_of(metric, run.curve(metric)[1]))
    if smaller_is_better(metric):
        return f"{strategy} brought the {metric_words(metric)} on {task} down to {best}"
    return f"{strategy} reached {best} {metric_words(metric)} on {task}"


def opening(run: Run, facts: Facts) -> list[str]:
    """Return the sentences under the headline, each complete in itself."""
    return [line for line in (_what_ran(run, facts), _target(run), _why_stopped(run), _stragglers(facts, run),
                              _speeds(facts), _lost_work(facts)) if line]


def _what_ran(run: Run, facts: Facts) -> str:
    summary = run.summary
    clients = len(facts.clients)
    who = f"{clients} client{'s' if clients != 1 else ''}" if clients else "The clients"
    updates, steps = finite(summary.get("client_updates")), finite(summary.get("client_steps"))
    did = f" sent {count(updates)} update{'s' if updates != 1 else ''}" if updates is not None else " trained"
    did += f" ({count(steps)} local steps)" if steps else ""
    wall = finite(summary.get("wall_s"))
    took = f" in {seconds(finite(summary.get('time_s')))} of {clock_of(run)}"
    return f"{who}{did}{took}" + (f", computed in {seconds(wall)} of real time." if wall is not None else ".")


def _why_stopped(run: Run) -> str:
    if not run.finished:
        return "The run has no summary: it was killed or is still going, and these are its figures so far."
    reason = str(run.summary.get("stop_reason") or "")
    stop = run.config.get("stop")
    limit = finite(stop.get(reason)) if isinstance(stop, dict) else None
    if limit is not None:
        return "It stopped after " + (f"{seconds(limit)} of {clock_of(run)}" if reason == "seconds" else
                                      f"{count(limit)} {metric_words(reason)}") + ", as set."
    return STOPPED.get(reason, f"It stopped: {reason}." if reason else "")


def _target(run: Run) -> str:
    said = []
    for metric, value in target_of(run.config).items():
        reached = run.time_to(metric, value)
        words = goal_words(metric, value)
        said.append(f"The target, {words}, was met after {seconds(reached)}." if reached is not None
                    else f"The target, {words}, was not met.")
    return " ".join(said)


def _stragglers(facts: Facts, run: Run) -> str:
    """Return how the clients' time was spent; the sentence that tells synchronous from asynchronous methods."""
    spent = facts.spent
    if spent is None or spent.online <= 0:
        return ""
    sentence = (f"Clients spent {percent(spent.share('training'))} of their time training, "
                f"{percent(spent.share('transfer'))} sending and receiving, and "
                f"{percent(spent.share('waiting'))} waiting")
    waits = [client for client in facts.clients if client.spent is not None and client.spent.online > 0]
    most = max(waits, key=_waiting)
    if len(waits) > 1 and _waiting(most) > 0.05:
        sentence += f"; client {most.node} waited the most, {percent(_waiting(most))} of the run"
    return sentence + "."


def _waiting(client: Client) -> float:
    return client.spent.share("waiting") if client.spent is not None else 0.0


def _speeds(facts: Facts) -> str:
    pair = facts.slow_to_fast
    if pair is None:
        return ""
    slow, fast = pair[0].seconds_per_step or 0.0, pair[1].seconds_per_step or 1.0
    return (f"The slowest client ({pair[0].node}) needs {slow / fast:.3g} times as long per step as the fastest "
            f"({pair[1].node}): {seconds(slow)} against {seconds(fast)}.")


def _lost_work(facts: Facts) -> str:
    done = sum(client.steps for client in facts.clients)
    if not facts.lost_steps:
        return ""
    share = facts.lost_steps / (done + facts.lost_steps)
    return f"{percent(share)} of the local steps handed out were lost to failures, lost messages or refused replies."


def warnings_of(run: Run) -> list[str]:
    """Return what a reader must know before believing the figures."""
    said = [row["warning"] for row in run.rows("log") if "warning" in row]
    evaluations = run.rows("evaluate")
    broken = sum(any(metric in row and finite(row[metric]) is None for metric in ("loss", "accuracy"))
                 for row in evaluations)
    if broken:
        said.append(f"{broken} of {len(evaluations)} evaluations gave a value that is not a finite number: the "
                    "training diverged there, and the curves have gaps.")
    if not evaluations:
        said.append("Nothing was evaluated, so there are no learning curves and no best accuracy.")
    went_wrong = [f"{count(amount)} {one if amount == 1 else many} {what}" for event, one, many, what in (
        ("failure", "task", "tasks", "failed"), ("refused", "reply", "replies", "refused as malformed"))
        if (amount := len(run.rows(event)))]
    return [*said, " and ".join(went_wrong).capitalize() + "; see below."] if went_wrong else said


def cards(run: Run, facts: Facts) -> list[Card]:
    """Return the key figures, the most important first."""
    summary = run.summary
    accuracy, loss = best_of("accuracy", run.curve("accuracy")[1]), run.curve("loss")[1]
    shown = []
    if accuracy is not None:
        final = finite(summary.get("final_accuracy"))
        shown.append(Card(percent(accuracy), "best accuracy", "" if final is None else f"{percent(final)} at the end"))
    if loss:
        best = best_of("loss", loss)
        last = finite(loss[-1])
        shown.append(Card("not finite" if last is None else figure(last), "final loss", f"lowest {figure(best)}"))
    for metric, value in target_of(run.config).items():
        reached = run.time_to(metric, value)
        shown.append(Card(seconds(reached) if reached is not None else "not met",
                          f"to {goal_words(metric, value)}"))
    wall = finite(summary.get("wall_s"))
    shown.append(Card(seconds(finite(summary.get("time_s"))), clock_of(run),
                      f"{seconds(wall)} of real time" if wall is not None else ""))
    shown.append(Card(count(finite(summary.get("client_updates"))), "client updates",
                      f"{count(finite(summary.get('versions')))} model versions"))
    shown.append(Card(count(finite(summary.get("client_steps"))), "local steps"))
    shown.append(Card(data_size(finite(summary.get("bytes_up"))), "sent by clients",
                      f"{data_size(finite(summary.get('bytes_down')))} sent to them"))
    if facts.spent is not None and facts.spent.online > 0:
        shown.append(Card(percent(facts.spent.share("waiting")), "of client time waiting"))
    lost = sum(len(run.rows(event)) for event in ("failure", "refused"))
    if lost:
        shown.append(Card(count(lost), "failed or refused", "see Failures"))
    return shown + special_cards(summary)


def special_cards(summary: Row) -> list[Card]:
    """Return the figures that only some methods have: privacy, queries, exchanges, consensus, excess loss, ..."""
    shown = []
    for key, value in summary.items():
        as_float = finite(value)
        if key not in COUNTED and as_float is not None:
            words = count(as_float) if isinstance(value, int) else figure(as_float)
            shown.append(Card(words, SUMMARY_WORDS.get(key, metric_words(key))))
    return shown


def plain_rows(content: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted path, value) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            rows += plain_rows(value, f"{path}.")
        else:
            rows.append((path, figure(value) if isinstance(value, float) or value is None else str(value)))
    return rows
