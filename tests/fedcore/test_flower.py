"""What is made past Flower's constructors equals what they make."""
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedcore.flower import adopt_identity, record_of, reply_to, with_id

ENTRIES = {"lr": 0.1, "steps": 3}


@pytest.fixture
def request_message():
    adopt_identity()
    content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    message = with_id(Message(content, 1005, "train.special", ttl=60.0, group_id="7"), content, "12")
    # As a SuperLink hands it to a node; it takes no reply that claims to have been delivered already.
    message.metadata.delivered_at = "2026-01-01T00:00:00+00:00"
    return message


@pytest.mark.parametrize("outcome", [RecordDict({"metrics": MetricRecord({"loss": 1.0})}), Error(2, "it raised")])
def test_a_reply_equals_the_one_that_flower_makes(request_message, outcome):
    ours, flowers = reply_to(request_message, outcome), Message(outcome, reply_to=request_message)
    assert vars(ours).keys() == vars(flowers).keys()
    mine, theirs = vars(ours.metadata), vars(flowers.metadata)
    moments = ("_created_at", "_ttl")
    assert {name: mine[name] for name in mine if name not in moments} == {
        name: theirs[name] for name in theirs if name not in moments
    }
    assert ours.has_error() == flowers.has_error() and ours.has_content() == flowers.has_content()
    assert (ours.error if ours.has_error() else ours.content) is outcome
    assert sum(mine[name] for name in moments) == pytest.approx(sum(theirs[name] for name in moments), abs=1e-3)


def test_a_reply_expires_with_its_request(request_message):
    metadata = reply_to(request_message, Error(0)).metadata
    asked = request_message.metadata
    assert metadata.created_at + metadata.ttl == pytest.approx(asked.created_at + asked.ttl)


@pytest.mark.parametrize("kind", [ConfigRecord, MetricRecord])
def test_a_record_of_right_entries_equals_flowers_and_checks_what_is_put_in_later(kind):
    record = record_of(kind, dict(ENTRIES))
    assert record == kind(dict(ENTRIES)) and record.object_id == kind(dict(ENTRIES)).object_id
    with pytest.raises(TypeError):
        record["wrong"] = object()


def test_a_message_with_an_id_leaves_the_original_alone(request_message):
    again = with_id(request_message, request_message.content, "13")
    assert (again.metadata.message_id, request_message.metadata.message_id) == ("13", "12")
    assert vars(again.metadata).keys() == vars(request_message.metadata).keys()
