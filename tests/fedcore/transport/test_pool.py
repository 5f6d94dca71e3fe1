"""Memory for what arrives comes back when nobody refers to it any more."""
import gc

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.transport.pool import ALIGNMENT, BufferPool

MEGABYTE = 1 << 20


def test_a_buffer_comes_back_only_when_the_last_tensor_over_it_is_gone():
    pool = BufferPool(10 * MEGABYTE)
    body = pool.take(MEGABYTE)
    address = body.ctypes.data
    tensor = torch.from_numpy(body[64:128].view(np.float32).reshape(4, 4))[1:]
    del body
    gc.collect()
    assert pool.idle_bytes == 0
    del tensor
    gc.collect()
    assert pool.idle_bytes >= MEGABYTE
    assert pool.take(MEGABYTE - 100).ctypes.data == address


def test_two_takers_never_share_memory():
    pool = BufferPool(10 * MEGABYTE)
    first, second = pool.take(MEGABYTE), pool.take(MEGABYTE)
    assert not np.shares_memory(first, second)


@given(size=st.integers(0, 300_000))
def test_buffers_have_the_asked_size_and_torchs_alignment(size):
    body = BufferPool(MEGABYTE).take(size)
    assert body.shape == (size,) and body.flags.writeable
    assert size == 0 or body.ctypes.data % ALIGNMENT == 0


def test_no_more_idle_memory_is_kept_than_allowed():
    pool = BufferPool(3 * MEGABYTE)
    taken = [pool.take(MEGABYTE) for _ in range(5)]
    taken.clear()
    gc.collect()
    assert MEGABYTE <= pool.idle_bytes <= 3 * MEGABYTE
    pool.limit(0)
    assert pool.idle_bytes == 0


def test_a_much_larger_buffer_is_not_handed_out_for_a_small_one():
    pool = BufferPool(10 * MEGABYTE)
    address = pool.take(4 * MEGABYTE).ctypes.data
    gc.collect()
    assert pool.take(MEGABYTE).ctypes.data != address
