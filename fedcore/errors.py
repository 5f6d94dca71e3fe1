"""Named errors: each carries the offending value, what is allowed, and the next thing to try."""
from collections.abc import Sequence
from pathlib import Path

LONGEST_VALUE = 60      # characters of a wrong value that are shown
MOST_PROBLEMS = 8       # of one experiment that are shown: they fit on a screen


def shown(value: object) -> str:
    """Return a value as a message shows it: on one line, cut when it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE - 4]} ..."


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


class FedcoreError(Exception):
    """Base of every error that fedcore raises on purpose."""


class BadInput(FedcoreError):
    """Something the user gave cannot be used; commands exit with status 2."""


class InvalidSetting(BadInput, ValueError):
    """A setting lies outside its range."""

    def __init__(self, name: str, value: object, allowed: str, advice: str = ""):
        super().__init__(self._sentence(name, value, allowed, advice).rstrip())
        self.name, self.value, self.allowed, self.advice = name, value, allowed, advice

    def _sentence(self, name: str, value: object, allowed: str, advice: str) -> str:
        return f"{name}={shown(value)}, but it must be {allowed}. {advice}"

    def under(self, path: str) -> "InvalidSetting":
        """Return the same error with the setting's full path, `path` put before its name."""
        return type(self)(f"{path}.{self.name}", self.value, self.allowed, self.advice)

    # Worker processes send their errors home, and an exception is pickled by its message alone.
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self.allowed, self.advice)


class UnknownSetting(InvalidSetting):
    """A setting that does not exist; `allowed` says which do."""

    def _sentence(self, name: str, value: object, allowed: str, advice: str) -> str:
        return _joined(f"{name}={shown(value)}, but there is no such setting.", advice, f"Allowed: {allowed}.")


class UnknownName(InvalidSetting):
    """A name that nothing has; `allowed` says which exist."""

    def _sentence(self, name: str, value: object, allowed: str, advice: str) -> str:
        return _joined(f"{name}={shown(value)}, but nothing has that name.", advice, f"Allowed: {allowed}.")


class BrokenPlugin(BadInput):
    """A class of the user's own that cannot be imported or built."""


class MissingSetting(InvalidSetting):
    """A setting that has no default was left out."""

    def _sentence(self, name: str, value: object, allowed: str, advice: str) -> str:
        return f"{name} is missing; it must be {allowed}. {advice}"


class BadExperiment(BadInput):
    """An experiment that cannot be run; `problems` holds everything that is wrong with it."""

    def __init__(self, source: str, problems: Sequence[BadInput]):
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  - {problem}" for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            lines.append(f"  ... and {len(problems) - MOST_PROBLEMS} more.")
        super().__init__("\n".join([f"{source} cannot be run: {count}.", *lines]))
        self.source, self.problems = source, tuple(problems)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.source, self.problems)


class MissingData(BadInput):
    """A data file that the experiment names is not there or cannot be read."""


class UnsupportedModel(BadInput):
    """A model that cannot be handled as one flat vector."""


class MalformedGraph(BadInput):
    """A graph with an edge that cannot be."""


class DisconnectedGraph(BadInput):
    """A graph in which some nodes can never hear of others; `parts` are the nodes of each connected part."""

    def __init__(self, parts: Sequence[Sequence[int]], which: str = "The graph"):
        some = "; ".join(", ".join(map(str, part[:MOST_PROBLEMS])) + (" ..." if len(part) > MOST_PROBLEMS else "")
                         for part in parts[:MOST_PROBLEMS])
        more = "; ..." if len(parts) > MOST_PROBLEMS else ""
        super().__init__(f"{which} is not connected: it has {len(parts)} parts, with the nodes {some}{more}. "
                         "Add edges between them, or choose a denser graph.")
        self.parts, self.which = parts, which

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.parts, self.which)


class UnusableCheckpoint(BadInput):
    """A checkpoint that is absent, damaged, or belongs to another experiment."""


class UnusableApp(BadInput):
    """A folder that holds no Flower app, or one that cannot be loaded."""


class AppFailed(FedcoreError):
    """A Flower app whose own code raised an exception."""


class BadTls(BadInput):
    """A TLS folder or a file in it that cannot be used; `advice` says what to do."""

    def __init__(self, path: Path, reason: str, advice: str):
        super().__init__(f"{path} cannot be used: {reason}. {advice}")
        self.path, self.reason, self.advice = path, reason, advice

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.reason, self.advice)


class BadCertificate(FedcoreError):
    """A certificate that speaks for nobody; `reason` says what is wrong with it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class MalformedReply(FedcoreError):
    """A client's reply that must not touch the model; `reason` says what is wrong with it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class MalformedPayload(MalformedReply):
    """A compressed vector that no sender of ours can have written."""


class NotFinite(FedcoreError):
    """A vector with NaN or infinite values, which cannot be compressed."""


class SingularKernel(FedcoreError):
    """Queries of a black box on which no Gaussian process can stand."""

    def __init__(self, count: int, noise: float):
        super().__init__(f"The kernel matrix of {count} queries is singular even with noise {noise:g}. Ask at points "
                         "further apart, or choose a smaller lengthscale.")
        self.count, self.noise = count, noise

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.count, self.noise)


class BlackBoxFailed(FedcoreError):
    """A black box that returns nothing usable, time after time."""


class EmptyRound(FedcoreError):
    """A round in which no client carries weight."""


class Diverged(FedcoreError):
    """A run whose values became infinite, or not a number."""


class NothingCanHappen(FedcoreError):
    """Everybody waits and nothing is under way: without this error the run would hang forever."""


class AllNodesFailed(FedcoreError):
    """No node is left that can be given work."""


class RunEnded(FedcoreError):
    """The run's limit was reached while a round was waiting; the driver catches it."""


class StoppedEarly(FedcoreError):
    """The user stopped a run before it had begun."""


class WorkerDied(FedcoreError):
    """A worker process ended while it was computing a client's task."""


class EmptyClient(FedcoreError):
    """A client was asked to train or to evaluate without a single example."""

    def __init__(self, site: object, purpose: str):
        super().__init__(f"Client {site!r} has no example to {purpose}. Give it data, or leave it out of the run.")
        self.site = site


class MalformedRequest(FedcoreError):
    """A request that does not fit this client's task."""


class UnknownSite(BadInput):
    """A client does not know which data are its own."""


class ReleaseRefused(FedcoreError):
    """A request for something about private records that this client's operator, or the agreed budget, forbids."""


class UnreadableLedger(BadInput):
    """A ledger of privacy spending that cannot be read: what was spent is then unknown."""


class PeerLost(FedcoreError):
    """A peer that is waited for will never answer again."""

    def __init__(self, rank: int):
        super().__init__(f"Peer {rank} is gone and will not answer any more.")
        self.rank = rank

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.rank,)


class GroupBroken(FedcoreError):
    """A member of a torch.distributed group is gone, and without it the group can do nothing more."""

    def __init__(self, rank: int, reason: str):
        super().__init__(f"The link to rank {rank} of the torch.distributed group broke: {reason}. Such a group does "
                         "not survive the loss of a member; peers with a roster do. Start all of it again, with "
                         "--resume where each has a checkpoint of the same step.")
        self.rank, self.reason = rank, reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.rank, self.reason)


class StateMissing(PeerLost):
    """A peer is to go on where others are, and none of them knows where that is."""

    def __init__(self, rank: int):
        FedcoreError.__init__(self, f"Nobody has the state from which peer {rank} is to go on.")
        self.rank = rank


class StrategyMismatch(FedcoreError):
    """A node was set up for another strategy of peers, or for other settings, than the server."""


class LeftBehind(PeerLost):
    """The others took this peer for lost and went on without it."""

    def __init__(self, rank: int):
        FedcoreError.__init__(self, f"The others could not reach peer {rank} for too long and went on without it. "
                              "Start it again with --rejoin.")
        self.rank = rank


class MalformedFrame(FedcoreError):
    """Bytes on the link that no sender of ours can have written."""


class StreamCut(MalformedFrame):
    """A transfer ended before it was complete; it can be continued."""


class RunOver(FedcoreError):
    """The server's run is over: a client need not come again."""


class TooSlow(FedcoreError):
    """A transfer that made less progress than the least that is allowed."""


class LinkRefused(FedcoreError):
    """The server turned this client away, and trying again would not help."""


class TaskLost(FedcoreError):
    """The server does not know, or no longer wants, the task that a transfer belongs to."""


class CannotListen(BadInput):
    """The server cannot listen where it was told to."""
