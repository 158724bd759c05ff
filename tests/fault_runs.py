"""Kills training runs, resumes them, and reads what lies in their folders: `python fault_runs.py --points 200`.

Every run is a process of its own, forked from one that has everything imported. A killed one dies by SIGKILL: before a
chosen line of adaclip's code (chosen among those that write files, or among all that a run executes), or at a random
time, which may be inside a kernel or a system call. Others get an error from the operating system at a chosen line that
writes, as if the disk were full for a moment. Then the folder is looked at as an attacker would, the run is
resumed, possibly killed again, and so on, and at last run to its end.

What must hold, each time a process has died:

* the ledger file is whole, and counts every step of which anything could be seen: summed over all processes that
  trained in the folder, the steps between the checkpoint that a process went on from and the last step that it began to
  write, evaluate or publish. Steps done again count again.
* the next process can resume, or start anew where the run had not begun.

And at the end:

* with a given key, parameters, optimizer state, average and metrics are those of an uninterrupted run, bit for bit: all
  steps of it, or, where a plan had no room left for steps that were lost, those up to the step where training ended.
* epsilon is within the budget, if there is one.
* nothing is left over in the folder.

Processes say in a file outside of the folder what they are about to show, before they do.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_runs import SETTINGS, write_mnist

from adaclip import checkpoint, engine, files, optimizer, runs, train
from adaclip.accounting import Ledger, ledger
from adaclip.runs import RunFolder
from adaclip.train import Training, is_finished
from adaclip.train_sources import resolve, resume_with

__all__ = ["Campaign"]

STEPS = 12
KEY = bytes(range(32))
FREE = {"noise_multiplier": 1.0, "epsilon": None}
PLANNED = {"epsilon": 3.0}
# With every kind of state that a run has.
SCHEME = {
    **FREE,
    "noise_multiplier": 2.0,
    "noise_schedule": "linear:0.5",
    "optimizer": "noise-nadam",
    "clipping": "adaptive",
    "quantile_noise": 5.0,
    "groups": "reweight",
    "smoothing": 0.01,
    "smoothing_signal": "snr",
    "augment": "shift",
    "views": 2,
    "max_batch_size": 8,
}
# Where files are written; and where, beside that, the account and the parameters change.
WRITING = (files.__file__,)
# A checkpoint is written in hundreds of pieces.
PIECES = ("write",)
TRAINING = tuple(module.__file__ for module in (files, checkpoint, runs, ledger, train, engine, optimizer))
_TIMEOUT = 300


class Seen(NamedTuple):
    """What a process has said: the step it went on from, and the last one of which it was about to show anything."""

    start: int
    shown: int


class Campaign:
    """Runs of one kind, in folders below `path`.

    settings: of `TrainConfig`, beside those of a tiny run; key: a given key for every process, or None; lines: those of
    another campaign.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        settings: dict[str, Any],
        key: bytes | None = KEY,
        lines: dict[str, int] | None = None,
    ):
        self.path, self.name, self._key = path, name, key
        self._settings = settings
        self._data = write_mnist(path / "data") if not (path / "data").exists() else path / "data"
        self._number = 0
        self._warm_up()
        started = time.monotonic()
        self.whole = self._run_whole()
        self.seconds = time.monotonic() - started
        # How many lines a run executes; they are about as many for every kind.
        self.lines = lines or {
            "writing": self._count(WRITING),
            "training": self._count(TRAINING),
            "around writes": self._count(WRITING, PIECES),
        }

    # --- one process -------------------------------------------------------------------------------

    def _training(self, folder: RunFolder, steps: int = STEPS) -> Training | None:
        if not folder.config.exists():
            settings = {
                "steps": steps,
                "eval_every": 4,
                "batch_size": 10,
                "ema": 0.9,
                "optimizer": "adam",
                "lr": 0.01,
            }
            config = resolve({**SETTINGS, "data_dir": str(self._data), **settings, **self._settings})
            return Training(config, RunFolder.create(folder.path))
        folder = RunFolder.open(folder.path)
        saved = folder.read_config()
        if folder.begun and is_finished(folder):
            return None
        config = resume_with(saved["train"], {})
        return Training(config, folder, saved=saved if folder.begun else None)

    def _fork(
        self,
        folder: Path,
        arm: Callable[[], object] = lambda: None,
        trace: Path | None = None,
        expected: bool = False,
    ) -> int:
        """Train in a new process, which shows its error unless one is expected; returns its number."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            witness = os.open(f"{folder}.seen", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            self._watch(witness, trace)
            arm()
            training = self._training(RunFolder(folder))
            if training is not None:
                training.run(quiet=True)
            sys.settrace(None)
            code = 0
        except BaseException:
            sys.settrace(None)
            if not expected:
                traceback.print_exc()
        finally:
            os._exit(code)

    def _watch(self, witness: int, trace: Path | None) -> None:
        """Have this process say what it is about to show; give it the key; make its plots small."""
        state: dict[str, Any] = {}

        def say(kind: str) -> None:
            training = state["training"]
            os.write(witness, f"{kind} {training.step}\n".encode())

        def before(owner: Any, name: str, kind: str) -> None:
            original = getattr(owner, name)

            def saying(*args: Any, **kwargs: Any) -> Any:
                say(kind)
                return original(*args, **kwargs)

            setattr(owner, name, saying)

        make = train.Training.__init__

        def making(self: Training, *args: Any, **kwargs: Any) -> None:
            state["training"] = self
            make(self, *args, **kwargs)
            say("start")

        train.Training.__init__ = making
        # Not save itself: its first byte is what counts, and the ledger comes before it.
        before(files.Output, "write", "shown")
        before(train, "evaluate", "shown")
        before(train.RunFolder, "append_metrics", "shown")
        train.plot_run = lambda path, rows, split: runs.write_text(path / "plot.png", json.dumps(rows))
        options = train.privacy_options
        if self._key is not None:
            train.privacy_options = lambda *a, **k: {**options(*a, **k), "noise_generator": self._key}
        if trace is not None:
            train_on = train.Training._train_on

            def noting(self: Training, *args: Any) -> bool:
                done = train_on(self, *args)
                if done and self.loader.current.last:
                    with open(trace, "a") as file:
                        file.write(f"{self.step} {digest(self)}\n")
                return done

            train.Training._train_on = noting

    @staticmethod
    def _wait(pid: int) -> int:
        """Wait for a process and return its status; one that hangs is an error."""
        end = time.monotonic() + _TIMEOUT
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"a run did not end within {_TIMEOUT} s")

    def _warm_up(self) -> None:
        """A run in this process, so that those forked from it need not import what is imported on first use."""
        folder = self.path / f"{self.name}-warm"
        training = self._training(RunFolder(folder), steps=1)
        training.run(quiet=True)
        training.folder.close()

    # --- uninterrupted -----------------------------------------------------------------------------

    def _run_whole(self) -> dict[int, str]:
        """The state after every step of an uninterrupted run."""
        folder, trace = self.path / f"{self.name}-whole", self.path / f"{self.name}-trace"
        assert self._wait(self._fork(folder, trace=trace)) == 0
        self._rows = strip(RunFolder(folder).read_metrics())
        return {int(step): state for step, state in (line.split() for line in trace.read_text().splitlines())}

    def _count(self, where: tuple[str, ...], without: tuple[str, ...] = ()) -> int:
        """How many lines of these files an uninterrupted run executes."""
        folder, told = self.path / f"{self.name}-lines", self.path / f"{self.name}-count"

        def arm() -> None:
            counted = trace_lines(where, None, without=without)
            leave = os._exit

            def leaving(code: int) -> None:
                told.write_text(str(next(counted)))
                leave(code)

            os._exit = leaving

        assert self._wait(self._fork(folder, arm)) == 0
        remove(folder)
        return int(told.read_text())

    # --- killed ------------------------------------------------------------------------------------

    def kill_and_resume(self, rng: random.Random, kills: int) -> str:
        """One folder: so many kills, a resume after each, and the checks; returns what happened, in words."""
        self._number += 1
        folder = self.path / f"{self.name}-{self._number}"
        told = []
        for _ in range(kills):
            told.append(self._killed(folder, rng))
            self.check_killed(folder)
        assert self._wait(self._fork(folder)) == 0, f"the run could not be resumed after {told}"
        seen = self.check_killed(folder)
        self.check_finished(folder)
        remove(folder)
        Path(f"{folder}.seen").unlink()
        return f"{'; '.join(told)}; from steps {[each.start for each in seen]}"

    def _killed(self, folder: Path, rng: random.Random) -> str:
        way = rng.choice(("writing", "training", "time", "full"))
        if way == "time":
            seconds = rng.random() * self.seconds
            pid = self._fork(folder)
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._wait(pid)
            return f"after {seconds:.2f} s"
        where = TRAINING if way == "training" else WRITING
        number = rng.randrange(self.lines["training" if way == "training" else "writing"])
        what = full if way == "full" else kill
        self._wait(self._fork(folder, lambda: trace_lines(where, number, what), expected=way == "full"))
        return f"before line {number} of {way}"

    def kill_before_line(self, number: int) -> None:
        """The same with one kill, before that line of those that write."""
        self._number += 1
        folder = self.path / f"{self.name}-{self._number}"
        status = self._wait(self._fork(folder, lambda: trace_lines(WRITING, number, without=PIECES)))
        assert os.WIFSIGNALED(status), status
        self.check_killed(folder)
        assert self._wait(self._fork(folder)) == 0
        self.check_killed(folder)
        self.check_finished(folder)
        remove(folder)
        Path(f"{folder}.seen").unlink()

    # --- what must hold ----------------------------------------------------------------------------

    def seen(self, folder: Path) -> list[Seen]:
        """What every process that trained in the folder has said, oldest first."""
        lives: list[Seen] = []
        for line in Path(f"{folder}.seen").read_text().splitlines():
            kind, step = line.split()
            if kind == "start":
                lives.append(Seen(int(step), int(step)))
            elif lives:  # else it is step 0: the checkpoint of the start
                lives[-1] = lives[-1]._replace(shown=max(lives[-1].shown, int(step)))
        return lives

    def check_killed(self, folder: Path) -> list[Seen]:
        """That the folder of a process that has ended counts everything that it shows."""
        run, lives = RunFolder(folder), self.seen(folder)
        released = sum(life.shown - life.start for life in lives)
        if released:
            assert Ledger.load(run.ledger).steps >= released, (lives, Ledger.load(run.ledger))
        if run.checkpoint.exists():
            state = checkpoint.load(run.checkpoint)
            counted = Ledger.load(run.ledger)
            assert counted.after(Ledger.from_state_dict(state["accountant"])) is not None
            assert counted.steps >= max(state["extra"]["step"], run.published())
            if self._key is not None:
                assert self._key not in run.checkpoint.read_bytes()
        return lives

    def check_finished(self, folder: Path) -> None:
        """That a run which was resumed ends where an uninterrupted one does, or at a step of it."""
        run = RunFolder(folder)
        names = {entry.name for entry in folder.iterdir()}
        assert names == {"config.json", "ledger.json", "metrics.jsonl", "checkpoint.pt", "plot.png", ".lock"}
        state, counted = checkpoint.load(run.checkpoint), Ledger.load(run.ledger)
        step = state["extra"]["step"]
        assert state["extra"]["finished"]
        rows = strip(run.read_metrics())
        if self._settings.get("epsilon"):
            assert counted.steps <= STEPS
            assert rows[-1]["epsilon"] <= self._settings["epsilon"]
            # A step fewer for each one that is on the account without being in the checkpoint.
            assert step == STEPS - (counted.steps - step)
        else:
            assert step == STEPS
        if self._key is None:
            return
        if step:
            assert digest_of(state) == self.whole[step], f"another state at step {step}"
        expected = [row for row in self._rows if row["step"] <= step]
        for mine, theirs in zip(rows, expected, strict=False):
            if mine["step"] == theirs["step"]:
                # The same but for what it cost.
                assert {**mine, "epsilon": 0} == {**theirs, "epsilon": 0}
                assert mine["epsilon"] >= theirs["epsilon"]
        assert [row["step"] for row in rows if row["step"] % 4 == 0] == [row["step"] for row in expected]


def kill() -> None:
    """End this process as nothing else does."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """What a write raises on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trace_lines(
    where: tuple[str, ...],
    number: int | None,
    then: Callable[[], None] = kill,
    without: tuple[str, ...] = (),
) -> Iterator[int]:
    """Count the lines of these files that this process executes, and call `then` before the one of that number.

    Functions named in `without` do not count. next() of what is returned gives the count.
    """
    count = 0

    def line(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count - 1 == number:
                then()
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        return line if code.co_filename in where and code.co_name not in without else None

    sys.settrace(call)

    def counted() -> Iterator[int]:
        while True:
            yield count

    return counted()


def digest(training: Training) -> str:
    """A hash of parameters, optimizer state and average (the learning rate is set before a step, also one refused)."""
    average = None if training.average is None else training.average.state_dict()
    return _hashed(training.model.state_dict(), training.optimizer.state_dict()["state"], average)


def digest_of(state: dict[str, Any]) -> str:
    """The same, of a checkpoint."""
    return _hashed(state["module"], state["optimizer"]["state"], state["extra"]["ema"])


def _hashed(*states: Any) -> str:
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    for state in states:
        add(state)
    return sha.hexdigest()


def strip(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock decides."""
    return [
        {name: v for name, v in row.items() if name not in ("seconds", "images_per_second")} for row in rows
    ]


def remove(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=200, help="random kill points")
    parser.add_argument(
        "--every", type=int, default=1, help="every so many one of the lines around writes; 0: none"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of the random kill points; default: a new one"
    )
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    rng = random.Random(seed)
    torch.set_num_threads(1)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        free = Campaign(path, "free", FREE)
        kinds = [
            free,
            Campaign(path, "planned", PLANNED, lines=free.lines),
            Campaign(path, "scheme", SCHEME, lines=free.lines),
            Campaign(path, "secret", PLANNED, key=None, lines=free.lines),
        ]
        print(f"lines executed: {free.lines}", flush=True)
        points = 0
        while points < args.points:
            kills = min(rng.choice((1, 1, 2, 3)), args.points - points)
            kind = rng.choice(kinds)
            told = kind.kill_and_resume(rng, kills)
            points += kills
            print(f"{points}/{args.points} {kind.name}: killed {told}", flush=True)
        around = free.lines["around writes"]
        for number in range(0, around if args.every else 0, args.every or 1):
            free.kill_before_line(number)
            print(f"killed before line {number} of {around} around writes", flush=True)
    print("every ledger counts what its folder shows, and every run ended as one that was not killed")


if __name__ == "__main__":
    main()
