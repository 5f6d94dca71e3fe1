"""A ledger never forgets what may have been sent."""
import pytest

from fedcore.errors import UnreadableLedger
from fedcore.privacy.ledger import Ledger


def test_entries_are_on_the_disk_when_append_returns(tmp_path):
    path = tmp_path / "privacy.jsonl"
    Ledger(path).append({"times": 1})
    Ledger(path).append({"times": 2})
    assert Ledger(path).entries == [{"times": 1}, {"times": 2}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_being_written_when_the_process_died_is_dropped(tmp_path, cut):
    path = tmp_path / "privacy.jsonl"
    ledger = Ledger(path)
    ledger.append({"times": 1})
    ledger.append({"times": 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Ledger(path)
    assert again.entries == [{"times": 1}]
    again.append({"times": 3})
    assert Ledger(path).entries == [{"times": 1}, {"times": 3}]


@pytest.mark.parametrize("damage", [b"nonsense\n", b"[1]\n"])
def test_a_damaged_ledger_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "privacy.jsonl"
    path.write_bytes(damage)
    with pytest.raises(UnreadableLedger, match="privacy.jsonl"):
        Ledger(path)


def test_a_ledger_that_cannot_be_written_stops_the_release(tmp_path):
    ledger = Ledger(tmp_path / "no such folder" / "privacy.jsonl")
    with pytest.raises(UnreadableLedger, match="cannot be written"):
        ledger.append({"times": 1})


def test_a_ledger_can_be_cut_back_for_a_simulation(tmp_path):
    path = tmp_path / "privacy.jsonl"
    ledger = Ledger(path)
    for times in range(4):
        ledger.append({"times": times})
    ledger.cut(2)
    assert Ledger(path).entries == ledger.entries == [{"times": 0}, {"times": 1}]
