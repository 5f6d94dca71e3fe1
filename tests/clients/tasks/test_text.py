"""Next characters of a text."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.clients.partitions import ByKey, Contiguous
from fedcore.clients.task import PartitionedTask
from fedcore.clients.tasks.files import UnreadableData
from fedcore.clients.tasks.text import NUM_TOKENS, VOCABULARY, Shakespeare, cut, encode, speeches
from fedcore.errors import InvalidSetting, MissingData

PLAY = "ALICE:\nGood morrow.\nHow now?\n\nBOB:\nI am here, " + "la " * 60 + "\n\nALICE:\nFarewell.\n"


def test_what_a_speaker_says_is_put_together():
    found = speeches(PLAY)
    assert list(found) == ["ALICE", "BOB"]
    assert found["ALICE"] == "Good morrow.\nHow now?\nFarewell.\n\n"
    assert speeches(PLAY.replace("\n", "\r\n")) == found


def test_a_text_without_speakers_is_one_speech():
    assert speeches("Once upon a time: long ago.") == {"": "Once upon a time: long ago."}


@given(text=st.text(max_size=60))
def test_every_character_has_a_token(text):
    tokens = encode(text)
    assert len(tokens) == len(text)
    for character, token in zip(text, tokens.tolist(), strict=True):
        assert token == (VOCABULARY.index(character) if character in VOCABULARY else NUM_TOKENS - 1)


@given(length=st.integers(2, 20), size=st.integers(0, 200))
def test_pieces_follow_each_other_with_one_character_in_common(length, size):
    tokens = encode("x" * size) + torch.arange(size).numpy().astype("uint8")
    pieces = cut(tokens, length)
    assert pieces.shape == (max(0, (size - 1) // length), length + 1)
    if len(pieces):
        assert pieces[:, :-1].reshape(-1).tolist() == tokens[:pieces.shape[0] * length].tolist()
        assert (pieces[1:, 0] == pieces[:-1, -1]).all()


def test_targets_are_the_next_characters(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    inputs, targets = Shakespeare(tmp_path / "play.txt", length=8).training_data().batch(torch.tensor([0]))
    assert inputs.dtype is targets.dtype is torch.int64
    assert "".join(VOCABULARY[token] for token in inputs[0]) == "Good mor"
    assert "".join(VOCABULARY[token] for token in targets[0]) == "ood morr"


def test_the_last_tenth_of_a_speakers_pieces_is_for_testing(tmp_path):
    (tmp_path / "play.txt").write_text("A:\n" + "a" * 400 + "\n\nB:\n" + "b" * 900 + "\n")
    task = Shakespeare(tmp_path / "play.txt", length=10)
    assert (len(task.training_data()), len(task.test_data())) == (36 + 81, 4 + 9)
    assert task.traits().keys.tolist() == [0] * 36 + [1] * 81


def test_clients_may_be_speakers_or_stretches_of_text(tmp_path):
    (tmp_path / "play.txt").write_text("A:\n" + "a" * 400 + "\n\nB:\n" + "b" * 900 + "\n")
    task = Shakespeare(tmp_path / "play.txt", length=10)
    by_speaker = PartitionedTask(task, ByKey(), num_clients=2)
    assert sorted(len(by_speaker.data(site)) for site in range(2)) == [36, 81]
    stretches = PartitionedTask(task, Contiguous(), num_clients=3)
    assert [len(stretches.data(site)) for site in range(3)] == [39, 39, 39]
    assert stretches.labels(0) is None


@pytest.mark.parametrize("content", [b"", b"too short", b"A:\n\nB:\n"])
def test_a_text_without_an_example_is_refused(tmp_path, content):
    (tmp_path / "play.txt").write_bytes(content)
    with pytest.raises(UnreadableData, match="less than 65 characters"):
        Shakespeare(tmp_path / "play.txt").training_data()


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "play.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "play.txt", tmp_path):
        with pytest.raises(UnreadableData, match="no readable text"):
            Shakespeare(path).training_data()


def test_wrong_settings_are_refused(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    with pytest.raises(InvalidSetting, match="length=1"):
        Shakespeare(tmp_path / "play.txt", length=1)
    with pytest.raises(MissingData, match="tiny Shakespeare"):
        Shakespeare().training_data()
    with pytest.raises(InvalidSetting, match="task.model"):
        Shakespeare(tmp_path / "play.txt", model="cnn")
