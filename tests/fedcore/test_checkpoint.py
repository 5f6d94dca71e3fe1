"""Checkpoints: everything comes back as it was, and a crash at any moment costs at most the newest one."""
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcore.checkpoint import Checkpoints, freeze, load_tree, save_tree
from fedcore.errors import UnusableCheckpoint
from fedcore.payload import VectorRecord, clone_content
from fedcore.vectors import Model
from tests.support import small_net, vector_model

ROOT = Path(__file__).parents[2]
MODEL = Model.of(small_net())

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
keys = (
    st.text(max_size=4) | st.integers(-3, 3) | st.booleans() | st.none()
    | st.tuples(st.integers(0, 2), st.text(max_size=2))
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
dtypes = st.sampled_from([
    np.float32, np.float64, np.float16, np.int64, np.int8, np.uint8, np.uint16, np.bool_, np.complex64
])
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes))
tensors = arrays.map(lambda values: torch.from_numpy(values.copy()))
scalars = arrays.filter(lambda values: values.size).map(lambda values: values.reshape(-1)[0])
numbers = st.integers(-2**40, 2**40) | st.floats() | st.lists(st.floats(), max_size=2)
metrics = st.dictionaries(st.text(max_size=4), numbers)
settings = st.booleans() | st.text(max_size=4) | st.binary(max_size=4) | st.lists(st.integers(), max_size=2)
configs = st.dictionaries(st.text(max_size=4), settings)
records = (
    metrics.map(MetricRecord) | configs.map(ConfigRecord) | arrays.map(lambda values: ArrayRecord([np.asarray(values)]))
    | st.just(VectorRecord(MODEL))
)
contents = st.dictionaries(st.text(max_size=4), records, max_size=3).map(RecordDict)
trees = st.recursive(
    plain | tensors | arrays | scalars | records | contents | st.just(MODEL),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


def same(found, expected):
    """Say whether two trees are equal in values, types and order, NaN and minus zero included."""
    if isinstance(expected, torch.Tensor):
        expected, found = expected.numpy(), found.numpy()
    if isinstance(expected, (np.ndarray, np.generic)):
        return (type(found), found.dtype, found.shape, found.tobytes()) == (
            type(expected), expected.dtype, expected.shape, expected.tobytes()
        )
    if isinstance(expected, Model):
        return found.layout == expected.layout and same(found.state_dict(), expected.state_dict())
    if isinstance(expected, ArrayRecord):
        read = {name: array.numpy() for name, array in found.items()}
        return type(found) is type(expected) and same(read, {name: array.numpy() for name, array in expected.items()})
    if type(found) is not type(expected):
        return False
    if isinstance(expected, (dict, RecordDict, MetricRecord, ConfigRecord)):
        return list(map(str, found)) == list(map(str, expected)) and all(
            same(mine, theirs) for mine, theirs in zip(found.values(), expected.values(), strict=True)
        ) and all(map(same, found, expected))
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        # JSON knows one NaN, and two zeros.
        return math.isnan(found) if math.isnan(expected) else (found, math.copysign(1, found)) == (
            expected, math.copysign(1, expected)
        )
    return bool(found == expected)


@given(trees)
def test_any_tree_comes_back_as_it_was(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "tree.safetensors"
    save_tree(path, tree)
    assert same(load_tree(path), tree)


def test_keys_that_look_like_tags_are_only_keys(tmp_path):
    tree = {"$tensor": "t0", "a": {"$map": [1]}, "$": {"$tuple": []}}
    save_tree(tmp_path / "t", tree)
    assert load_tree(tmp_path / "t") == tree


def test_views_and_strides_do_not_matter(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = {"steps": base[::-1, ::2], "transposed": base.T, "view": torch.from_numpy(base)[1:3].t()}
    save_tree(tmp_path / "t", tree)
    found = load_tree(tmp_path / "t")
    assert all(np.array_equal(found[name], np.asarray(tree[name])) for name in tree)


def test_gradients_are_left_behind(tmp_path):
    save_tree(tmp_path / "t", torch.ones(2, requires_grad=True))
    assert not load_tree(tmp_path / "t").requires_grad


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, Array("float32", (1,), "numpy.ndarray", b"")])
def test_what_cannot_be_held_is_refused_by_its_type(tmp_path, value):
    with pytest.raises(TypeError, match=f"cannot hold a {type(value).__name__}"):
        save_tree(tmp_path / "t", {"state": [value]})
    assert not list(tmp_path.iterdir())


# ---- what is shared is stored once ----------------------------------------------------------------------------------


def size(path, tree):
    save_tree(path, tree)
    return path.stat().st_size


def test_a_model_that_many_requests_share_is_stored_once(tmp_path):
    model = vector_model(100_000)
    lazy, stock = VectorRecord(model), ArrayRecord(model.state_dict())
    for shared in (model.params, lazy, stock, model.params.numpy(), ArrayRecord({"copied": stock["params"]})):
        one, many = size(tmp_path / "one", [shared]), size(tmp_path / "many", [shared] * 50)
        assert many < one + 20_000
    requests = [clone_content(RecordDict({"lazy": lazy, "stock": stock})) for _ in range(50)]
    assert size(tmp_path / "requests", requests) < 2.2 * size(tmp_path / "one", [model])


def test_arrays_of_a_changed_record_are_stored_once_as_well(tmp_path):
    record = VectorRecord(vector_model(100_000))
    record["more"] = Array(np.zeros(3))
    assert size(tmp_path / "t", [record.copy() for _ in range(50)]) < 500_000


def test_what_was_shared_is_shared_again(tmp_path):
    params = torch.zeros(5)
    save_tree(tmp_path / "t", {"a": params, "b": [params]})
    found = load_tree(tmp_path / "t")
    assert found["a"] is found["b"][0]


def test_a_tree_of_a_hundred_megabytes_of_text_is_saved_and_read(tmp_path):
    tree = ["x" * 1_000_000 for _ in range(101)]
    save_tree(tmp_path / "t", tree)
    assert load_tree(tmp_path / "t") == tree


def test_a_frozen_tree_is_what_was_frozen(tmp_path):
    counts, values = {"a": [1]}, np.ones(3)
    frozen = freeze({"counts": counts, "values": values})
    counts["a"].append(2)
    values[:] = 7
    save_tree(tmp_path / "t", frozen)
    assert same(load_tree(tmp_path / "t"), {"counts": {"a": [1]}, "values": np.ones(3)})


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_file_of_another_format_is_refused_by_both_names(tmp_path):
    Model.of(small_net()).save(tmp_path / "model")
    with pytest.raises(UnusableCheckpoint, match="has the format None; this fedcore reads 'fedcore-1'"):
        load_tree(tmp_path / "model")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff" * 100, (99).to_bytes(8, "little") + b"{"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(UnusableCheckpoint, match="cannot be read"):
        load_tree(tmp_path / "t")


def test_a_file_that_was_damaged_or_cut_anywhere_is_refused_or_still_whole(tmp_path):
    tree = {"model": MODEL, "count": 3, "name": "x"}
    save_tree(tmp_path / "good", tree)
    good = (tmp_path / "good").read_bytes()
    chooser = random.Random(1)
    for _ in range(300):
        bad = bytearray(good)
        if chooser.random() < 0.3:
            bad = bad[:chooser.randrange(len(bad))]
        else:
            bad[chooser.randrange(len(bad))] ^= 1 << chooser.randrange(8)
        (tmp_path / "bad").write_bytes(bad)
        try:
            found = load_tree(tmp_path / "bad")
        except UnusableCheckpoint:
            continue
        assert same(found, tree)


def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save({"step": 1})
    newest = checkpoints.save({"step": 2})
    newest.write_bytes(newest.read_bytes()[:-3])
    tree, problems = Checkpoints(tmp_path).load_newest()
    assert tree == {"step": 1}
    assert len(problems) == 1 and str(newest) in problems[0] and "cannot be read" in problems[0]
    newest.write_bytes(b"")
    assert Checkpoints(tmp_path).load_newest()[0] == {"step": 1}


def test_after_a_fallback_the_good_one_outlives_the_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save({"step": 1})
    checkpoints.save({"step": 2}).write_bytes(b"damaged")
    again = Checkpoints(tmp_path, keep=2)
    again.load_newest()
    again.save({"step": 3}).write_bytes(b"damaged, too")
    assert Checkpoints(tmp_path).load_newest()[0] == {"step": 1}


def test_without_a_readable_checkpoint_every_reason_is_told(tmp_path):
    with pytest.raises(UnusableCheckpoint, match="holds none.*without --resume"):
        Checkpoints(tmp_path / "new").load_newest()
    checkpoints = Checkpoints(tmp_path / "old")
    for step in range(2):
        checkpoints.save({"step": step}).write_bytes(b"")
    with pytest.raises(UnusableCheckpoint, match="00000002.*00000001.*without --resume"):
        checkpoints.load_newest()


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(7):
        checkpoints.save({"step": step})
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"checkpoint-{number:08d}.safetensors" for number in range(8 - keep, 8)]
    assert checkpoints.load_newest() == ({"step": 6}, [])


def test_numbers_go_on_where_an_earlier_run_left_off(tmp_path):
    Checkpoints(tmp_path).save({"step": 1})
    assert Checkpoints(tmp_path).save({"step": 2}).name == "checkpoint-00000002.safetensors"


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    others = [tmp_path / name for name in ("checkpoint-copy.safetensors", "checkpoint-1.safetensors.bak", "notes.txt")]
    for path in others:
        path.write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(3):
        checkpoints.save({"step": step})
    assert checkpoints.load_newest() == ({"step": 2}, [])
    assert all(path.read_text() == "mine" for path in others)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(UnusableCheckpoint, match="cannot be written.*Make room"):
        save_tree(tmp_path / "absent" / "t", {})


# ---- killed in the middle -------------------------------------------------------------------------------------------

SAVER = """
import sys, torch
from pathlib import Path
from fedcore.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
step = int(sys.argv[2])
while True:
    step += 1
    checkpoints.save({"step": step, "values": torch.full((200_000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving_the_newest_readable_one_is_never_far_behind(tmp_path):
    chooser = random.Random(2)
    done = 0
    for _ in range(2):
        command = [sys.executable, "-c", SAVER, str(tmp_path), str(done)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3):
            done = int(process.stdout.readline())
        time.sleep(0.05 * chooser.random())
        os.kill(process.pid, signal.SIGKILL)
        done = int((process.communicate()[0].split() or [done])[-1])
        tree, problems = Checkpoints(tmp_path).load_newest()
        assert problems == []
        assert tree["step"] in (done, done + 1)
        assert torch.equal(tree["values"], torch.full((200_000,), float(tree["step"])))
        done = tree["step"]
