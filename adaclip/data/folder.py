"""Image folders: one folder a class, any common 8-bit format, decoded by Pillow in threads."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaclip.data._bounded import check_fits
from adaclip.data.errors import DataError
from adaclip.data.image_data import ImageData, stratified_split

# Formats are named so that Pillow's rarer plugins (some start external programs) are never tried.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pbm")
GRAY_MODES = ("1", "L", "LA")
COLOR_MODES = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")
MAX_SIDE = 8192  # of what images are resized to
MAX_PIXELS = MAX_SIDE * MAX_SIDE  # more is taken for a decompression bomb
# Images of more pixels than this are decoded one at a time: each takes up to 8 bytes a pixel while it is.
_LARGE_PIXELS, _LARGE = 1 << 22, Lock()
SPLIT_SEED = 0
TEST_FRACTION = 0.2
_BLOCK = 256  # files per thread task

MEDICAL_CLASSES = ["AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"]
MEDICAL_COUNT = 58_954
MEDICAL_URL = "https://www.kaggle.com/datasets/andrewmvd/medical-mnist"


def _class_names(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(
                e.name for e in entries if _is_folder(e) and not e.name.startswith((".", "__MACOSX"))
            )
    except OSError as error:
        raise DataError(
            f"{root} cannot be read as an image folder: {error.strerror}. Give a folder that holds "
            f"one folder of images a class."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _scan(root: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """(image paths, labels), in the order of ``classes``, paths sorted within a class."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        members = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(root / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not members:
            raise DataError(
                f"{root / name} holds no image ({', '.join(SUFFIXES)}). Put that class's images there, or "
                f"remove the folder if it is not a class."
            )
        paths += members  # plain strings: sorting 60,000 Path objects takes seconds
        labels += [label] * len(members)
    return paths, labels


def _open(path: str) -> Image.Image:
    return Image.open(path, formats=FORMATS)


def _area(image: Image.Image) -> int:
    return image.size[0] * image.size[1]


def _unreadable(path: str, error: BaseException | str) -> DataError:
    reason = "it does not fit in memory" if isinstance(error, MemoryError) else error
    return DataError(
        f"{path} cannot be decoded as an 8-bit image: {reason}. Restore it from the source of the data set, "
        f"convert it to 8 bits a channel, or remove it."
    )


def _decode_one(
    path: str, mode: str, size: tuple[int, int], resize: bool, hashed: bool = False
) -> tuple[np.ndarray, bytes]:
    """(uint8 [H, W] (mode "L") or [H, W, 3] (mode "RGB"), SHA-256 of size and pixels before resizing if
    ``hashed``, else empty); ``size`` is (W, H)."""
    try:
        with _open(path) as image, _LARGE if _area(image) > _LARGE_PIXELS else nullcontext():
            # Again: the file may be another one by now.
            if _area(image) > MAX_PIXELS or (not resize and image.size != size):
                raise ValueError(f"its size is now {image.size}, not {size}")
            pixels = image if image.mode == mode else image.convert(mode)
            digest = hashlib.sha256(b"%dx%d:" % pixels.size + pixels.tobytes()).digest() if hashed else b""
            return np.asarray(pixels.resize(size, Image.Resampling.BILINEAR) if resize else pixels), digest
    # Pillow's decoders report damage with a dozen exception types (OSError, SyntaxError, struct.error, …).
    except Exception as error:
        raise _unreadable(path, error) from error


def _probe(path: str) -> tuple[str, tuple[int, int]]:
    """(mode, (W, H)) from the file's header."""
    try:
        # Opening a pipe would wait for someone to write to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        with _open(path) as image:
            mode, size = image.mode, image.size
    except Exception as error:  # as in _decode_one
        raise _unreadable(path, error) from error
    if mode not in GRAY_MODES + COLOR_MODES:
        raise _unreadable(path, f"its pixel format is {mode!r}")
    if size[0] * size[1] > MAX_PIXELS:
        raise _unreadable(path, f"it announces {size[0]}x{size[1]} pixels")
    return mode, size


def decode_images(
    paths: list[str], image_size: int | None = None, digests: list[bytes] | None = None
) -> Tensor:
    """Decode image files into one tensor.

    Args:
        paths: at least one file. All grayscale: C = 1; else C = 3 (alpha is dropped).
        image_size: resize every image to ``image_size`` squared (bilinear, antialiased). None: all must have
            one size.
        digests: a list to be filled with one SHA-256 a file, of the size and the pixels before resizing: equal
            where two images are equal pixel by pixel.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        DataError: a file that cannot be decoded, more than 8 bits a channel, sizes that differ without
            ``image_size``, or more pixels than fit in memory.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            blocks = range(0, len(paths), _BLOCK)
            probed = [
                found
                for part in pool.map(lambda i: [_probe(path) for path in paths[i : i + _BLOCK]], blocks)
                for found in part
            ]
            mode = "L" if all(m in GRAY_MODES for m, _ in probed) else "RGB"
            sizes = Counter(size for _, size in probed)
            if image_size is None and len(sizes) > 1:
                (common, count), *_, ((w, h), _) = sizes.most_common()
                odd = next(path for path, (_, size) in zip(paths, probed, strict=True) if size == (w, h))
                raise DataError(
                    f"{odd} is {w}x{h} pixels, and {count} of the {len(paths)} images are "
                    f"{common[0]}x{common[1]}: the sizes differ. Give image_size to resize them all."
                )
            size = (image_size, image_size) if image_size else next(iter(sizes))
            # Memory for all of them only once one of them has shown that it really decodes to this size.
            _decode_one(paths[0], mode, size, image_size is not None)
            channels = 1 if mode == "L" else 3
            try:
                check_fits(len(paths) * channels * size[0] * size[1])
                out = np.empty((len(paths), channels, size[1], size[0]), dtype=np.uint8)
            except (MemoryError, ValueError) as error:
                raise DataError(
                    f"the {len(paths)} images of {size[0]}x{size[1]} pixels in "
                    f"{Path(paths[0]).parent.parent} do not fit in memory. "
                    f"Give a smaller image_size to resize them."
                ) from error

            def decode(start: int) -> list[bytes]:
                found = []
                for i in range(start, min(start + _BLOCK, len(paths))):
                    pixels, digest = _decode_one(
                        paths[i], mode, size, image_size is not None, hashed=digests is not None
                    )
                    out[i] = pixels if mode == "L" else pixels.transpose(2, 0, 1)
                    found.append(digest)
                return found

            found = [digest for part in pool.map(decode, blocks) for digest in part]
            if digests is not None:
                digests[:] = found
        except BaseException:
            # The first bad file (or Ctrl-C) ends it; the rest is not decoded for nothing.
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(out)


def _build(
    name: str,
    classes: list[str],
    paths: list[str],
    labels: Tensor,
    train_count: int,
    image_size: int | None,
    distinct: bool = False,
) -> ImageData:
    """Decode ``paths``, the training images first, into one tensor whose two parts are views.

    ``distinct``: leave test images out that equal a training image pixel by pixel before resizing.
    """
    digests: list[bytes] | None = [] if distinct else None
    images = decode_images(paths, image_size, digests)
    half = (0.5,) * images.shape[1]
    n = train_count
    test_images, test_labels, removed = images[n:], labels[n:], 0
    if digests is not None:
        known = set(digests[:n])
        kept = torch.tensor([digest not in known for digest in digests[n:]], dtype=torch.bool)
        removed = len(kept) - int(kept.sum())
        if removed == len(kept):
            raise DataError(
                f"every test image of {Path(paths[0]).parent.parent} equals a training image: nothing is left to "
                "test on. Restore the images from the source of the data set."
            )
        test_images, test_labels = test_images[kept], test_labels[kept]
    return ImageData(
        name,
        images[:n],
        labels[:n],
        test_images,
        test_labels,
        classes,
        half,
        half,
        duplicates_removed=removed,
    )


def _split_and_build(
    name: str, root: Path, classes: list[str], image_size: int | None, distinct: bool = False
) -> ImageData:
    paths, label_list = _scan(root, classes)
    labels = torch.tensor(label_list)
    train, test = stratified_split(labels, TEST_FRACTION, SPLIT_SEED)
    if len(test) == 0:
        raise DataError(f"{root} is too small to split: no class has two images. Add images to it.")
    order = torch.cat([train, test])
    return _build(
        name, classes, [paths[i] for i in order.tolist()], labels[order], len(train), image_size, distinct
    )


def load_folder(root: Path, image_size: int | None = None) -> ImageData:
    """An image folder: ``root/train/CLASS/IMAGE`` and ``root/test/CLASS/IMAGE`` if both exist, else
    ``root/CLASS/IMAGE`` with a fixed stratified 80/20 split.

    Classes are the folder names, sorted; images are found at any depth below a class folder; other files and
    hidden ones are ignored. Grayscale if every image is, else RGB. Mean and std are 0.5.
    """
    split = (root / "train").is_dir() and (root / "test").is_dir()
    top = root / "train" if split else root
    classes = _class_names(top)
    if len(classes) < 2:
        raise DataError(
            f"{top} holds {len(classes)} class folder(s) and a classifier needs two. The expected layout is "
            f"{root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE."
        )
    if not split:
        return _split_and_build("folder", root, classes, image_size)
    test_classes = _class_names(root / "test")
    if test_classes != classes:
        raise DataError(
            f"{root / 'test'} holds the classes {', '.join(test_classes) or '(none)'} and {top} holds "
            f"{', '.join(classes)}. Both must hold the same class folders: rename, move or remove the others."
        )
    train_paths, train_labels = _scan(top, classes)
    test_paths, test_labels = _scan(root / "test", classes)
    labels = torch.tensor(train_labels + test_labels)
    return _build("folder", classes, train_paths + test_paths, labels, len(train_paths), image_size)


def load_medical_mnist(data_dir: Path, download: bool, image_size: int | None = None) -> ImageData:
    """Medical MNIST (Kaggle): 58,954 grayscale 64x64 JPEGs in six class folders, [1, 64, 64].

    Looked for in ``data_dir/medical_mnist`` and ``data_dir``. The set has no official split: a fixed
    stratified 80/20 one gives 47,163 training and 11,791 test images. The set holds the same pictures several
    times: test images that equal a training image pixel by pixel (138 of the 11,791) are left out, because
    knowing them is no generalization; ``duplicates_removed`` counts them.
    """
    roots = [data_dir / "medical_mnist", data_dir]
    root = next((r for r in roots if any((r / c).is_dir() for c in MEDICAL_CLASSES)), None)
    layout = f"{roots[0]}/CLASS/IMAGE.jpeg with the classes {', '.join(MEDICAL_CLASSES)}"
    if root is None:
        asked = "adaclip cannot download it, because Kaggle asks for an account. " if download else ""
        raise DataError(
            f"Medical MNIST is not in {data_dir}. {asked}Download it from {MEDICAL_URL} and unpack it to "
            f"{layout}."
        )
    missing = [c for c in MEDICAL_CLASSES if not (root / c).is_dir()]
    if missing:
        raise DataError(
            f"{root} lacks the class folders {', '.join(missing)} of Medical MNIST. Unpack the whole set "
            f"from {MEDICAL_URL} to {layout}."
        )
    data = _split_and_build("medical_mnist", root, list(MEDICAL_CLASSES), image_size, distinct=True)
    count = len(data.train_labels) + len(data.test_labels) + data.duplicates_removed
    if count != MEDICAL_COUNT:
        warnings.warn(
            f"{root} holds {count:,} images and Medical MNIST has {MEDICAL_COUNT:,}: is the copy complete?",
            stacklevel=3,
        )
    return data
