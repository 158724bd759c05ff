"""Run folders: what a training run leaves on disk, and in which order.

    config.json        the resolved settings, what follows from them (q, sigma, N, …), versions
    ledger.json        the privacy events (adaclip.accounting.Ledger)
    metrics.jsonl      one object per evaluation
    checkpoint.pt      model, optimizer, ledger and counters
    *.png              plots of metrics.jsonl
    .lock              held by the process that trains here
    PRIVATE-not-for-release/   only with --private-diagnostics

Everything outside PRIVATE-not-for-release is computed from noised parameters and public numbers. What is released
when, and what a process killed at any point leaves behind:

* A step is released when something that depends on its noise can be seen: first by the bytes of a checkpoint being
  written, then by its evaluation. What a killed process held in memory alone was not released, and does not count.
* The order is ledger, checkpoint, evaluation, metrics. Each is on disk before the next begins, so the ledger on disk
  counts at least every step of which a byte can be found.
* A resumed run goes on from the checkpoint, and with the larger of two accounts: the checkpoint's own and the ledger
  file's, one of which continues the other. Steps that only the ledger file holds may have been seen and stay on the
  account. They are done again with new noise, and count again: both branches are releases of the data. A budget that
  these steps were planned to fill is then spent before the run's last step, where training ends.
* With a given key (for tests and replay; `adaclip train` takes none) the steps that are done again are the same
  releases, bit for bit, at the same places of a noise schedule. They count again all the same.
* A copy of a run folder that is resumed as well is another run on the same data. Both count; nobody can see it here.

Needs no torch.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaclip.accounting import Ledger
from adaclip.files import Lock, append_line, leftovers, replace_file

__all__ = ["PRIVATE", "RunFolder"]

SCHEMA = 1
PRIVATE = "PRIVATE-not-for-release"
_PRIVATE_README = """# Private: not for release

The files in this folder were computed from single training examples without noise: training loss and
accuracy, the realised sizes of the Poisson batches, quantiles of the per-sample gradient norms, the share of
clipped samples, the number of samples with non-finite gradients. No (epsilon, delta) guarantee covers them.

They are for the person who may see the training data, to debug a run. Keep them where the training data is
kept, and leave this folder out of everything that is published; the rest of the run folder is covered by the
guarantee in ledger.json.
"""


class RunFolder:
    """A folder that holds one run.

    `create` and `open` lock it: no other process may train here until `close`, or until this one ends.

    Attributes:
        path: the folder.
        config, ledger, metrics, checkpoint: paths of its files.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.ledger = path / "ledger.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self._made: list[Path] = []
        self._lock: Lock | None = None

    # --- making and opening ------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Make the folder of a new run and see that it can be written.

        Raises:
            ValueError: it exists and is not an empty folder; it is left as it is.
            OSError: it cannot be made or written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"run folder {path} is a file: choose another one with --run-dir")
        folder = cls(path)
        if path.is_dir():
            folder._check_empty()
        try:
            for parent in reversed([path, *path.parents]):
                if not parent.exists():
                    parent.mkdir()
                    folder._made.append(parent)
            folder._take()
            # Once more: another process may have been here first.
            folder._check_empty()
        except BlockingIOError:
            raise
        except OSError as error:
            folder.abandon()
            raise OSError(
                f"run folder {path} cannot be written ({error.strerror or error}): choose another one with "
                "--run-dir"
            ) from error
        except ValueError:
            folder.close()
            raise
        return folder

    def _check_empty(self) -> None:
        """Raise ValueError if there is anything but what killed starts leave."""
        ours = {self._lock_file, *leftovers(self.path)}
        if all(entry in ours for entry in self.path.iterdir()):
            return
        what = "holds a run already" if self.config.exists() else "is not empty"
        raise ValueError(
            f"run folder {self.path} {what}, and nothing is overwritten: choose another one with --run-dir, "
            f"or continue it with --resume {self.path}"
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of a run to resume, rid of what a killed process left half-written.

        Raises:
            ValueError: it holds no run, or one that cannot be resumed; it is left as it is.
            OSError: it cannot be written, or another process trains in it.
        """
        folder = cls(Path(path))
        folder._check_resumable()
        try:
            folder._take()
        except BlockingIOError:
            raise
        except OSError as error:
            folder.close()
            raise OSError(f"run folder {path} cannot be written ({error.strerror or error})") from error
        return folder

    @classmethod
    def join(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of a run whose first process has made or opened it; the others only read."""
        return cls(Path(path))

    def _check_resumable(self) -> None:
        missing = [file for file in (self.config, self.ledger, self.checkpoint) if not file.is_file()]
        if self.checkpoint in missing and self.config not in missing and self._untrained():
            return
        if missing:
            raise ValueError(f"{self.path} holds no run that could be resumed: {missing[0].name} is missing")

    def _untrained(self) -> bool:
        """Whether no step can have been released here: a start that was cut off before the first checkpoint."""
        if self.metrics.exists():
            return False
        return not self.ledger.exists() or Ledger.load(self.ledger).steps == 0

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from; if not, the run has yet to take its first step."""
        return self.checkpoint.is_file()

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    def _take(self) -> None:
        """Lock the folder, see that it can be written, and clear it of leftovers; OSError where that fails."""
        try:
            self._lock = Lock(self._lock_file)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"run folder {self.path} is in use: another process trains in it"
            ) from error
        with tempfile.TemporaryFile(dir=self.path):
            pass
        for path in leftovers(self.path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process train here."""
        if self._lock is not None:
            self._lock.release()

    def abandon(self) -> None:
        """Undo `create` where no checkpoint has been written: remove what there is of the run, and folders made."""
        if self._lock is not None and not self.checkpoint.exists():
            for file in (self.config, self.ledger, self._lock_file):
                file.unlink(missing_ok=True)
        self.close()
        for made in reversed(self._made):
            try:
                made.rmdir()
            except OSError:
                return

    # --- config --------------------------------------------------------------------------------------

    def write_config(self, *, train: Mapping, run: Mapping, versions: Mapping) -> None:
        """Write config.json: settings, what follows from them, versions."""
        state = {"schema": SCHEMA, "train": dict(train), "run": dict(run), "versions": dict(versions)}
        write_text(self.config, json.dumps(standard(state), indent=1, allow_nan=False) + "\n")

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote: {"train", "run", "versions"}.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        try:
            state = json.loads(self.config.read_text(encoding="utf-8"))
            if not isinstance(state, dict) or not all(
                isinstance(state.get(k), dict) for k in ("train", "run")
            ):
                raise ValueError("it lacks the tables 'train' and 'run'")
        except ValueError as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from error
        if state.get("schema") != SCHEMA:
            raise ValueError(f"{self.config} has schema {state.get('schema')!r}; this adaclip reads {SCHEMA}")
        return state

    # --- metrics -------------------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one evaluation to metrics.jsonl, on disk when this returns."""
        append_row(self.metrics, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The evaluations, oldest first, without those of steps that a resumed run did again.

        Raises:
            ValueError: the file is damaged.
        """
        rows: list[dict[str, Any]] = []
        for row in self._rows():
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
            rows.append(row)
        return rows

    def published(self) -> int:
        """The last step of which an evaluation was written; 0 if there is none. ValueError as in `read_metrics`."""
        return max((row["step"] for row in self._rows()), default=0)

    def _rows(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        try:
            rows = [json.loads(line) for line in whole_lines(self.metrics)]
        except ValueError as error:
            raise ValueError(f"{self.metrics} is damaged: {error}") from error
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError(f"{self.metrics} is damaged: not every line is an object with an integer step")
        return rows

    # --- private -------------------------------------------------------------------------------------

    def private_file(self, name: str) -> Path:
        """The path of a private file, in a folder that says so."""
        folder = self.path / PRIVATE
        folder.mkdir(exist_ok=True)
        readme = folder / "README.md"
        if not readme.exists():
            write_text(readme, _PRIVATE_README)
        return folder / name


# --- files ------------------------------------------------------------------------------------------------


def standard(value: Any) -> Any:
    """`value` with infinite floats as the strings "inf" and "-inf": JSON has none."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, Mapping):
        return {key: standard(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [standard(item) for item in value]
    return value


def epsilon_text(epsilon: float) -> str:
    """Four decimals, rounded up: a printed bound stays a bound."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else f"{epsilon:g}"


def write_text(path: Path, text: str) -> None:
    """Write a file so that `path` is the old one or the whole new one."""
    data = text.encode()
    replace_file(path, lambda file: file.write(data))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line, on disk when this returns, dropping a line that a crash left unfinished."""
    append_line(path, json.dumps(standard(dict(row)), allow_nan=False))


def whole_lines(path: Path) -> list[str]:
    """The finished lines of a file."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]
