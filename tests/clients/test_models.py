"""The models that come with fedcore."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedcore.clients.models import build_model, check_model
from fedcore.clients.modules import initial_model
from fedcore.clients.tasks.digits import Digits
from fedcore.errors import InvalidSetting
from fedcore.vectors import FlatModule, Model

IMAGES = [("logistic", (1, 8, 8)), ("mlp", (1, 28, 28)), ("mlp", (13,)), ("cnn", (1, 28, 28)), ("cnn", (3, 32, 32)),
          ("cnn", (1, 8, 8)), ("cnn", (2, 7, 9))]
TEXT = ["lstm", "transformer"]


@pytest.mark.parametrize(("name", "shape"), IMAGES)
def test_a_model_of_examples_scores_each(name, shape):
    assert build_model(name, shape, 10)(torch.randn(5, *shape)).shape == (5, 10)


@pytest.mark.parametrize("name", TEXT)
def test_a_model_of_text_scores_each_position(name):
    assert build_model(name, (97,), 97)(torch.randint(0, 97, (5, 20))).shape == (5, 20, 97)


@pytest.mark.parametrize("name", TEXT)
def test_a_model_of_text_does_not_look_ahead(name):
    model, tokens = build_model(name, (97,), 97), torch.randint(0, 97, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = 0
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), [*IMAGES, *((name, (97,)) for name in TEXT)])
def test_a_model_survives_being_flattened_and_loaded(name, shape):
    first, second = build_model(name, shape, 10), FlatModule(build_model(name, shape, 10))
    values = Model.of(first)
    second.load(values.params, values.buffers)
    inputs = torch.randint(0, 97, (3, 9)) if name in TEXT else torch.randn(3, *shape)
    assert torch.equal(first(inputs), second.module(inputs))


@pytest.mark.parametrize(("name", "shape"), [("mlp", (13,)), ("cnn", (1, 8, 8)), ("transformer", (97,))])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_can_be_taken_per_example(name, shape):
    model = build_model(name, shape, 4)
    inputs = torch.randint(0, 97, (3, 9)) if name in TEXT else torch.randn(3, *shape)
    targets = torch.zeros((3, 9) if name in TEXT else (3,), dtype=torch.long)

    def loss(params, example, target):
        scores = functional_call(model, params, (example[None],))
        return functional.cross_entropy(scores.reshape(-1, 4), target.reshape(-1))

    each = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), inputs, targets)
    for name_, parameter in model.named_parameters():
        model.zero_grad()
        functional.cross_entropy(model(inputs).reshape(-1, 4), targets.reshape(-1)).backward()
        assert torch.allclose(each[name_].mean(0), parameter.grad, atol=1e-5), name_


def test_settings_reach_the_model():
    layers = build_model({"name": "mlp", "hidden": [7, 5]}, (3,), 2).layers
    assert [layer.out_features for layer in layers[::2]] == [7, 5, 2]
    assert isinstance(build_model({"name": "mlp", "hidden": []}, (3,), 2).layers[0], nn.Linear)


def test_a_model_of_ones_own_needs_no_arguments():
    assert isinstance(build_model("torch.nn:Identity", (3,), 2), nn.Identity)


@pytest.mark.parametrize("check", [check_model, build_model])
@pytest.mark.parametrize(("spec", "shape", "words"), [
    ("cnnn", (1, 8, 8), "Did you mean cnn"),
    ("cnn", (13,), "It takes images"),
    ("lstm", (1, 8, 8), "It reads text"),
    ("transformer", (1, 8, 8), "It reads text"),
    ({"name": "cnn", "width": 0}, (1, 8, 8), "task.model.width=0"),
    ({"name": "cnn", "depth": 3}, (1, 8, 8), "task.model.depth"),
    ({"name": "mlp", "hidden": [10, 0]}, (13,), "task.model.hidden"),
    ({"name": "mlp", "hidden": "wide"}, (13,), "task.model.hidden"),
    ({"name": "lstm", "layers": 0}, (97,), "task.model.layers=0"),
    ({"name": "transformer", "heads": 3}, (97,), "task.model.heads=3.*divisor of width=64"),
    ({"name": "mlp", "num_outputs": 3}, (13,), "num_outputs"),
])
def test_wrong_settings_are_refused_with_their_path(check, spec, shape, words):
    with pytest.raises(InvalidSetting, match=words):
        check(spec, shape, 10)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(InvalidSetting, match="torch.nn.Module"):
        build_model("collections:OrderedDict", (3,), 2)


def test_initial_models_made_in_several_threads_are_those_made_in_one():
    task = Digits()
    alone = initial_model(task, 7).params
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: initial_model(task, seed).params, [7, 8] * 40))
    assert all(torch.equal(found, alone) for found in together[::2])
    assert len({float(found.sum()) for found in together[1::2]}) == 1
