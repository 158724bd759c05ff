"""Looks at a checkpoint's bytes before torch does: whole, unaltered, no larger than it looks, and plain values only.

torch.load with `weights_only` executes nothing, but it does not check the sums of an archive (a flipped bit in a weight
or in a count of the ledger goes unnoticed), inflates what is compressed, and lets a pickle ask for memory by a number
(`bytearray(10**12)`).
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

__all__ = ["check_archive"]

# What a pickle of tensors and plain values names, "module name". torch.load checks each against a list of its own.
_NAMES = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (\w+Storage|Size|device|b?float\w*|u?int\d+|bool|complex\d+|half|double|long|short)"
    r"|torch\.serialization _get_layout"
    r"|collections OrderedDict"
    r"|_codecs encode"
)
_CHUNK = 1 << 20


def check_archive(path: Path) -> None:
    """Raise ValueError unless the file is a whole zip archive of stored entries, whose pickle names plain values only.

    Reads the file once, a megabyte at a time.

    Raises:
        ValueError: with the reason and the path.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive)
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while file.read(_CHUNK):
                        pass  # at the end of each entry its sum is compared
            for entry in archive.infolist():
                if entry.filename.endswith("/data.pkl"):
                    _check_pickle(path, archive.read(entry))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: it is damaged ({error})") from error


def _check_entries(path: Path, archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f"checkpoint {path} holds compressed data, which this library does not write: "
                f"{entry.filename} would have {entry.file_size} bytes"
            )
    # An altered directory may place them before the file.
    if any(entry.header_offset < 0 for entry in entries):
        raise ValueError(f"checkpoint {path} is damaged: it places entries outside of itself")
    # Entries that share bytes would have more of them than there are.
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > size or len({entry.filename for entry in entries}) != len(entries):
        raise ValueError(
            f"checkpoint {path} is damaged: its entries have {total} bytes together, the file has {size}"
        )


def _check_pickle(path: Path, data: bytes) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.proto > 2:
                raise ValueError(f"opcode {opcode.name} is not of a pickle that this library writes")
            if opcode.name in ("GLOBAL", "INST") and not _NAMES.fullmatch(str(argument)):
                raise ValueError(f"it names {argument!r}, which is neither a tensor nor a plain value")
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is not read: {error}") from error
