"""adaclip.files: whatever fails, and whenever, the old file or the whole new one; nothing is left over."""

import builtins
import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import file_size_limit

from adaclip import checkpoint, files
from adaclip.files import Output, append_line, leftovers, replace_file


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_everything_is_on_disk_before_the_next_thing_happens(tmp_path, monkeypatch):
    """A power cut loses what was not synced: the bytes before the name, the name before the call returns."""
    done = []

    def noting(name):
        original = getattr(os, name)

        def noted(*args):
            if name == "fsync":
                is_folder = os.path.samestat(os.fstat(args[0]), tmp_path.stat())
                done.append("sync folder" if is_folder else f"sync {os.fstat(args[0]).st_size} bytes")
            else:
                done.append(name)
            return original(*args)

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "replace"):
        noting(name)
    replace_file(tmp_path / "f", lambda file: file.write(b"12345"))
    assert done == ["sync 5 bytes", "replace", "sync folder"]
    done.clear()
    append_line(tmp_path / "rows", "one")
    append_line(tmp_path / "rows", "two")
    assert done == ["sync 4 bytes", "sync folder", "sync 8 bytes"]


@pytest.mark.parametrize("at", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, at):
    path = tmp_path / "f"
    replace_file(path, lambda file: file.write(b"old"))
    if at == "open":
        monkeypatch.setattr(builtins, "open", full)
    elif at != "write":
        monkeypatch.setattr(os, at, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        replace_file(path, full if at == "write" else lambda file: file.write(b"new"))
    monkeypatch.undo()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_cannot_be_synced_is_an_error_and_the_file_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "f"
    replace_file(path, lambda file: file.write(b"old"))
    monkeypatch.setattr(files, "sync_folder", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_other_errors_of_the_writer_are_its_own(tmp_path):
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "f", lambda file: 1 / 0)
    with pytest.raises(OSError, match=r"^the user said no$"):
        replace_file(tmp_path / "f", lambda file: (_ for _ in ()).throw(OSError("the user said no")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 64, 1000, 20_000, 40_000, 41_000])
def test_the_error_of_a_write_is_not_buried_by_torch(tmp_path, size):
    """A real one, at every part of the archive: header, pickle, tensor, directory."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"w": torch.zeros(4)})
    old = path.read_bytes()
    with file_size_limit(size), pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(path, {"w": torch.zeros(100, 100)})
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_output_keeps_the_first_error_and_swallows_what_follows(tmp_path):
    with open(tmp_path / "f", "wb") as file:
        output = Output(file)
        assert output.write(b"ab") == 2
        assert output.error is None
    with open(os.devnull, "rb") as file:  # not writable
        output = Output(file)
        assert output.write(b"abc") == 3
        first = output.error
        assert isinstance(first, OSError)
        output.write(b"d")
        assert output.error is first


@settings(max_examples=30)
@given(
    st.lists(st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"])), max_size=4),
    st.data(),
)
def test_an_appended_line_is_whole_or_not_there(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("rows") / "rows"
    for line in lines:
        append_line(path, line)
    whole = path.read_bytes() if lines else b""
    assert whole == "".join(f"{line}\n" for line in lines).encode()
    # A fault that tore the last line, which the next one replaces.
    torn = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:torn])
    append_line(path, "next")
    kept = whole[:torn].rfind(b"\n") + 1
    assert path.read_bytes() == whole[:kept] + b"next\n"


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_line_for_which_there_is_no_room_is_taken_back(tmp_path, room):
    path = tmp_path / "rows"
    append_line(path, "first")
    with file_size_limit(6 + room), pytest.raises(OSError, match="File too large") as caught:
        append_line(path, "second")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"first\n"
    append_line(path, "second")
    assert path.read_bytes() == b"first\nsecond\n"


def test_leftovers_are_what_a_killed_write_leaves(tmp_path):
    pid = os.fork()
    if not pid:
        try:
            replace_file(tmp_path / "f", lambda file: os.kill(os.getpid(), 9))
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    (tmp_path / "f.part").write_text("someone else's")
    assert len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in leftovers(tmp_path)] == [p.name for p in tmp_path.iterdir() if p.name != "f.part"]
