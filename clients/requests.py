"""What a request asks of a client, read and checked."""
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Context, Message

from fedcore.clients.task import Site
from fedcore.errors import MalformedRequest, UnknownSite
from fedcore.payload import CONFIG

KINDS = ("update", "model")


class Request(NamedTuple):
    """The settings of a request and of the node that it came to.

    Attributes:
        site: which data are this client's own.
        partition: what random numbers are derived from; the site where the node has no partition number.
        seed: of the run.
        draw: how many training tasks this node was given before.
        local_steps: optimizer steps; None leaves them to the client's settings.
        lr_scale: factor on the learning rate.
        proximal_mu: FedProx's pull towards the received model.
        version: of the received model.
        kind: what to reply with, `update` or `model`.
        echo: what the reply must repeat, None when the request asks for nothing of the kind.
    """

    site: Site
    partition: Site
    seed: int
    draw: int
    local_steps: int | None
    lr_scale: float
    proximal_mu: float
    version: int
    kind: str
    echo: dict[str, int | str] | None

    @classmethod
    def of(cls, message: Message, context: Context) -> "Request":
        """Read a request.

        Raises:
            MalformedRequest: an entry of its configuration has no meaning.
            UnknownSite: the node's configuration names neither `partition-id` nor `site`.
        """
        record = message.content.get(CONFIG)
        if record is not None and not isinstance(record, ConfigRecord):
            raise MalformedRequest(f"The request's {CONFIG!r} is a {type(record).__name__}, not a ConfigRecord.")
        # A plain dictionary is looked things up in ten times faster than a record.
        config: dict[str, Any] = {} if record is None else dict(record.items())
        node_config: Mapping[str, Any] = context.node_config
        site = site_of(context)
        round_before = _integer(config, "server-round", 1) - 1
        kind = config.get("reply", "model")
        if kind not in KINDS:
            raise MalformedRequest(f"The request asks for reply={kind!r}; this client knows {' and '.join(KINDS)}.")
        echo: dict[str, int | str] | None = None
        if "reply" in config or "task-id" in config:
            echo = {"kind": kind, **{name: config[name] for name in ("task-id", "version") if name in config}}
        return cls(
            site=site,
            partition=node_config.get("partition-id", site),
            seed=_integer(config, "seed", 0) if "seed" in config else _integer(context.run_config, "seed", 0),
            draw=_integer(config, "draw", round_before),
            local_steps=_integer(config, "local-steps", 1, least=1) if "local-steps" in config else None,
            lr_scale=_number(config, "lr-scale", 1.0),
            proximal_mu=_number(config, "proximal-mu", 0.0),
            version=_integer(config, "version", round_before),
            kind=kind,
            echo=echo,
        )


def site_of(context: Context) -> Site:
    """Return which data are this client's own: `site` of the node's configuration, or else its `partition-id`.

    Raises:
        UnknownSite: it has neither.
    """
    config = context.node_config
    site = config.get("site", config.get("partition-id"))
    if not isinstance(site, (int, str)):
        raise UnknownSite(
            f"This node's configuration is {dict(config)}, which does not say whose data it holds. "
            'Start it with --node-config "partition-id=0", or "site=PATH" for data of its own.'
        )
    return site


def _integer(config: Mapping[str, Any], name: str, default: int, least: int = 0) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < least:
        raise MalformedRequest(f"The request's {name} is {value!r}, but must be a whole number of at least {least}.")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise MalformedRequest(f"The request's {name} is {value!r}, but must be a finite number of at least 0.")
    return float(value)
