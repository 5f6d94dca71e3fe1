"""What an operator may set of the link, and of what a client lets be done with it."""
from dataclasses import dataclass, field

from fedcore.errors import InvalidSetting
from fedcore.transport.streams import Pace


@dataclass(frozen=True)
class LinkSettings:
    """The server's side of the link.

    Attributes:
        max_uploads: large replies that are in memory at once before the strategy has taken them; others wait.
        max_upload_bytes: the same in bytes; None: no limit of its own. One upload is always admitted.
        max_reply_bytes: a larger reply is refused; None: four times the largest request, at least 64 MiB.
        max_nodes: clients that may be connected at once.
        pace: the least progress of a transfer.
        heartbeat_s: how often a client says that it is there; after three of them in silence it counts as gone.
        grace_s: how long a client that lost its connection is waited for before it counts as gone.
        resume_grace_s: the same after the server itself was restarted.
        linger_s: how long, when the run is over, clients that are away are waited for, to be told.
        check_s: how often the identities of connected clients are checked again (revocation, expiry).
        observers: names of nodes that may see the state of all (`fedcore status`).
        max_tunnels: connections between peers that the server relays at one time.
    """

    max_uploads: int = 4
    max_upload_bytes: int | None = None
    max_reply_bytes: int | None = None
    max_nodes: int = 4096
    pace: Pace = field(default_factory=Pace)
    heartbeat_s: float = 10.0
    grace_s: float = 30.0
    resume_grace_s: float = 120.0
    linger_s: float = 10.0
    check_s: float = 2.0
    observers: tuple[str, ...] = ()
    max_tunnels: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_uploads", "max_nodes", "max_tunnels"):
            if getattr(self, name) < 1:
                raise InvalidSetting(name, getattr(self, name), "at least 1")
        for name in ("max_upload_bytes", "max_reply_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidSetting(name, getattr(self, name), "at least 1")
        for name in ("heartbeat_s", "check_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidSetting(name, getattr(self, name), "a positive number of seconds")
        for name in ("grace_s", "resume_grace_s", "linger_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidSetting(name, getattr(self, name), "a number of seconds, at least 0")

    @property
    def silence_s(self) -> float:
        """After how much silence a connection counts as dead."""
        return 3 * self.heartbeat_s


@dataclass(frozen=True)
class Limits:
    """What a client's operator lets the server ask for; None: no limit.

    Attributes:
        actions: message types, such as `train`, `train.gradient`, `evaluate` (`query` is always allowed).
        max_steps: optimizer steps in one task.
        max_seconds: computing in one task; a task that takes longer is answered with a refusal, and what it made is
            dropped when it ends.
        max_bytes: of a request or of a reply.
    """

    actions: frozenset[str] | None = None
    max_steps: float | None = None
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_seconds", "max_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidSetting(name, value, "positive")

    def refuse_action(self, action: str) -> str | None:
        """Return why an action is not allowed, None when it is."""
        if self.actions is None or action in self.actions or action.split(".")[0] == "query":
            return None
        return f"the operator of this client does not allow {action!r}, only {', '.join(sorted(self.actions))}"

    def refuse_steps(self, steps: float) -> str | None:
        """Return why so many steps are not allowed, None when they are."""
        if self.max_steps is None or steps <= self.max_steps:
            return None
        return f"the operator of this client allows {self.max_steps:g} steps in a task, not {steps:g}"

    def refuse_bytes(self, num_bytes: int, what: str) -> str | None:
        """Return why so many bytes are not allowed, None when they are."""
        if self.max_bytes is None or num_bytes <= self.max_bytes:
            return None
        return f"the operator of this client allows {self.max_bytes} bytes in a {what}, not {num_bytes}"
