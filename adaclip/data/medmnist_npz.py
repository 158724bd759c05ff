"""MedMNIST's 2-D sets (Yang et al. 2023, https://medmnist.com) in their official npz files.

The npz files are read here: importing the medmnist package proper needs torchvision. Its table of names,
labels, addresses and checksums is used when the package is installed.
"""

from __future__ import annotations

import importlib.util
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaclip.data._bounded import MAX_DEFLATE_RATIO, read_exactly
from adaclip.data.download import fetch
from adaclip.data.errors import DataError
from adaclip.data.image_data import ImageData

FLAGS = (
    "pathmnist",
    "dermamnist",
    "octmnist",
    "pneumoniamnist",
    "retinamnist",
    "breastmnist",
    "bloodmnist",
    "tissuemnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
)
SIZES = (28, 64, 128, 224)
RECORD = "https://zenodo.org/records/10519652"


def _info(flag: str) -> dict[str, Any] | None:
    """The medmnist package's entry for ``flag``; None when the package is not installed.

    Only its table is loaded: ``import medmnist`` prints a complaint where torchvision is missing.
    """
    package = importlib.util.find_spec("medmnist")
    for folder in (package.submodule_search_locations or ()) if package else ():
        spec = importlib.util.spec_from_file_location("_medmnist_info", Path(folder, "info.py"))
        if spec is not None and spec.loader is not None and Path(folder, "info.py").is_file():
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.INFO.get(flag)
    return None


def read_npz(path: Path, keys: tuple[str, ...], cure: str) -> dict[str, np.ndarray]:
    """Arrays of unsigned bytes (or other integers) from an npz file that is not trusted.

    Nothing is unpickled, and no memory is taken from a header before it fits the file's real size.

    Args:
        path: the file.
        keys: the arrays to read.
        cure: last sentences of the error message.

    Raises:
        DataError: missing or unreadable file, a key that is not there, not integers, truncated or oversized.
    """
    try:
        on_disk = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            absent = [key for key in keys if f"{key}.npy" not in names]
            if absent:
                raise ValueError(f"it lacks the arrays {', '.join(absent)}")
            read: dict[str, np.ndarray] = {}
            for key in keys:
                held = sum(array.nbytes for array in read.values())
                read[key] = _read_member(archive, f"{key}.npy", on_disk, held)
            return read
    # zipfile and numpy's header parser report damage with a dozen exception types.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read as a MedMNIST npz file: {reason}. {cure}") from error


def _read_member(archive: zipfile.ZipFile, name: str, on_disk: int, held: int) -> np.ndarray:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by method {info.compress_type}, which npz files do not use")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        # Later versions, for headers of more than 65,535 bytes, may announce one of 4 GB.
        if version != (1, 0):
            raise ValueError(f"{name} has npy version {version}, not (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.kind not in "ui" or fortran:
            order = " in Fortran order" if fortran else ""
            raise ValueError(f"{name} holds {dtype}{order}, not plain integers in C order")
        expected = math.prod(shape) * dtype.itemsize
        if expected > on_disk * MAX_DEFLATE_RATIO:
            raise ValueError(f"{name} announces shape {shape}, which a file of {on_disk:,} bytes cannot hold")
        data = read_exactly(stream, expected, held)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _split(
    arrays: dict[str, np.ndarray], split: str, size: int, path: Path, cure: str
) -> tuple[Tensor, Tensor]:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    n = len(images) if images.ndim else 0
    if n == 0 or images.dtype != np.uint8 or images.shape not in ((n, size, size), (n, size, size, 3)):
        raise DataError(
            f"{path} holds {split}_images of {images.dtype} {images.shape}; they must be uint8 "
            f"[N, {size}, {size}] or [N, {size}, {size}, 3]. {cure}"
        )
    if labels.shape != (n, 1):
        raise DataError(f"{path} holds {split}_labels of shape {labels.shape}; they must be [{n}, 1]. {cure}")
    if int(labels.min()) < 0 or int(labels.max()) > 255:
        raise DataError(f"{path} holds {split}_labels from {labels.min()} to {labels.max()}. {cure}")
    pixels = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels[:, 0].astype(np.int64))


def load_medmnist(flag: str, data_dir: Path, download: bool, image_size: int | None = None) -> ImageData:
    """One of MedMNIST's single-label 2-D sets: its official training and test splits, [C, S, S].

    The official validation split is left out (``ImageData.holdout`` splits the training set). Looked for as
    ``FLAG.npz`` (28 pixels) or ``FLAG_64.npz`` … in ``data_dir/medmnist`` and ``data_dir``. Mean and std are
    0.5, as in MedMNIST's own examples. Without the medmnist package the class names are the label numbers.

    Args:
        image_size: 28 (also None), 64, 128 or 224.

    Raises:
        ValueError: another image_size.
        DataError: see ``read_npz``; labels out of range; the medmnist package missing for a download.
    """
    size = 28 if image_size is None else image_size
    if size not in SIZES:
        raise ValueError(f"image_size of {flag} must be one of {SIZES}, got {image_size}")
    suffix = "" if size == 28 else f"_{size}"
    file = f"{flag}{suffix}.npz"
    url = f"{RECORD}/files/{file}?download=1"
    info = _info(flag)
    folders = [data_dir / "medmnist", data_dir]
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None and not download:
        raise DataError(
            f"{file} is not in {folders[0]} or {folders[1]}. Load with download=True (command line: "
            f"--download), or download {url} and put it there."
        )
    if path is None:
        if info is None:
            raise DataError(
                f"{file} cannot be downloaded: its checksum comes with the medmnist package, which is "
                f"not installed. Run `pip install adaclip[medmnist]`, or download {url} and put it in "
                f"{folders[0]}."
            )
        path = fetch(info[f"url{suffix}"], f"md5:{info[f'MD5{suffix}']}", folders[0] / file)

    cure = (
        f"Remove it and load again with download=True (command line: --download), or put the official file "
        f"from {url} in its place."
    )
    arrays = read_npz(path, ("train_images", "train_labels", "test_images", "test_labels"), cure)
    train, test = (_split(arrays, split, size, path, cure) for split in ("train", "test"))
    if train[0].shape[1] != test[0].shape[1]:
        raise DataError(f"{path} mixes grayscale and color images between its splits. {cure}")
    largest = int(max(train[1].max(), test[1].max()))
    if info is not None:
        classes = [info["label"][key] for key in sorted(info["label"], key=int)]
        if largest >= len(classes):
            raise DataError(f"{path} holds label {largest} and {flag} has {len(classes)} classes. {cure}")
    else:
        classes = [str(label) for label in range(largest + 1)]
    half = (0.5,) * train[0].shape[1]
    return ImageData(flag, *train, *test, classes, half, half)
