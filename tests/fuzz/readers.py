"""Cases of the data readers: files that are damaged, or that lie in their headers, with right checksums."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
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
from fuzz.bounds import limits
from fuzz.values import damaged
from hypothesis import strategies as st

from adaclip.data import DataError, ImageData, folder, load

# Sizes as headers announce them.
_SIZES = st.sampled_from([0, 1, 2, 4, 28, 255, 784, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
_MEMORY = 1 << 29


def _load(name: str, files: dict[str, bytes], **options: Any) -> str:
    with tempfile.TemporaryDirectory() as root, tiny_cifar():
        write(root, files)
        return _load_from(name, root, **options)


def _load_from(name: str, root: str, **options: Any) -> str:
    """Load what is there: the data set, or a DataError of one paragraph that names the folder."""
    try:
        with limits(seconds=30, size=_MEMORY):
            loaded = load(name, root, **options)
    except DataError as error:
        said = str(error)
    else:
        assert isinstance(loaded, ImageData)
        return "ok"
    assert "\n" not in said
    assert root in said, said
    return "DataError"


def _hurt(draw: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    key = draw(st.sampled_from(sorted(files)))
    return files | {key: damaged(draw, files[key])}


def idx(draw: Any) -> str:
    """MNIST's files, gzipped: bytes of the archive, or of what is in it, changed."""
    files = mnist_files(True, 4)
    how = draw(st.integers(0, 3))
    if how == 0:
        return _load("mnist", _hurt(draw, files))
    key = draw(st.sampled_from(sorted(files)))
    inside = gzip.decompress(files[key])
    if how == 1:
        inside = damaged(draw, inside)
    else:
        dims = 3 if "images" in key else 1
        sizes = [draw(_SIZES) for _ in range(dims)]
        magic = draw(st.sampled_from([2048 + dims, 2048 + dims, 2048 + dims, 2049, 0x0D03, 0]))
        inside = struct.pack(f">{1 + dims}I", magic, *sizes) + inside[4 + 4 * dims :]
    more = bytes(draw(st.sampled_from([0, 0, 1, 1 << 20])))
    return _load("mnist", files | {key: gzip.compress(inside + more, compresslevel=1)})


def idx_raw(draw: Any) -> str:
    """MNIST's files, not gzipped."""
    files = mnist_files(False, 4)
    if draw(st.booleans()):
        return _load("mnist", _hurt(draw, files))
    key = draw(st.sampled_from(sorted(files)))
    dims = 3 if "images" in key else 1
    header = struct.pack(f">{1 + dims}I", 2048 + dims, *(draw(_SIZES) for _ in range(dims)))
    return _load("mnist", files | {key: header + files[key][len(header) :]})


def cifar(draw: Any) -> str:
    """CIFAR-10's files."""
    return _load("cifar10", _hurt(draw, cifar_files()))


_unpickled: list[str] = []


def _open_pickle() -> None:
    _unpickled.append("opened")


class _Marker:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> Any:
        return _open_pickle, ()


def _npy(draw: Any) -> bytes:
    """A member of an npz file whose header may say anything."""
    shape = tuple(draw(st.lists(_SIZES | st.sampled_from([-1, 6, 28]), max_size=4)))
    descr = draw(
        st.sampled_from(
            [
                "|u1",
                "|u1",
                "|u1",
                "<i8",
                ">i2",
                "|O",
                "<U5",
                "<f8",
                "|b1",
                "|V9999",
                "x",
                "(2,3)u1",
                [("a", "|u1")],
            ]
        )
    )
    fields = {
        "descr": descr,
        "fortran_order": draw(st.sampled_from([False, False, True, 1, None])),
        "shape": shape,
    }
    text = draw(
        st.sampled_from(
            [repr(fields), repr(fields), "{" * 500, "[" * 9000, "1", repr(fields)[:-3], "x" * 70000]
        )
    )
    version = draw(st.sampled_from([(1, 0), (1, 0), (1, 0), (2, 0), (3, 0), (9, 9)]))
    body = text.encode("latin1")
    size = draw(st.sampled_from([len(body), len(body), len(body), 0, 2**16 - 1, 2**32 - 1]))
    length = struct.pack("<H", size & 0xFFFF) if version == (1, 0) else struct.pack("<I", size)
    data = (
        pickle.dumps(_Marker()) if descr == "|O" else bytes(draw(st.sampled_from([0, 6, 6 * 784, 1 << 20])))
    )
    return b"\x93NUMPY" + bytes(version) + length + body + data


def npz_archive(draw: Any) -> str:
    """MedMNIST's npz files: bytes of the archive changed, or members that lie."""
    if draw(st.integers(0, 2)) == 0:
        return _load(
            "breastmnist", {"breastmnist.npz": damaged(draw, npz(medmnist_arrays(), draw(st.booleans())))}
        )
    members = {}
    for name, array in medmnist_arrays().items():
        file = io.BytesIO()
        np.save(file, array)
        members[f"{name}.npy"] = file.getvalue()
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(members)))
        members[name] = _npy(draw) if draw(st.booleans()) else damaged(draw, members[name])
    how = draw(
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    how = _load("breastmnist", {"breastmnist.npz": file.getvalue()})
    assert not _unpickled, "a pickle was opened"
    return how


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_TEXT = b"a\0\0" + zlib.compress(bytes(1 << 22), 9)  # 4 MB of text in 4 kB


def _png(draw: Any) -> bytes:
    """A PNG with right checksums that announces any size, depth and color."""
    size = st.sampled_from([0, 1, 8, 8, 8, 8, 255, 1000, 8192, 8193, 2**31 - 1, 2**32 - 1])
    header = struct.pack(
        ">IIBBBBB",
        draw(size), draw(size), draw(st.sampled_from([1, 2, 8, 8, 16, 99])), draw(st.sampled_from([0, 2, 3, 4, 6, 9])),
        0, 0, draw(st.sampled_from([0, 0, 1, 7])),
    )  # fmt: skip
    data = zlib.compress(bytes(draw(st.sampled_from([0, 72, 1 << 16]))), 1)
    more = draw(
        st.sampled_from(
            [
                b"",
                b"",
                _chunk(b"zTXt", _TEXT),
                _chunk(b"iCCP", _TEXT),
                _chunk(b"PLTE", bytes(9)),
                _chunk(b"acTL", bytes(8)),
            ]
        )
    )
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + more + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    )


_FORMATS = ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]


def images(draw: Any) -> str:
    """Image folders: one file changed, in any of the formats, whatever its suffix."""
    files = folder_files(2)
    kind = draw(st.sampled_from(_FORMATS))
    color = draw(st.booleans())
    content = image_bytes(pixels(8, 8, 3) if color else pixels(8, 8), kind)
    how = draw(st.integers(0, 4))
    if how == 0:
        content = _png(draw)
    elif how == 1:
        # Where these formats keep width and height.
        at = {"PNG": 16, "BMP": 18, "GIF": 6, "TIFF": 10, "WEBP": 24, "PPM": 3, "JPEG": 159}[kind]
        content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 4 :]
    elif how < 4:
        content = damaged(draw, content)
    suffix = draw(st.sampled_from(folder.SUFFIXES))
    files[f"bee/new{suffix}"] = content
    return _load("folder", files, image_size=draw(st.sampled_from([None, 8, 8, 64])))


# No NUL and no slash, and what a file system takes.
_NAMES = st.text(
    st.characters(blacklist_characters="\0/", blacklist_categories=()), min_size=1, max_size=6
).filter(lambda name: name not in (".", ".."))


def layouts(draw: Any) -> str:
    """Folders with any names, links, loops, pipes and sockets' kin in them."""
    with tempfile.TemporaryDirectory() as root:
        write(root, folder_files(2))
        for _ in range(draw(st.integers(1, 4))):
            parent = Path(root, draw(st.sampled_from(["", "ant", "bee"])))
            name = draw(_NAMES) + draw(st.sampled_from(["", ".png", ".PNG", ".jpeg"]))
            try:
                path = parent / os.fsencode(name).decode("utf-8", "surrogateescape")
                os.fsencode(path)
            except UnicodeEncodeError:
                path = parent / "odd.png"
            if os.path.lexists(path):
                continue
            kind = draw(
                st.sampled_from(
                    ["image", "folder", "loop", "self", "dangling", "device", "pipe", "empty", "class"]
                )
            )
            if kind == "image":
                path.write_bytes(image_bytes(pixels(8, 8)))
            elif kind == "folder":
                path.mkdir()
            elif kind == "class":
                path.mkdir()
                Path(path, "a.png").write_bytes(image_bytes(pixels(8, 8)))
            elif kind == "loop":
                path.symlink_to(root)
            elif kind == "self":
                path.symlink_to(path.name)
            elif kind == "dangling":
                path.symlink_to("nowhere")
            elif kind == "device":
                path.symlink_to("/dev/zero")
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.write_bytes(b"")
        return _load_from("folder", root)


def arguments_of_load(draw: Any) -> str:
    """load with any arguments."""
    from fuzz.bounds import attempt
    from fuzz.values import arguments

    with tempfile.TemporaryDirectory() as root:
        write(root, folder_files(2))
        given = arguments(
            draw,
            name_=st.sampled_from(
                [
                    "folder",
                    f"folder:{root}",
                    "mnist",
                    "cifar10",
                    "breastmnist",
                    "medical_mnist",
                    "folder:~nobody/x",
                    "folder:\0",
                    "x:y",
                ]
            ),
            data_dir=st.just(root) | st.just(Path(root)) | st.just("~nobody/x"),
            image_size=st.sampled_from([None, 8, 28, 64]),
        )
        how, _ = attempt(lambda: load(**given))
        return how


TARGETS = {
    "idx": {"idx": (idx, 1)},
    "idx_raw": {"idx_raw": (idx_raw, 1)},
    "cifar": {"cifar": (cifar, 1)},
    "npz": {"npz_archive": (npz_archive, 1)},
    "images": {"images": (images, 1)},
    "layouts": {"layouts": (layouts, 2), "arguments_of_load": (arguments_of_load, 1)},
}
