"""`fedcore server`, `fedcore client` and `fedcore status`: a federation on separate machines."""
import contextlib
from pathlib import Path
from typing import Annotated

import typer

from fedcore.cli import Command, FileArgument, Overrides
from fedcore.transport.handshakes import Overheard

TlsOption = Annotated[Path | None, typer.Option(
    "--tls", metavar="DIR", show_default=False, help="Certificates and key, made with [bold]fedcore certs[/]."
)]
ServerOption = Annotated[str, typer.Option(
    "--server", metavar="HOST:PORT", show_default=False, help="Where the server listens."
)]
INSECURE = "Without encryption, and everybody is believed: for tests on one machine only."

SERVER_EXAMPLES = """[bold]Examples[/]

fedcore server experiment.yaml --listen 0.0.0.0:9400 --tls server-tls

fedcore server experiment.yaml --listen 0.0.0.0:9400 --tls server-tls --out runs/night --dashboard 8080

fedcore server --resume runs/night --listen 0.0.0.0:9400 --tls server-tls

fedcore server experiment.yaml --listen 127.0.0.1:9400 --insecure
"""


def server(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", show_default=False)] = None,
    listen: Annotated[str, typer.Option(
        metavar="HOST:PORT", help="Where clients dial in; 0.0.0.0 for every network of this machine."
    )] = "127.0.0.1:9400",
    tls: TlsOption = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Folder for the results; new or empty. Without it, a new one below runs/."
    )] = None,
    resume: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Continue the run in this folder; clients come back by themselves."
    )] = None,
    dashboard: Annotated[int | None, typer.Option(
        metavar="PORT", min=1, max=65535, help="Serve a live page on 127.0.0.1:PORT."
    )] = None,
    insecure: Annotated[int, typer.Option(
        "--insecure", count=True, help=f"{INSECURE} Give it twice to listen on more than loopback."
    )] = 0,
    observer: Annotated[list[str] | None, typer.Option(
        metavar="NAME", help="Let the holder of this node's certificate see everybody's state (fedcore status)."
    )] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what fedcore and Flower log.")] = False,
) -> None:
    """Wait for the clients of an experiment, train with them, and write the same folder as a simulation.

    The clients dial in. The run is saved while it goes on; after a crash, --resume continues it without losing or
    repeating anything. SIGTERM or Ctrl-C saves and ends it.

    Exit status: 0 done, 1 failed, 2 bad input, 3 stopped without reaching a demanded target, 130 interrupted.
    """
    from fedcore.terminal import show_logs

    show_logs(verbose)
    if resume is None and file is None:
        raise typer.BadParameter("name an experiment file, or a run with --resume DIR", param_hint="FILE")
    if resume is not None and (file is not None or out is not None):
        raise typer.BadParameter("the folder has its own experiment: leave out FILE and --out", param_hint="--resume")
    with contextlib.ExitStack() as stack:
        # Before anything imports gRPC, which says who failed to shake hands only if it is asked for that first.
        overheard = None if tls is None else stack.enter_context(Overheard())
        from fedcore.deploy_commands import ServerSettings, run_server

        settings = ServerSettings(listen, tls, insecure, dashboard, tuple(observer or ()), overheard)
        raise typer.Exit(run_server(file, overrides or (), out, resume, settings, ctx.meta))


CLIENT_EXAMPLES = """[bold]Examples[/]

fedcore client experiment.yaml --server fl.example.org:9400 --tls tls --node-config partition-id=0

fedcore client experiment.yaml --server fl.example.org:9400 --tls tls --node-config site=records.npz

fedcore client experiment.yaml --server 127.0.0.1:9400 --insecure --name site-0 --node-config partition-id=0

[bold]Strategies of peers[/] (noloco, diloco, co2, dadao, ...): clients dial each other, too.

fedcore client experiment.yaml --server fl.example.org:9400 --tls tls --node-config partition-id=0 \
--peer-listen 0.0.0.0:9444 --peer-advertise a.example.org:9444
"""


def client(
    file: FileArgument,
    server: ServerOption,
    tls: TlsOption = None,
    overrides: Overrides = None,
    node_config: Annotated[list[str] | None, typer.Option(
        metavar="KEY=VALUE ...", help="Whose data this node holds: partition-id=NUMBER, or site=PATH of its own data; "
                                      "may be repeated."
    )] = None,
    state: Annotated[Path, typer.Option(
        metavar="DIR", help="Where this client keeps what it must not forget. Give each client one of its own."
    )] = Path("fedcore-state"),
    name: Annotated[str | None, typer.Option(
        metavar="NAME", show_default=False, help="What the server calls this client; with --tls, its certificate says."
    )] = None,
    allow: Annotated[list[str] | None, typer.Option(
        metavar="ACTION", help="Do only this for the server, e.g. [bold]train[/]; may be repeated. Without it, all "
                               "that the experiment's client can do."
    )] = None,
    max_local_steps: Annotated[int | None, typer.Option(
        min=1, metavar="N", help="Refuse tasks of more local steps."
    )] = None,
    max_seconds: Annotated[float | None, typer.Option(
        min=0.001, metavar="S", help="Refuse further work after so many seconds of computing."
    )] = None,
    max_megabytes: Annotated[float | None, typer.Option(
        min=0.001, metavar="MB", help="Refuse messages larger than this."
    )] = None,
    peer_listen: Annotated[str | None, typer.Option(
        metavar="HOST:PORT", show_default=False, help="Strategies of peers: where this client listens to the others."
    )] = None,
    peer_advertise: Annotated[str | None, typer.Option(
        metavar="HOST:PORT", show_default=False, help="Where the others dial it, if that is another address."
    )] = None,
    peer_side_port: Annotated[int | None, typer.Option(
        min=1, max=65535, metavar="PORT", show_default=False,
        help="On which large vectors come, if the others can dial that too; else they come on the first port."
    )] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help=INSECURE)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what fedcore and Flower log.")] = False,
) -> None:
    """Train for a server, with the task and the settings of this machine's own FILE.

    The client dials out, and comes back by itself after a lost connection or a restart of the server. The server never
    sends code: what runs here is what FILE names. SIGTERM or Ctrl-C ends it after the present task.

    Exit status: 0 the run is over, 1 failed, 2 bad input, 130 interrupted.
    """
    from fedcore.deploy_commands import ClientSettings, run_client
    from fedcore.terminal import show_logs

    show_logs(verbose)
    settings = ClientSettings(
        server, tls, insecure, name, tuple(node_config or ()), state, None if allow is None else tuple(allow),
        max_local_steps, max_seconds, max_megabytes, peer_listen, peer_advertise, peer_side_port,
    )
    raise typer.Exit(run_client(file, overrides or (), settings))


STATUS_EXAMPLES = """[bold]Examples[/]

fedcore status --server fl.example.org:9400 --tls tls

watch fedcore status --server 127.0.0.1:9400 --insecure
"""


def status(
    server: ServerOption = "127.0.0.1:9400",
    tls: TlsOption = None,
    insecure: Annotated[bool, typer.Option("--insecure", help=INSECURE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show who is connected to a server, what each does since when, versions, rates and bytes."""
    from fedcore.deploy_commands import show_status

    show_status(server, tls, insecure, as_json)


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(cls=Command, epilog=SERVER_EXAMPLES)(server)
    app.command(cls=Command, epilog=CLIENT_EXAMPLES)(client)
    app.command(cls=Command, epilog=STATUS_EXAMPLES)(status)
