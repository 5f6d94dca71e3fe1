"""Named errors: each carries the offending value, what is allowed, and the next thing to try."""


class FedcoreError(Exception):
    """Base of every error that fedcore raises on purpose."""


class BadInput(FedcoreError):
    """Something the user gave cannot be used; commands exit with status 2."""


class InvalidSetting(BadInput, ValueError):
    """A setting lies outside its range."""

    def __init__(self, name: str, value: object, allowed: str, advice: str = ""):
        super().__init__(f"{name}={value!r}, but it must be {allowed}. {advice}".rstrip())
        self.name, self.value, self.allowed, self.advice = name, value, allowed, advice


class MissingData(BadInput):
    """A data file that the experiment names is not there or cannot be read."""


class UnsupportedModel(BadInput):
    """A model that cannot be handled as one flat vector."""


class UnusableCheckpoint(BadInput):
    """A checkpoint that is absent, damaged, or belongs to another experiment."""


class MalformedReply(FedcoreError):
    """A client's reply that must not touch the model; `reason` says what is wrong with it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class EmptyRound(FedcoreError):
    """A round in which no client carries weight."""


class NothingCanHappen(FedcoreError):
    """Everybody waits and nothing is under way: without this error the run would hang forever."""


class AllNodesFailed(FedcoreError):
    """No node is left that can be given work."""


class RunEnded(FedcoreError):
    """The run's limit was reached while a round was waiting; the driver catches it."""


class WorkerDied(FedcoreError):
    """A worker process ended while it was computing a client's task."""
