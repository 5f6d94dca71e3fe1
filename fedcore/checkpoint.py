"""Checkpoints: one safetensors file each, whole or absent; the tree of plain values is one of its tensors, as JSON.

Trees may hold dicts (any hashable plain keys), lists, tuples, numbers, strings, None, tensors, NumPy arrays and
scalars, and Flower records. A tensor or array that occurs many times (the model that many clients train from) is
stored once. No pickle.
"""
import base64
import json
import os
import re
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
# The tensor that holds the tree: the header of a safetensors file has a limit, and 100,000 clients exceed it.
TREE = "tree"
NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
# Most values of a large tree: they are asked for first.
PLAIN = frozenset((type(None), bool, int, float, str))
MOST_KEPT_KEYS = 32
SCALAR_RECORDS = {"metrics": MetricRecord, "config": ConfigRecord}


class _Encoder:
    """Turns a tree into JSON values and a table of tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layouts: list[Layout] = []
        self._names: dict[int, str] = {}
        self._plain_keys: set[tuple[str, ...]] = set()
        self._keep: list[Any] = []    # ids stay unique only while the objects live

    def encode(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        if isinstance(value, np.generic):    # np.float64 is a float, too
            return {"$scalar": self._values(value, np.asarray(value))}
        if isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, dict):
            if self._all_plain(tuple(value)):
                return {key: item if type(item) in PLAIN else self.encode(item) for key, item in value.items()}
            return {"$map": [self.encode(list(value)), self.encode(list(value.values()))]}
        if isinstance(value, list):
            return [item if type(item) in PLAIN else self.encode(item) for item in value]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item) for item in value]}
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value)}
        if isinstance(value, np.ndarray):
            return {"$ndarray": self._values(value, value)}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        return self._encode_flower(value)

    def _all_plain(self, keys: tuple[Any, ...]) -> bool:
        """Say whether JSON can hold these keys as they are; thousands of mappings have the same ones."""
        if keys in self._plain_keys:
            return True
        plain = all(isinstance(key, str) and not key.startswith("$") for key in keys)
        if plain and len(keys) <= MOST_KEPT_KEYS:
            self._plain_keys.add(keys)
        return plain

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
            if isinstance(value, (kind,)):
                return {"$" + tag: [[name, self.encode(item)] for name, item in value.items()]}
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    def _tensor(self, tensor: Tensor, owner: Any = None) -> str:
        """Store a tensor; `owner` is the object that stands for it, where the tensor was made for the occasion."""
        owner = tensor if owner is None else owner
        if id(owner) not in self._names:
            self._names[id(owner)] = f"t{len(self.tensors)}"
            self._keep.append(owner)
            self.tensors[self._names[id(owner)]] = tensor.detach()
        return self._names[id(owner)]

    def _values(self, owner: Any, values: np.ndarray) -> str:
        if id(owner) in self._names:
            return self._names[id(owner)]
        if not values.dtype.isnative:
            raise TypeError(f"a checkpoint cannot hold values of dtype {values.dtype}")
        return self._tensor(torch.from_numpy(np.array(values, order="C")), owner)

    def _array(self, array: Array) -> Any:
        if isinstance(array, LazyArray) and array.view is not None:
            return {"lazy": self._values(array.view, array.view)}
        described = {"dtype": array.dtype, "shape": list(array.shape), "stype": array.stype}
        # Copies of a record share its arrays' bytes.
        return {**described, "bytes": self._values(array.data, np.frombuffer(array.data, dtype=np.uint8))}

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
            keys, items = body
            return dict(zip(self.decode(keys), self.decode(items), strict=True))
        if tag == "tuple":
            return tuple(self.decode(item) for item in body)
        if tag == "tensor":
            return self.tensors[body]
        if tag in ("ndarray", "scalar"):
            values = self.tensors[body].numpy()
            return values if tag == "ndarray" else values[()]
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
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data if tensors[name].numel() else b"")
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


def thaw(frozen: Frozen) -> Any:
    """Return a frozen tree as it was; its tensors are shared."""
    body = json.loads(frozen.text)
    return _Decoder(frozen.tensors, [_layout_from_json(layout) for layout in body["layouts"]]).decode(body["tree"])


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree, or a frozen one, to one file, atomically: the file is whole, or it is not there.

    Raises:
        UnusableCheckpoint: the file cannot be written.
    """
    frozen = tree if isinstance(tree, Frozen) else freeze(tree)
    # Views of one memory must be parted: safetensors refuses tensors that share.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in frozen.tensors.items()}
    metadata = {"format": FORMAT, "digest": _digest(frozen.text, tensors)}
    tensors[TREE] = torch.frombuffer(bytearray(frozen.text.encode()), dtype=torch.uint8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UnusableCheckpoint(f"{path} cannot be written: {error}. Make room there, and resume the run.") from error


def sync(path: Path) -> None:
    """Let a file, or a folder's list of files, reach the disk before anything else happens."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


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
    text = bytes(tensors.pop(TREE, torch.empty(0, dtype=torch.uint8)).numpy()).decode(errors="replace")
    if _digest(text, tensors) != metadata.get("digest"):
        raise UnusableCheckpoint(f"{path} is damaged: its checksum does not match.")
    return thaw(Frozen(text, tensors))


class Checkpoints:
    """The newest few checkpoints of a run, in a folder of their own.

    Args:
        folder: made when absent.
        keep: how many are kept, at least 1; two allow for one that a dying disk cut short.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(1, keep)
        self._unreadable: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def _newest_first(self) -> list[tuple[int, Path]]:
        numbered = [(int(found[1]), path) for path in self.folder.iterdir() if (found := NAME.fullmatch(path.name))]
        return sorted(numbered, reverse=True)

    def save(self, tree: Any) -> Path:
        """Write the next checkpoint and delete those beyond `keep`; one that could not be read is worth nothing."""
        before = self._newest_first()
        path = self.folder / f"checkpoint-{before[0][0] + 1 if before else 1:08d}.safetensors"
        save_tree(path, tree)
        readable = [old for _, old in before if old not in self._unreadable]
        for old in {*readable[self.keep - 1:], *self._unreadable}:
            old.unlink(missing_ok=True)
        self._unreadable = set()
        return path

    def load_newest(self) -> tuple[Any, list[str]]:
        """Return the newest tree that can be read, and what was wrong with newer ones (for the user to see).

        Raises:
            UnusableCheckpoint: there is none.
        """
        problems: list[str] = []
        for _, path in self._newest_first():
            try:
                return load_tree(path), problems
            except UnusableCheckpoint as error:
                problems.append(str(error))
                self._unreadable.add(path)
        found = " ".join(problems) or f"{self.folder} holds none."
        raise UnusableCheckpoint(f"No checkpoint can be resumed from: {found} Start the run anew without --resume.")
