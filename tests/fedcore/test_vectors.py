"""A model as one flat vector, and back, bit for bit."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fedcore.errors import BadInput, MalformedReply, UnsupportedModel
from fedcore.vectors import FlatModule, Layout, Model, TensorSpec
from tests.support import small_net

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
BUFFER_DTYPES = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.float64])


class Made(nn.Module):
    """A module with any shapes."""

    def __init__(self, shapes, buffers, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(len(shapes))
        for index, shape in enumerate(shapes):
            setattr(self, f"p{index}", nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))
        for index, (shape, buffer_dtype) in enumerate(buffers):
            values = (10 * torch.randn(shape, generator=generator)).to(buffer_dtype)
            self.register_buffer(f"b{index}", values)


modules = st.builds(
    Made,
    st.lists(SHAPES, min_size=1, max_size=4),
    st.lists(st.tuples(SHAPES, BUFFER_DTYPES), max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
)


def same(found, expected):
    """Say whether two state dicts hold the same names in the same order, and the same bits."""
    return list(found) == list(expected) and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        and found[name].numpy().tobytes() == tensor.numpy().tobytes()
        for name, tensor in expected.items()
    )


@given(modules)
def test_a_module_comes_back_from_its_vector_bit_for_bit(module):
    model = Model.of(module)
    assert model.params.shape == (model.layout.num_params,) and model.params.dtype == model.layout.dtype
    assert same(model.state_dict(), module.state_dict())
    blank = Made([], [], torch.float32)
    blank.__dict__ = {**module.__dict__}
    for tensor in blank.state_dict().values():
        tensor.zero_()
    model.load_into(blank)
    assert same(blank.state_dict(), model.state_dict())


@given(modules)
def test_a_saved_model_is_read_back_bit_for_bit(tmp_path_factory, module):
    model = Model.of(module)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model.save(path)
    assert same(Model.load(path, model.layout).state_dict(), model.state_dict())


@given(modules)
def test_the_layout_counts_elements_and_bytes(module):
    layout = Layout.of(module)
    assert layout.num_params == sum(parameter.numel() for parameter in module.parameters())
    assert layout.num_bytes == sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert layout.order == tuple(module.state_dict())


def test_frozen_parameters_statistics_and_counters_are_buffers():
    layout = Layout.of(small_net())
    assert {spec.name for spec in layout.buffers} == {
        "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"
    }
    assert [spec.dtype for spec in layout.buffers if spec.name == "1.num_batches_tracked"] == ["int64"]


def test_a_model_is_a_copy_of_the_module():
    net = small_net()
    model = Model.of(net)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert same(model.state_dict(), before)


def test_replacing_makes_a_new_model_and_leaves_the_old_one():
    model = Model.of(small_net())
    params, mean = model.params + 1, torch.full((4,), 9.0)
    other = model.replace(params, {"1.running_mean": mean})
    assert torch.equal(other.params, model.params + 1) and torch.equal(other.buffers["1.running_mean"], mean)
    assert torch.equal(other.buffers["1.running_var"], model.buffers["1.running_var"])
    assert not torch.equal(model.buffers["1.running_mean"], mean)


@pytest.mark.parametrize("params", [torch.zeros(3), torch.zeros(30, dtype=torch.float64)])
def test_parameters_of_another_shape_or_dtype_are_refused(params):
    with pytest.raises(UnsupportedModel, match=r"\[.*\].*must be float32\[30\]"):
        Model.of(small_net()).replace(params)


def test_buffers_that_the_model_does_not_have_are_refused():
    with pytest.raises(UnsupportedModel, match="'gamma'"):
        Model.of(small_net()).replace(buffers={"gamma": torch.zeros(1)})


# ---- training in a flat module --------------------------------------------------------------------------------------


def test_a_flat_module_computes_what_the_plain_one_computes():
    plain, flat = small_net(), FlatModule(small_net())
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for module, parameters in ((plain, plain.parameters()), (flat.module, flat.module.parameters())):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            optimizer.step()
    assert same(flat.module.state_dict(), plain.state_dict())
    assert torch.equal(flat.params, Model.of(plain).params)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in flat.buffers().items())


def test_loading_a_flat_module_overwrites_everything_and_keeps_no_reference():
    flat, model = FlatModule(small_net(seed=1)), Model.of(small_net(seed=2))
    params, buffers = model.params.clone(), {name: value.clone() for name, value in model.buffers.items()}
    flat.load(params, buffers)
    assert same(flat.module.state_dict(), model.state_dict())
    params.zero_()
    buffers["1.running_mean"].zero_()
    assert same(flat.module.state_dict(), model.state_dict())


def test_buffers_of_a_flat_module_are_copies():
    flat = FlatModule(small_net())
    taken = flat.buffers()
    flat.module(torch.ones(4, 3))
    assert int(taken["1.num_batches_tracked"]) == 7
    assert int(flat.buffers()["1.num_batches_tracked"]) == 8


# ---- what cannot be a vector ----------------------------------------------------------------------------------------


def tied():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


def half_frozen():
    net = nn.Linear(2, 2)
    net.requires_grad_(False)
    return net


class Extra(nn.Linear):
    """A module that puts something that is no tensor into its state dict."""

    def get_extra_state(self):
        return {"answer": 42}

    def set_extra_state(self, state):
        pass


def with_buffer(dtype):
    net = nn.Linear(2, 2)
    net.register_buffer("extra", torch.zeros(2).to(dtype))
    return net


@pytest.mark.parametrize(("module", "words"), [
    (tied(), "one parameter under two names"),
    (half_frozen(), "no trainable parameter"),
    (nn.Linear(2, 2).half(), "float16; they must all be float32 or all float64"),
    (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "float32, .*float64"),
    (Extra(2, 2), "_extra_state.*dict"),
    (with_buffer(torch.bfloat16), "extra.*bfloat16"),
])
def test_a_module_that_is_no_vector_is_refused_by_name(module, words):
    with pytest.raises(UnsupportedModel, match=words):
        Layout.of(module)


@pytest.mark.parametrize(("change", "words"), [
    (lambda state: state.pop("0.weight"), "lacks '0.weight'"),
    (lambda state: state.update(more=torch.zeros(1)), "unexpected 'more'"),
    (lambda state: state.update({"0.weight": torch.zeros(3, 4)}), r"float32\[3, 4\], but must be float32\[4, 3\]"),
    (lambda state: state.update({"0.weight": torch.zeros(4, 3).double()}), r"float64\[4, 3\], but must be float32"),
])
def test_a_state_dict_of_another_model_is_refused(change, words):
    state = small_net().state_dict()
    change(state)
    with pytest.raises(MalformedReply, match=words):
        Layout.of(small_net()).split(state)


def test_a_file_that_is_no_model_is_bad_input(tmp_path):
    layout = Layout.of(small_net())
    for name, content in (("absent", None), ("empty", b""), ("text", b"hello, world")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadInput, match="Cannot read a model"):
            Model.load(path, layout)
    with pytest.raises(BadInput, match="Cannot read a model"):
        Model.load(tmp_path, layout)


def test_a_file_with_another_model_is_bad_input(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="does not fit the task's: .*lacks"):
        Model.load(tmp_path / "other.safetensors", Layout.of(small_net()))


def test_a_spec_describes_its_tensor():
    spec = TensorSpec.of("counts", torch.zeros((2, 3), dtype=torch.int16))
    assert (spec.shape, spec.dtype, spec.num_elements, spec.num_bytes) == ((2, 3), "int16", 6, 12)
