"""Messages' contents: arrays that are views of a vector, their price on the wire, and what is refused."""
import math
import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedcore.arrays import LazyArray, Reading
from fedcore.errors import MalformedReply, UnsupportedModel
from fedcore.payload import (
    MAX_NUM_EXAMPLES,
    VectorRecord,
    clone_content,
    model_from_arrays,
    read_arrays,
    read_train_reply,
    wire_bytes,
)
from fedcore.vectors import Layout, Model
from tests.support import small_net, vector_model

NET = small_net()
MODEL = Model.of(NET)
LAYOUT = MODEL.layout


def stock(model=MODEL):
    """Return the record that Flower itself makes of a model."""
    return ArrayRecord(model.state_dict())


def bits(record):
    return {name: (array.dtype, array.shape, array.numpy().tobytes()) for name, array in record.items()}


def through_pickle(value):
    """Pickle as the worker processes' links do: large buffers travel beside the rest, into memory of their own."""
    buffers = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(body, buffers=[bytearray(buffer.raw()) for buffer in buffers]), len(body)


@st.composite
def models(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4))
    module = nn.ParameterList([nn.Parameter(torch.full(shape, 0.5 * k, dtype=dtype)) for k, shape in enumerate(shapes)])
    if draw(st.booleans()):
        module.append(nn.BatchNorm1d(3).to(dtype))
    return Model.of(module)


# ---- a record that is a view ----------------------------------------------------------------------------------------


@given(models())
def test_a_vector_record_is_read_back_without_a_copy_and_a_stock_one_bit_for_bit(model):
    params, buffers = read_arrays(VectorRecord(model), model.layout)
    assert params is model.params and buffers == dict(model.buffers)
    params, buffers = read_arrays(stock(model), model.layout)
    assert torch.equal(params, model.params)
    assert buffers.keys() == model.buffers.keys()
    assert all(torch.equal(value, model.buffers[name]) for name, value in buffers.items())


@given(models())
def test_a_vector_record_is_the_stock_record_for_everybody_else(model):
    ours, theirs = VectorRecord(model), stock(model)
    assert list(ours) == list(theirs) and len(ours) == len(theirs)
    assert bits(ours) == bits(theirs)
    assert ours == theirs and theirs == ours
    assert ours.count_bytes() == theirs.count_bytes()
    mine, its = ours.to_torch_state_dict(), theirs.to_torch_state_dict()
    assert list(mine) == list(its) and all(torch.equal(mine[name], its[name]) for name in its)
    assert all(np.array_equal(a, b) for a, b in zip(ours.to_numpy_ndarrays(), theirs.to_numpy_ndarrays(), strict=True))


@given(models())
def test_on_flowers_wire_nobody_sees_a_difference(model):
    ours, theirs = VectorRecord(model), stock(model)
    assert ours.deflate() == theirs.deflate()
    assert ours.object_id == theirs.object_id
    assert list(ours.children) == list(theirs.children)
    inflated = ArrayRecord.inflate(ours.deflate(), {
        object_id: Array.inflate(array.deflate(), array.children) for object_id, array in ours.children.items()
    })
    assert bits(inflated) == bits(theirs)


@given(models())
def test_a_pickled_record_keeps_its_values_and_its_arrays_travel_beside_the_pickle(model):
    content = RecordDict({"arrays": VectorRecord(model), "metrics": MetricRecord({"num-examples": 3})})
    found, body = through_pickle(content)
    assert bits(found["arrays"]) == bits(stock(model)) and found["metrics"] == content["metrics"]
    assert found["arrays"].model.layout == model.layout
    assert wire_bytes(found) == wire_bytes(content)
    assert body < 4000    # of names and shapes; the values are elsewhere


def test_large_arrays_are_not_in_the_pickle():
    _, body = through_pickle(VectorRecord(vector_model(100_000)))
    assert body < 2000


def test_a_pickled_stock_record_and_a_changed_one_come_back():
    changed = VectorRecord(MODEL)
    changed["0.weight"] = Array(np.ones((4, 3), np.float32))
    for record in (stock(), changed):
        found, _ = through_pickle(record)
        assert bits(found) == bits(record)


def test_values_that_do_not_fit_their_layout_are_refused_where_they_are_made():
    for params in (torch.zeros(31), torch.zeros(1, 30), torch.zeros(30, dtype=torch.float64)):
        with pytest.raises(UnsupportedModel, match=r"'params' is .*, but must be float32\[30\]"):
            VectorRecord.of(params, MODEL.buffers, LAYOUT)
    with pytest.raises(UnsupportedModel, match="running_mean"):
        VectorRecord.of(MODEL.params, {**MODEL.buffers, "1.running_mean": torch.zeros(5)}, LAYOUT)


# ---- changing a record ----------------------------------------------------------------------------------------------


def test_numpy_hands_out_a_copy():
    record = VectorRecord(MODEL)
    record["0.weight"].numpy()[:] = 99
    assert bits(record) == bits(stock())


def change_entry(record):
    record["0.weight"] = Array(np.full((4, 3), 2, np.float32))


def change_update(record):
    record.update({"0.weight": Array(np.full((4, 3), 2, np.float32))})


def change_data(record):
    record["0.weight"].data = Array(np.full((4, 3), 2, np.float32)).data


def change_shape(record):
    record["0.weight"].shape = (3, 4)


def change_dtype(record):
    record["0.weight"].dtype = "float64"


def change_pop(record):
    record.pop("0.weight")


def change_delete(record):
    del record["0.weight"]


def change_clear(record):
    record.clear()


CHANGES = [
    change_entry, change_update, change_data, change_shape, change_dtype, change_pop, change_delete, change_clear
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_record_is_what_a_changed_stock_record_is(change):
    ours, theirs = VectorRecord(MODEL), stock()
    change(ours)
    change(theirs)
    assert ours.model is None
    assert dict(ours) == dict(theirs) and ours.object_id == theirs.object_id
    assert bits(ours) == bits(theirs)
    assert bits(VectorRecord(MODEL)) == bits(stock())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [lambda: VectorRecord(MODEL), stock])
def test_changing_a_clone_leaves_the_original_alone(change, make):
    content = RecordDict({"arrays": make()})
    clone = clone_content(content)
    change(clone["arrays"])
    assert bits(content["arrays"]) == bits(stock())
    if isinstance(content["arrays"], VectorRecord):
        assert content["arrays"].model is MODEL
    change(content["arrays"])
    assert content == clone


def test_changing_an_array_of_a_copy_leaves_the_record_alone():
    record = VectorRecord(MODEL)
    change_data(record.copy())
    assert record.model is MODEL and bits(record) == bits(stock())


def test_cloned_lists_and_entries_are_apart_from_the_original():
    content = RecordDict({"config": ConfigRecord({"losses": [1.0], "name": "a"}), "m": MetricRecord({"steps": [1, 2]})})
    clone = clone_content(content)
    assert clone == content
    clone["config"]["losses"].append(2.0)
    clone["config"]["name"] = "b"
    clone["m"]["steps"].clear()
    clone["more"] = MetricRecord()
    assert content == RecordDict({"config": ConfigRecord({"losses": [1.0], "name": "a"}),
                                  "m": MetricRecord({"steps": [1, 2]})})


def test_arrays_do_not_lie_about_a_record_that_was_changed():
    record = VectorRecord(MODEL)
    change_data(record)
    params, _ = read_arrays(record, LAYOUT)
    assert torch.equal(params[:12], torch.full((12,), 2.0))


# ---- Flower's own code on our records -------------------------------------------------------------------------------


def reply_to(values, num_examples):
    content = RecordDict({"arrays": values, "metrics": MetricRecord({"num-examples": num_examples, "loss": 1.0})})
    request = Message(RecordDict(), 1000, "train")
    return Message(content, reply_to=request)


def test_fedavg_averages_our_records_to_the_bits_of_stock_ones():
    others = [MODEL.replace(MODEL.params * factor) for factor in (1.5, -0.3, 7.0)]
    ours, _ = FedAvg().aggregate_train(1, [reply_to(VectorRecord(model), n) for n, model in enumerate(others, 3)])
    theirs, _ = FedAvg().aggregate_train(1, [reply_to(stock(model), n) for n, model in enumerate(others, 3)])
    assert bits(ours) == bits(theirs)


# ---- the price ------------------------------------------------------------------------------------------------------


@given(models())
def test_bytes_follow_from_shapes_and_dtypes_and_are_those_of_the_stock_record(model):
    elements = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    expected = elements + 128 * len(model.layout.order)
    record = VectorRecord(model)
    assert wire_bytes(RecordDict({"arrays": record})) == expected
    assert wire_bytes(RecordDict({"arrays": stock(model)})) == expected
    change_first = next(iter(record))
    record[change_first] = stock(model)[change_first]
    assert wire_bytes(RecordDict({"arrays": record})) == expected
    assert sum(len(array.data) for array in stock(model).values()) == expected


@pytest.mark.parametrize(("record", "expected"), [
    (MetricRecord({"a": 1, "b": 2.5}), 16),
    (MetricRecord({"a": [1, 2, 3]}), 8 + 24),
    (ConfigRecord({"a": True, "b": "word", "c": b"xy"}), 24 + 4 + 2),
    (ConfigRecord({"a": ["ab", "c"]}), 8 + 16 + 3),
    (ConfigRecord(), 0),
])
def test_scalars_take_eight_bytes_each_and_texts_their_characters(record, expected):
    assert wire_bytes(RecordDict({"record": record})) == expected


@pytest.mark.parametrize("array", [
    Array("no-such-type", (3,), "numpy.ndarray", b"12345"),
    Array("float32", (-4, 2), "numpy.ndarray", b"12345"),
    Array("float32", (10**9, 10**9), "numpy.ndarray", b"12345"),
    Array("float32", (10**12,), "gzip", b"12345"),
])
def test_an_array_that_describes_itself_wrongly_is_billed_by_its_bytes(array):
    record = ArrayRecord()
    record["w"] = array
    assert wire_bytes(RecordDict({"arrays": record})) == 5 + 128


# ---- what is refused ------------------------------------------------------------------------------------------------


def good_reply():
    return RecordDict({
        "arrays": stock(), "metrics": MetricRecord({"num-examples": 10, "work-steps": 4, "train-seconds": 1.5}),
        "reply": ConfigRecord({"kind": "update", "task-id": 3, "version": 2}),
    })


def npy(values):
    stream = BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def metric(name, value):
    return lambda reply: reply["metrics"].update({name: value})


def array(name, value):
    return lambda reply: reply["arrays"].update({name: value})


def weight(value, dtype=np.float32, shape=(4, 3)):
    return array("0.weight", Array(np.full(shape, value, dtype)))


def data(content, **changes):
    described = {"dtype": "float32", "shape": (4, 3), "stype": "numpy.ndarray", "data": content, **changes}
    return array("0.weight", Array(**described))


def echo(**entries):
    return lambda reply: reply["reply"].update({name.replace("_", "-"): value for name, value in entries.items()})


HEADER = npy(np.zeros((4, 3), np.float32))
BROKEN = {
    "no arrays": (lambda reply: reply.pop("arrays"), "one record of arrays, found 0"),
    "two arrays": (lambda reply: reply.update(more=stock()), "one record of arrays, found 2"),
    "no metrics": (lambda reply: reply.pop("metrics"), "one record of metrics, found 0"),
    "two metrics": (lambda reply: reply.update(more=MetricRecord()), "one record of metrics, found 2"),
    "name missing": (lambda reply: reply["arrays"].pop("0.bias"), "lacks '0.bias'"),
    "name extra": (array("extra", Array(np.zeros(1))), "unexpected 'extra'"),
    "shape": (weight(1, shape=(3, 4)), r"'0.weight' is float32\[3, 4\], but must be float32\[4, 3\]"),
    "dtype": (weight(1, dtype=np.float64), r"float64\[4, 3\], but must be float32\[4, 3\]"),
    "a number for a counter": (array("1.num_batches_tracked", Array(np.asarray(3.0))), "must be int64"),
    "NaN": (weight(np.nan), "12 of 30 values are NaN or infinite"),
    "Inf": (weight(-np.inf), "12 of 30 values are NaN or infinite"),
    "NaN in a buffer": (array("1.running_var", Array(np.full(4, np.nan, np.float32))), "buffer '1.running_var'"),
    "no num-examples": (lambda reply: reply["metrics"].pop("num-examples"), "no number under 'num-examples'"),
    "zero examples": (metric("num-examples", 0), "num-examples is 0"),
    "negative examples": (metric("num-examples", -5), "num-examples is -5"),
    "NaN examples": (metric("num-examples", math.nan), "num-examples is nan"),
    "infinite examples": (metric("num-examples", math.inf), "num-examples is inf"),
    "half an example": (metric("num-examples", 2.5), "num-examples is 2.5"),
    "too many examples": (metric("num-examples", MAX_NUM_EXAMPLES + 1), "num-examples is 1000000000001"),
    "absurdly many examples": (metric("num-examples", 10**400), "num-examples is 1000"),
    "listed examples": (metric("num-examples", [10]), "no number under 'num-examples'"),
    "negative steps": (metric("work-steps", -1), "work-steps is -1"),
    "NaN steps": (metric("work-steps", math.nan), "work-steps is nan"),
    "absurdly many steps": (metric("work-steps", 10**400), "work-steps is 1000"),
    "listed seconds": (metric("train-seconds", [1.0]), r"train-seconds is \[1.0\]"),
    "infinite seconds": (metric("train-seconds", math.inf), "train-seconds is inf"),
    "unknown kind": (echo(kind="gradient"), "kind is 'gradient'"),
    "kind of another type": (echo(kind=[1, 2]), r"kind is \[1, 2\]"),
    "task of another type": (echo(task_id="three"), "task-id is 'three'"),
    "version of another type": (echo(version=1.5), "version is 1.5"),
    "other serialisation": (data(HEADER, stype="pickle"), "serialised as 'pickle'"),
    "no bytes": (data(b""), "cannot be decoded"),
    "other bytes": (data(b"hello"), "cannot be decoded"),
    "bytes cut short": (data(HEADER[:-1]), "cannot be decoded"),
    "an archive": (data(b"PK\x03\x04" + bytes(50)), "cannot be decoded"),
    "pickled objects": (data(npy(np.array([{"a": 1}] * 12, object).reshape(4, 3))), "cannot be decoded"),
    "bytes of another shape": (data(npy(np.zeros((2, 6), np.float32))), r"is float32\[2, 6\], but must be"),
    "bytes of another dtype": (data(npy(np.zeros((4, 3), np.int32))), r"is int32\[4, 3\], but must be"),
    "bytes of another endianness": (data(npy(np.zeros((4, 3), ">f4"))), "but must be float32"),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_a_malformed_reply_is_refused_by_name(damage, words):
    reply = good_reply()
    damage(reply)
    with pytest.raises(MalformedReply, match=words):
        read_train_reply(reply, LAYOUT)


def test_a_header_that_promises_terabytes_allocates_nothing():
    header = {"descr": "<f4", "fortran_order": False, "shape": (4, 3)}
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (10**13,)})
    reply = good_reply()
    data(stream.getvalue() + bytes(100))(reply)
    with pytest.raises(MalformedReply, match="cannot be decoded"):
        read_train_reply(reply, LAYOUT)


@given(st.data())
def test_bytes_that_were_damaged_anywhere_are_decoded_or_refused_and_never_crash(draw):
    content = bytearray(HEADER)
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    reply = good_reply()
    data(bytes(content))(reply)
    try:
        found = read_train_reply(reply, LAYOUT)
    except MalformedReply:
        return
    assert found.values.shape == (30,) and torch.isfinite(found.values).all()


@given(st.binary(max_size=80), st.text(max_size=60))
def test_a_header_of_any_text_never_crashes(tail, text):
    body = text.encode()
    reply = good_reply()
    data(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + tail)(reply)
    with pytest.raises(MalformedReply):
        read_train_reply(reply, LAYOUT)


def test_reading_touches_nothing():
    reply = good_reply()
    before = bits(reply["arrays"])
    found = read_train_reply(reply, LAYOUT)
    found.metrics["num-examples"] = 0
    assert bits(reply["arrays"]) == before and reply["metrics"]["num-examples"] == 10
    assert bits(VectorRecord(MODEL)) == before


def test_a_good_reply_is_read_as_it_says():
    found = read_train_reply(good_reply(), LAYOUT)
    assert (found.kind, found.num_examples, found.work_steps, found.train_seconds) == ("update", 10, 4, 1.5)
    assert (found.task_id, found.version) == (3, 2)
    assert torch.equal(found.values, MODEL.params)


def test_a_stock_reply_is_a_model_and_may_count_in_floats():
    reply = RecordDict({"whatever": stock(), "also": MetricRecord({"num-examples": 10.0, "loss": math.nan})})
    found = read_train_reply(reply, LAYOUT)
    assert (found.kind, found.num_examples, found.task_id, found.work_steps) == ("model", 10, None, None)


def test_finite_values_whose_sum_overflows_are_accepted():
    reply = good_reply()
    weight(3e38)(reply)
    assert read_train_reply(reply, LAYOUT).values.max() == np.float32(3e38)


# ---- a model from arrays alone --------------------------------------------------------------------------------------


def test_a_model_of_arrays_trains_floats_and_leaves_statistics_alone():
    model = model_from_arrays(ArrayRecord(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()))
    assert [spec.name for spec in model.layout.params] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert set(model.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_arrays_without_anything_to_train_are_refused():
    with pytest.raises(UnsupportedModel, match="no float32 or float64"):
        model_from_arrays(ArrayRecord([np.arange(3)]))


def test_initial_arrays_that_cannot_be_decoded_are_refused():
    record = ArrayRecord()
    record["w"] = Array("float32", (3,), "numpy.ndarray", b"hello")
    with pytest.raises(UnsupportedModel, match="initial arrays cannot be read"):
        model_from_arrays(record)


def test_a_layout_from_arrays_reads_what_a_module_with_the_same_names_sends():
    net = nn.Linear(2, 2)
    assert model_from_arrays(ArrayRecord(net.state_dict())).layout == Layout.of(net)


def test_arrays_sent_to_many_are_decoded_once_and_stay_each_ones_own():
    values = np.arange(6.0).reshape(2, 3)
    content, reading = RecordDict({"arrays": ArrayRecord([values])}), Reading()
    first, second = (clone_content(content, reading)["arrays"]["0"] for _ in range(2))
    assert isinstance(first, LazyArray) and first is not second and first.view is second.view
    assert first == content["arrays"]["0"] and first.data is content["arrays"]["0"].data
    copy = first.numpy()
    copy[0, 0] = -1.0
    assert np.array_equal(second.numpy(), values)
    second.data = Array(values + 1).data
    assert np.array_equal(second.numpy(), values + 1) and np.array_equal(first.numpy(), values)


def test_an_array_that_was_changed_between_two_nodes_is_decoded_anew():
    content, reading = RecordDict({"arrays": ArrayRecord([np.zeros(2)])}), Reading()
    before = clone_content(content, reading)["arrays"]["0"]
    content["arrays"]["0"].data = Array(np.ones(2)).data
    assert np.array_equal(clone_content(content, reading)["arrays"]["0"].numpy(), np.ones(2))
    assert np.array_equal(before.numpy(), np.zeros(2))


@pytest.mark.parametrize("array", [
    Array("float64", (2,), "numpy.ndarray", b"no array"),
    Array("float32", (2,), "numpy.ndarray", Array(np.ones(2)).data),
    Array("float64", (2,), "something.else", Array(np.ones(2)).data),
])
def test_an_array_that_cannot_be_decoded_is_sent_as_it_is(array):
    record = ArrayRecord()
    record["x"] = array
    sent = clone_content(RecordDict({"arrays": record}), Reading())["arrays"]["x"]
    assert type(sent) is Array and vars(sent) == vars(array) and sent is not array
