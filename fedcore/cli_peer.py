"""`fedcore peer`: one peer of a run without a server."""
from pathlib import Path
from typing import Annotated

import typer

from fedcore.cli import Command, FileArgument, Overrides
from fedcore.cli_deploy import INSECURE, TlsOption
from fedcore.errors import BadInput

PEER_EXAMPLES = """[bold]Examples[/]

fedcore peer experiment.yaml --roster roster.yaml --name hospital-a --tls tls

fedcore peer experiment.yaml --roster roster.yaml --name hospital-a --tls tls --rejoin

torchrun --nproc-per-node 4 -m fedcore peer experiment.yaml --torch-distributed gloo --out runs/cluster

[bold]A roster[/] names the peers in the order of their partitions; every peer has the same:

run: night
peers:
- {name: hospital-a, address: "a.example.org:9444", fingerprint: 6f1c...}
- {name: hospital-b, address: "b.example.org:9444", fingerprint: 90de...}
"""


def peer(
    file: FileArgument,
    roster: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Who takes part, where each is reached, and the fingerprint of its certificate."
    )] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="This peer's name in the roster.")] = None,
    torch_distributed: Annotated[str | None, typer.Option(
        metavar="BACKEND", help="Instead of a roster: talk to the processes that torchrun started, by gloo or nccl."
    )] = None,
    tls: TlsOption = None,
    listen: Annotated[str | None, typer.Option(
        metavar="HOST:PORT", help="Where to listen, if not at the roster's address, e.g. 0.0.0.0:9444."
    )] = None,
    side_port: Annotated[int | None, typer.Option(
        min=1, max=65535, metavar="PORT", show_default=False,
        help="On which large vectors come, if the others can dial that too; else they come on the first port."
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
    from fedcore.terminal import show_logs

    show_logs(verbose)
    if torch_distributed is not None:
        if roster or name or tls or listen or side_port or rejoin:
            raise BadInput("torchrun says who takes part and connects them: --torch-distributed goes without --roster, "
                           "--name, --tls, --listen, --side-port and --rejoin.")
        from fedcore.cluster_peer import run_cluster_peer

        raise typer.Exit(run_cluster_peer(file, overrides or (), torch_distributed, out, resume))
    from fedcore.peer_commands import run_peer

    if roster is None or name is None:
        raise BadInput("Who takes part, and which of them is this? Give --roster FILE and --name NAME; or start all "
                       "peers with torchrun and --torch-distributed gloo.")
    raise typer.Exit(run_peer(file, overrides or (), roster, name, tls, insecure, (listen, side_port or 0), out, resume,
                            rejoin))


def add_commands(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command, epilog=PEER_EXAMPLES)(peer)
