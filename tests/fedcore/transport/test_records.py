"""Records survive the journey bit for bit, without copies of tensors, and what strangers write is refused before memory
is taken for it."""
import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import MalformedFrame
from fedcore.payload import VectorRecord
from fedcore.transport.records import DTYPES, Plan, encode
from fedcore.vectors import Model
from tests.support import small_net

finite = st.floats(allow_nan=False)
numbers = st.one_of(st.integers(-2**63, 2**63 - 1), finite)
number_lists = st.one_of(st.lists(st.integers(-2**63, 2**63 - 1), max_size=100), st.lists(finite, max_size=100))
config_values = st.one_of(numbers, number_lists, st.text(), st.binary(), st.booleans(), st.lists(st.text(), max_size=4),
                          st.lists(st.binary(), max_size=4), st.lists(st.booleans(), max_size=4))
names = st.text(max_size=20)


def travel(content: RecordDict | Error, **facts):
    """Return what arrives of what was sent."""
    framed = encode(content, **facts)
    plan = Plan.of(framed.head)
    assert plan.size == framed.size
    return plan.build(np.frombuffer(bytearray(framed.joined()), np.uint8) if plan.size else np.empty(0, np.uint8)), plan


@given(metrics=st.dictionaries(names, st.one_of(numbers, number_lists)), config=st.dictionaries(names, config_values))
def test_numbers_texts_and_bytes_arrive_as_they_were(metrics, config):
    content = RecordDict({"m": MetricRecord(metrics), "c": ConfigRecord(config)})
    found, _ = travel(content)
    assert found == content
    assert [list(map(type, record.values())) for record in found.values()] == \
        [list(map(type, record.values())) for record in content.values()]


@given(dtype=st.sampled_from(sorted(DTYPES)), shape=st.lists(st.integers(0, 4), max_size=4), fortran=st.booleans())
def test_arrays_of_every_kind_arrive_as_they_were(dtype, shape, fortran):
    values = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    array = Array(np.asarray(values, order="F" if fortran else "C"))
    found, _ = travel(RecordDict({"a": ArrayRecord({"x": array})}))
    arrived = found["a"]["x"]
    assert (arrived.dtype, tuple(arrived.shape)) == (dtype, tuple(shape))
    assert np.array_equal(arrived.numpy(), values)


def test_an_array_in_a_format_of_the_users_own_arrives_as_it_was():
    array = Array("custom", (3,), "my.format", b"\x00secret")
    found, _ = travel(RecordDict({"a": ArrayRecord({"x": array})}))
    assert found["a"]["x"] == array


def test_a_model_arrives_as_views_of_the_memory_it_was_received_in():
    model = Model.of(small_net())
    framed = encode(RecordDict({"arrays": VectorRecord(model)}))
    body = np.frombuffer(bytearray(framed.joined()), np.uint8)
    record = Plan.of(framed.head).build(body)["arrays"]
    assert isinstance(record, VectorRecord)
    assert np.shares_memory(record.model.params.numpy(), body)
    assert torch.equal(record.model.params, model.params)
    assert record.model.layout == model.layout
    assert all(torch.equal(record.model.buffers[name], value) for name, value in model.buffers.items())
    assert list(record) == list(VectorRecord(model))


def test_sending_a_model_copies_nothing():
    model = Model.of(small_net())
    framed = encode(RecordDict({"arrays": VectorRecord(model)}))
    assert any(np.shares_memory(np.frombuffer(piece, np.uint8), model.params.numpy()) for piece in framed.pieces)


def test_a_failure_arrives_with_its_code_and_reason_and_facts_beside_it():
    found, plan = travel(Error(2, "it raised"), compute_s=1.5)
    assert (found.code, found.reason, plan.facts) == (2, "it raised", {"compute_s": 1.5})


HUGE = {"records": [["a", "arrays", [["x", "float32", [25_000_000_000]]]]]}


def test_a_claim_of_a_hundred_gigabytes_is_known_before_any_memory_is_taken():
    assert Plan.of(json.dumps(HUGE).encode()).size == 100 * 10**9


@pytest.mark.parametrize("head", [
    b"", b"not json", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"records": 7}', b'{"records": [["a"]]}',
    b'{"records": [["a", "unknown", []]]}', b'{"records": [["a", "arrays", [["x", "float32", [-1]]]]]}',
    b'{"records": [["a", "arrays", [["x", "object", [1]]]]]}', b'{"records": [["a", ["metrics"], []]]}',
    b'{"records": [["a", "arrays", [["x", "float32", [1.5]]]]]}',
    b'{"records": [["a", "arrays", [["x", "float32", [true]]]]]}', b'{"records": [["a", "arrays", 1]]}',
    b'{"records": [["a", "config", [["x", null]]]]}', b'{"records": [["a", "config", [["x", {"bytes": -5}]]]]}',
    b'{"records": [["a", "config", [["x", {"cut": [1, "y"]}]]]]}', b'{"error": ["2", "x"]}', b'{"error": 5}',
    b'{"records": [["a", "vector", {"params": [], "buffers": [], "order": []}]]}',
    b'{"records": [["a", "vector", {"params": [["w", "int64", [2]]], "buffers": [], "order": ["w"]}]]}',
    b'{"records": [["a", "vector", {"params": [["w", "float32", [2]]], "buffers": [], "order": ["v"]}]]}',
    b'{"records": [["a", "vector", {"params": [["w", [], [2]]], "buffers": [], "order": ["w"]}]]}',
    b'{"records": [["a", "metrics", []], ["a", "metrics", []]]}', b'{"records": [[["a"], "metrics", []]]}',
    b'{"x": ' + b"9" * 5000 + b"}",
], ids=lambda head: head[:60].decode(errors="replace"))
def test_a_head_that_nobody_of_ours_wrote_is_refused_by_name(head):
    with pytest.raises(MalformedFrame):
        Plan.of(head)


@pytest.mark.parametrize("body", [
    [["a", "metrics", [["x", "text"]]]], [["a", "metrics", [["x", [1, "y"]]]]], [["a", "config", [["x", [1, 2.5]]]]],
    [["a", "arrays", [["x", "float32", [0, 10**30]]]]],
])
def test_values_that_no_record_holds_are_refused_by_name(body):
    plan = Plan.of(json.dumps({"records": body}).encode())
    with pytest.raises(MalformedFrame):
        plan.build(np.empty(plan.size, np.uint8))


short = st.text(max_size=8)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), short),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(short, inner, max_size=4), max_leaves=12,
)


@given(kind=st.sampled_from(["vector", "arrays", "metrics", "config"]), body=json_values)
def test_whatever_stands_in_a_head_there_is_a_plan_or_a_named_error(kind, body):
    try:
        plan = Plan.of({"records": [["a", kind, body]]})
        if plan.size < 10_000:
            plan.build(np.zeros(plan.size, np.uint8))
    except MalformedFrame:
        return
    assert plan.size >= 0
