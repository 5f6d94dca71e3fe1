"""Every compressor keeps its bound, its length and its bits; no payload of a stranger's breaks it."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.compression.base import all_finite
from fedcore.errors import InvalidSetting, MalformedPayload, NotFinite
from fedcore.registry import build, names

SHAPES = [(4, 6), (9,), (3, 2, 5), (0,), (1,)]
SIZE = 64
EVERY = [
    *names("compressors"),
    {"name": "top_k", "fraction": 0.02, "per_tensor": True}, {"name": "top_k", "values": "bfloat16"},
    {"name": "top_k", "fraction": 1.0, "values": "float16"}, {"name": "top_k", "fraction": 0.6},
    {"name": "rand_k", "scaling": "unbiased"}, {"name": "qsgd", "scaling": "unbiased", "levels": 1},
    {"name": "qsgd", "levels": 8, "per_tensor": False}, {"name": "natural", "scaling": "unbiased"},
    {"name": "sign", "per_tensor": False}, {"name": "power_sgd", "rank": 1, "values": "float16"},
    {"name": "identity", "values": "bfloat16"},
]
UNBIASED = [spec for spec in EVERY if isinstance(spec, dict) and spec.get("scaling") == "unbiased"]
DTYPES = [torch.float32, torch.float64]


def codec_of(spec, dtype=torch.float64, shapes=SHAPES):
    return build("compressors", spec).codec(shapes, dtype)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(seed, dtype=torch.float64, size=SIZE):
    return torch.randn(size, dtype=torch.float64, generator=draw(seed)).to(dtype)


def sent(codec, values, seed=0):
    return codec.decode(codec.encode(values, draw(seed)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_payload_has_the_length_that_was_promised_and_the_same_generator_gives_the_same_bytes(spec, dtype):
    codec, values = codec_of(spec, dtype), vector(1, dtype)
    before = values.clone()
    first, second = codec.encode(values, draw(5)), codec.encode(values, draw(5))
    assert first.dtype == torch.uint8 and first.shape == (codec.num_bytes,)
    assert torch.equal(first, second) and torch.equal(codec.decode(first), codec.decode(second))
    assert torch.equal(values, before)
    assert codec.decode(first).shape == (SIZE,) and codec.decode(first).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_zero_stays_zero(spec, dtype):
    codec = codec_of(spec, dtype)
    assert not sent(codec, torch.zeros(SIZE, dtype=dtype)).any()


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_the_mean_squared_error_keeps_the_bound(spec):
    codec = codec_of(spec)
    values = vector(2) * torch.logspace(-1, 1, SIZE, dtype=torch.float64)
    errors = torch.stack([(sent(codec, values, seed) - values).square().sum() for seed in range(200)])
    relative = errors / values.square().sum()
    bound = 1 - codec.contraction if codec.contraction is not None else codec.variance
    assert relative.mean() <= bound + 4 * relative.std() / math.sqrt(len(relative)) + 1e-4
    assert (codec.contraction is None) == (spec in UNBIASED)


@pytest.mark.parametrize("spec", UNBIASED, ids=str)
def test_unbiased_compressors_have_the_right_mean(spec):
    codec, values = codec_of(spec), vector(3)
    samples = torch.stack([sent(codec, values, seed) for seed in range(2000)])
    deviation = (samples.mean(0) - values).abs()
    assert (deviation <= 5 * samples.std(0) / math.sqrt(len(samples)) + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(spec=st.sampled_from(EVERY), numbers=st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=SIZE, max_size=SIZE))
def test_whatever_is_finite_can_be_sent_and_arrives_finite(spec, numbers):
    for dtype in DTYPES:
        codec = codec_of(spec, dtype)
        assert all_finite(sent(codec, torch.tensor(numbers, dtype=dtype)))


@settings(max_examples=200, deadline=None)
@given(spec=st.sampled_from(EVERY), data=st.data())
def test_strange_bytes_are_decoded_to_finite_values_or_refused_by_name(spec, data):
    codec = codec_of(spec, torch.float32)
    length = data.draw(st.one_of(st.just(codec.num_bytes), st.integers(0, codec.num_bytes + 9)))
    payload = torch.tensor(list(data.draw(st.binary(min_size=length, max_size=length))), dtype=torch.uint8)
    before = payload.clone()
    try:
        values = codec.decode(payload)
    except MalformedPayload:
        pass
    else:
        assert length == codec.num_bytes and values.shape == (SIZE,) and all_finite(values)
    assert torch.equal(payload, before)


@settings(max_examples=200, deadline=None)
@given(spec=st.sampled_from(EVERY), position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_harmless_or_refused(spec, position, bit):
    codec = codec_of(spec, torch.float32)
    payload = codec.encode(vector(4, torch.float32), draw())
    payload[position % len(payload)] ^= 1 << bit
    try:
        values = codec.decode(payload)
    except MalformedPayload:
        return
    assert values.shape == (SIZE,) and all_finite(values)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_lengths_and_kinds_of_payloads_are_checked(spec):
    codec = codec_of(spec)
    payload = codec.encode(vector(5), draw())
    for wrong in (payload[:-1], torch.cat([payload, payload[:1]]), payload[:0], payload.to(torch.int16), payload[None]):
        with pytest.raises(MalformedPayload):
            codec.decode(wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", names("compressors"))
def test_what_is_not_finite_is_refused(spec, value):
    values = vector(6)
    values[7] = value
    with pytest.raises(NotFinite, match="1 of 64 values"):
        codec_of(spec).encode(values, draw())


@pytest.mark.parametrize("spec, name", [
    ({"name": "top_k", "fraction": 0}, "fraction"), ({"name": "top_k", "fraction": 1.1}, "fraction"),
    ({"name": "rand_k", "fraction": -1}, "fraction"), ({"name": "rand_k", "scaling": "none"}, "scaling"),
    ({"name": "top_k", "values": "int8"}, "values"), ({"name": "qsgd", "levels": 0}, "levels"),
    ({"name": "power_sgd", "rank": 0}, "rank"),
])
def test_settings_out_of_range_are_refused_by_their_full_name(spec, name):
    with pytest.raises(InvalidSetting, match=f"^strategy.compressor.{name}="):
        build("compressors", spec)


def test_identity_is_exact():
    for dtype in DTYPES:
        assert torch.equal(sent(codec_of("identity", dtype), vector(7, dtype)), vector(7, dtype))


def test_top_k_takes_the_first_of_equal_values():
    codec = codec_of({"name": "top_k", "fraction": 0.5}, shapes=[(6,)])
    values = torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0, 2.0], dtype=torch.float64)
    assert sent(codec, values).tolist() == [0, -2, 2, -2, 0, 0]


def test_top_k_of_equal_magnitudes_meets_its_bound_exactly():
    codec = codec_of({"name": "top_k", "fraction": 0.25}, shapes=[(SIZE,)])
    values = vector(8).sign()
    assert (sent(codec, values) - values).square().sum() == (1 - codec.contraction) * SIZE


def test_top_k_per_tensor_keeps_a_share_of_each():
    codec = codec_of({"name": "top_k", "fraction": 0.5, "per_tensor": True}, shapes=[(4,), (4,)])
    values = torch.tensor([1.0, 2, 3, 4, 50, 60, 70, 80], dtype=torch.float64)
    assert sent(codec, values).tolist() == [0, 0, 3, 4, 0, 0, 70, 80]


@pytest.mark.parametrize("count", [1, 1000, 40_000])
def test_the_largest_of_many_are_those_that_sorting_finds(count):
    size = (1 << 20) + 3
    values = vector(9, torch.float32, size).mul(8).round()    # with many ties
    codec = codec_of({"name": "top_k", "fraction": count / size}, torch.float32, [(size,)])
    order = torch.sort(values.abs(), descending=True, stable=True).indices[:count]
    expected = torch.zeros_like(values)
    expected[order] = values[order]
    assert torch.equal(sent(codec, values), expected)


def test_a_hundredth_of_the_values_takes_a_hundredth_of_the_bytes_and_a_byte_for_each_index():
    codec = codec_of({"name": "top_k", "fraction": 0.01}, torch.float32, [(1_000_000,)])
    assert codec.num_bytes / 10_000 == pytest.approx(4 + 8.6 / 8, abs=0.05)


def test_lengths_are_those_of_the_formulas():
    def length(spec):
        return codec_of(spec, torch.float32, [(20, 50)]).num_bytes

    assert length("identity") == 4000
    assert length({"name": "identity", "values": "float16"}) == 2000
    assert length({"name": "rand_k", "fraction": 0.1}) == 8 + 400
    assert length("sign") == 4 + 125
    assert length({"name": "qsgd", "levels": 15}) == 4 + 1000 * 5 // 8
    assert length("natural") == 1125
    assert length({"name": "power_sgd", "rank": 2}) == 4 * 2 * 70


def test_power_sgd_is_exact_for_a_matrix_of_its_rank():
    matrix = torch.outer(vector(1, size=20), vector(2, size=50)) + torch.outer(vector(3, size=20), vector(4, size=50))
    codec = codec_of({"name": "power_sgd", "rank": 2}, shapes=[(20, 50)])
    assert torch.allclose(sent(codec, matrix.reshape(-1)), matrix.reshape(-1), atol=1e-12)


def test_a_value_beyond_float16_is_sent_as_its_largest_number():
    codec = codec_of({"name": "identity", "values": "float16"}, torch.float32, [(2,)])
    assert sent(codec, torch.tensor([1e6, -1e30])).tolist() == [65504, -65504]
