"""adaclip.runs: run folders, torn files, and which ledger counts."""

import errno
import fcntl
import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaclip.accounting import Ledger, SubsampledGaussian
from adaclip.files import Lock
from adaclip.runs import PRIVATE, RunFolder, append_row, epsilon_text, standard, write_text

EVENTS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([1.0, 2.0]), st.integers(1, 5)), max_size=5
)


def ledger(events):
    return Ledger((SubsampledGaussian(q, sigma), count) for q, sigma, count in events)


def cut(events, steps):
    """The first `steps` steps of the events."""
    out = []
    for q, sigma, count in events:
        out.append((q, sigma, min(count, steps)))
        steps -= out[-1][2]
    return out


def test_a_new_folder_is_made_with_its_parents_and_can_be_taken_back(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b")
    assert folder.path.is_dir()
    folder.abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandoning_removes_nothing_that_was_there_or_is_not_the_runs(tmp_path):
    empty = tmp_path / "mine"
    empty.mkdir()
    RunFolder.create(empty).abandon()
    assert list(empty.iterdir()) == []
    folder = RunFolder.create(tmp_path / "full")
    write_text(folder.path / "notes.txt", "mine")
    folder.abandon()
    assert [p.name for p in folder.path.iterdir()] == ["notes.txt"]


def test_a_folder_with_a_run_or_anything_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
        RunFolder.create(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a run already.*--resume"):
        RunFolder.create(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create(tmp_path / "notes.txt")


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written \(Not a directory\).*--run-dir"):
        RunFolder.create(tmp_path / "file" / "run")


def test_opening_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no run that could be resumed: config\.json is missing"):
        RunFolder.open(tmp_path)


def test_config_survives_the_file(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    folder.write_config(train={"lr": 0.1 + 0.2}, run={"sigma": 1.2345678901234567}, versions={"adaclip": "0"})
    state = folder.read_config()
    assert state["train"]["lr"] == 0.1 + 0.2
    assert state["run"]["sigma"] == 1.2345678901234567
    for damage, message in (
        ("{", "cannot be read"),
        ("[]", "lacks"),
        ('{"train": {}, "run": {}}', "schema None"),
    ):
        folder.config.write_text(damage)
        with pytest.raises(ValueError, match=message):
            folder.read_config()


def test_a_torn_last_line_is_dropped_before_the_next_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "te')
    append_row(path, {"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    path.write_text('{"torn')
    append_row(path, {"step": 4})
    assert path.read_text() == '{"step": 4}\n'


def test_reading_metrics_skips_steps_that_were_done_again_and_torn_lines(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    assert folder.read_metrics() == []
    for step, accuracy in ((10, 0.1), (20, 0.2), (30, 0.3), (20, 0.4), (40, 0.5)):
        folder.append_metrics({"step": step, "test_accuracy": accuracy})
    with folder.metrics.open("a") as file:
        file.write('{"step":')
    assert [(r["step"], r["test_accuracy"]) for r in folder.read_metrics()] == [
        (10, 0.1),
        (20, 0.4),
        (40, 0.5),
    ]


def test_json_has_no_infinities():
    state = standard({"a": math.inf, "b": [-math.inf, 1.0], "c": {"d": math.nan}})
    assert state == {"a": "inf", "b": ["-inf", 1.0], "c": {"d": "nan"}}


def test_a_printed_epsilon_stays_a_bound():
    assert [epsilon_text(e) for e in (2.99991, 1.0, 0.0, math.inf)] == ["3.0000", "1.0000", "0.0000", "inf"]


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "f"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_private_files_lie_in_a_folder_that_says_so(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    path = folder.private_file("x.jsonl")
    assert path.parent.name == PRIVATE == "PRIVATE-not-for-release"
    assert "not for release" in (path.parent / "README.md").read_text()


# --- one process at a time, and what a killed one leaves --------------------------------------------------


def test_a_folder_is_locked_while_a_run_is_in_it(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    with pytest.raises(BlockingIOError, match="is in use: another process trains in it"):
        RunFolder.create(tmp_path / "r")
    write_text(folder.config, "{}")
    write_text(folder.ledger, "{}")
    write_text(folder.checkpoint, "")
    with pytest.raises(BlockingIOError, match="is in use"):
        RunFolder.open(tmp_path / "r")
    folder.close()
    RunFolder.open(tmp_path / "r").close()


HOLDER = """
import sys, time
from pathlib import Path
from adaclip.runs import RunFolder
folder = RunFolder.create(sys.argv[1])
print("holds it", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "holds it\n"
            with pytest.raises(BlockingIOError, match="is in use"):
                RunFolder.create(tmp_path / "r")
        finally:
            holder.kill()
    # The start that was killed has left the lock's file alone, which is no obstacle.
    assert [p.name for p in (tmp_path / "r").iterdir()] == [".lock"]
    RunFolder.create(tmp_path / "r").abandon()
    assert [p.name for p in (tmp_path / "r").iterdir()] == []


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / "lock", fcntl.flock

    def removed_just_before(handle, operation):
        monkeypatch.undo()
        path.unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_just_before)
    lock = Lock(path)
    with pytest.raises(BlockingIOError):
        Lock(path)
    lock.release()
    Lock(path).release()


def test_leftovers_are_cleared_by_the_next_run_and_nothing_else(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    for name in (
        "config.json",
        "ledger.json",
        "checkpoint.pt",
        ".hidden.part",
        "mine.part",
        "checkpoint.pt.part",
    ):
        (folder.path / name).write_text("{}")
    for name in (".checkpoint.pt.0123abcd.part", ".ledger.json.deadbeef.part"):
        (folder.path / name).write_text("half")
    before = {p.name for p in folder.path.iterdir()}
    folder.close()
    RunFolder.open(folder.path).close()
    assert before - {p.name for p in folder.path.iterdir()} == {
        ".checkpoint.pt.0123abcd.part",
        ".ledger.json.deadbeef.part",
    }


def test_a_start_that_was_cut_off_can_be_opened_and_a_run_without_its_checkpoint_cannot(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    folder.write_config(train={}, run={}, versions={})
    folder.close()
    for _ in range(2):
        opened = RunFolder.open(folder.path)
        assert not opened.begun
        opened.close()
        ledger([]).save(folder.ledger)
    ledger([(0.1, 1.0, 3)]).save(folder.ledger)
    with pytest.raises(ValueError, match=r"no run that could be resumed: checkpoint\.pt is missing"):
        RunFolder.open(folder.path)
    ledger([]).save(folder.ledger)
    folder.append_metrics({"step": 4})
    with pytest.raises(ValueError, match=r"checkpoint\.pt is missing"):
        RunFolder.open(folder.path)


def test_abandoning_takes_back_what_was_written_before_the_first_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b")
    write_text(folder.config, "{}")
    write_text(folder.ledger, "{}")
    folder.abandon()
    assert list(tmp_path.iterdir()) == []
    folder = RunFolder.create(tmp_path / "r")
    write_text(folder.config, "{}")
    write_text(folder.checkpoint, "")
    folder.abandon()
    assert folder.config.exists()


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "r")
    for file in (folder.config, folder.ledger, folder.checkpoint):
        write_text(file, "{}")
    folder.close()

    def read_only(path, flags, *args):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *args)

    opened = os.open
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"run folder .*r cannot be written \(Read-only file system\)"):
        RunFolder.open(folder.path)


def test_damaged_metrics_are_an_error_that_names_the_file(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    for damage in ("{\n", "[]\n", '{"step": "4"}\n'):
        folder.metrics.write_text(damage)
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
            folder.read_metrics()


def test_what_was_published_includes_steps_that_were_done_again(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    assert folder.published() == 0
    for step in (10, 20, 15):
        folder.append_metrics({"step": step})
    assert folder.published() == 20


# --- which ledger counts ----------------------------------------------------------------------------------


@given(EVENTS, st.data())
def test_the_larger_ledger_counts(events, data):
    part = cut(events, data.draw(st.integers(0, sum(count for _, _, count in events))))
    whole = ledger(events)
    assert ledger(part).longer(whole) == whole.longer(ledger(part)) == whole


@pytest.mark.parametrize(
    ("saved", "written"),
    [
        ([(0.1, 1.0, 5)], [(0.1, 2.0, 9)]),
        ([(0.1, 1.0, 5), (0.2, 1.0, 1)], [(0.1, 1.0, 9)]),
        ([(0.1, 1.0, 5)], [(0.1, 1.0, 3), (0.2, 1.0, 9)]),
    ],
)
def test_ledgers_of_different_runs_are_refused(saved, written):
    for one, other in ((saved, written), (written, saved)):
        with pytest.raises(ValueError, match="different runs"):
            ledger(one).longer(ledger(other))
    with pytest.raises(ValueError, match="different runs"):
        ledger(saved).longer(Ledger(ledger(saved).events, adjacency="zero_out"))
