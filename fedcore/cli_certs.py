"""`fedcore certs`: who may take part in a federation."""
from pathlib import Path
from typing import Annotated

import typer

from fedcore.cli import ARGUMENT_HELP, DONE, FAILED, Command

ARGUMENT_HELP.update({
    "request": "The node's signing request, a .csr file; without it, a key is made here (see --name).",
    "what": "A TLS folder, a CA's folder, or a .crt or .csr file.",
    "node": "The name in the certificates.",
})

app = typer.Typer(
    name="certs", no_args_is_help=True, rich_markup_mode="rich",
    help="Certificates: a private CA, and who may take part.",
    epilog="""[bold]In this order[/]

on the CA's machine: fedcore certs init --ca ca

fedcore certs server --ca ca --names fl.example.org,10.0.0.5 --out server-tls

on each node: fedcore certs request --name site-3 --out tls

on the CA's machine: fedcore certs node site-3.csr --ca ca --out site-3-tls
""",
)

CaOption = Annotated[Path, typer.Option(
    "--ca", metavar="DIR", show_default=False, help="The CA's folder. Keep it apart from servers and clients."
)]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", show_default=False, help="The folder to write to.")]
DaysOption = Annotated[int, typer.Option("--days", metavar="N", help="How long the certificate is valid.")]


@app.command(cls=Command, epilog="[bold]Example[/]\n\nfedcore certs init --ca ca --name 'Hospitals North'")
def init(
    ca: CaOption,
    name: Annotated[str, typer.Option(metavar="TEXT", help="What certificates say of who issued them.")] = "fedcore CA",
    days: DaysOption = 3650,
) -> None:
    """Make a certificate authority: whoever holds its key decides who takes part."""
    from fedcore.authority import init_ca
    from fedcore.certs_shown import show_files

    certificate = init_ca(ca, name, days)
    show_files(ca, certificate, "Keep ca.key on a machine that is neither server nor client, and a copy off line.")


@app.command(cls=Command, epilog="[bold]Example[/]\n\n"
             "fedcore certs server --ca ca --names fl.example.org,10.0.0.5 --out server-tls")
def server(
    ca: CaOption,
    out: OutOption,
    names: Annotated[str, typer.Option(
        metavar="HOST,...", help="Host names and addresses that clients dial; localhost is always among them."
    )] = "",
    name: Annotated[str, typer.Option(metavar="NAME", help="What logs call the server.")] = "server",
    days: DaysOption = 365,
) -> None:
    """Make a server's TLS folder."""
    from fedcore.authority import Authority
    from fedcore.certs import host_names
    from fedcore.certs_shown import show_files

    certificate = Authority(ca).issue_server(host_names(names), out, name, days)
    show_files(out, certificate, f"Copy the folder to the server: fedcore server FILE --tls {out.name} ...")


@app.command(cls=Command, epilog="[bold]Example[/]\n\nfedcore certs request --name site-3 --out tls")
def request(
    name: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="1 to 63 of a-z, 0-9 and -.")],
    out: OutOption,
) -> None:
    """Make a node's key, which never leaves the node, and the request that the CA signs."""
    from fedcore.certs import make_request
    from fedcore.certs_shown import show_request

    show_request(out, name, make_request(name, out))


@app.command(cls=Command, epilog="""[bold]Examples[/]

fedcore certs node site-3.csr --ca ca --out site-3-tls

fedcore certs node --name site-3 --ca ca --out site-3-tls
""")
def node(
    ca: CaOption,
    out: OutOption,
    request: Annotated[Path | None, typer.Argument(metavar="[REQUEST]", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(
        metavar="NAME", show_default=False, help="Make key and certificate at once, for a node of this name."
    )] = None,
    days: DaysOption = 365,
    renew: Annotated[bool, typer.Option("--renew", help="Allow a second certificate for the same name.")] = False,
) -> None:
    """Certify a node: sign its request, or make its whole TLS folder."""
    from fedcore.authority import Authority
    from fedcore.certs import read_request
    from fedcore.certs_shown import show_files

    if (request is None) == (name is None):
        raise typer.BadParameter("give the node's request, or --name", param_hint="REQUEST")
    if request is None:
        assert name is not None
        certificate = Authority(ca).issue_node(name, out, days, renew)
        advice = "Copy the folder to the node, over a channel that nobody else can read, and delete it here."
    else:
        certificate = Authority(ca).sign_node(read_request(request), out, days, renew)
        advice = "Compare the key's fingerprint with the node's, then copy both files to the node, beside its node.key."
    show_files(out, certificate, advice)


@app.command(cls=Command, epilog="[bold]Examples[/]\n\nfedcore certs show tls\n\nfedcore certs show site-3.csr")
def show(what: Annotated[Path, typer.Argument(metavar="DIR|FILE", show_default=False)]) -> None:
    """Show whom certificates are for, until when, and what is wrong with them.

    Exit status: 0 all is well, 1 something is wrong or about to expire, 2 bad input.
    """
    from fedcore.certs_shown import show_path

    raise typer.Exit(DONE if show_path(what) else FAILED)


@app.command(cls=Command, epilog="[bold]Example[/]\n\nfedcore certs revoke site-3 --ca ca --tls server-tls")
def revoke(
    node: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    ca: CaOption,
    tls: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default=False, help="The server's TLS folder; a running server notices at once."
    )] = None,
    serial: Annotated[str | None, typer.Option(
        metavar="HEX", show_default=False, help="Only the certificate with this number, e.g. the one before a renewal."
    )] = None,
) -> None:
    """Revoke a node's certificates: the server refuses them from now on, and cuts its connections."""
    from fedcore.authority import Authority
    from fedcore.certs_shown import parse_serial, show_revoked

    show_revoked(node, Authority(ca).revoke(node, tls, parse_serial(serial)), ca, tls)
