"""`fedcore peer`: one peer of a run without a server."""
from pathlib import Path
from typing import Annotated

import typer

from fedcore.cli import Command, FileArgument, Overrides
from fedcore.cli_deploy import INSECURE, TlsOption

PEER_EXAMPLES = """[bold]Examples[/]

fedcore peer experiment.yaml --roster roster.yaml --name hospital-a --tls tls

fedcore peer experiment.yaml --roster roster.yaml --name hospital-a --tls tls --rejoin

[bold]A roster[/] names the peers in the order of their partitions; every peer has the same:

run: night
peers:
- {name: hospital-a, address: "a.example.org:9444", fingerprint: 6f1c...}
- {name: hospital-b, address: "b.example.org:9444", fingerprint: 90de...}
"""


def peer(
    file: FileArgument,
    roster: Annotated[Path, typer.Option(
        metavar="FILE", help="Who takes part, where each is reached, and the fingerprint of its certificate."
    )],
    name: Annotated[str, typer.Option(metavar="NAME", help="This peer's name in the roster.")],
    tls: TlsOption = None,
    listen: Annotated[str | None, typer.Option(
        metavar="HOST:PORT", help="Where to listen, if not at the roster's address, e.g. 0.0.0.0:9444."
    )] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Folder for this peer's results; new or empty. Without it, a new one below runs/."
    )] = None,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Continue from the checkpoint in --out; all peers must, from the same step."
    )] = False,
    rejoin: Annotated[bool, typer.Option(
        "--rejoin", help="Start from what a living peer has: this one was away."
    )] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help=INSECURE)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what fedcore logs.")] = False,
) -> None:
    """Take part in a run of peers that talk to each other, without a server.

    Every peer is started with the same experiment and the same roster. It begins once all are there.

    Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.
    """
    from fedcore.peer_commands import run_peer
    from fedcore.terminal import show_logs

    show_logs(verbose)
    raise typer.Exit(run_peer(file, overrides or (), roster, name, tls, insecure, listen, out, resume, rejoin))


def add_commands(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command, epilog=PEER_EXAMPLES)(peer)
