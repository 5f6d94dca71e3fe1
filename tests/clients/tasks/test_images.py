"""MNIST and CIFAR-10 from files, made up here."""
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.clients.tasks.files import UnreadableData
from fedcore.clients.tasks.images import IDX_STEMS, Cifar10, Mnist
from fedcore.errors import MissingData

GENERATOR = np.random.default_rng(0)
MNIST = {
    "x_train": GENERATOR.integers(0, 256, (30, 28, 28), dtype=np.uint8),
    "y_train": GENERATOR.integers(0, 10, 30, dtype=np.uint8),
    "x_test": GENERATOR.integers(0, 256, (8, 28, 28), dtype=np.uint8),
    "y_test": GENERATOR.integers(0, 10, 8, dtype=np.uint8),
}
CIFAR10 = {
    **{name: GENERATOR.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for name, count in
       (("x_train", 20), ("x_test", 5))},
    "y_train": GENERATOR.integers(0, 10, (20, 1)),
    "y_test": GENERATOR.integers(0, 10, (5, 1)),
}


def archive(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def idx_folder(folder: Path, compressed: bool) -> Path:
    for stem, name in zip(IDX_STEMS, ("x_train", "y_train", "x_test", "y_test"), strict=True):
        content = idx(MNIST[name])
        path = folder / (f"{stem}.gz" if compressed else stem)
        path.write_bytes(gzip.compress(content) if compressed else content)
    return folder


@pytest.mark.parametrize("make", [
    lambda folder: archive(folder, MNIST), lambda folder: idx_folder(folder, True),
    lambda folder: idx_folder(folder, False),
])
def test_mnist_is_read_from_an_archive_or_from_idx_files(tmp_path, make):
    task = Mnist(make(tmp_path))
    for part, suffix in ((task.training_data(), "train"), (task.test_data(), "test")):
        images, labels = part.batch(torch.arange(len(part)))
        expected = (MNIST[f"x_{suffix}"][:, None] / 255 - 0.1307) / 0.3081
        assert images.dtype is torch.float32
        assert np.allclose(images.numpy(), expected, atol=1e-5)
        assert labels.tolist() == MNIST[f"y_{suffix}"].tolist()
    assert task.traits().labels.tolist() == MNIST["y_train"].tolist()


@pytest.mark.parametrize("channels_first", [False, True])
def test_cifar10_is_read_in_either_layout(tmp_path, channels_first):
    arrays = {**CIFAR10}
    if channels_first:
        arrays |= {name: arrays[name].transpose(0, 3, 1, 2) for name in ("x_train", "x_test")}
    images, labels = Cifar10(archive(tmp_path, arrays)).training_data().batch(torch.arange(20))
    expected = (CIFAR10["x_train"] / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    assert np.allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert labels.tolist() == CIFAR10["y_train"].reshape(-1).tolist()


def test_images_stay_bytes_until_they_are_used(tmp_path):
    assert Mnist(archive(tmp_path, MNIST)).training_data().inputs.dtype is torch.uint8


def test_a_deployed_client_reads_its_own_file(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    path = archive(own, {name: values[:6] for name, values in MNIST.items()})
    task = Mnist(archive(tmp_path, MNIST))
    assert (len(task.training_data()), len(task.training_data(str(path)))) == (30, 6)


@pytest.mark.parametrize("task", [Mnist, Cifar10])
def test_a_task_without_its_file_says_where_to_get_it(task, tmp_path):
    with pytest.raises(MissingData, match="set task.path.*x_train"):
        task().training_data()
    with pytest.raises(MissingData, match="nowhere.npz'.*x_train"):
        task(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(("change", "words"), [
    ({"x_train": None}, "no array 'x_train'; it has: y_train, x_test, y_test"),
    ({"x_train": MNIST["x_train"][:, :27]}, r"x_train is uint8\[30, 1, 27, 28\]"),
    ({"x_train": MNIST["x_train"] / 255.0}, "x_train is float64"),
    ({"y_train": MNIST["y_train"][:-1]}, r"y_train is uint8\[29\].*30 whole numbers"),
    ({"y_test": MNIST["y_test"] + 10}, "y_test is uint8.*from 0 to 9"),
    ({"y_test": MNIST["y_test"].astype(float)}, "y_test is float64"),
    ({"y_test": np.array(["seven"] * 8, dtype=object)}, "no readable .npz"),
])
def test_an_archive_of_something_else_is_refused(tmp_path, change, words):
    arrays = {name: values for name, values in {**MNIST, **change}.items() if values is not None}
    with pytest.raises(UnreadableData, match=words):
        Mnist(archive(tmp_path, arrays)).training_data()


def truncated(content: bytes) -> bytes:
    return content[:len(content) // 2]


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"not an archive", truncated,
    lambda content: content[:200] + bytes(50) + content[250:],
])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    path = archive(tmp_path, MNIST)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnreadableData, match="data.npz"):
        Mnist(path).training_data()


@pytest.mark.parametrize(("damage", "words"), [
    (lambda content: b"", "begins with nothing"), (lambda content: b"junk" + content, "no IDX file"),
    (lambda content: content[:3] + b"\x09" + content[4:], "cut short or too long"),
    (lambda content: content[:-1], "cut short or too long"), (lambda content: content + b"\0", "cut short or too long"),
])
def test_a_damaged_idx_file_is_refused(tmp_path, damage, words):
    path = idx_folder(tmp_path, compressed=False) / IDX_STEMS[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnreadableData, match=words):
        Mnist(tmp_path).training_data()


def test_a_damaged_compressed_idx_file_is_refused(tmp_path):
    path = idx_folder(tmp_path, compressed=True) / f"{IDX_STEMS[0]}.gz"
    path.write_bytes(truncated(path.read_bytes()))
    with pytest.raises(UnreadableData, match="cannot be read"):
        Mnist(tmp_path).training_data()


def test_a_folder_without_idx_files_is_refused(tmp_path):
    with pytest.raises(UnreadableData, match="train-images-idx3-ubyte"):
        Mnist(tmp_path).training_data()
