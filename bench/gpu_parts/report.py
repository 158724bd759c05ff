"""What `bench.gpu` has found so far, as JSON and as a Markdown table; both are replaced after every measurement."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Report"]

RESULTS = Path(__file__).parents[1] / "results"
"""Where measurements live. Those of a dry run never do."""


class Report:
    """Results in the order they came, each a plain dict with "id", "section" and "status".

    status: "ok"; "red" (its correctness gate failed: it was not timed), "oom" (no memory for any part of it), "failed",
    "not available", "cut off" (it ran past its limit), or "not reached" (the budget was spent before).
    """

    def __init__(self, folder: Path, dry_run: bool, settings: dict[str, Any]) -> None:
        self.environment: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.path: Path | None = None
        self._folder, self._dry_run, self._settings = folder, dry_run, settings

    def begin(self, environment: dict[str, Any]) -> None:
        """Name the files after the GPU, and write them for the first time."""
        self.environment = environment
        name = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower().removeprefix("nvidia")).strip("-")
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"gpu-{name}-{time.strftime('%Y-%m-%d')}"
        # A second run of a day leaves the first one's results alone.
        numbers = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
        paths = (self._folder / f"{stem}{number}.json" for number in numbers)
        self.path = next(path for path in paths if not path.exists())
        self.write()

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self.write()

    @property
    def checks_failed(self) -> bool:
        """Whether a test has failed on the device: then no ratio is told."""
        return any(r["section"] == "checks" and r["status"] == "failed" for r in self.results)

    def told(self) -> list[dict[str, Any]]:
        """The results as they may be told: none is a comparison unless every gate is green."""
        return [_without_ratios(r) if self.checks_failed else r for r in self.results]

    def write(self) -> None:
        content = {
            "dry_run": self._dry_run,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "environment": self.environment,
            "settings": self._settings,
            "checks_failed": self.checks_failed,
            "results": self.told(),
        }
        _replace(self.path, json.dumps(content, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        env = self.environment
        title = f"# {'Dry run on ' if self._dry_run else ''}{env['gpu']}, {time.strftime('%Y-%m-%d')}"
        versions = ", ".join(
            f"{k} {env[k]}" for k in ("driver", "torch", "cuda", "triton", "python", "commit")
        )
        parts = [title, versions]
        if self._dry_run:
            parts.append("**Dry run: toy sizes on the CPU. Nothing here is a measurement of anything.**")
        if self.checks_failed:
            parts.append(
                "**Tests failed on this device. Times are given for diagnosis; ratios are withheld.**"
            )
        results = self.told()
        for section, lines in (
            ("checks", _checks),
            ("steps", _steps),
            ("kernels", _kernels),
            ("peers", _steps),
        ):
            mine = [r for r in results if r["section"] == section]
            done = [r for r in mine if r["status"] in ("ok", "failed", "red") or "rows" in r]
            if done:
                parts += [f"## {section.capitalize()}", "\n".join(lines(done))]
        missing = [r for r in results if r["status"] != "ok"]
        if missing:
            told = [f"- {r['id']}: {r['status']}{_because(r)}" for r in missing]
            parts += ["## Not measured, or not right", "\n".join(told)]
        return "\n\n".join(parts) + "\n"


def _because(result: dict[str, Any]) -> str:
    why = result.get("why")
    return f" ({why.splitlines()[-1][:200]})" if why else ""


def _without_ratios(result: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {k: v for k, v in row.items() if not re.search("ratio|fraction", k)} for row in result.get("rows", ())
    ]
    return {**result, "rows": rows} if "rows" in result else result


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader, or whoever kills us, never meets half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)


# --- the tables


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _number(value: float | None, form: str = ".3g", missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def _checks(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for r in results:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in r.get("counts", {}).items())
        lines += [
            f"{r['status']}: {counts or 'no test was run'}",
            *(f"- {name}" for name in r.get("failed", ())),
        ]
    return lines


def _steps(results: list[dict[str, Any]]) -> list[str]:
    header = [
        "model",
        "B",
        "precision",
        "step",
        "ms",
        "samples/s",
        "ratio (quartiles)",
        "peak MiB",
        "memory ratio",
        "error",
    ]
    rows = []
    for r in results:
        for row in r.get("rows", ()):
            ratio = _number(row.get("ratio"), ".3f")
            if "ratio_quartiles" in row:
                ratio += " ({:.3f} to {:.3f})".format(*row["ratio_quartiles"])
            ms = _number(row["ms"]) if row["status"] == "ok" else row["status"]
            peak = row.get("peak_bytes")
            rows.append(
                [
                    *(r["model"], str(r["batch_size"]), r["precision"], row["name"], ms),
                    _number(row.get("samples_per_second"), ",.0f"),
                    ratio,
                    _number(None if peak is None else peak / 2**20, ",.0f"),
                    _number(row.get("memory_ratio"), ".3f"),
                    _number(row.get("error"), ".1e"),
                ]
            )
    return [
        "Ratios are to the first step of each group, pair by pair; error: of the clipped sum, relative to float64.",
        "",
        *_table(header, rows),
    ]


def _kernels(results: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            *(row["what"], row["way"], _number(row.get("us"), ".1f", row["status"])),
            _number(row.get("floor_us"), ".1f"),
            _number(row.get("fraction_of_floor"), ".0%"),
            row.get("limit", "-"),
        ]
        for r in results
        for row in r.get("rows", ())
    ]
    return _table(["what", "way", "us", "floor us", "of the floor", "the floor is of"], rows)
