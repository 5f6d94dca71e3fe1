"""An experiment on real machines: the server's run, and the client beside the data."""
import contextlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from fedcore.config import Experiment
from fedcore.errors import BadInput, InvalidSetting, LinkRefused
from fedcore.launch import Launch
from fedcore.recorder import CLIENTS_FILE, Listener, plain, write_atomically
from fedcore.session import Session
from fedcore.tasks import printable
from fedcore.tls import Credentials, RevocationList, Role, channel_credentials, load_credentials
from fedcore.transport.grid import GrpcGrid, log_incident
from fedcore.transport.settings import LinkSettings
from fedcore.transport.wire import channel_options, is_loopback, method, pack, unpack

logger = logging.getLogger("fedcore")

# Of more nodes and addresses no misbehaviour is written down.
MOST_OFFENDERS = 1000
# Of more than so many kinds of it at one node or address only the number is.
MOST_REASONS = 8
# How long a server may take to say how it is, seconds.
ANSWER_S = 10.0


class Address(NamedTuple):
    """Where a server listens, or is dialled."""

    host: str
    port: int

    @classmethod
    def of(cls, option: str, text: str) -> "Address":
        """Read `HOST:PORT`; an IPv6 address stands in brackets.

        Raises:
            InvalidSetting: it is something else; `option` is what the user calls it.
        """
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InvalidSetting(option, text, "HOST:PORT with a port from 1 to 65535", "For example 127.0.0.1:9400.")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def open_tls(role: Role, folder: Path | None, insecure: int, address: Address) -> Credentials | None:
    """Return who we are; None where the user wants to do without.

    Raises:
        BadInput: neither or both were asked for, the folder cannot be used, or strangers could dial in.
    """
    if folder is not None and insecure:
        raise BadInput("--tls and --insecure exclude each other: leave out --insecure.")
    if folder is not None:
        return load_credentials(folder, role)
    if not insecure:
        raise BadInput(
            "Give --tls DIR: certificates are made with `fedcore certs` (see `fedcore certs --help`). For a try on "
            "this machine alone, --insecure does without encryption and believes everybody."
        )
    if role == "server" and not is_loopback(address.host) and insecure < 2:
        raise BadInput(
            f"--insecure on {address.host} would let everybody who reaches this port take part and read the model. Use "
            "--tls, listen on 127.0.0.1, or give --insecure twice if the network is yours alone."
        )
    return None


def read_node_config(entries: Sequence[str]) -> dict[str, int | float | str]:
    """Return `key=value` pairs, given one by one or several in one text, as Flower's node configuration.

    Raises:
        InvalidSetting: an entry is not of that form.
    """
    found: dict[str, int | float | str] = {}
    for pair in " ".join(entries).split():
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise InvalidSetting("--node-config", pair, "of the form key=value", "For example partition-id=0.")
        found[key] = _number(text.strip("\"'"))
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@dataclass(frozen=True)
class ServerLink:
    """How clients reach a server.

    Attributes:
        tls_folder: where revocations are looked up; None without TLS.
        insecure_anywhere: listen in clear on more than loopback.
        observers: nodes that may ask for the state of all (`fedcore status`).
    """

    address: Address
    credentials: Credentials | None = None
    tls_folder: Path | None = None
    insecure_anywhere: bool = False
    observers: tuple[str, ...] = ()


class Deployment(Launch):
    """The server's side of an experiment on separate machines."""

    engine = "grpc"
    in_background = True
    grid: GrpcGrid

    def __init__(self, settings: Experiment, folder: Path, link: ServerLink, on_row: Listener | None = None):
        self.link = link
        self._incidents: defaultdict[str, Counter[str]] = defaultdict(Counter)    # by name: what, and how often
        super().__init__(settings, folder, on_row)

    def make_grid(self) -> GrpcGrid:
        link = self.link
        revoked = {} if link.tls_folder is None else {"refuse": RevocationList(link.tls_folder).reason}
        return GrpcGrid(
            str(link.address), link.credentials, run_config={"seed": self.settings.seed},
            settings=LinkSettings(observers=link.observers), kept_checkpoints=self.settings.checkpoint.keep,
            insecure_anywhere=link.insecure_anywhere, on_incident=self._on_incident, **revoked,
        )

    def _on_incident(self, name: str, reason: str) -> None:
        """Write down who did what no client of ours does; called in the link's thread."""
        if name not in self._incidents and len(self._incidents) >= MOST_OFFENDERS:
            return
        seen = self._incidents[name]
        # Several sites may come from one address, each with its own trouble.
        kind = reason if reason in seen or len(seen) < MOST_REASONS else ""
        seen[kind] += 1
        count = seen[kind]
        # Whoever goes on and on must fill neither the log nor the disk.
        if count & (count - 1) == 0:
            log_incident(name, reason if count == 1 else f"{reason} (for the {count}th time)")
            self.recorder.metric(self.hub.now, "incident", version=self.hub.version, node=name, reason=reason,
                                 count=count)

    def close_grid(self) -> None:
        reason = self.hub.stop_reason
        if reason is None or reason == "interrupted":
            self.grid.close("the server was stopped, and may come back", final=False)
        else:
            self.grid.close(f"the run is over ({reason})", final=True)

    def write_clients(self, session: Session) -> None:
        names = {node["partition"]: node["name"] for node in self.grid.snapshot()["nodes"]}
        rows = [{"seconds_per_step": None, **client, "name": names.get(partition)}
                for partition, client in sorted(session.clients.items())]
        write_atomically(self.folder / CLIENTS_FILE, json.dumps(plain(rows)))


def ask_status(server: str, credentials: Credentials | None) -> dict[str, Any]:
    """Return what a server says of itself and its clients.

    Raises:
        LinkRefused: it is not reachable, or does not answer this caller.
    """
    with contextlib.closing(
        grpc.insecure_channel(server, options=channel_options()) if credentials is None
        else grpc.secure_channel(server, channel_credentials(credentials), options=channel_options())
    ) as channel:
        try:
            answer = channel.unary_unary(method("Status"))(pack({"kind": "status"}), timeout=ANSWER_S)
        except grpc.RpcError as error:
            raise LinkRefused(f"{server} does not answer: {printable(error.details() or str(error.code()))}") from error
    return unpack(answer).facts
