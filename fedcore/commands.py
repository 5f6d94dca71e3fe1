"""What the commands do, after the command line has been read."""
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.syntax import Syntax

from fedcore.cli import DONE, FOLDER, INTERRUPTED, TARGET_MISSED
from fedcore.config import Experiment, Part, load_experiment
from fedcore.errors import BadInput, InvalidSetting, StoppedEarly
from fedcore.progress import Figures, Progress
from fedcore.recorder import CHECKPOINTS_FOLDER, CONFIG_FILE, REPORT_FILE
from fedcore.report import comparison_rows, write_comparison, write_report
from fedcore.report.scales import count, data_size, goal_words, metric_figure, percent, seconds
from fedcore.runs import Run
from fedcore.terminal import make_console, pairs, plain_spaces, table

MOST_SIZED_CLIENTS = 10_000     # beyond so many clients `check` does not look at each one's data
BYTES_PER_MBIT = 125_000


def run_experiment(
    file: Path | None, overrides: Sequence[str], out: Path | None, workers: int, resume: Path | None,
    meta: MutableMapping[str, Any],
) -> int:
    """Run or resume an experiment with progress and a summary; returns the exit status.

    Args:
        meta: gets the run's folder, for whoever reports a defect.
    """
    from fedcore.launch import new_folder
    from fedcore.simulations.run import run_until_asked

    console = make_console()
    if resume is not None:
        experiment, folder = of_folder(resume, overrides), resume
    else:
        assert file is not None
        experiment = load_experiment(file, overrides)
        folder = new_folder(out, experiment)
    meta[FOLDER] = folder
    if resume is None:      # the settings of a run folder are complete, so none of them says what was meant
        show_warnings(experiment)
    console.print(f"{experiment.strategy_name} on {experiment.task_name}, {experiment.clients.count} clients, "
                  f"seed {experiment.seed}: {folder}", markup=False, soft_wrap=True)
    with ending_well(console, folder, "fedcore simulate"), Progress.of(console, experiment) as progress:
        run, _ = run_until_asked(None if resume else experiment, None if resume else folder, workers, resume,
                                 progress.on_row, overrides if resume else ())
    return conclude(console, run)


@contextmanager
def ending_well(console: Console, folder: Path, command: str) -> Iterator[None]:
    """Say, however a run ends, what is left of it and how to go on.

    Args:
        command: that continues it.
    """
    try:
        yield
    except BadInput:
        remove_if_empty(folder)
        raise
    except StoppedEarly:
        raise
    except KeyboardInterrupt:
        console.print(f"Stopped at once. Continue from its last checkpoint: {command} --resume {folder}",
                      markup=False, soft_wrap=True)
        raise
    except Exception:
        if (folder / CONFIG_FILE).is_file():
            console.print(f"What was done until then: {write_report(folder)}", markup=False, soft_wrap=True)
        raise


def of_folder(folder: Path, overrides: Sequence[str], part: Part = "all") -> Experiment:
    """Return the experiment of a run's folder.

    Raises:
        BadInput: it is none.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise BadInput(f"{folder} is not a run folder: it has no {CONFIG_FILE}. Give the folder of an earlier run.")
    return load_experiment(folder / CONFIG_FILE, overrides, part)


def show_warnings(experiment: Experiment) -> None:
    """Print what is allowed and probably not meant."""
    console = make_console(stderr=True)
    for warning in experiment.warnings:
        console.print(f"Note: {warning}", style="yellow", markup=False, soft_wrap=True)


def remove_if_empty(folder: Path) -> None:
    """Take back a run's folder to which nothing was written."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def conclude(console: Console, run: Run) -> int:
    """Print how a run ended; returns the exit status."""
    summary = run.summary
    rows = [(plain_spaces(name), plain_spaces(value)) for name, value in summary_rows(summary)]
    console.print()
    console.print(pairs(rows))
    console.print(f"\nreport: {run.folder / REPORT_FILE}", markup=False, soft_wrap=True)
    if summary.get("stop_reason") == "interrupted":
        if (run.folder / CHECKPOINTS_FOLDER).is_dir():
            again = "fedcore server" if summary.get("engine") == "grpc" else "fedcore simulate"
            console.print(f"continue: {again} --resume {run.folder}", markup=False, soft_wrap=True)
        return INTERRUPTED
    target = summary.get("target") or {}
    if target and summary.get("time_to_target_s") is None:
        wanted = " and ".join(goal_words(metric, value) for metric, value in target.items())
        console.print(plain_spaces(f"The target was not reached: {wanted}."), style="yellow", markup=False)
        return TARGET_MISSED
    return DONE


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a run that its last screen shows, as pairs of texts."""
    reasons = {"target": "the target is reached", "seconds": "the time is over", "rounds": "all rounds are done",
               "client_updates": "all client updates are done", "interrupted": "it was interrupted",
               "finished": "the app has finished", "budget": "the privacy budget is spent",
               "diverged": "the steps were too long", "queries": "a client has no queries left"}
    reason = str(summary.get("stop_reason"))
    rows = [
        ("stopped because", reasons.get(reason, reason)),
        ("virtual time", f"{seconds(summary.get('time_s'))} (computed in {seconds(summary.get('wall_s'))})")
        if summary.get("engine", "virtual") == "virtual" else ("time", seconds(summary.get("time_s"))),
        ("versions", count(summary.get("versions"))),
        ("client updates",
         f"{count(summary.get('client_updates'))} ({count(summary.get('client_steps'))} local steps)"),
        ("bytes", f"{data_size(summary.get('bytes_up'))} up, {data_size(summary.get('bytes_down'))} down"),
    ]
    for metric in ("loss", "accuracy"):
        if (final := summary.get(f"final_{metric}")) is not None:
            best = summary.get(f"best_{metric}")
            text = metric_figure(metric, final) + (f" (best {metric_figure(metric, best)})" if best is not None else "")
            rows.append((f"final {metric}", text))
    if (epsilon := summary.get("epsilon")) is not None and (delta := summary.get("delta")) is not None:
        rows.append(("privacy spent", f"epsilon {epsilon:.4g} at delta {delta:g}"))
    if (excess := summary.get("excess_loss")) is not None:
        rows.append(("excess loss", metric_figure("excess_loss", excess)))
    for metric, value in (summary.get("target") or {}).items():
        rows.append((f"time to {goal_words(metric, value)}", seconds(summary.get("time_to_target_s"))))
    troubles = {name: summary.get(name) for name in ("failures", "refused", "lost", "late") if summary.get(name)}
    if troubles:
        rows.append(("went wrong", ", ".join(f"{count(number)} {name}" for name, number in troubles.items())))
    return rows


def run_flower_app(
    app: Path, file: Path | None, overrides: Sequence[str], out: Path | None, workers: int
) -> int:
    """Run a stranger's Flower app in virtual time; returns the exit status."""
    from fedcore.simulations.flower_app import simulate_app

    console = make_console()
    with Progress(console, f"Flower app {app.resolve().name}", Figures({})) as progress:
        run = simulate_app(app, file, out=out, workers=workers, overrides=overrides, on_row=progress.on_row)
    return conclude(console, run)


def check_experiment_file(file: Path, overrides: Sequence[str]) -> None:
    """Print what an experiment file means, without running it."""
    experiment = load_experiment(file, overrides)
    rows = [(name, plain_spaces(text)) for name, text in _facts(experiment)]
    console = make_console()
    settings = yaml.safe_dump(experiment.resolved(), sort_keys=False, default_flow_style=None, width=100)
    if console.is_terminal:
        console.print(Syntax(settings, "yaml", background_color="default"))
    else:
        console.print(settings, markup=False, soft_wrap=True, end="")
    console.print()
    console.print(pairs(rows))
    show_warnings(experiment)
    console.print(f"\n{file} can be run: fedcore simulate {file}", markup=False, soft_wrap=True)


def _facts(experiment: Experiment) -> list[tuple[str, str]]:
    """Return what follows from an experiment's settings: its model, the clients' data, speeds and links."""
    from fedcore.clients.build import build_task, train_settings
    from fedcore.clients.modules import initial_model
    from fedcore.simulations.devices import Devices

    clients = experiment.clients.count
    task = build_task(experiment)
    layout = initial_model(task, experiment.seed, train_settings(experiment).torch_dtype).layout
    rows = [("model", f"{count(layout.num_params)} parameters, {data_size(layout.num_bytes)}")]
    if clients <= MOST_SIZED_CLIENTS:
        sizes = sorted(len(task.data(partition)) for partition in range(clients))
        rows.append(("examples per client", f"{count(sizes[0])} to {count(sizes[-1])}, "
                                            f"median {count(sizes[clients // 2])}, {count(sum(sizes))} together"))
        devices = Devices.from_settings(experiment.simulation.devices.model_dump(), experiment.seed, clients)
        speeds = sorted(devices.seconds_per_step(partition) for partition in range(clients))
        rows.append(("seconds per local step", f"{seconds(speeds[0])} to {seconds(speeds[-1])}, "
                                               f"median {seconds(speeds[clients // 2])}"))
    uplink = experiment.simulation.network.uplink_mbps
    if isinstance(uplink, (int, float)):
        rows.append(("upload of one model", seconds(layout.num_bytes / (uplink * BYTES_PER_MBIT))))
    return rows


def compare_runs(folders: Sequence[Path], out: Path, target: str | None) -> None:
    """Print a table of what each run needed, and write the page that overlays them."""
    wanted = None if target is None else _target(target)
    rows = comparison_rows(folders, wanted)
    console = make_console()
    goal = rows[0]["target"]
    to_goal = "to target" if goal is None else f"to {goal}"
    cells = []
    for row in rows:
        reached = "" if row["reached"] == row["runs"] else f" ({row['reached']} of {row['runs']})"
        cells.append([plain_spaces(text) for text in (
            row["label"], str(row["runs"]), seconds(row["time_to_target_s"]) + (reached if goal else ""),
            count(row["updates_to_target"]), data_size(row["bytes_to_target"]), percent(row["best_accuracy"]),
        )])
    columns = ("experiment", "runs", f"time {to_goal}", "updates", "bytes", "best accuracy")
    console.print(table(None, [plain_spaces(column) for column in columns], cells, right=(1, 2, 3, 4, 5)))
    if any(row["runs"] > 1 for row in rows):
        console.print("Medians over the seeds.")
    console.print(f"\ncomparison: {write_comparison(folders, out, wanted)}", markup=False, soft_wrap=True)


def _target(text: str) -> dict[str, float]:
    metric, equals, value = text.partition("=")
    advice = "For example accuracy=0.9."
    if not equals or not metric:
        raise InvalidSetting("--target", text, "of the form metric=value", advice)
    try:
        return {metric: float(value)}
    except ValueError as error:
        raise InvalidSetting("--target", text, "of the form metric=value, with a number", advice) from error
