"""The command `fedcore`. Everything it does is a Python call too; heavy imports wait until a command needs them.

Exit status: 0 done, 1 failed, 2 bad input, 3 stopped without reaching a demanded target, 130 interrupted.
"""
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from fedcore import __version__
from fedcore.errors import BadInput, FedcoreError

DONE, FAILED, BAD_INPUT, TARGET_MISSED, INTERRUPTED = 0, 1, 2, 3, 130
ERROR_LOG = "error.log"
FOLDER = "fedcore.folder"       # where a command says which run folder it writes

ARGUMENT_HELP: dict[str, str] = {
    "file": "The experiment, a YAML file.",
    "kind": "strategies, tasks, partitions, models, ...; without it, all kinds.",
    "name": "One of them, with all its settings.",
    "runs": "Folders of runs.",
    "folder": "The folder to write: new or empty.",
}


class Command(TyperCommand):
    """A command whose arguments are explained."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # From click 8.5 on, its constructor wipes out the help that typer 0.20 has just set.
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.help = ARGUMENT_HELP[str(parameter.name)]


class Commands(TyperGroup):
    """Commands whose errors are a message and an exit status, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BadInput as error:
            self._fail(error, BAD_INPUT, ctx)
        except FedcoreError as error:
            self._fail(error, FAILED, ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:      # a defect, ours or of the user's own classes: the traceback goes to a file
            self._report_defect(error, ctx)

    @staticmethod
    def _fail(error: FedcoreError, status: int, ctx: click.Context) -> None:
        from fedcore.terminal import one_screen, show_error

        text = one_screen(error)
        if FOLDER in ctx.meta and "\n...\n" in text:
            text += f"\nThe full message is in {_write_log(str(error), ctx)}."
        show_error(text)
        raise typer.Exit(status) from None

    @staticmethod
    def _report_defect(error: Exception, ctx: click.Context) -> None:
        import traceback

        from fedcore.terminal import show_error

        log = _write_log("".join(traceback.format_exception(error)), ctx)
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        place = traceback.extract_tb(error.__traceback__)[-1]
        show_error(f"{type(error).__name__}: {last[:400]} ({place.filename}, line {place.lineno})\n"
                   f"The full traceback is in {log}.")
        raise typer.Exit(FAILED) from None


def _write_log(text: str, ctx: click.Context) -> Path:
    """Write what is too long for a screen into the run's folder, or where the command was given."""
    log = Path(ctx.meta.get(FOLDER, ".")) / ERROR_LOG
    log.write_text(text, encoding="utf-8")
    return log


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    suggest_commands=False,     # click does
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with [bold]fedcore simulate examples/quickstart/experiment.yaml[/]; "
           "[bold]fedcore COMMAND --help[/] explains each command.",
)

Overrides = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Change a setting of the file, e.g. [bold]train.lr=0.1[/]; may be repeated."
)]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", show_default=False)]
RunArguments = Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedcore {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    )] = False,
) -> None:
    """Federated training on Flower: one algorithm, written once, runs simulated, deployed and peer to peer."""


SIMULATE_EXAMPLES = """[bold]Examples[/]

fedcore simulate experiment.yaml

fedcore simulate experiment.yaml --set strategy=fedavg --set seed=1 --out runs/fedavg

fedcore simulate --resume runs/fedavg

fedcore simulate --flower-app my_app
"""


@app.command(cls=Command, epilog=SIMULATE_EXAMPLES)
def simulate(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", show_default=False)] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Folder for the results; new or empty. Without it, a new one below runs/."
    )] = None,
    workers: Annotated[int, typer.Option(
        min=0, metavar="N", help="Processes that compute clients' work besides this one; results are the same."
    )] = 0,
    resume: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Continue the run in this folder, to the same result as a run that never stopped."
    )] = None,
    flower_app: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Run this unmodified Flower app; FILE may give devices and network."
    )] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what fedcore and Flower log.")] = False,
) -> None:
    """Run a federation in virtual time, and write metrics, timeline, model and report into a folder.

    Exit status: 0 done, 1 failed, 2 bad input, 3 stopped without reaching a demanded target, 130 interrupted.
    """
    from fedcore.terminal import show_logs

    show_logs(verbose)
    if flower_app is not None:
        if resume is not None:
            raise typer.BadParameter("a Flower app's run cannot be resumed", param_hint="--resume")
        from fedcore.commands import run_flower_app

        raise typer.Exit(run_flower_app(flower_app, file, overrides or (), out, workers))
    if resume is None and file is None:
        raise typer.BadParameter("name an experiment file, or a run with --resume DIR", param_hint="FILE")
    if resume is not None and (file is not None or out is not None):
        raise typer.BadParameter("the folder has its own experiment: leave out FILE and --out", param_hint="--resume")
    from fedcore.commands import run_experiment

    raise typer.Exit(run_experiment(file, overrides or (), out, workers, resume, ctx.meta))


LIST_EXAMPLES = """[bold]Examples[/]

fedcore list

fedcore list strategies

fedcore list strategies fedbuff
"""


@app.command(name="list", cls=Command, epilog=LIST_EXAMPLES)
def list_plugins(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", show_default=False)] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None,
) -> None:
    """List what can be named in an experiment file, or all settings of one NAME."""
    from fedcore.listing import show_kind, show_kinds, show_plugin
    from fedcore.terminal import make_console

    console = make_console()
    if kind is None:
        show_kinds(console)
    elif name is None:
        show_kind(console, kind)
    else:
        show_plugin(console, kind, name)


CHECK_EXAMPLES = """[bold]Examples[/]

fedcore check experiment.yaml

fedcore check experiment.yaml --set clients.count=100
"""


@app.command(cls=Command, epilog=CHECK_EXAMPLES)
def check(file: FileArgument, overrides: Overrides = None) -> None:
    """Check an experiment without running it, and show all its settings, its model and who has how much data."""
    from fedcore.commands import check_experiment_file
    from fedcore.terminal import show_logs

    show_logs(verbose=False)
    check_experiment_file(file, overrides or ())


COMPARE_EXAMPLES = """[bold]Examples[/]

fedcore compare runs/fedavg runs/fedcompass

fedcore compare runs/* --target accuracy=0.95 --out comparison.html
"""


@app.command(cls=Command, epilog=COMPARE_EXAMPLES)
def compare(
    runs: RunArguments,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("compare.html"),
    target: Annotated[str | None, typer.Option(
        metavar="METRIC=VALUE", help="What the runs are timed to, e.g. [bold]accuracy=0.9[/]."
    )] = None,
) -> None:
    """Print what each run needed to reach a target, and write a page that overlays the runs."""
    from fedcore.commands import compare_runs

    compare_runs(runs, out, target)


@app.command(cls=Command, epilog="[bold]Example[/]\n\nfedcore report runs/digits-fedavg-seed0-1")
def report(
    runs: RunArguments,
) -> None:
    """Write report.html again, into each run's folder; a run that was killed gets one too."""
    from fedcore.report import write_report

    for folder in runs:
        typer.echo(write_report(folder))


EXPORT_EXAMPLES = """[bold]Examples[/]

fedcore export-app experiment.yaml my-app

flwr run my-app my-superlink --stream
"""


@app.command(name="export-app", cls=Command, epilog=EXPORT_EXAMPLES)
def export_app(
    file: FileArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Write an experiment as a Flower app, for `flwr run` on a SuperLink or in Flower's simulation."""
    from fedcore.export import export_app as export
    from fedcore.terminal import show_logs

    show_logs(verbose=False)
    export(file, folder, overrides or ())
    typer.echo(f"wrote {folder}: see {folder / 'README.md'}")


from fedcore.cli_certs import app as certs_app  # noqa: E402 (they need what is above)
from fedcore.cli_deploy import add_commands as add_deploy_commands  # noqa: E402
from fedcore.cli_doctor import add_commands as add_doctor  # noqa: E402
from fedcore.cli_peer import add_commands as add_peer_commands  # noqa: E402
from fedcore.cli_privacy import add_commands as add_privacy_commands  # noqa: E402

app.add_typer(certs_app)
add_doctor(app)
add_deploy_commands(app)
add_privacy_commands(app)
add_peer_commands(app)


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[None]:
    """End quietly when whoever reads our output has left (`fedcore list strategies | head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None


def main() -> None:
    """Run the command line."""
    # Both would wait for a network that a simulation does not need.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with _quiet_pipe():
        app(prog_name="fedcore")
