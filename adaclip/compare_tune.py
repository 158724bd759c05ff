"""Tuning for comparisons: the same grid of settings for every scheme, on training images held out. Needs no torch.

A tuning folder:

    recipe.toml, tune.json            what all runs share; schemes, grids and the command
    tuning/SCHEME/KEY=VALUE,…/        one run folder for each point of a scheme's grid
    logs/, tuning.jsonl               what the runs said; a line for each finished run
    tuned.toml                        the recipe, with each scheme's best point in [scheme.NAME]

The last two are written anew after every run, as in `adaclip.compare`. No privacy accounting covers the choice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaclip.compare import Job, check_settings, row_of, run_jobs
from adaclip.runs import standard, whole_lines, write_text
from adaclip.schemes import OWNED, SCHEMES, chain
from adaclip.train_sources import Tables, resolve, setting_of, write_tables

__all__ = ["Grid", "Tuning", "parse_grid"]

SCHEMA = 1


class Grid:
    """Values to try for one setting.

    Args:
        scheme: the only scheme it is for; None: all.
        key: the setting, one that schemes decide.
        texts: values; "x0.5" stands for half of what the scheme has.

    Raises:
        ValueError: an unknown scheme or setting, or a value that does not fit.
    """

    def __init__(self, scheme: str | None, key: str, texts: Sequence[str]):
        if scheme is not None:
            chain(scheme)
        if key not in OWNED:
            raise ValueError(
                f"a tuned setting must be one that schemes decide, {', '.join(sorted(OWNED))}, got {key!r}"
            )
        if not texts or len(set(texts)) != len(texts):
            raise ValueError(f"values of {key} must be different, at least one, got {list(texts)}")
        self.scheme, self.key, self.texts = scheme, key, tuple(texts)
        for text in texts:
            self._value(text, 1.0)

    def values(self, own: Any) -> list[Any]:
        """The values for a scheme that has `own`."""
        return [self._value(text, own) for text in self.texts]

    def _value(self, text: str, own: Any) -> Any:
        if not text.startswith("x"):
            return setting_of(self.key, text)
        try:
            return float(text[1:]) * own
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.key} must be a value, or x and a factor of a number that the scheme has, got {text!r}"
            ) from None


def parse_grid(text: str) -> Grid:
    """A grid from "[SCHEME:]KEY=VALUE,VALUE,…". Raises ValueError."""
    left, equals, values = text.partition("=")
    scheme, colon, key = left.rpartition(":")
    if not equals or not key or (colon and not scheme):
        raise ValueError(f"tune must be [SCHEME:]KEY=VALUE,VALUE,…, got {text!r}")
    return Grid(scheme or None, key.replace("-", "_"), values.split(","))


class Tuning:
    """The tuning in a folder.

    Args:
        out: its folder; new, empty, or that of this tuning.
        recipe, machine, schemes, command: as for `adaclip.compare.Comparison`.
        grids: of all settings to tune; a scheme's points are the product of those that concern it.
        fraction: of the training images to hold out and to judge by, in (0, 1).

    Raises:
        ValueError, OSError: an argument or the folder is at fault. Nothing has been written then.
    """

    def __init__(
        self,
        out: Path,
        recipe: Tables,
        *,
        machine: Mapping[str, Any],
        schemes: Sequence[str],
        grids: Sequence[Grid],
        fraction: float,
        command: str = "",
    ):
        if not 0 < fraction < 1:
            raise ValueError(f"validation must be in (0, 1) for tuning, got {fraction!r}")
        if not schemes or len(set(schemes)) != len(schemes):
            raise ValueError(f"schemes must be different names, at least one, got {list(schemes)}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "tune.json").is_file():
            raise ValueError(f"{out} is not empty and holds no tuning: choose another folder with --out")
        self.out, self.recipe, self.command = out, recipe, command
        self.schemes, self.fraction = list(schemes), fraction
        self._points: dict[str, tuple[str, dict[str, Any]]] = {}
        self.jobs: list[Job] = []
        for scheme in schemes:
            self._add(scheme, dict(machine), [grid for grid in grids if grid.scheme in (None, scheme)])

    def _add(self, scheme: str, machine: dict[str, Any], grids: Sequence[Grid]) -> None:
        shared = machine | {"scheme": scheme, "seed": 0, "validation": self.fraction}
        base = resolve(shared, self.recipe)
        keys = [grid.key for grid in grids]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"every setting of scheme {scheme} may be tuned by one grid, got {', '.join(keys)}"
            )
        for values in itertools.product(*(grid.values(getattr(base, grid.key)) for grid in grids)):
            point = dict(zip(keys, values, strict=True))
            title = ",".join(f"{key}={value}" for key, value in point.items()) or "as-it-is"
            name = f"{scheme}/{title}"
            job = Job(
                name=name,
                scheme=scheme,
                folder=self.out / "tuning" / scheme / title,
                log=self.out / "logs" / f"{scheme},{title}.log",
                settings=resolve(shared | point, self.recipe),
                flags=shared | point,
            )
            check_settings(job)
            self.jobs.append(job)
            self._points[name] = scheme, point

    def run(self, *, jobs: int = 1, say: Callable[[str], None] = print) -> bool:
        """Make the missing runs; False if a signal came before the end. Raises RunsFailed as a comparison does."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "recipe.toml", write_tables(self.recipe))
        state = {
            "schema": SCHEMA,
            "schemes": self.schemes,
            "validation": self.fraction,
            "command": self.command,
        }
        write_text(self.out / "tune.json", json.dumps(state, indent=1) + "\n")
        rows = self.rows()

        def finished(job: Job) -> None:
            rows[job.name] = row_of(job) | {"point": self._points[job.name][1]}
            lines = (json.dumps(standard(row)) + "\n" for row in rows.values())
            write_text(self.out / "tuning.jsonl", "".join(lines))
            self._write_best(rows)
            say(f"{job.name}: validation accuracy {rows[job.name]['accuracy']:.2%}")

        missing = [job for job in self.jobs if job.name not in rows]
        self._write_best(rows)
        return run_jobs(missing, self.out / "recipe.toml", finished, parallel=jobs, say=say)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of finished runs, by name: those of `adaclip.compare.row_of`, and the point."""
        path = self.out / "tuning.jsonl"
        lines = whole_lines(path) if path.is_file() else []
        return {row["run"]: row for row in map(json.loads, lines)}

    def best(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """By scheme the row of highest accuracy among this tuning's points; the first of equals."""
        found: dict[str, Mapping[str, Any]] = {}
        for name, (scheme, _) in self._points.items():
            row = rows.get(name)
            if row is not None and (scheme not in found or row["accuracy"] > found[scheme]["accuracy"]):
                found[scheme] = row
        return found

    def _write_best(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        tables = {name: dict(table) for name, table in self.recipe.schemes.items()}
        for scheme, row in self.best(rows).items():
            tables[scheme] = tables.get(scheme, {}) | row["point"]
        # In the order of the schemes, so that a base stands before what is based on it.
        ordered = {name: tables[name] for name in SCHEMES if name in tables}
        write_text(self.out / "tuned.toml", write_tables(Tables(self.recipe.train, ordered)))
