"""A body cut into chunks is put together again, from wherever an earlier attempt ended, and damage is noticed."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import MalformedFrame
from fedcore.transport.frames import MAX_HEAD_BYTES, Assembler, Framed, checksum
from fedcore.transport.pool import ALIGNMENT

buffers = st.lists(st.binary(max_size=700), max_size=6)


def framed(parts: list[bytes]) -> Framed:
    return Framed.of(b"{}", [memoryview(part) for part in parts])


def together(message: Framed) -> bytes:
    return b"".join(message.pieces)


@given(parts=buffers, chunk_bytes=st.integers(1, 900), checked=st.booleans(), data=st.data())
def test_chunks_make_up_the_body_from_any_byte_on(parts, chunk_bytes, checked, data):
    message = framed(parts)
    start = data.draw(st.integers(0, message.size))
    body = np.zeros(message.size, np.uint8)
    body[:start] = np.frombuffer(together(message), np.uint8)[:start]
    assembler = Assembler(body, start, checked)
    for chunk in message.chunks(start, checked, chunk_bytes):
        assembler.add(chunk)
    assert assembler.missing == 0
    assert body.tobytes() == together(message) == message.joined()


@given(parts=buffers)
def test_every_buffer_starts_where_torch_would_put_it(parts):
    message = framed(parts)
    starts = np.cumsum([0, *map(len, message.pieces)])
    assert message.size % ALIGNMENT == 0
    assert {together(message).find(part) for part in parts if part} <= set(range(message.size))
    assert all(start % ALIGNMENT == 0 or len(piece) < ALIGNMENT
               for start, piece in zip(starts, message.pieces, strict=False))


@given(data=st.binary(min_size=1, max_size=20_000), where=st.integers(0), flip=st.integers(1, 255))
def test_the_checksum_notices_any_changed_byte(data, where, flip):
    damaged = bytearray(data)
    damaged[where % len(data)] ^= flip
    assert checksum(bytes(damaged)) != checksum(data)


def test_the_checksum_notices_exchanged_rows_and_added_zeros():
    first, second = bytes(range(256)) * 16, bytes(4096)
    assert checksum(first + second) != checksum(second + first)
    assert checksum(first) != checksum(first + b"\0")


def test_a_damaged_chunk_is_refused():
    message = framed([bytes(range(200))])
    chunk = bytearray(next(message.chunks(checked=True)))
    chunk[50] ^= 1
    with pytest.raises(MalformedFrame, match="damaged"):
        Assembler(np.empty(message.size, np.uint8), checked=True).add(bytes(chunk))


@pytest.mark.parametrize("chunk", [b"", b"x" * 129], ids=["empty", "more than announced"])
def test_a_chunk_that_does_not_fit_is_refused_and_nothing_is_written(chunk):
    body = np.zeros(128, np.uint8)
    with pytest.raises(MalformedFrame, match="were missing"):
        Assembler(body).add(chunk)
    assert not body.any()


def test_a_head_that_no_receiver_takes_is_refused_by_the_sender():
    with pytest.raises(MalformedFrame, match="head"):
        Framed.of(b" " * (MAX_HEAD_BYTES + 1), [])


def test_bodies_over_the_same_memory_are_recognised():
    memory = np.zeros(4 << 20, np.uint8)
    first, second = (Framed.of(b"{}", [memory.data]) for _ in range(2))
    assert first.memory == second.memory != 0
    assert framed([b"small"]).memory == 0
