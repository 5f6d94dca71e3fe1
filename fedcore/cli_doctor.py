"""`fedcore doctor`: why a client cannot reach its server."""
from pathlib import Path
from typing import Annotated

import typer

from fedcore.cli import DONE, FAILED, Command

EXAMPLES = """[bold]Examples[/]

fedcore doctor --server fl.example.org:9400 --tls tls

fedcore doctor --server 127.0.0.1:9400 --insecure
"""


def doctor(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", show_default=False, help="Where the server listens.")],
    tls: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default=False, help="This node's certificates and key."
    )] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="The server speaks in clear.")] = False,
) -> None:
    """Say which link of the chain between this node and a server is broken, and what to do about it.

    One after the other: the TLS folder, the server's name, its port, its certificate, whether it accepts ours, the
    clocks, the versions.

    Exit status: 0 all is well (there may be warnings), 1 something is broken, 2 bad input.
    """
    from fedcore.deploy import Address
    from fedcore.doctor import show_diagnosis

    if (tls is None) != insecure:
        raise typer.BadParameter("give --tls DIR, or --insecure for a server that speaks in clear", param_hint="--tls")
    raise typer.Exit(DONE if show_diagnosis(Address.of("--server", server), tls) else FAILED)


def add_commands(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command, epilog=EXAMPLES)(doctor)
