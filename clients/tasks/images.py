"""MNIST and CIFAR-10 from local files: a NumPy archive, or for MNIST the original IDX files."""
import gzip
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.clients.data import Samples
from fedcore.clients.models import build_model, check_model
from fedcore.clients.partitions import Traits
from fedcore.clients.tasks.classification import Classification
from fedcore.clients.tasks.files import UnreadableData, existing, read_npz

CLASSES = 10
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# The original names; some copies write a dot where others have a hyphen, and most are compressed.
IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_BYTES = 8
MNIST_ADVICE = (
    "Give an .npz archive with x_train, y_train, x_test, y_test (Keras publishes mnist.npz), or a folder with the four "
    "IDX files of https://yann.lecun.com/exdb/mnist. Without a file, the task digits needs no download."
)
CIFAR10_ADVICE = (
    "Give an .npz archive with x_train (n, 32, 32, 3), y_train, x_test, y_test, made from the Python version at "
    "https://www.cs.toronto.edu/~kriz/cifar.html. Without a file, the task digits needs no download."
)


@dataclass(frozen=True)
class Rescale:
    """Bytes to numbers of mean 0 and deviation 1: x * scale + shift, each of shape (channels, 1, 1)."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: tuple[float, ...], deviation: tuple[float, ...]) -> "Rescale":
        """Return the map for given statistics of pixels in [0, 1]."""
        means, deviations = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
        return cls(1 / (255 * deviations), -means / deviations)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mul_(self.scale).add_(self.shift)


class Images(Classification):
    """Images of a fixed shape, kept as bytes and rescaled batch by batch."""

    name: str
    shape: tuple[int, int, int]
    advice: str
    rescale: Rescale

    def __init__(self, path: Path | None = None, model: str | dict[str, Any] = "cnn"):
        check_model(model, self.shape, CLASSES)
        if path is not None:    # a server, and a client with a site of its own, do without
            existing(path, self.name, self.advice)
        self._path, self._model = path, model

    def model(self) -> nn.Module:
        """Return a fresh model of one image."""
        return build_model(self._model, self.shape, CLASSES)

    def training_data(self, site: str | None = None) -> Samples:
        """Return the training images of the pool, or of a site's own file."""
        return self._load(site)[0]

    def test_data(self, site: str | None = None) -> Samples:
        """Return the test images of the pool, or of a site's own file."""
        return self._load(site)[1]

    def traits(self) -> Traits:
        """Return the training images' classes."""
        labels = self.training_data().targets.numpy()
        return Traits(len(labels), labels=labels)

    def _load(self, site: str | None) -> tuple[Samples, Samples]:
        path = existing(self._path if site is None else Path(site), self.name, self.advice)
        x_train, y_train, x_test, y_test = _read(path, self.shape)
        return (
            Samples(x_train, y_train, transform=self.rescale),
            Samples(x_test, y_test, transform=self.rescale),
        )


class Mnist(Images):
    """Handwritten digits of 28 x 28 pixels, 60,000 to train on and 10,000 to test with.

    Args:
        path: an `.npz` archive, or a folder with the four IDX files (compressed or not).
        model: name of the model, alone or under `name` among its settings.

    Source: LeCun et al., 1998, Gradient-based learning applied to document recognition.
    """

    name, shape, advice = "mnist", (1, 28, 28), MNIST_ADVICE
    rescale = Rescale.of((0.1307,), (0.3081,))


class Cifar10(Images):
    """Photographs of 32 x 32 pixels in ten classes.

    Args:
        path: an `.npz` archive; images (n, 32, 32, 3) or (n, 3, 32, 32).
        model: name of the model, alone or under `name` among its settings.

    Source: Krizhevsky, 2009, Learning multiple layers of features from tiny images.
    """

    name, shape, advice = "cifar10", (3, 32, 32), CIFAR10_ADVICE
    rescale = Rescale.of((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@lru_cache(maxsize=4)
def _read(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arrays = _read_idx(path) if path.is_dir() else read_npz(path, ARRAYS)
    return (
        _images(path, "x_train", arrays[0], shape), _labels(path, "y_train", arrays[1], len(arrays[0])),
        _images(path, "x_test", arrays[2], shape), _labels(path, "y_test", arrays[3], len(arrays[2])),
    )


def _images(path: Path, name: str, images: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    if images.ndim == 3 and channels == 1:
        images = images[:, None]
    if images.shape[1:] == (height, width, channels):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1:] != shape or images.dtype != np.uint8:
        raise UnreadableData(
            f"{path}: {name} is {images.dtype}{list(images.shape)}, but must hold bytes (uint8) of shape "
            f"{['n', *shape]} or {['n', height, width, channels]}."
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _labels(path: Path, name: str, labels: np.ndarray, count: int) -> Tensor:
    whole = labels.dtype.kind in "iu" and labels.size == count
    if not whole or (count and not 0 <= labels.min() <= labels.max() < CLASSES):
        raise UnreadableData(
            f"{path}: {name} is {labels.dtype}{list(labels.shape)}, but must hold {count} whole numbers from 0 to "
            f"{CLASSES - 1}, one for each image."
        )
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _read_idx(folder: Path) -> list[np.ndarray]:
    return [_read_idx_file(_find_idx(folder, stem)) for stem in IDX_STEMS]


def _find_idx(folder: Path, stem: str) -> Path:
    for name in (stem, stem.replace("-idx", ".idx")):
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise UnreadableData(f"The folder {folder} has no file {stem} or {stem}.gz. {MNIST_ADVICE}")


def _read_idx_file(path: Path) -> np.ndarray:
    """Read one IDX file: two zero bytes, the type, the number of dimensions, each dimension as 4 bytes, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableData(f"{path} cannot be read: {error}.") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, IDX_BYTES)):
        raise UnreadableData(f"{path} is no IDX file of bytes: it begins with {content[:4].hex() or 'nothing'}.")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist()) if len(content) >= start else ()
    if len(shape) != content[3] or len(content) - start != int(np.prod(shape)):
        raise UnreadableData(f"{path} is cut short or too long: {len(content)} bytes for shape {list(shape)}.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()
