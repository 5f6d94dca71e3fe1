"""Small models, built from the shape of a task's examples and the number of outputs that it needs."""
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.errors import InvalidSetting
from fedcore.registry import build, check


def build_model(spec: str | dict[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the model that a task's `model` setting names.

    A class of the user's own is given `input_shape` and `num_outputs` when its constructor has such arguments.

    Args:
        spec: registered name or `package.module:Class`, alone or under `name` among its settings.
        input_shape: shape of one example; for text the number of tokens in the vocabulary.
        num_outputs: classes, or values to predict.

    Raises:
        InvalidSetting: no such model, a wrong setting, or something that is no torch module.
    """
    model = build("models", spec, "task.model", input_shape=input_shape, num_outputs=num_outputs)
    if not isinstance(model, nn.Module):
        raise InvalidSetting("task.model", spec, "a torch.nn.Module", f"It is a {type(model).__name__}.")
    return model


def check_model(spec: str | dict[str, Any], input_shape: tuple[int, ...], num_outputs: int) -> None:
    """Find out early what is wrong with a task's `model` setting.

    Raises:
        InvalidSetting: as `build_model`; the shape of a user's own model shows only when it is built.
    """
    checked, problems = check("models", spec, "task.model")
    if problems:
        raise problems[0]
    if ":" not in checked["name"]:
        # Only its shapes matter here: whoever uses torch's global generator notices nothing.
        with torch.random.fork_rng(devices=[]):
            build_model(spec, input_shape, num_outputs)


class Logistic(nn.Module):
    """Linear scores of the flattened input: logistic regression, or with one output linear regression."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int):
        super().__init__()
        self.linear = nn.Linear(prod(input_shape), num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.linear(inputs.flatten(1))
        return scores


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them.

    Args:
        hidden: width of each hidden layer.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, hidden: Sequence[int] = (100,)):
        super().__init__()
        _check_widths("hidden", hidden)
        widths = (prod(input_shape), *hidden, num_outputs)
        layers: list[nn.Module] = []
        for width, following in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.layers(inputs.flatten(1))
        return scores


class Cnn(nn.Module):
    """Two strided 5 x 5 convolutions and a linear layer, for images of shape (channels, height, width).

    Strides instead of pooling: on one core a step on 32 MNIST digits takes about 1.5 ms.

    Args:
        width: channels after the first convolution; the second has twice as many.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, width: int = 8):
        super().__init__()
        _check_widths("width", (width,))
        if len(input_shape) != 3:
            raise InvalidSetting(
                "task.model", "cnn", "another model for this task", "It takes images, (channels, height, width)."
            )
        channels, height, across = input_shape
        self.first = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        self.second = nn.Conv2d(width, 2 * width, 5, stride=2, padding=2)
        self.scores = nn.Linear(2 * width * _quarter(height) * _quarter(across), num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = functional.relu(self.second(functional.relu(self.first(inputs))))
        scores: Tensor = self.scores(maps.flatten(1))
        return scores


class CharLstm(nn.Module):
    """Next-token scores at every position, shape (batch, length, num_outputs), from an LSTM.

    Args:
        embedding: width of a token's vector.
        hidden: width of the LSTM.
        layers: LSTMs on top of each other.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_outputs: int, embedding: int = 16, hidden: int = 128, layers: int = 1
    ):
        super().__init__()
        _check_widths("embedding", (embedding,))
        _check_widths("hidden", (hidden,))
        _check_widths("layers", (layers,))
        _check_tokens("lstm", input_shape)
        self.embedding = nn.Embedding(input_shape[0], embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.scores = nn.Linear(hidden, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.lstm(self.embedding(tokens))[0])
        return scores


class CharTransformer(nn.Module):
    """Next-token scores at every position, shape (batch, length, num_outputs), from a pre-norm causal transformer.

    Args:
        width: of a token's vector.
        heads: attention heads; a divisor of `width`.
        layers: blocks.
        max_length: longest text it can read.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_outputs: int, width: int = 64, heads: int = 4, layers: int = 2,
        max_length: int = 256,
    ):
        super().__init__()
        _check_widths("width", (width,))
        _check_widths("layers", (layers,))
        _check_tokens("transformer", input_shape)
        if heads < 1 or width % heads:
            raise InvalidSetting("heads", heads, f"a divisor of width={width}")
        self.tokens = nn.Embedding(input_shape[0], width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.tokens(tokens) + self.positions[:tokens.shape[-1]]
        scores: Tensor = self.scores(self.norm(self.blocks(vectors)))
        return scores


class CausalBlock(nn.Module):
    """Self-attention to earlier positions, then a two-layer network; each is added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.projection = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, vectors: Tensor) -> Tensor:
        parts = self.projection(self.norms[0](vectors)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(-3, -2) for part in parts.unbind(-3))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        vectors = vectors + self.merge(attended.transpose(-3, -2).flatten(-2))
        output: Tensor = vectors + self.network(self.norms[1](vectors))
        return output


def _quarter(size: int) -> int:
    return -(-size // 4)


def _check_widths(name: str, widths: Sequence[int]) -> None:
    if any(width < 1 for width in widths):
        raise InvalidSetting(name, list(widths) if len(widths) != 1 else widths[0], "at least 1")


def _check_tokens(name: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 1:
        raise InvalidSetting("task.model", name, "another model for this task", "It reads text, one token at a time.")
