"""A model as one flat vector, and back.

Strategies do their mathematics on vectors: a line of a paper is then a line of Python. Trainable parameters form the
vector, in the order of the module's state dict; everything else in the state dict (BatchNorm statistics, integer
counters) is a *buffer*: kept by name, never added to a gradient or an update.
"""
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedcore.errors import BadInput, MalformedReply, UnsupportedModel

FLAT_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype (as torch prints it, without `torch.`) of one entry of a state dict."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def num_elements(self) -> int:
        return prod(self.shape)

    @cached_property
    def num_bytes(self) -> int:
        return self.num_elements * self.torch_dtype.itemsize

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Self:
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a model lies in the flat vector, and which tensors stay outside it.

    Attributes:
        params: trainable entries; their elements, in this order, are the vector of length `num_params`.
        buffers: the other entries of the state dict.
        order: every name, in the order of the state dict.
    """

    params: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    order: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Read the layout off a module.

        Raises:
            UnsupportedModel: nothing is trainable, a parameter has two names, the trainable parameters are not all
                float32 or all float64, or an entry of the state dict is none that NumPy can hold.
        """
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        shared = {name for name, _ in module.named_parameters(remove_duplicate=False)} - {
            name for name, _ in module.named_parameters()
        }
        if shared:
            raise UnsupportedModel(
                f"{type(module).__name__} uses one parameter under two names ({', '.join(sorted(shared))}). "
                "Give each its own values: tied weights have no place of their own in a flat vector."
            )
        state = module.state_dict()
        for name, tensor in state.items():
            _require_array(name, tensor)
        params = tuple(TensorSpec.of(name, tensor) for name, tensor in state.items() if name in trainable)
        buffers = tuple(TensorSpec.of(name, tensor) for name, tensor in state.items() if name not in trainable)
        if not params:
            raise UnsupportedModel(f"{type(module).__name__} has no trainable parameter.")
        dtypes = {spec.torch_dtype for spec in params}
        if len(dtypes) != 1 or not dtypes <= set(FLAT_DTYPES):
            found = ", ".join(sorted(spec.dtype for spec in params))
            raise UnsupportedModel(
                f"{type(module).__name__} has parameters of dtype {found}; they must all be float32 or all float64. "
                "Convert it with module.float() or module.double()."
            )
        return cls(params, buffers, tuple(state))

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.params[0].torch_dtype

    @cached_property
    def num_params(self) -> int:
        return sum(spec.num_elements for spec in self.params)

    @cached_property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.params + self.buffers)

    @cached_property
    def slices(self) -> tuple[tuple[TensorSpec, int, int], ...]:
        """Each trainable entry with the start and the end of its elements in the vector."""
        rows, start = [], 0
        for spec in self.params:
            rows.append((spec, start, start + spec.num_elements))
            start += spec.num_elements
        return tuple(rows)

    def views(self, params: Tensor) -> dict[str, Tensor]:
        """Return the trainable tensors as views of the vector `params`, shape (num_params,)."""
        return {spec.name: params[start:end].view(spec.shape) for spec, start, end in self.slices}

    def split(self, state: Mapping[str, Tensor]) -> "Model":
        """Return a model that copies a state dict of this layout.

        Raises:
            MalformedReply: names, shapes or dtypes differ.
        """
        check_names(state, self.order)
        for spec in self.params + self.buffers:
            found = TensorSpec.of(spec.name, state[spec.name])
            if found != spec:
                raise MalformedReply(mismatch(spec, found.shape, found.dtype))
        params = torch.empty(self.num_params, dtype=self.dtype)
        for spec, start, end in self.slices:
            params[start:end] = state[spec.name].detach().reshape(-1)
        return Model(params, {spec.name: state[spec.name].detach().clone() for spec in self.buffers}, self)


def _require_array(name: str, value: object) -> None:
    """Raise `UnsupportedModel` unless an entry of a state dict is a tensor that can travel as a NumPy array."""
    if not isinstance(value, Tensor):
        raise UnsupportedModel(f"The state dict's {name!r} is a {type(value).__name__}, and only tensors can be sent.")
    try:
        torch.empty(0, dtype=value.dtype).numpy()
    except TypeError as error:
        raise UnsupportedModel(
            f"The state dict's {name!r} is {str(value.dtype).removeprefix('torch.')}, which NumPy does not know. "
            "Use float32, or another type that both have."
        ) from error


def check_names(found: Mapping[str, object], expected: tuple[str, ...]) -> None:
    """Raise `MalformedReply` unless a mapping has exactly the expected names."""
    if found.keys() == set(expected):
        return
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in set(expected)]
    words = [f"lacks {', '.join(map(repr, missing[:3]))}"] if missing else []
    words += [f"has unexpected {', '.join(repr(name[:80]) for name in extra[:3])}"] if extra else []
    raise MalformedReply(f"the arrays' names differ: the reply {' and '.join(words)}")


def mismatch(spec: TensorSpec, shape: tuple[int, ...], dtype: str) -> str:
    """Say how an array differs from what its name requires."""
    return f"array {spec.name!r} is {dtype}{list(shape)}, but must be {spec.dtype}{list(spec.shape)}"


@dataclass(frozen=True, eq=False)
class Model:
    """A model's values. Immutable by agreement: nobody writes into these tensors, so they can be shared freely.

    Attributes:
        params: trainable parameters, shape (num_params,), float32 or float64.
        buffers: values of all other entries of the state dict, by name.
    """

    params: Tensor
    buffers: Mapping[str, Tensor]
    layout: Layout = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> "Model":
        """Return a copy of a module's present values."""
        return Layout.of(module).split(module.state_dict())

    def replace(self, params: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None) -> "Model":
        """Return the model with other parameters, other buffers, or both.

        Raises:
            UnsupportedModel: the parameters have another shape or dtype, or a buffer's name is unknown.
        """
        params = self.params if params is None else params
        if params.shape != self.params.shape or params.dtype != self.params.dtype:
            found, needed = TensorSpec.of("params", params), TensorSpec.of("params", self.params)
            raise UnsupportedModel(f"New values do not fit the model: {mismatch(needed, found.shape, found.dtype)}.")
        if buffers is not None and (unknown := buffers.keys() - self.buffers.keys()):
            raise UnsupportedModel(f"The model has no buffers called {', '.join(map(repr, sorted(unknown)))}.")
        return Model(params, self.buffers if buffers is None else {**self.buffers, **buffers}, self.layout)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state dict in the module's order; trainable entries are views, not to be written to."""
        tensors = {**self.layout.views(self.params), **self.buffers}
        return {name: tensors[name] for name in self.layout.order}

    def load_into(self, module: nn.Module) -> None:
        """Copy these values into a module of the same layout."""
        module.load_state_dict(self.state_dict())

    def save(self, path: Path) -> None:
        """Write the state dict as safetensors, atomically."""
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({name: tensor.contiguous().clone() for name, tensor in self.state_dict().items()}, temporary)
        # safetensors makes files that only their owner can read; a result is as readable as its neighbours.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path, layout: Layout) -> "Model":
        """Read a model of a given layout from a safetensors file.

        Raises:
            BadInput: the file cannot be read or holds another model.
        """
        try:
            return layout.split(load_file(path))
        except (OSError, SafetensorError) as error:
            raise BadInput(f"Cannot read a model from {path}: {error}. Give a .safetensors file.") from error
        except MalformedReply as error:
            raise BadInput(f"The model in {path} does not fit the task's: {error.reason}.") from error


class FlatModule:
    """A module whose trainable parameters are views into one flat buffer, so that loading is a single copy."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.layout = Layout.of(module)
        start_values = self.layout.split({name: tensor.cpu() for name, tensor in module.state_dict().items()})
        named = dict(module.named_parameters())
        self.device = next(iter(named.values())).device
        self.params = start_values.params.to(self.device)    # (d,), live: optimizer steps change it
        for spec, start, end in self.layout.slices:
            named[spec.name].data = self.params[start:end].view(spec.shape)
        state = module.state_dict()
        self._buffers = {spec.name: state[spec.name] for spec in self.layout.buffers}

    def load(self, params: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Overwrite the module's values with `params`, shape (d,), and `buffers` by name."""
        self.params.copy_(params)
        for name, tensor in self._buffers.items():
            tensor.copy_(buffers[name])

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the non-trainable values, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._buffers.items()}
