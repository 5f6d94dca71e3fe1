"""`fedcore privacy`: what an experiment will spend, before anything runs."""
import typer

from fedcore.cli import Command, FileArgument, Overrides

EXAMPLES = """[bold]Examples[/]

fedcore privacy experiment.yaml

fedcore privacy experiment.yaml --set strategy.epsilon=1 --set stop.rounds=300
"""


def privacy(file: FileArgument, overrides: Overrides = None) -> None:
    """Print the privacy budget of an experiment: what is promised to whom, how much noise, and when it is spent."""
    from fedcore.budget_table import show_budget
    from fedcore.terminal import show_logs

    show_logs(verbose=False)
    show_budget(file, overrides or ())


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command(cls=Command, epilog=EXAMPLES)(privacy)
