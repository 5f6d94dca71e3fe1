"""Local optimizers by name."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedcore.clients.optim import OptimizerFactory
from fedcore.errors import InvalidSetting

NAMES = ("adam", "adamw", "nadam", "radam", "adamax", "adagrad", "adadelta", "rmsprop", "rprop", "asgd")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (4,), (2, 4))]


def walk(step, values, steps: int = 6) -> list[torch.Tensor]:
    """Follow the same gradients and changing rates, and return where that leads."""
    generator = torch.Generator().manual_seed(4)
    for number in range(steps):
        gradients = tuple(torch.randn(value.shape, generator=generator).to(value.dtype) for value in values)
        step(gradients, 0.1 / (1 + number))
    return [value.detach().clone() for value in values]


def by_torch(optimizer: torch.optim.Optimizer, values: list[nn.Parameter]):
    def step(gradients, lr):
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return step


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]), weight_decay=st.sampled_from([0.0, 0.01]), nesterov=st.booleans(),
    maximize=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sgd_is_torchs_bit_for_bit(momentum, weight_decay, nesterov, maximize, dtype):
    settings = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov and momentum > 0,
                "maximize": maximize}
    ours, theirs = parameters(dtype), parameters(dtype)
    found = walk(OptimizerFactory({"name": "sgd", **settings})(ours).step, ours)
    expected = walk(by_torch(torch.optim.SGD(theirs, lr=1.0, **settings), theirs), theirs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", NAMES)
def test_every_other_optimizer_is_torchs(name):
    ours, theirs = parameters(), parameters()
    factory = OptimizerFactory(name)
    found = walk(factory(ours).step, ours)
    torch_class = next(cls for cls in vars(torch.optim).values() if getattr(cls, "__name__", "").lower() == name)
    expected = walk(by_torch(torch_class(theirs, lr=1.0), theirs), theirs)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("spec", ["adam", {"name": "sgd", "momentum": 0.9}])
def test_the_state_starts_afresh_with_every_task(spec):
    factory = OptimizerFactory(spec)
    first, second = parameters(), parameters()
    walk(factory(first).step, first)
    assert all(map(torch.equal, walk(factory(second).step, second), first))


def test_settings_reach_the_optimizer():
    plain, decayed = parameters(), parameters()
    found = walk(OptimizerFactory({"name": "adamw", "betas": [0.5, 0.6], "weight_decay": 0.5})(decayed).step, decayed)
    assert not torch.equal(found[0], walk(OptimizerFactory("adamw")(plain).step, plain)[0])


@pytest.mark.parametrize(("spec", "words"), [
    ("sdg", "Did you mean sgd"),
    ({"name": "sgd", "momentun": 0.9}, "train.optimizer.momentun.*Did you mean momentum"),
    ({"name": "sgd", "lr": 0.1}, "train.lr"),
    ({"name": "sgd", "momentum": -1}, "train.optimizer.momentum=-1"),
    ({"name": "sgd", "nesterov": True}, "train.optimizer.nesterov"),
    ({"name": "adam", "betas": [2.0, 0.9]}, "beta"),
    ({"name": "torch.optim:LBFGS"}, "several times per step"),
    ({"name": "torch.optim:Muon"}, "matrices only"),
])
def test_wrong_settings_are_refused_with_their_path(spec, words):
    with pytest.raises(InvalidSetting, match=words):
        OptimizerFactory(spec)


def test_plain_sgd_does_not_load_torchs_compiler():
    program = (
        "import sys, torch\n"
        "from fedcore.clients.optim import OptimizerFactory\n"
        "value = torch.nn.Parameter(torch.ones(3))\n"
        "OptimizerFactory({'name': 'sgd', 'momentum': 0.9})([value]).step((torch.ones(3),), 0.5)\n"
        "assert value.tolist() == [0.5] * 3, value\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
