"""Numbers and index sets come back as they were, in the length that was promised."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.compression.bits import CHUNK, IndexSet, pack, packed_bytes, unpack
from fedcore.errors import MalformedPayload


@given(width=st.integers(0, 40), data=st.data())
def test_numbers_come_back(width, data):
    numbers = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=30)), np.int64)
    payload = pack(numbers, width)
    assert len(payload) == packed_bytes(len(numbers), width)
    assert np.array_equal(unpack(payload, len(numbers), width), numbers)


def test_many_numbers_are_packed_as_few_are():
    numbers = np.arange(CHUNK + 11) % 32
    payload = pack(numbers, 5)
    assert len(payload) == packed_bytes(len(numbers), 5) and np.array_equal(unpack(payload, len(numbers), 5), numbers)


def test_bits_after_the_last_number_are_refused():
    with pytest.raises(MalformedPayload, match="after its last"):
        unpack(np.array([0b10100001], np.uint8), 2, 3)


@given(size=st.integers(1, 5000), data=st.data())
def test_index_sets_come_back_and_are_as_long_as_promised(size, data):
    indices = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=60)))
    code = IndexSet(len(indices), size)
    payload = code.encode(np.array(indices))
    assert len(payload) == code.num_bytes
    assert len(payload) <= packed_bytes(size, 1)
    assert code.decode(payload).tolist() == indices


@settings(max_examples=300)
@given(count=st.integers(1, 20), size=st.integers(1, 500), data=st.data())
def test_strange_codes_hold_valid_sets_or_are_refused(count, size, data):
    code = IndexSet(min(count, size), size)
    payload = data.draw(st.binary(min_size=code.num_bytes, max_size=code.num_bytes))
    try:
        indices = code.decode(np.frombuffer(payload, np.uint8))
    except MalformedPayload:
        return
    assert len(indices) == code.count and indices[0] >= 0 and indices[-1] < size and (np.diff(indices) > 0).all()


def coded(indices, size):
    """Return a code without checks of what is in it."""
    code = IndexSet(len(indices), size)
    return code, code.encode(np.array(indices))


def test_an_index_beyond_the_last_value_is_refused():
    code, payload = coded([3, 1000], 1001)
    low = code.low_width
    assert not code.as_bitmap and low
    other = pack(np.array([3, (1 << low) - 1]), low)
    with pytest.raises(MalformedPayload, match="there are 1001 values"):
        code.decode(np.concatenate([other, payload[len(other):]]))


def test_the_same_index_twice_is_refused():
    code, payload = coded([512, 513], 1001)
    low = pack(np.array([512, 512]) & ((1 << code.low_width) - 1), code.low_width)
    with pytest.raises(MalformedPayload, match="not ascending"):
        code.decode(np.concatenate([low, payload[len(low):]]))
