"""Files that survive faults: the old one or the whole new one, on disk when a call returns, no leftovers.

A fault here is whatever ends a process between two instructions (SIGKILL, power), or makes a write fail (a full or
read-only disk, a limit). Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["Lock", "Output", "append_line", "leftovers", "replace_file", "sync_folder"]

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.part")


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Make `path` hold what `write` puts into the file it is given; on disk when this returns.

    Whoever opens `path` meanwhile, or after a fault at any point, finds the old file or the whole new one. What is
    being written lies beside it under a name that `leftovers` knows; it is removed if anything fails, and left by
    SIGKILL alone.

    Raises:
        OSError: a write failed, with the path; an existing file is unchanged (or replaced whole, if it was the last
        step that failed, the folder's sync). Whatever `write` raises, likewise.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # The rename itself is durable only once the folder is on disk.
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


class Output:
    """A file for a writer that buries the error of a write under others of its own: here the first one is kept."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the owner of the file does."""


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a text file, which is made if it is missing; on disk when this returns.

    A line that a fault left unfinished is dropped first. A line that cannot be written whole is taken back.

    Raises:
        OSError: it cannot be written; the finished lines are unchanged.
    """
    path = Path(path)
    try:
        new = not path.exists()
        # Unbuffered: closing a file that failed would try once more to write what is left.
        with open(path, "a+b", buffering=0) as file:
            size = _end_of_lines(file)
            try:
                data = memoryview((line + "\n").encode())
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        if new:
            sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _end_of_lines(file: BinaryIO) -> int:
    """The size of the file's finished lines, to which it is cut."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
    return size


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have a folder's entries on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def leftovers(folder: Path) -> list[Path]:
    """What killed calls of `replace_file` have left in a folder; whoever is alone there may remove it."""
    return [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]


class Lock:
    """An exclusive lock on a file, until `release` or the end of the process, however it ends.

    The file is made if it is missing, and stays. Other machines are kept out where the file system shares its locks.

    Raises:
        BlockingIOError: another holder.
        OSError: the file cannot be opened, or the file system knows no locks.
    """

    _handle: int | None = None

    def __init__(self, path: Path):
        while not self._take(path):
            # Its last holder removed the file while it was opened here.
            self.release()

    def _take(self, path: Path) -> bool:
        """Open and lock; whether `path` is still the file that was locked."""
        # Not inherited by programs that this process starts: they could outlive it. (Forked processes share it.)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path.exists() and os.path.samestat(os.fstat(self._handle), path.stat())
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go; nothing if that is done."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.release()
