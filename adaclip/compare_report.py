"""The report of a comparison: a table, a Markdown page and curves. Public numbers only."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from adaclip.plots import plot_comparison
from adaclip.runs import epsilon_text, standard, write_text
from adaclip.schemes import ABLATIONS, SCHEMES

__all__ = ["export", "summarize", "table_text", "write_report"]

_CONFIDENCE = 0.95


def write_report(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    facts: Mapping[str, Any],
    planned: Mapping[str, int],
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """Write table.json, report.md and, where there are rows, curves.png into `out`; returns the table.

    Args:
        rows: finished runs, as `compare.row_of` makes them.
        curves: the evaluations of each, by the run's name.
        facts: the config.json of one of the runs; empty without rows.
        planned: seeds by scheme, in the order of the table.
        command: the command line that made it; seconds: how long all of it took.
    """
    table = summarize(rows, facts=facts, planned=planned, command=command) | {"seconds": seconds}
    write_text(out / "table.json", json.dumps(standard(table), indent=1, allow_nan=False) + "\n")
    write_text(out / "report.md", _markdown(table))
    if rows:
        by_scheme: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
        for row in rows:
            by_scheme.setdefault(row["scheme"], []).append(curves[row["run"]])
        plot_comparison(out / "curves.png", by_scheme, split=rows[0]["split"])
    return table


def summarize(
    rows: Sequence[Mapping[str, Any]], *, facts: Mapping[str, Any], planned: Mapping[str, int], command: str
) -> dict[str, Any]:
    """The table: a row for each scheme with a finished run, and the ablations' paired differences.

    Accuracies are those of each run's last evaluation, their standard deviation that of a sample (null for one run).
    An ablation's difference is accuracy(adaptive) - accuracy(ablation), paired over the seeds that both have, with a
    95 % interval by Student's t.
    """
    schemes = [_scheme_row(name, [r for r in rows if r["scheme"] == name], n) for name, n in planned.items()]
    return {
        "command": command,
        **_shared(rows, facts),
        "rows": [row for row in schemes if row["n"]],
        "missing": {row["scheme"]: row["planned"] - row["n"] for row in schemes if row["n"] < row["planned"]},
        "ablations": _ablations(rows),
    }


def _scheme_row(name: str, runs: Sequence[Mapping[str, Any]], planned: int) -> dict[str, Any]:
    def mean(key: str) -> float:
        return statistics.fmean(float(run[key]) for run in runs)

    row: dict[str, Any] = {"scheme": name, "title": SCHEMES[name].title, "n": len(runs), "planned": planned}
    if not runs:
        return row
    accuracies = [run["accuracy"] for run in runs]
    return row | {
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "accuracies": accuracies,
        "seconds_per_epoch": mean("seconds_per_epoch"),
        "seconds": mean("seconds"),
        "max_grad_norm": mean("max_grad_norm"),
        "noise_multiplier": mean("noise_multiplier"),
        "gradient_noise_multiplier": mean("gradient_noise_multiplier"),
        # Of the runs the largest: a bound for each of them.
        "epsilon": max(float(run["epsilon"]) for run in runs),
        "steps": runs[0]["steps"],
    }


def _shared(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    if not rows:
        return {}
    train, run = facts["train"], facts["run"]
    return {
        "dataset": train["dataset"],
        "split": rows[0]["split"],
        "training_images": run["dataset_size"],
        "evaluation_images": run["evaluated_on"]["size"],
        "duplicates_removed": run["duplicates_removed"],
        "model": train["model"],
        "model_option": train["model_option"],
        "trained_parameters": run["trained_parameters"],
        "batch_size": train["batch_size"],
        "steps": run["steps"],
        "delta": train["delta"],
        "adjacency": train["adjacency"],
        "device": run["device"],
        "threads": run["threads"],
        "versions": facts["versions"],
    }


def _ablations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def by_seed(scheme: str) -> dict[int, float]:
        return {row["seed"]: row["accuracy"] for row in rows if row["scheme"] == scheme}

    whole, found = by_seed("adaptive"), []
    for name in ABLATIONS:
        part = by_seed(name)
        differences = [whole[seed] - part[seed] for seed in sorted(whole.keys() & part.keys())]
        if not differences:
            continue
        n, mean, half = len(differences), statistics.fmean(differences), None
        if n > 1:
            quantile = float(stdtrit(n - 1, 0.5 + _CONFIDENCE / 2))
            half = quantile * statistics.stdev(differences) / math.sqrt(n)
        found.append(
            {"scheme": name, "title": SCHEMES[name].title, "n": n, "difference": mean, "half_width": half}
        )
    return found


def export(out: Path, prefix: Path) -> list[Path]:
    """Copy a written report to PREFIX.md, PREFIX.json and (if it is there) PREFIX.png; returns the files."""
    made = []
    text = (out / "report.md").read_text(encoding="utf-8").replace("(curves.png)", f"({prefix.name}.png)")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        (".md", text.encode()),
        (".json", (out / "table.json").read_bytes()),
        (".png", (out / "curves.png").read_bytes() if (out / "curves.png").exists() else None),
    ):
        if content is not None:
            # Not with_suffix: a prefix may have dots.
            path = prefix.with_name(prefix.name + suffix)
            path.write_bytes(content)
            made.append(path)
    return made


# --- text -------------------------------------------------------------------------------------------------------

_COLUMNS = ("scheme", "runs", "accuracy", "s/epoch", "final C", "σ_tot", "σ_g", "ε ≤")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
    return (
        row["scheme"],
        str(row["n"]),
        f"{100 * row['accuracy_mean']:.2f}{spread} %",
        f"{row['seconds_per_epoch']:.1f}",
        f"{row['max_grad_norm']:.3g}",
        f"{row['noise_multiplier']:.4g}",
        f"{row['gradient_noise_multiplier']:.4g}",
        epsilon_text(row["epsilon"]),
    )


def table_text(table: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    lines = [_COLUMNS, *(_cells(row) for row in table["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _markdown(table: Mapping[str, Any]) -> str:
    if not table["rows"]:
        return "# Comparison\n\nNo run is finished yet.\n"
    lines = [f"# Comparison on {table['dataset']}", "", *_setting_lines(table), ""]
    lines += _markdown_table(
        (*_COLUMNS, "what it is"), [(*_cells(row), row["title"]) for row in table["rows"]]
    )
    lines += [
        "",
        "accuracy: mean ± sample standard deviation over the runs, of the last evaluation of each; seeds decide "
        "initial weights, everything else is drawn anew. s/epoch: training alone. final C: the norm that clipped the "
        "last step. σ_tot: noise multiplier of all that a step releases, the one accounted for; σ_g: what is left for "
        "the gradient. ε: the accountant's upper bound, rounded up.",
        "",
        "![accuracy over steps](curves.png)",
    ]
    if table["missing"]:
        missing = ", ".join(f"{name} ({n})" for name, n in table["missing"].items())
        lines += ["", f"Not finished: {missing}."]
    if table["ablations"]:
        lines += ["", "## What each step contributes", ""]
        lines += _markdown_table(
            ("ablation", "runs", "adaptive is better by (points)", "95 % interval", "verdict"),
            [_ablation_cells(row) for row in table["ablations"]],
        )
        lines += [
            "",
            "Differences are paired by seed. Few runs give wide intervals: “not distinguishable” is no proof that a "
            "step does nothing.",
        ]
    lines += ["", "## What the ε does not cover", ""]
    lines += [
        "Choosing hyper-parameters: learning rates, norms and the like were chosen by looking at runs on these data or "
        "on part of them, and that choice is not accounted for.",
    ]
    if table["command"]:
        lines += ["", "## Command", "", f"    {table['command']}"]
        lines += ["", f"All of it took {table['seconds'] / 60:.1f} minutes."]
    return "\n".join(lines) + "\n"


def _setting_lines(table: Mapping[str, Any]) -> list[str]:
    option = json.dumps(table["model_option"]) if table["model_option"] else ""
    removed = table["duplicates_removed"]
    lines = [
        f"* data: {table['training_images']:,} training images, evaluated on {table['evaluation_images']:,} "
        f"{table['split']} images"
        + (f" ({removed:,} more left out, which equal a training image)" if removed else ""),
        f"* model: {table['model']} {option}".rstrip() + f", {table['trained_parameters']:,} parameters",
        f"* length: {table['steps']:,} steps, expected batch {table['batch_size']:,}",
        f"* privacy: δ = {table['delta']:g}, adjacency {table['adjacency']}",
        f"* machine: {table['device']}, {table['threads']} threads a run; adaclip {table['versions']['adaclip']}, "
        f"torch {table['versions']['torch']}",
    ]
    return lines


def _ablation_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    points = 100 * row["difference"]
    if row["half_width"] is None:
        return row["title"], str(row["n"]), f"{points:+.2f}", "-", "one run: no verdict"
    half = 100 * row["half_width"]
    verdict = "not distinguishable"
    if abs(points) > half:
        verdict = "the step helps" if points > 0 else "the step hurts"
    return (
        row["title"],
        str(row["n"]),
        f"{points:+.2f}",
        f"{points - half:+.2f} … {points + half:+.2f}",
        verdict,
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
