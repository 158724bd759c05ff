"""Plots: a run folder's, from the rows of metrics.jsonl, comparisons, and privacy curves. Public numbers only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from adaclip.files import replace_file

__all__ = ["plot_comparison", "plot_privacy", "plot_run"]

# Told apart without color vision too: eight colors (Okabe, Ito 2008, with a gray) by four dashes.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DASHES = ("-", "--", ":", "-.")


def plot_run(folder: Path, rows: Sequence[Mapping[str, Any]], *, split: str) -> list[Path]:
    """Write accuracy_epsilon.png and clipping_norm.png into `folder`.

    Args:
        rows: evaluations with step, <split>_accuracy, epsilon (a float or "inf"), delta, max_grad_norm.
        split: "test" or "validation".

    Returns:
        the files written; none without rows.
    """
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    accuracy, privacy = folder / "accuracy_epsilon.png", folder / "clipping_norm.png"

    # Two panels over one axis of steps: two scales in one panel would invite reading a crossing.
    figure, (top, bottom) = _figure(2)
    _line(top, steps, [row[f"{split}_accuracy"] for row in rows], f"{split} accuracy")
    top.yaxis.set_major_formatter(PercentFormatter(1.0))
    epsilons = [math.nan if row["epsilon"] == "inf" else row["epsilon"] for row in rows]
    _line(bottom, steps, epsilons, f"ε at δ = {rows[-1]['delta']:g}")
    if all(math.isnan(epsilon) for epsilon in epsilons):
        _say_infinite(bottom)
    else:
        bottom.set_ylim(bottom=0)
    _save(figure, accuracy)

    figure, (axes,) = _figure(1)
    norms = [row["max_grad_norm"] for row in rows]
    _line(axes, steps, norms, "clipping norm C")
    axes.set_ylim(0, 1.25 * max(norms))
    _save(figure, privacy)
    return [accuracy, privacy]


def plot_comparison(
    path: Path, curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, split: str
) -> None:
    """Write accuracy over steps, mean and band of one standard deviation over the runs, as a PNG to `path`.

    Args:
        curves: by label, the evaluations of its runs, each with step and <split>_accuracy. Steps that not all runs of
            a label have are left out.
        split: "test" or "validation".

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, (label, runs) in enumerate(curves.items()):
        by_step = [{row["step"]: row[f"{split}_accuracy"] for row in run} for run in runs]
        steps = sorted(set.intersection(*(set(each) for each in by_step)))
        values = [[each[step] for each in by_step] for step in steps]
        means = [statistics.fmean(each) for each in values]
        style = {"color": _COLORS[at % len(_COLORS)], "linestyle": _DASHES[at // len(_COLORS) % len(_DASHES)]}
        axes.plot(steps, means, label=label, linewidth=1.5, **style)
        if len(runs) > 1:
            spread = [statistics.stdev(each) for each in values]
            low = [mean - s for mean, s in zip(means, spread, strict=True)]
            high = [mean + s for mean, s in zip(means, spread, strict=True)]
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _dress(axes, f"{split} accuracy")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    _save(figure, path)


def plot_privacy(
    path: Path,
    deltas: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    rdp: Sequence[float],
    approximation: Sequence[float] | None,
) -> None:
    """Write the curve of ε over δ, a PNG, to `path`.

    Args:
        deltas: ascending, in (0, 1).
        lower, upper: certified bounds on ε at each δ; inf where there is no noise.
        rdp: the RDP accountant's upper bounds.
        approximation: the central limit figures, marked as no guarantee; None leaves them out.

    Raises:
        OSError: the file cannot be written.
    """
    figure, (axes,) = _figure(1, "δ")
    drawn = [
        (rdp, "RDP, upper bound", {"color": "#D55E00", "linestyle": "--"}),
        (upper, "upper bound", {"color": "#0072B2"}),
        (lower, "lower bound", {"color": "#009E73", "linestyle": ":"}),
    ]
    if approximation is not None:
        drawn.append(
            (approximation, "GDP (approximation, no guarantee)", {"color": "0.5", "linestyle": "-."})
        )
    finite = False
    for values, label, style in drawn:
        shown = [value if math.isfinite(value) else math.nan for value in values]
        finite = finite or not all(math.isnan(value) for value in shown)
        axes.plot(deltas, shown, label=label, linewidth=1.5, **style)
    axes.set_xscale("log")
    _dress(axes, "ε")
    if finite:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    else:
        _say_infinite(axes)
    _save(figure, path)


def _figure(panels: int, xlabel: str = "step") -> tuple[Figure, Sequence[Axes]]:
    # Not pyplot: it keeps global state, and picks a backend that may want a display.
    figure = Figure(figsize=(6.4, 2.0 + 2.0 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    axes[-1].set_xlabel(xlabel)
    return figure, axes


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.plot(steps, values, color="#0072B2", marker="o", markersize=3, linewidth=1.5)
    _dress(axes, label)


def _say_infinite(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no noise: ε is infinite", ha="center", va="center", transform=axes.transAxes)


def _dress(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    # The old plot or the new one: an interrupted run may be interrupted again.
    replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))
