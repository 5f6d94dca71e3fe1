"""Checkpoints: one safetensors file each, whole or absent, with the tree of plain values in its metadata.

Trees may hold dicts (any hashable plain keys), lists, tuples, numbers, strings, None, tensors, NumPy arrays and
Flower records. A tensor that occurs many times (the model that many clients train from) is stored once. No pickle.
"""
import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedcore.arrays import LazyArray
from fedcore.errors import UnusableCheckpoint
from fedcore.payload import VectorRecord
from fedcore.vectors import Layout, Model, TensorSpec

FORMAT = "fedcore-1"
SCALAR_RECORDS = {"metrics": MetricRecord, "config": ConfigRecord}


class _Encoder:
    """Turns a tree into JSON values and a table of tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layouts: list[Layout] = []
        self._names: dict[int, str] = {}
        self._keep: list[Any] = []    # ids stay unique only while the objects live

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(item) for key, item in value.items()}
            return {"$map": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, list):
            return [self.encode(item) for item in value]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item) for item in value]}
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value)}
        if isinstance(value, np.ndarray):
            return {"$ndarray": self._tensor(torch.from_numpy(np.array(value)))}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        return self._encode_flower(value)

    def _encode_flower(self, value: Any) -> Any:
        if isinstance(value, Model):
            return {"$model": [self._layout(value.layout), self.encode(value.params), self.encode(dict(value.buffers))]}
        if isinstance(value, VectorRecord) and value.model is not None:
            return {"$vector": self.encode(value.model)}
        if isinstance(value, RecordDict):
            return {"$records": [[name, self.encode(record)] for name, record in value.items()]}
        if isinstance(value, ArrayRecord):
            return {"$arrays": [[name, self._array(array)] for name, array in value.items()]}
        for tag, kind in SCALAR_RECORDS.items():
            if isinstance(value, kind):
                return {"$" + tag: [[name, self.encode(item)] for name, item in value.items()]}
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    def _tensor(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            self._names[id(tensor)] = f"t{len(self.tensors)}"
            self._keep.append(tensor)
            self.tensors[self._names[id(tensor)]] = tensor.detach()
        return self._names[id(tensor)]

    def _array(self, array: Array) -> Any:
        if isinstance(array, LazyArray):
            return {"lazy": self._tensor(torch.from_numpy(np.array(array.numpy())))}
        values = torch.from_numpy(np.frombuffer(array.data, dtype=np.uint8).copy())
        return {"dtype": array.dtype, "shape": list(array.shape), "stype": array.stype, "bytes": self._tensor(values)}

    def _layout(self, layout: Layout) -> int:
        if layout not in self.layouts:
            self.layouts.append(layout)
        return self.layouts.index(layout)


class _Decoder:
    """Turns JSON values and a table of tensors back into a tree."""

    def __init__(self, tensors: dict[str, Tensor], layouts: list[Layout]):
        self.tensors, self.layouts = tensors, layouts

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1 and (tag := next(iter(value))).startswith("$"):
            return self._tagged(tag[1:], value[tag])
        return {key: self.decode(item) for key, item in value.items()}

    def _tagged(self, tag: str, body: Any) -> Any:
        if tag == "map":
            return {self.decode(key): self.decode(item) for key, item in body}
        if tag == "tuple":
            return tuple(self.decode(item) for item in body)
        if tag == "tensor":
            return self.tensors[body]
        if tag == "ndarray":
            return self.tensors[body].numpy()
        if tag == "bytes":
            return base64.b64decode(body)
        if tag == "model":
            return Model(self.decode(body[1]), self.decode(body[2]), self.layouts[body[0]])
        if tag == "vector":
            return VectorRecord(self.decode(body))
        if tag == "arrays":
            record = ArrayRecord()
            for name, array in body:
                record[name] = self._array(array)
            return record
        kind = RecordDict if tag == "records" else SCALAR_RECORDS[tag]
        return kind({name: self.decode(item) for name, item in body})

    def _array(self, body: Any) -> Array:
        if "lazy" in body:
            return LazyArray(self.tensors[body["lazy"]].numpy())
        data = self.tensors[body["bytes"]].numpy().tobytes()
        return Array(body["dtype"], tuple(body["shape"]), body["stype"], data)


def _layout_to_json(layout: Layout) -> Any:
    def specs(entries: tuple[TensorSpec, ...]) -> Any:
        return [[spec.name, list(spec.shape), spec.dtype] for spec in entries]

    return {"params": specs(layout.params), "buffers": specs(layout.buffers), "order": list(layout.order)}


def _layout_from_json(body: Any) -> Layout:
    def specs(entries: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in entries)

    return Layout(specs(body["params"]), specs(body["buffers"]), tuple(body["order"]))


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = blake2b(tree.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        # Bytes through NumPy: an empty tensor has no memory to take a view of.
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy() if tensors[name].numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class Frozen:
    """A tree as it was at one moment: what changes in place was copied, tensors are shared."""

    text: str
    tensors: dict[str, Tensor]


def freeze(tree: Any) -> Frozen:
    """Return a tree in a form that later changes do not reach, to be saved now or later."""
    encoder = _Encoder()
    body = encoder.encode(tree)
    text = json.dumps({"tree": body, "layouts": [_layout_to_json(layout) for layout in encoder.layouts]})
    return Frozen(text, encoder.tensors)


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree, or a frozen one, to one file, atomically: the file is whole, or it is not there."""
    frozen = tree if isinstance(tree, Frozen) else freeze(tree)
    # Views of one memory must be parted: safetensors refuses tensors that share.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in frozen.tensors.items()}
    metadata = {"format": FORMAT, "tree": frozen.text, "digest": _digest(frozen.text, tensors)}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors or {"empty": torch.zeros(1)}, temporary, metadata=metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_tree(path: Path) -> Any:
    """Read a tree back.

    Raises:
        UnusableCheckpoint: the file is absent, cut short, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UnusableCheckpoint(f"{path} cannot be read: {error}.") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise UnusableCheckpoint(f"{path} has the format {found!r}; this fedcore reads {FORMAT!r}.")
    text = metadata.get("tree", "")
    stored = {name: tensor for name, tensor in tensors.items() if name != "empty"}
    if _digest(text, stored) != metadata.get("digest"):
        raise UnusableCheckpoint(f"{path} is damaged: its checksum does not match.")
    body = json.loads(text)
    return _Decoder(tensors, [_layout_from_json(layout) for layout in body["layouts"]]).decode(body["tree"])


class Checkpoints:
    """The newest few checkpoints of a run, in a folder of their own.

    Args:
        folder: made when absent.
        keep: how many are kept, at least 1; two allow for one that a dying disk cut short.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def _newest_first(self) -> Iterator[Path]:
        return iter(sorted(self.folder.glob("checkpoint-*.safetensors"), reverse=True))

    def save(self, tree: Any) -> Path:
        """Write the next checkpoint and delete those beyond `keep`."""
        newest = next(self._newest_first(), None)
        number = int(newest.stem.split("-")[1]) + 1 if newest else 1
        path = self.folder / f"checkpoint-{number:08d}.safetensors"
        save_tree(path, tree)
        for old in list(self._newest_first())[self.keep:]:
            old.unlink()
        return path

    def load_newest(self) -> tuple[Any, list[str]]:
        """Return the newest tree that can be read, and what was wrong with newer ones (for the user to see).

        Raises:
            UnusableCheckpoint: there is none.
        """
        problems: list[str] = []
        for path in self._newest_first():
            try:
                return load_tree(path), problems
            except UnusableCheckpoint as error:
                problems.append(str(error))
        found = " ".join(problems) or f"{self.folder} holds none."
        raise UnusableCheckpoint(f"No checkpoint can be resumed from: {found} Start the run anew without --resume.")
