"""The data sets by name, from sound files; real sets where they are on disk.

Set ADACLIP_DATA to a folder with the real data sets to run the tests that read them.
"""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import numpy as np
import pytest
import torch
from data_files import (
    RECORDS,
    cifar_files,
    folder_files,
    image_bytes,
    medmnist_arrays,
    mnist_files,
    npz,
    pixels,
    tiny_cifar,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from adaclip.data import DataError, ImageData, folder, load, medmnist_npz, stratified_split


@pytest.fixture(scope="module")
def mini():
    return load("mnist-mini")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"mnist-mini.*got 'imagenet'"):
        load("imagenet")
    with pytest.raises(ValueError, match="name must be one of"):
        load("mnist:/tmp")
    with pytest.raises(TypeError, match="name must be a str"):
        load(3)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_bad_image_size(size):
    with pytest.raises(ValueError, match="image_size must be a positive int"):
        load("medical_mnist", image_size=size)


def test_image_size_of_a_fixed_set():
    with pytest.raises(ValueError, match="image_size must be None for mnist"):
        load("mnist", image_size=32)


def test_folder_given_twice_or_never(tmp_path):
    for name, data_dir in (("folder", None), ("folder:x", tmp_path)):
        with pytest.raises(ValueError, match="must be given once"):
            load(name, data_dir)


def test_mnist_mini_is_whole_and_stratified(mini):
    data = mini
    assert data.train_images.shape == (4000, 1, 28, 28)
    assert data.test_images.shape == (1000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    assert data.train_images.max() == 255
    # Real digits, normalized by MNIST's public constants, are near mean 0 and deviation 1.
    normalized = data.normalize(data.train_images)
    assert abs(float(normalized.mean())) < 0.05
    assert abs(float(normalized.std()) - 1) < 0.05
    # The split is fixed for good: published numbers depend on it.
    assert int(data.test_images.long().sum()) == 26_395_469
    assert repr(data) == "ImageData('mnist-mini', train=4000, test=1000, shape=(1, 28, 28), classes=10)"


def image_data(**changes):
    fields = {
        "name": "x",
        "train_images": torch.from_numpy(pixels(6, 3, 4, 5)),
        "train_labels": torch.tensor([0, 1, 0, 1, 0, 1]),
        "test_images": torch.from_numpy(pixels(2, 3, 4, 5)),
        "test_labels": torch.tensor([0, 1]),
        "classes": ["a", "b"],
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.6, 0.7),
    }
    return ImageData(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(6, 3, 4, 5)}, "train_images must be uint8"),
        ({"train_labels": torch.tensor([0, 1])}, "train_labels must be int64"),
        ({"test_labels": torch.tensor([0, 2])}, r"test_labels must be in 0 … 1, got 0 … 2"),
        ({"test_labels": torch.tensor([-1, 1])}, r"test_labels must be in 0 … 1"),
        ({"test_images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "the same"),
        ({"mean": (0.5,)}, "mean and std must be 3"),
        ({"std": (0.5, 0.0, 0.5)}, "std > 0"),
    ],
)
def test_image_data_checks_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        image_data(**changes)


def test_normalize_matches_its_formula_and_keeps_the_layout():
    data = image_data()
    batch = data.train_images.contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    out = data.normalize(batch)
    torch.testing.assert_close(out, (batch / 255 - mean) / std)
    assert out.is_contiguous(memory_format=torch.channels_last)
    views = data.normalize(data.train_images.unflatten(0, (3, 2)))
    torch.testing.assert_close(views.flatten(0, 1), out.contiguous())
    for bad in (torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="batch must be uint8"):
            data.normalize(bad)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_split_is_a_stratified_partition(counts, fraction, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    first, second = stratified_split(labels, fraction, seed)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(len(labels)))
    for label, n in enumerate(counts):
        held = int((labels[second] == label).sum())
        assert abs(held - fraction * n) <= 1
        if n >= 2:
            assert 1 <= held <= n - 1
    assert torch.equal(stratified_split(labels, fraction, seed)[1], second)


def test_holdout_splits_the_training_set_alone(mini):
    data = mini
    tuning = data.holdout(0.25, seed=3)
    assert tuning.test_labels.bincount().tolist() == [100] * 10
    assert tuning.train_labels.bincount().tolist() == [300] * 10
    both = torch.cat([tuning.train_images, tuning.test_images]).flatten(1)
    assert torch.equal(both.long().sum(0), data.train_images.flatten(1).long().sum(0))
    assert not torch.equal(data.holdout(0.25, seed=4).test_images, tuning.test_images)
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction must be in"):
            data.holdout(bad)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["mnist", ".", "MNIST/raw"])
def test_mnist_reads_the_official_files(tmp_path, zipped, where):
    write(tmp_path / where, mnist_files(zipped))
    data = load("mnist", tmp_path)
    np.testing.assert_array_equal(data.train_images[:, 0], pixels(12, 28, 28))
    assert data.train_labels.tolist() == [i % 10 for i in range(12)]
    assert len(data.test_images) == 6


def test_mnist_reads_the_dotted_spelling(tmp_path):
    write(tmp_path, {k.replace("-idx", ".idx"): v for k, v in mnist_files(False).items()})
    assert len(load("mnist", tmp_path).train_images) == 12


def test_cifar10_reads_the_official_records(tmp_path):
    write(tmp_path, cifar_files())
    with tiny_cifar():
        data = load("cifar10", tmp_path)
        assert torch.equal(load("cifar10", tmp_path / "cifar-10-batches-bin").train_images, data.train_images)
    record = pixels(RECORDS, 3073)[:, 1:].reshape(RECORDS, 3, 32, 32)
    np.testing.assert_array_equal(data.train_images, np.tile(record, (5, 1, 1, 1)))
    assert data.test_labels.tolist() == list(range(RECORDS))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 28), (3, 64)])
def test_medmnist_reads_the_official_npz(tmp_path, channels, size, compressed):
    arrays = medmnist_arrays(channels, size)
    name = "breastmnist.npz" if size == 28 else f"breastmnist_{size}.npz"
    write(tmp_path, {f"medmnist/{name}": npz(arrays, compressed)})
    data = load("breastmnist", tmp_path, image_size=None if size == 28 else size)
    assert data.train_images.shape == (6, channels, size, size)
    expected = arrays["test_images"].reshape(4, size, size, channels).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.test_images, expected)
    assert data.test_labels.tolist() == [0, 1, 0, 1]
    assert data.num_classes == 2


def test_medmnist_without_its_package(tmp_path):
    with mock.patch.object(medmnist_npz.importlib.util, "find_spec", return_value=None):
        with pytest.raises(DataError, match=r"pip install adaclip\[medmnist\]"):
            load("breastmnist", tmp_path, download=True)
        write(tmp_path, {"breastmnist.npz": npz(medmnist_arrays())})
        assert load("breastmnist", tmp_path).classes == ["0", "1"]


def test_medmnist_names_its_classes():
    if importlib.util.find_spec("medmnist") is None:
        pytest.skip("medmnist is not installed")
    for flag in medmnist_npz.FLAGS:
        info = medmnist_npz._info(flag)
        assert info["url"] == f"{medmnist_npz.RECORD}/files/{flag}.npz?download=1"
        assert all(f"MD5_{size}" in info for size in medmnist_npz.SIZES[1:])


def test_medmnist_bad_size(tmp_path):
    with pytest.raises(ValueError, match=r"image_size of breastmnist must be one of .*got 32"):
        load("breastmnist", tmp_path, image_size=32)


@pytest.mark.parametrize(("shape", "channels"), [((8, 6), 1), ((8, 6, 3), 3)])
def test_folder_without_splits(tmp_path, shape, channels):
    write(tmp_path, folder_files(10, shape=shape) | {"ant/notes.txt": b"x", ".hidden/a.png": b"x"})
    data = load(f"folder:{tmp_path}")
    assert data.classes == ["ant", "bee"]
    assert data.train_images.shape == (16, channels, 8, 6)
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    truth = {
        pixels(*shape, seed=100 * label + i).reshape(8, 6, channels).transpose(2, 0, 1).tobytes(): label
        for label in range(2)
        for i in range(10)
    }
    images = torch.cat([data.train_images, data.test_images])
    labels = torch.cat([data.train_labels, data.test_labels])
    assert [truth.pop(image.numpy().tobytes()) for image in images] == labels.tolist()
    assert not truth


def test_folder_with_splits(tmp_path):
    write(tmp_path, folder_files(3, root="train/") | folder_files(2, root="test/"))
    data = load("folder", tmp_path)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]


def test_folder_mixed_modes_become_color(tmp_path):
    write(
        tmp_path,
        folder_files(3) | folder_files(3, ("cat",), (8, 8, 3)) | folder_files(3, ("dog",), (8, 8, 4)),
    )
    data = load("folder", tmp_path)
    assert data.in_channels == 3
    ants = data.train_images[data.train_labels == 0]
    assert torch.equal(ants[:, 0], ants[:, 2])


def test_folder_resizes_only_when_asked(tmp_path):
    write(tmp_path, folder_files(5, shape=(8, 8)) | {"ant/odd.png": image_bytes(pixels(9, 7))})
    with pytest.raises(DataError, match=r"odd.png is 7x9 pixels.*10 of the 11 images are 8x8.*image_size"):
        load("folder", tmp_path)
    assert load("folder", tmp_path, image_size=16).train_images.shape[1:] == (1, 16, 16)


def test_medical_mnist(tmp_path):
    files = folder_files(5, folder.MEDICAL_CLASSES, (64, 64), "JPEG", root="medical_mnist/")
    write(tmp_path, files)
    with pytest.warns(UserWarning, match="is the copy complete"):
        data = load("medical_mnist", tmp_path)
    assert data.classes == folder.MEDICAL_CLASSES
    assert data.train_images.shape == (24, 1, 64, 64)
    assert data.test_labels.tolist() == list(range(6))
    with pytest.warns(UserWarning, match="is the copy complete"):
        assert load("medical_mnist", tmp_path / "medical_mnist", image_size=32).image_size == (32, 32)
    assert data.duplicates_removed == 0


@pytest.mark.filterwarnings("ignore:.*is the copy complete")
@pytest.mark.parametrize("size", [None, 8])
def test_medical_mnist_is_not_tested_on_training_images(tmp_path, size):
    """Equality is that of the pixels before resizing, whatever the file's bytes are."""
    files = {}
    for label, name in enumerate(folder.MEDICAL_CLASSES):
        for i in range(5):
            files[f"medical_mnist/{name}/{i:03d}.png"] = image_bytes(pixels(64, 64, seed=100 * label + i))
    labels = torch.arange(len(folder.MEDICAL_CLASSES)).repeat_interleave(5)
    train, test = folder.stratified_split(labels, folder.TEST_FRACTION, folder.SPLIT_SEED)
    names = list(files)
    # One test image is a training image's pixels in another file format; one is its neighbor by one value.
    source = names[int(train[2])]
    label, index = divmod(int(train[2]), 5)
    picture = pixels(64, 64, seed=100 * label + index)
    assert files[source] == image_bytes(picture)
    same, near = names[int(test[0])], names[int(test[1])]
    files[same] = image_bytes(picture, "BMP")
    changed = picture.copy()
    changed[0, 0] ^= 1
    files[near] = image_bytes(changed)
    write(tmp_path, files)
    data = load("medical_mnist", tmp_path, image_size=size)
    assert data.duplicates_removed == 1
    assert data.test_labels.tolist() == [1, 2, 3, 4, 5]
    assert len(data.train_labels) == 24
    assert data.holdout(0.3).duplicates_removed == 0
    for name in names:
        (tmp_path / name).write_bytes(image_bytes(picture))
    with pytest.raises(DataError, match=r"every test image of .* equals a training image"):
        load("medical_mnist", tmp_path, image_size=size)


REAL = [
    ("mnist", (60000, 1, 28, 28), 10000, 10, "train 33.32 test 33.79"),
    ("cifar10", (50000, 3, 32, 32), 10000, 10, "train 120.71 test 121.53"),
    ("breastmnist", (546, 1, 28, 28), 156, 2, None),
    ("medical_mnist", (47163, 1, 64, 64), 11791 - 138, 6, None),
]


@pytest.mark.parametrize(("name", "shape", "test", "classes", "means"), REAL)
def test_real_data(name, shape, test, classes, means):
    root = os.environ.get("ADACLIP_DATA")
    if not root:
        pytest.skip("ADACLIP_DATA names no folder with the real data sets")
    try:
        data = load(name, root)
    except DataError as error:
        pytest.skip(f"not in ADACLIP_DATA: {error}")
    assert data.train_images.shape == shape
    assert len(data.test_images) == test
    assert data.num_classes == classes
    assert data.train_labels.bincount().min() > 0
    if means:
        mean = [float(x.numpy().mean()) for x in (data.train_images, data.test_images)]
        assert means == f"train {mean[0]:.2f} test {mean[1]:.2f}"
