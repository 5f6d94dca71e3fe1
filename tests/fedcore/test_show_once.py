"""What a user sees of exceptions in clients' code."""
import pytest

from fedcore.tasks import Failure, Node, ShowOnce

RAISED, OFFLINE = 2, 5


@pytest.fixture
def shown(caplog) -> list[str]:
    """Collect what is logged for failures of node 0, 0, 1, ... 9 with one exception, and of one with another."""
    show = ShowOnce()
    for partition in (0, *range(10)):
        reason = f"node {partition} raised an exception: Traceback ...\n  File ...\nValueError: too cold"
        show(Failure(Node(partition, partition), partition, reason, RAISED))
    show(Failure(Node(0, 0), 99, "node 0 raised an exception: Traceback ...\nValueError: too hot", RAISED))
    show(Failure(Node(0, 0), 100, "node 0 went offline", OFFLINE))
    return [record.getMessage() for record in caplog.records]


def test_each_exception_is_shown_once_with_its_traceback_and_node(shown):
    whole = [message for message in shown if "Traceback" in message]
    assert [message.split("\n")[-1] for message in whole] == ["ValueError: too cold", "ValueError: too hot"]
    assert all(message.startswith("node 0 raised an exception") for message in whole)


def test_other_nodes_with_the_same_exception_get_a_line_and_many_are_not_named(shown):
    assert shown[1:5] == [
        "Node 1 failed in the same way: ValueError: too cold",
        "Node 2 failed in the same way: ValueError: too cold",
        "Node 3 failed in the same way: ValueError: too cold",
        "More nodes fail in the same way; metrics.jsonl names each of them.",
    ]
    assert len(shown) == 6


def test_a_node_that_goes_offline_is_part_of_life(shown):
    assert not any("offline" in message for message in shown)
