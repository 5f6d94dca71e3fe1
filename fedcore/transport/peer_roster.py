"""Who takes part in a run of real peers, where each is reached, and by which certificate it is known."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedcore.errors import InvalidSetting, MissingSetting
from fedcore.transport.wire import NAME
from fedcore.yaml_file import read_mapping


@dataclass(frozen=True)
class Entry:
    """One peer.

    Attributes:
        name: of its certificate.
        address: HOST:PORT at which it listens.
        fingerprint: SHA-256 of its certificate, lower-case hex; empty in clear.
    """

    name: str
    address: str
    fingerprint: str = ""


@dataclass(frozen=True)
class Roster:
    """The peers of a run, by rank.

    Attributes:
        run: the run's name; messages of other runs are refused.
        absent: ranks that take no part at present.
    """

    run: str
    peers: tuple[Entry, ...]
    absent: frozenset[int] = frozenset()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who takes part, ascending."""
        return tuple(rank for rank in range(len(self.peers)) if rank not in self.absent)

    @classmethod
    def of(cls, source: Path | Mapping[str, Any]) -> "Roster":
        """Read a roster: `{run: NAME, peers: [{name: ..., address: HOST:PORT, fingerprint: ...}, ...]}`.

        Raises:
            UnreadableFile: the file is missing, or is not YAML.
            InvalidSetting, MissingSetting: something in it is wrong.
        """
        found = read_mapping(source) if isinstance(source, Path) else source
        run, rows = found.get("run"), found.get("peers")
        if not isinstance(run, str) or not run:
            raise MissingSetting("run", run, "the name of the run", "Any name, the same at all peers.")
        if not isinstance(rows, list) or not rows:
            raise MissingSetting("peers", rows, "a list of peers", "[{name: a, address: host:port}, ...]")
        peers = tuple(_entry(row, f"peers[{rank}]") for rank, row in enumerate(rows))
        for name in ("name", "address"):
            values = [getattr(peer, name) for peer in peers]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise InvalidSetting(f"peers.{name}", twice, "different for every peer")
        return cls(run, peers)

    @classmethod
    def of_members(cls, run: str, members: Mapping[int, Entry]) -> Self:
        """Return the roster of those with some ranks."""
        nobody, count = Entry("", ""), max(members) + 1
        absent = frozenset(rank for rank in range(count) if rank not in members)
        return cls(run, tuple(members.get(rank, nobody) for rank in range(count)), absent)

    def rank_of(self, name: str) -> int:
        """Return a peer's rank.

        Raises:
            InvalidSetting: it does not take part.
        """
        for rank, peer in enumerate(self.peers):
            if peer.name == name:
                return rank
        raise InvalidSetting("name", name, f"one of {', '.join(peer.name for peer in self.peers)}")


def _entry(row: Any, where: str) -> Entry:
    if not isinstance(row, Mapping) or not set(row) <= {"name", "address", "fingerprint"}:
        raise InvalidSetting(where, row, "a mapping with name, address and fingerprint")
    entry = Entry(**{key: str(value) for key, value in row.items()}) if {"name", "address"} <= set(row) else None
    if entry is None:
        raise MissingSetting(where, row, "a mapping with name and address")
    if NAME.fullmatch(entry.name) is None:
        raise InvalidSetting(f"{where}.name", entry.name, "1 to 63 of a-z, 0-9 and -")
    host, _, port = entry.address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidSetting(f"{where}.address", entry.address, "HOST:PORT")
    return entry
