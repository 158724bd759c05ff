"""The data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

from adaclip.data import cifar, folder, medmnist_npz, mnist
from adaclip.data.download import default_data_dir
from adaclip.data.errors import DataError
from adaclip.data.folder import MAX_SIDE
from adaclip.data.image_data import ImageData

NAMES = ("mnist-mini", "mnist", "cifar10", "medical_mnist", "folder", *medmnist_npz.FLAGS)
_FIXED_SIZE = ("mnist-mini", "mnist", "cifar10")


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    *,
    image_size: int | None = None,
) -> ImageData:
    """Load a data set into memory.

    Args:
        name: one of ``NAMES``, or ``"folder:PATH"``.

            ========================  ==================================================================
            ``mnist-mini``            5,000 MNIST images that come with pip: stratified 4,000/1,000
            ``mnist``                 the four official idx files, gzipped or not
            ``cifar10``               the official binary version
            ``medical_mnist``         Kaggle's six folders of JPEGs: stratified 47,163/11,653 (11,791
                                      without the 138 that equal a training image)
            ``folder``, ``folder:P``  any image folder (``data_dir`` or P); ``train/`` and ``test/`` inside it
                                      are the splits, without them a stratified 80/20 one is made
            ``breastmnist`` …         MedMNIST's single-label 2-D sets: official train and test splits
            ========================  ==================================================================

        data_dir: the folder that holds the data; None: the user's cache folder (``default_data_dir()``).
        download: fetch what is missing (MNIST, CIFAR-10, MedMNIST), checked against known hashes. A file that
            is there already is never overwritten.
        image_size: resize to this many pixels squared (``medical_mnist`` and folders), or pick the edition
            of that size (MedMNIST: 28, 64, 128, 224).

    Returns:
        the data set; splits are the same on every machine.

    Raises:
        TypeError: name is no str, or data_dir no path.
        DataError: a missing or damaged file; the message says which, what is wrong and what to do.
        ValueError: an unknown name, or an ``image_size`` that the data set cannot have.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    kind, _, path = name.partition(":")
    if kind not in NAMES or (path and kind != "folder"):
        raise ValueError(f"name must be one of {', '.join(NAMES)} or folder:PATH, got {name!r}")
    if image_size is not None:
        if isinstance(image_size, bool) or not isinstance(image_size, int) or not 1 <= image_size <= MAX_SIDE:
            raise ValueError(f"image_size must be a positive int of at most {MAX_SIDE}, got {image_size!r}")
        if kind in _FIXED_SIZE:
            raise ValueError(
                f"image_size must be None for {kind}, whose images have one size, got {image_size}"
            )
    root = default_data_dir() if data_dir is None else _folder(data_dir)
    if kind == "folder":
        if bool(path) == (data_dir is not None):
            raise ValueError(
                f"an image folder must be given once, as data_dir or in the name as folder:PATH, "
                f"got name {name!r} and data_dir {data_dir!r}"
            )
        return folder.load_folder(_folder(path) if path else root, image_size)
    if kind == "mnist-mini":
        return mnist.load_mnist_mini()
    if kind == "mnist":
        return mnist.load_mnist(root, download)
    if kind == "cifar10":
        return cifar.load_cifar10(root, download)
    if kind == "medical_mnist":
        return folder.load_medical_mnist(root, download, image_size)
    return medmnist_npz.load_medmnist(kind, root, download, image_size)


def _folder(path: str | os.PathLike[str]) -> Path:
    """The path with ~ expanded."""
    try:
        made = Path(path).expanduser()
    except TypeError:
        raise TypeError(f"data_dir must be a path, got {path!r}") from None
    except RuntimeError as error:  # ~ of a user who is not there
        raise DataError(f"{path} is no folder: {error}. Give the folder that holds the data.") from error
    if "\0" in str(made):
        raise DataError(f"{str(made)!r} is no folder: a path cannot hold a null character.")
    return made
