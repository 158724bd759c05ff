"""Missing and damaged files: always a DataError of one paragraph, never another exception."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from unittest import mock

import numpy as np
import pytest
from data_files import (
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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaclip.data import NAMES, DataError, ImageData, folder, load


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mnist-mini"])
def test_missing_says_what_to_do(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path / "nothing here")
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert "http" in message or name == "folder"
    assert "download=True" in message or name in ("folder", "medical_mnist")


def test_medical_mnist_cannot_be_downloaded(tmp_path):
    with pytest.raises(DataError, match="Kaggle asks for an account"):
        load("medical_mnist", tmp_path, download=True)
    write(tmp_path, folder_files(2, folder.MEDICAL_CLASSES[:4]))
    with pytest.raises(DataError, match="lacks the class folders Hand, HeadCT"):
        load("medical_mnist", tmp_path)


def test_one_missing_file_is_named(tmp_path):
    files = mnist_files()
    del files["t10k-labels-idx1-ubyte.gz"]
    write(tmp_path, files)
    with pytest.raises(DataError, match=r": t10k-labels-idx1-ubyte.gz not found"):
        load("mnist", tmp_path)
    write(tmp_path, {k: v for k, v in cifar_files().items() if "batch_3" not in k})
    with pytest.raises(DataError, match=r": data_batch_3.bin not found"):
        load("cifar10", tmp_path)


def idx_header(magic, *sizes):
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "idx magic number"),
        (b"\x00\x00\x08", "idx magic number"),
        (b"<html>404 not found</html>", "idx magic number"),
        (idx_header(2049, 12, 28, 28), "idx magic number"),
        (idx_header(0x0D03, 12, 28, 28) + bytes(4 * 12 * 784), "idx magic number"),
        (idx_header(2051, 0, 28, 28), "announces no data"),
        (idx_header(2051, 12, 28, 28) + bytes(12 * 784 - 1), "ends after|cannot hold"),
        (idx_header(2051, 12, 28, 28) + bytes(12 * 784 + 1), "holds more"),
        (idx_header(2051, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(100), "cannot hold"),
        (idx_header(2051, 12, 14, 56) + bytes(12 * 784), "14x56 images"),
        (idx_header(2051, 11, 28, 28) + bytes(11 * 784), "11 images and .* 12 labels"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_idx(tmp_path, content, message, zipped):
    name = "train-images-idx3-ubyte" + ".gz" * zipped
    write(tmp_path, mnist_files(zipped) | {name: gzip.compress(content) if zipped else content})
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert name in str(caught.value)
    assert "https://ossci-datasets" in str(caught.value)


def test_idx_labels_out_of_range(tmp_path):
    write(tmp_path, mnist_files(False) | {"train-labels-idx1-ubyte": idx_header(2049, 12) + bytes([10] * 12)})
    with pytest.raises(DataError, match="holds label 10"):
        load("mnist", tmp_path)


def test_gzip_bomb_is_not_expanded(tmp_path):
    """64 MB of zeros behind a header that announces 12 images: reading stops one byte past those."""
    bomb = gzip.compress(idx_header(2051, 12, 28, 28) + bytes(1 << 26))
    write(tmp_path, mnist_files() | {"train-images-idx3-ubyte.gz": bomb})
    read = []
    original = gzip.GzipFile.read

    def counted(self, size=-1):
        data = original(self, size)
        read.append(len(data))
        return data

    with mock.patch.object(gzip.GzipFile, "read", counted), pytest.raises(DataError, match="holds more"):
        load("mnist", tmp_path)
    assert max(read) <= 12 * 784 + 1


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_damaged_cifar_size(tmp_path, change):
    files = cifar_files()
    key = "cifar-10-batches-bin/data_batch_2.bin"
    files[key] = files[key][:change] if change < 0 else files[key] + b"x"
    write(tmp_path, files)
    with tiny_cifar(), pytest.raises(DataError, match=r"data_batch_2.bin cannot be read .* bytes"):
        load("cifar10", tmp_path)


def test_cifar_label_out_of_range(tmp_path):
    files = cifar_files()
    key = "cifar-10-batches-bin/test_batch.bin"
    files[key] = b"\x0a" + files[key][1:]
    with tiny_cifar(), pytest.raises(DataError, match="holds label 10"):
        load("cifar10", write(tmp_path, files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": None}, "lacks the arrays train_images"),
        ({"train_images": pixels(6, 28)}, "train_images of uint8"),
        ({"train_images": pixels(6, 32, 32)}, "train_images of uint8"),
        ({"train_images": pixels(0, 28, 28)}, "train_images of uint8"),
        ({"train_images": pixels(6, 28, 28).astype(np.int16)}, "train_images of int16"),
        ({"train_images": pixels(6, 28, 28) / 255}, "not plain integers"),
        ({"train_images": np.asfortranarray(pixels(6, 28, 28))}, "Fortran"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, r"must be \[6, 1\]"),
        ({"train_labels": np.zeros((5, 1), np.uint8)}, r"must be \[6, 1\]"),
        ({"train_labels": np.full((6, 1), -1)}, "train_labels from -1"),
        ({"train_labels": np.full((6, 1), 256)}, "train_labels from 256"),
        ({"test_images": pixels(4, 28, 28, 3)}, "mixes grayscale and color"),
        ({"test_images": np.array([{"a": 1}] * 4, dtype=object)}, "not plain integers"),
    ],
)
def test_damaged_medmnist(tmp_path, change, message):
    arrays = {k: v for k, v in (medmnist_arrays() | change).items() if v is not None}
    write(tmp_path, {"breastmnist.npz": npz(arrays)})
    with pytest.raises(DataError, match=message) as caught:
        load("breastmnist", tmp_path)
    assert "breastmnist.npz" in str(caught.value)
    assert "zenodo" in str(caught.value)


def test_npy_header_is_not_trusted(tmp_path):
    """A header that claims a terabyte is compared with the file, not allocated."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "|u1", "fortran_order": False, "shape": (1 << 30, 28, 28)}
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("train_images", "train_labels", "test_images", "test_labels"):
            archive.writestr(f"{key}.npy", member.getvalue() + bytes(100))
    write(tmp_path, {"breastmnist.npz": buffer.getvalue()})
    with pytest.raises(DataError, match="cannot hold"):
        load("breastmnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded"),
        (b"not an image", "cannot be decoded"),
        (image_bytes(pixels(8, 8))[:-50], "cannot be decoded"),
        (image_bytes(pixels(64, 64), "JPEG")[:600], "cannot be decoded"),
        (image_bytes(pixels(8, 8).astype(np.uint16) * 256), "pixel format is 'I;16'"),
    ],
)
def test_damaged_image(tmp_path, content, message):
    write(tmp_path, folder_files(3) | {"bee/bad.png": content})
    with pytest.raises(DataError, match=message) as caught:
        load("folder", tmp_path, image_size=8)
    assert "bad.png" in str(caught.value)


def test_decompression_bomb(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    write(tmp_path, folder_files(3) | {"bee/bomb.png": bomb.getvalue()})
    with pytest.raises(DataError, match=r"bomb.png .*9000x9000"):
        load("folder", tmp_path, image_size=8)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds 0 class folder"),
        (folder_files(3, ("ant",)), "holds 1 class folder"),
        (folder_files(3) | {"cat/readme.txt": b""}, "cat holds no image"),
        (folder_files(1), "too small to split"),
        (
            folder_files(3, root="train/") | folder_files(3, ("ant",), root="test/"),
            "test holds the classes ant ",
        ),
        (
            folder_files(3, root="train/") | folder_files(3, ("ant", "bee", "cat"), root="test/"),
            "the same class folders",
        ),
    ],
)
def test_wrong_folder_layout(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load("folder", write(tmp_path, files))


FORMATS = {
    "mnist-gz": ("mnist", lambda: mnist_files(True, 4)),
    "mnist-raw": ("mnist", lambda: mnist_files(False, 4)),
    "cifar10": ("cifar10", cifar_files),
    "npz": ("breastmnist", lambda: {"breastmnist.npz": npz(medmnist_arrays())}),
    "npz-stored": ("breastmnist", lambda: {"breastmnist.npz": npz(medmnist_arrays(), False)}),
    "png": ("folder", lambda: folder_files(2)),
    "jpeg": ("folder", lambda: folder_files(2, kind="JPEG")),
}


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_damage_gives_data_or_a_data_error(kind, data):
    name, make = FORMATS[kind]
    files = make()
    key = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[key])
    if data.draw(st.booleans()):
        # Headers and trailers are where damage is most interesting.
        for _ in range(data.draw(st.integers(1, 4))):
            where = st.integers(0, len(content) - 1)
            ends = st.integers(0, min(40, len(content)) - 1) | st.integers(
                len(content) - 40, len(content) - 1
            )
            content[data.draw(ends | where) % len(content)] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    files[key] = bytes(content)
    with tempfile.TemporaryDirectory() as root, tiny_cifar():
        write(root, files)
        try:
            loaded = load(name, root)
        except DataError as error:
            message = str(error)
        else:
            message = ""
            assert isinstance(loaded, ImageData)
    assert "\n" not in message


# --- hostile files, in a process that may not grow -------------------------------------------------------

_READER = """
import json, resource, sys
from adaclip.data import DataError, load
import numpy.random, PIL.Image, torch  # what a reader loads does not count
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]), now + int(sys.argv[1])))
said = {}
for case, (name, root, size) in json.loads(sys.argv[2]).items():
    try:
        load(name, root, image_size=size)
        said[case] = "loaded"
    except DataError as error:
        said[case] = str(error)
print(json.dumps(said))
"""
LIMIT = 1 << 28  # bytes beyond what Python, numpy and torch take
ZEROS = 384 << 20  # what the bombs hold


def gzip_bomb():
    """Images of zeros, as many as its header announces, made without holding them."""
    count = ZEROS // 784
    pack = zlib.compressobj(1, zlib.DEFLATED, 31)
    parts = [
        pack.compress(idx_header(2051, count, 28, 28)),
        *(pack.compress(bytes(784 << 10)) for _ in range(count >> 10)),
    ]
    return b"".join([*parts, pack.compress(bytes(count % 1024 * 784)), pack.flush()])


def npz_bomb(body):
    """An npz file whose train_images are that body and many zeros; the others are as they should be."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, array in medmnist_arrays().items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                if key != "train_images":
                    np.save(stream, array)
                    continue
                stream.write(body)
                for _ in range(ZEROS >> 20):
                    stream.write(bytes(1 << 20))
    return buffer.getvalue()


def npy_header(shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What `load` says of hostile files, in one process that can take no more than LIMIT bytes and two minutes."""
    root = tmp_path_factory.mktemp("hostile")
    large = io.BytesIO()
    Image.new("L", (8192, 8192)).save(large, "PNG", compress_level=1)
    zeros = {f"{name}/{i}.png": large.getvalue() for name in ("ant", "bee") for i in range(3)}
    # Version 2.0 announces the header's length in 32 bits, and numpy reads all of it before it looks.
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", ZEROS)
    cases = {
        "gzip": ("mnist", mnist_files() | {"train-images-idx3-ubyte.gz": gzip_bomb()}, None),
        "long header": ("breastmnist", {"breastmnist.npz": npz_bomb(long)}, None),
        "npz": ("breastmnist", {"breastmnist.npz": npz_bomb(npy_header((ZEROS,)))}, None),
        "one large image after the other": ("folder", zeros, 8),
        "all large images": ("folder", zeros, None),
        "pipe": ("folder", folder_files(2), None),
    }
    for case, (_, files, _) in cases.items():
        write(root / case, files)
    os.mkfifo(root / "pipe" / "ant" / "pipe.png")
    for path in root.rglob("*"):
        assert not path.is_file() or path.stat().st_size < 1 << 22
    given = {case: (name, str(root / case), size) for case, (name, _, size) in cases.items()}
    command = [sys.executable, "-c", _READER, str(LIMIT), json.dumps(given)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "gzip",
            "train-images-idx3-ubyte.gz cannot be read as an idx file: its .* bytes of data do not fit in memory",
        ),
        (
            "long header",
            r"breastmnist.npz cannot be read as a MedMNIST npz file: train_images.npy has npy version \(2, 0\)",
        ),
        (
            "npz",
            "breastmnist.npz cannot be read as a MedMNIST npz file: its .* bytes of data do not fit in memory",
        ),
        ("one large image after the other", "loaded"),
        ("all large images", "(do|does) not fit in memory"),
        ("pipe", "pipe.png cannot be decoded as an 8-bit image: it is no regular file"),
    ],
)
def test_hostile_files_in_bounded_memory(said, case, message):
    """Files of at most 4 MB that hold, or announce, more than the process can: it goes on, and says which and why."""
    assert re.search(message, said[case]), said[case]


def test_more_than_the_machine_holds_is_not_begun(tmp_path):
    with mock.patch("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2):
        with pytest.raises(DataError, match="9,408 bytes of data do not fit in memory, which has 8,192"):
            load("mnist", write(tmp_path, mnist_files()))
        with pytest.raises(DataError, match="do not fit in memory"):
            load("folder", write(tmp_path / "images", folder_files(50, shape=(16, 16))))


def test_a_pickle_in_an_npz_is_not_opened(tmp_path):
    trace = tmp_path / "trace"
    array = np.empty(6, dtype=object)
    array[:] = [_Touch(str(trace))] * 6
    write(tmp_path, {"breastmnist.npz": npz(medmnist_arrays() | {"train_images": array})})
    with pytest.raises(DataError, match="not plain integers"):
        load("breastmnist", tmp_path)
    assert not trace.exists()


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_links_that_lead_nowhere_or_round_and_round(tmp_path):
    write(tmp_path, folder_files(2))
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    assert load("folder", tmp_path).classes == ["ant", "bee"]
    (tmp_path / "ant" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        load("folder", tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "\udcff", "…", " "])
def test_odd_names_are_one_paragraph(tmp_path, name):
    write(tmp_path, folder_files(2) | {f"bee/{name}.png": b"damaged"})
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        load("folder", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mnist-gz", "mnist-raw", "cifar10", "npz", "npz-stored", "png", "jpeg"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, kind):
    """What was measured is not what is read."""
    name, make = FORMATS[kind]
    write(tmp_path, make())
    original = os.stat

    def stat_then_cut(path, *args, **kwargs):
        found = original(path, *args, **kwargs)
        if str(path).startswith(str(tmp_path)) and found.st_size > 100 and stat.S_ISREG(found.st_mode):
            os.truncate(path, found.st_size // 2)
        return found

    # Path.stat and the readers' own checks come through here.
    with tiny_cifar(), mock.patch("os.stat", stat_then_cut), pytest.raises(DataError):
        load(name, tmp_path)


def test_arguments_that_are_no_folder(tmp_path):
    for where in ("~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(DataError, match="is no folder"):
            load("mnist", where)
        with pytest.raises(DataError, match="is no folder"):
            load(f"folder:{where}")
    with pytest.raises(TypeError, match="data_dir must be a path"):
        load("mnist", 3)
    with pytest.raises(ValueError, match="image_size must be a positive int of at most 8192"):
        load("folder", tmp_path, image_size=10**6)
