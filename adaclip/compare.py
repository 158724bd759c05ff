"""Comparisons: the same data, model, budget, steps and seeds for a list of schemes. Needs no torch.

A comparison lives in a folder:

    recipe.toml         what all runs share ([train]) and what single schemes add ([scheme.NAME])
    compare.json        schemes, seeds, the command, seconds taken
    runs/SCHEME-sSEED/  one ordinary run folder each, made by `adaclip train`
    logs/               what the runs said
    rows.jsonl          a line for each finished run
    table.json, report.md, curves.png

Every run is a process of its own. The last four files are written anew after every run, so that a comparison that
was cut off keeps its rows; started again with the same settings it runs what is missing, and resumes what was broken
off. Seeds go before schemes: all schemes have their first run before any has its second.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaclip.compare_report import write_report
from adaclip.interrupts import Interrupts
from adaclip.runs import RunFolder, standard, whole_lines, write_text
from adaclip.schemes import OWNED, chain
from adaclip.train_config import MACHINE, TrainConfig
from adaclip.train_sources import Tables, as_flags, overlay, read_tables, resolve, write_tables

__all__ = ["Comparison", "Job", "RunsFailed", "recipe_of", "run_jobs"]

SCHEMA = 1
_POLL = 0.1  # seconds


class RunsFailed(RuntimeError):
    """Some runs ended with an error; the message names them and what each said last."""


@dataclass(frozen=True)
class Job:
    """One run to make.

    Attributes:
        name: of the run, unique in its folder's parent.
        folder: the run folder. log: where its process writes.
        settings: what `adaclip train` resolves from `flags` and the recipe.
        flags: settings given on its command line, with --config for the recipe.
    """

    name: str
    scheme: str
    folder: Path
    log: Path
    settings: TrainConfig
    flags: Mapping[str, Any]


def recipe_of(flags: Mapping[str, Any], config: Path | None) -> Tables:
    """What all runs share: the settings of `config`, and over its [train] those of `flags`.

    Raises:
        ValueError: a flag is a scheme's to decide; the file is wrong.
    """
    owned = sorted(OWNED & flags.keys())
    if owned:
        raise ValueError(
            f"--{owned[0].replace('_', '-')} must not be given to a comparison, whose schemes decide it: put "
            f"{owned[0]} into a table [scheme.NAME] of a --config file"
        )
    given = Tables({}, {}) if config is None else read_tables(config)
    shared = {name: value for name, value in flags.items() if name not in MACHINE}
    train = overlay(given.train, shared, "flags")
    if train.get("scheme") is not None:
        raise ValueError(f"[train] in {config} must not set scheme: a comparison has a list of them")
    return Tables(train, given.schemes)


class Comparison:
    """The comparison in a folder.

    Args:
        out: its folder; new, empty, or that of this comparison.
        recipe: what `recipe_of` gave.
        machine: the `MACHINE` settings of all runs.
        schemes: names, at least one; seeds: 0 … seeds - 1.
        command: the command line, for the report.

    Raises:
        ValueError, OSError: a scheme, a setting or the folder is at fault, or the folder holds runs made with
        other settings. Nothing has been written then.
    """

    def __init__(
        self,
        out: Path,
        recipe: Tables,
        *,
        machine: Mapping[str, Any],
        schemes: Sequence[str],
        seeds: int,
        command: str = "",
    ):
        if not schemes or len(set(schemes)) != len(schemes):
            raise ValueError(f"schemes must be different names, at least one, got {list(schemes)}")
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
            raise ValueError(f"seeds must be a whole number of at least 1, got {seeds!r}")
        for name in schemes:
            chain(name)
        self.out, self.recipe, self.machine = out, recipe, dict(machine)
        before = self._read_settings()
        self.schemes = [
            *before.get("schemes", []),
            *(s for s in schemes if s not in before.get("schemes", [])),
        ]
        self.seeds = max(seeds, before.get("seeds", 0))
        # Of all calls of `run`, until the last run that each of them finished.
        self.seconds = float(before.get("seconds", 0.0))
        self.command = command
        jobs = self._jobs(recipe, self.schemes, self.seeds)
        for job in jobs:
            check_settings(job)
        self.jobs = [job for job in jobs if job.scheme in schemes and job.settings.seed < seeds]
        self._all = jobs

    def _read_settings(self) -> dict[str, Any]:
        path = self.out / "compare.json"
        if path.is_file():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            if not isinstance(state, dict) or state.get("schema") != SCHEMA:
                raise ValueError(f"{path} is not of this version of adaclip")
            return state
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(
                f"{self.out} is not empty and holds no comparison: choose another folder with --out"
            )
        return {}

    def _jobs(self, recipe: Tables, schemes: Sequence[str], seeds: int) -> list[Job]:
        made = []
        for seed in range(seeds):
            for scheme in schemes:
                name = f"{scheme}-s{seed}"
                flags = self.machine | {"scheme": scheme, "seed": seed}
                made.append(
                    Job(
                        name=name,
                        scheme=scheme,
                        folder=self.out / "runs" / name,
                        log=self.out / "logs" / f"{name}.log",
                        settings=resolve(flags, recipe),
                        flags=flags,
                    )
                )
        return made

    def run(self, *, jobs: int = 1, say: Callable[[str], None] = print) -> bool:
        """Make the missing runs, `jobs` at a time; False if SIGINT or SIGTERM came before the end.

        Raises:
            RunsFailed: runs ended with an error; all others were made, and are in the report.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "recipe.toml", write_tables(self.recipe))
        self._write_settings()
        rows, started, before = self.rows(), time.monotonic(), self.seconds
        missing = [job for job in self.jobs if job.name not in rows]
        if len(missing) < len(self.jobs):
            say(f"{len(self.jobs) - len(missing)} of {len(self.jobs)} runs are finished already")
        self.report()

        def finished(job: Job) -> None:
            row = row_of(job)
            rows[job.name] = row
            self._write_rows(rows)
            self.seconds = before + time.monotonic() - started
            self._write_settings()
            self.report()
            accuracy = row["accuracy"]
            say(f"{job.name}: {row['split']} accuracy {accuracy:.2%}, {row['seconds']:.0f} s")

        return run_jobs(missing, self.out / "recipe.toml", finished, parallel=jobs, say=say)

    def _write_settings(self) -> None:
        state = {
            "schema": SCHEMA,
            "schemes": self.schemes,
            "seeds": self.seeds,
            "command": self.command,
            "seconds": self.seconds,
        }
        write_text(self.out / "compare.json", json.dumps(state, indent=1) + "\n")

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of the finished runs by name, in the order of the comparison."""
        path = self.out / "rows.jsonl"
        known = {row["run"]: row for row in map(json.loads, whole_lines(path))} if path.is_file() else {}
        # A run folder that was taken away takes its row along.
        return {
            job.name: known[job.name]
            for job in self._all
            if job.name in known and RunFolder(job.folder).config.is_file()
        }

    def _write_rows(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        ordered = [rows[job.name] for job in self._all if job.name in rows]
        write_text(self.out / "rows.jsonl", "".join(json.dumps(standard(row)) + "\n" for row in ordered))

    def report(self) -> dict[str, Any]:
        """Write table.json, report.md and curves.png from the finished runs; returns the table."""
        rows = list(self.rows().values())
        curves = {row["run"]: RunFolder(self.out / "runs" / row["run"]).read_metrics() for row in rows}
        facts = {} if not rows else RunFolder(self.out / "runs" / rows[0]["run"]).read_config()
        planned = dict.fromkeys(self.schemes, self.seeds)
        return write_report(
            self.out,
            rows,
            curves,
            facts=facts,
            planned=planned,
            command=self.command,
            seconds=self.seconds,
        )


# --- one run ----------------------------------------------------------------------------------------------------


def check_settings(job: Job) -> None:
    """Raise ValueError if the job's folder holds a run made with other settings (`MACHINE` aside)."""
    folder = RunFolder(job.folder)
    if not folder.config.is_file():
        return
    saved, ours = folder.read_config()["train"], dataclasses.asdict(job.settings)
    for name, value in ours.items():
        if name not in MACHINE and saved.get(name) != value:
            raise ValueError(
                f"{name} of {job.name} must be what {job.folder} was made with, {saved.get(name)!r}, got "
                f"{value!r}: choose another folder with --out"
            )


def row_of(job: Job) -> dict[str, Any]:
    """What the table needs of a finished run: public numbers of its last evaluation."""
    folder = RunFolder(job.folder)
    config, metrics = folder.read_config(), folder.read_metrics()
    if not metrics:
        raise RunsFailed(f"{job.folder} has no evaluation in metrics.jsonl, though its run ended well")
    run, last = config["run"], metrics[-1]
    split = run["evaluated_on"]["split"]
    return {
        "run": job.name,
        "scheme": job.scheme,
        "seed": job.settings.seed,
        "split": split,
        "accuracy": last[f"{split}_accuracy"],
        "loss": last[f"{split}_loss"],
        "steps": last["step"],
        "epsilon": last["epsilon"],
        "delta": last["delta"],
        "max_grad_norm": last["max_grad_norm"],
        "noise_multiplier": last["noise_multiplier"],
        "gradient_noise_multiplier": last["gradient_noise_multiplier"],
        "seconds": last["seconds"],
        "seconds_per_epoch": run["dataset_size"] / last["images_per_second"],
        "images_per_second": last["images_per_second"],
        "threads": run["threads"],
    }


# --- processes --------------------------------------------------------------------------------------------------


def launch(words: Sequence[str], log: Path, threads: int | None) -> subprocess.Popen[bytes]:
    """Start `adaclip` with these words, in a session of its own: an interrupt reaches it through `run_jobs` alone."""
    program = "import sys; from adaclip.cli import main; sys.exit(main())"
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", program, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def run_jobs(
    jobs: Sequence[Job],
    recipe: Path,
    finished: Callable[[Job], None],
    *,
    parallel: int,
    say: Callable[[str], None],
) -> bool:
    """Make the runs, `parallel` at a time, in order; `finished` is called after each that ended well.

    Returns False if SIGINT or SIGTERM came: the runs in hand are asked to end, which leaves them resumable.

    Raises:
        RunsFailed: some ended with an error; the others were made all the same.
    """
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"jobs must be a whole number of at least 1, got {parallel!r}")
    waiting, active, failed = list(jobs), {}, []
    with Interrupts() as interrupts:
        try:
            while waiting or active:
                while waiting and len(active) < parallel and not interrupts.requested:
                    job = waiting.pop(0)
                    say(f"{job.name}: starts ({len(jobs) - len(waiting)} of {len(jobs)})")
                    active[job.name] = job, launch(_words(job, recipe), job.log, job.settings.threads)
                for name, (job, process) in list(active.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del active[name]
                    if code == 0:
                        finished(job)
                    elif not interrupts.requested:
                        failed.append(f"{name} ended with code {code}: {_last_line(job.log)}")
                        say(failed[-1])
                if interrupts.requested:
                    waiting.clear()
                    if active:
                        say(f"interrupted: waiting for {', '.join(active)} to write a checkpoint")
                    for _, process in active.values():
                        process.terminate()
                    for job, process in active.values():
                        if process.wait() == 0:
                            finished(job)
                    return False
                if active:
                    time.sleep(_POLL)
        finally:
            for _, process in active.values():
                process.terminate()
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")
    return True


def _words(job: Job, recipe: Path) -> list[str]:
    folder = RunFolder(job.folder)
    if folder.checkpoint.is_file():
        machine = {name: value for name, value in job.flags.items() if name in MACHINE}
        return ["train", "--resume", str(job.folder), *as_flags(machine)]
    if job.folder.exists():
        # Begun, but ended before its first checkpoint, which comes before its first step.
        shutil.rmtree(job.folder)
    return ["train", "--config", str(recipe), "--run-dir", str(job.folder), *as_flags(job.flags)]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
