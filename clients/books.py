"""What a client has released about its records, and what its operator allows.

An operator sets limits in the node's configuration, where no server can change them:

    max-epsilon, max-delta    of everything ever released (with `privacy-ledger`: over all runs), both or neither
    min-noise-multiplier      of any single release
    max-releases              of everything ever released
    trust-server              true: vectors without noise may be sent to an aggregator that adds it (`central`)
    privacy-ledger            a file that outlives runs and processes

A node with any limit answers to nothing but queries and private requests.
"""
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from flwr.app import ConfigRecord, Context

from fedcore.errors import InvalidSetting, ReleaseRefused
from fedcore.privacy.accounting import Release, Spending
from fedcore.privacy.ledger import Ledger
from fedcore.privacy.mechanism import CENTRAL, DISTRIBUTED
from fedcore.privacy.wire import Ask, Terms

BOOKS = "fedcore.privacy"
# What a simulator sets in a node's configuration: noise is then drawn from seeded generators.
SIMULATED = "simulated"
NUMBERS = ("max-epsilon", "max-delta", "min-noise-multiplier", "max-releases")
SAMPLED = ("sampled-noise", "sampled-rate", "sampled-count")


@dataclass(frozen=True)
class Limits:
    """What a node's operator allows; None: no limit."""

    max_epsilon: float | None = None
    max_delta: float | None = None
    min_noise_multiplier: float | None = None
    max_releases: float | None = None
    trust_server: bool = False
    ledger: Path | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read a node's configuration.

        Raises:
            InvalidSetting: a limit that is none.
        """
        found: dict[str, float] = {}
        for name in NUMBERS:
            if name not in config:
                continue
            value = config[name]
            usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
            if not usable or (name == "max-delta" and value >= 1):
                allowed = "a number above 0 and below 1" if name == "max-delta" else "a finite number above 0"
                raise InvalidSetting(name, value, allowed, "It is a limit in this node's configuration.")
            found[name.replace("-", "_")] = float(value)
        if ("max_epsilon" in found) != ("max_delta" in found):
            raise InvalidSetting("max-epsilon", config.get("max-epsilon"), "given together with max-delta",
                                 "An epsilon means nothing without its delta.")
        trust, ledger = config.get("trust-server", False), config.get("privacy-ledger")
        trust = {"true": True, "false": False}.get(str(trust).lower(), trust)    # our own command line gives texts
        if not isinstance(trust, bool):
            raise InvalidSetting("trust-server", trust, "true or false", "It is part of this node's configuration.")
        return cls(**found, trust_server=trust, ledger=None if ledger is None else Path(str(ledger)).expanduser())

    @property
    def any(self) -> bool:
        """Whether the operator set a limit."""
        return any(getattr(self, name.replace("-", "_")) is not None for name in NUMBERS) or self.ledger is not None


@lru_cache(maxsize=64)
def ledger_at(path: Path) -> Ledger:
    """Return the ledger in a file; one process has one of each."""
    return Ledger(path)


class Books:
    """A client's account of one run, and of all runs where there is a ledger file.

    Args:
        context: the account of the run is kept in its state.

    Raises:
        InvalidSetting: the node's limits are none.
        UnreadableLedger: the ledger file cannot be read.
    """

    def __init__(self, context: Context):
        self.context, self.limits = context, Limits.of(context.node_config)
        self.ledger = None if self.limits.ledger is None else ledger_at(self.limits.ledger.absolute())
        record = context.state.get(BOOKS)
        self._record: dict[str, Any] = dict(record.items()) if isinstance(record, ConfigRecord) else {}

    @property
    def spent(self) -> Spending:
        """What this run has released."""
        if self.ledger is not None:
            return self._folded(lambda entry: entry.get("run") == self.context.run_id)
        columns = [self._record.get(name, []) for name in SAMPLED]
        sampled = {(z, q): n for z, q, n in zip(*columns, strict=True)}
        return Spending(float(self._record.get("mu-squared", 0.0)), sampled)

    @property
    def spent_ever(self) -> Spending:
        """What all runs have released, as far as this client knows."""
        return self.spent if self.ledger is None else self._folded(lambda entry: True)

    @property
    def releases(self) -> int:
        """How many releases there were, in all runs that this client knows of."""
        if self.ledger is not None:
            return sum(int(entry["times"]) for entry in self.ledger.entries)
        return int(self._record.get("releases", 0))

    def _folded(self, wanted: Any) -> Spending:
        assert self.ledger is not None
        total = Spending()
        for entry in filter(wanted, self.ledger.entries):
            total = total.plus(Release(entry["noise_multiplier"], entry["sample_rate"], entry["times"]))
        return total

    def admit(self, ask: Ask, release: Release) -> None:
        """Raise `ReleaseRefused` where a release is not what was agreed, or more than the operator allows."""
        limits, terms = self.limits, ask.terms
        if terms.noise_mode == DISTRIBUTED:
            raise ReleaseRefused("The server asks for a share of noise that protects only within a secure sum, and "
                                 "there is none: it would see this node's vector with too little noise.")
        if terms.noise_mode == CENTRAL and limits.any and not limits.trust_server:
            raise ReleaseRefused("The server asks for a vector without noise (noise_mode: central). This node's "
                                 "operator set limits and did not set trust-server=true.")
        if limits.min_noise_multiplier is not None and release.noise_multiplier < limits.min_noise_multiplier:
            raise ReleaseRefused(f"The server asks for noise_multiplier={release.noise_multiplier:g}, less than "
                                 f"min-noise-multiplier={limits.min_noise_multiplier:g} that this node's operator set.")
        if limits.max_releases is not None and self.releases + release.times > limits.max_releases:
            raise ReleaseRefused(f"This would be release {self.releases + release.times:g}, and max-releases="
                                 f"{limits.max_releases:g} of this node's operator are all there may be.")
        self._hold_to(terms, release)
        if limits.max_epsilon is not None and limits.max_delta is not None:
            after = self.spent_ever.plus(release)
            if not after.within(limits.max_epsilon, limits.max_delta):
                raise ReleaseRefused(
                    f"After this release epsilon would be {after.epsilon(limits.max_delta):.6g} at delta="
                    f"{limits.max_delta:g}, more than max-epsilon={limits.max_epsilon:g} that this node's operator set."
                )

    def _hold_to(self, terms: Terms, release: Release) -> None:
        """Hold the server to the terms of its first request."""
        agreed = {name: self._record[name] for name in asdict(terms) if name in self._record}
        if agreed and agreed != asdict(terms):
            raise ReleaseRefused(f"The server now asks under {asdict(terms)}, but this run began under {agreed}.")
        after = self.spent.plus(release)
        if not after.within(terms.epsilon, terms.delta):
            raise ReleaseRefused(
                f"After this release epsilon would be {after.epsilon(terms.delta):.6g} at delta={terms.delta:g}, more "
                f"than the {terms.epsilon:.6g} agreed on for the run: less noise, or more releases, than announced."
            )

    def charge(self, ask: Ask, release: Release) -> None:
        """Write a release down; when this returns it may be sent."""
        after, releases = self.spent.plus(release), self.releases + release.times
        if self.ledger is not None:
            self.ledger.append({
                "run": self.context.run_id, "at": datetime.now(UTC).isoformat(timespec="seconds"), "round": ask.round,
                "kind": ask.kind, **asdict(release), "mu_squared": self.spent_ever.plus(release).mu_squared,
            })
        rows = [(*key, count) for key, count in sorted(after.sampled.items())]
        self._record = {
            **asdict(ask.terms), "mu-squared": after.mu_squared, "releases": releases,
            **{name: [row[column] for row in rows] for column, name in enumerate(SAMPLED) if rows},
        }
        self.context.state[BOOKS] = ConfigRecord(self._record)
