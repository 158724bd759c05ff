"""Counts over the samples of a batch, on the device: `adaclip.clip_ops.sample_statistics`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant

__all__ = ["sample_statistics"]

_BLOCK = 512


@triton.jit(do_not_specialize=["real"])
def _sample_statistics(
    sqnorms,
    thresholds,
    groups,
    rows,
    real,
    unit: tl.float64,
    below,
    edges,
    histogram,
    bins,
    labels,
    table,
    classes,
    shares,
    group_sums,
    group_counts,
    label_groups,
    REAL_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each number that is added to: below first, then histogram, group_sums, group_counts."""
    samples = tl.load(real) if REAL_ON_DEVICE else real
    below_end = 0
    if below is not None:
        below_end += groups
    bins_end = below_end
    if histogram is not None:
        bins_end += bins
    sums_end = bins_end
    if group_sums is not None:
        sums_end += label_groups
    which = tl.program_id(0)
    acc = tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = (row < rows) & (row < samples)
        live = inside
        total = tl.zeros([BLOCK], tl.float64)
        at = sqnorms + row
        for _ in range(0, groups):
            sqnorm = tl.load(at, mask=inside, other=0.0)
            at += rows
            total += sqnorm
            live = live & (sqnorm >= 0.0) & (sqnorm < float("inf"))
        value = tl.zeros([BLOCK], tl.float64)
        if below is not None and which < below_end:
            own = tl.load(sqnorms + which.to(tl.int64) * rows + row, mask=live, other=0.0)
            reached = tl.sqrt(own) * unit <= tl.load(thresholds + which)
            value = tl.where(reached, 0.5, -0.5).to(tl.float64)
        if histogram is not None and (which >= below_end) & (which < bins_end):
            bin = which - below_end
            norm = tl.sqrt(total) * unit
            # The first and the last bin are open.
            lower = tl.load(edges + bin - 1, mask=bin > 0, other=float("-inf"))
            upper = tl.load(edges + bin, mask=bin < bins - 1, other=float("inf"))
            value = ((norm > lower) & (norm <= upper)).to(tl.float64)
        if labels is not None and which >= bins_end:
            label = tl.load(labels + row, mask=live, other=-1)
            known = live & (label >= 0) & (label < classes)
            group = tl.load(table + label, mask=known, other=-1)
            if group_sums is not None and which < sums_end:
                member = known & (group == which - bins_end)
                value = tl.load(shares + row, mask=member, other=0.0)
            if group_counts is not None and which >= sums_end:
                value = (known & (group == which - sums_end)).to(tl.float64)
        acc += tl.where(live, value, 0.0)
    added = tl.sum(acc, 0)
    if below is not None and which < below_end:
        tl.store(below + which, tl.load(below + which) + added)
    if histogram is not None and (which >= below_end) & (which < bins_end):
        bin_at = histogram + which - below_end
        tl.store(bin_at, tl.load(bin_at) + added)
    if group_sums is not None and (which >= bins_end) & (which < sums_end):
        sum_at = group_sums + which - bins_end
        tl.store(sum_at, tl.load(sum_at) + added)
    if group_counts is not None and which >= sums_end:
        count_at = group_counts + which - sums_end
        tl.store(count_at, tl.load(count_at) + added)


def sample_statistics(
    sqnorms: Tensor,
    thresholds: Tensor,
    *,
    unit: float,
    real: int | Tensor,
    shares: Tensor | None = None,
    below: Tensor | None = None,
    edges: Tensor | None = None,
    histogram: Tensor | None = None,
    labels: Tensor | None = None,
    table: Tensor | None = None,
    group_sums: Tensor | None = None,
    group_counts: Tensor | None = None,
) -> None:
    """Adds what the samples contribute to below [K], histogram [M], group_sums [G], group_counts [G], in place.

    As `adaclip.clip_ops.sample_statistics`: sqnorms float64 [K, B], thresholds float64 [K], shares float64 [B], edges
    float64 [M-1], labels int64 [B], table int64 [classes]; all contiguous. `real` as in `clip_factors`. A label
    outside of the table, or one whose group is outside of [0, G), belongs to no group.

    Every number is added up by one program, in an order that depends on B alone; counts are exact.
    """
    groups, rows = sqnorms.shape
    bins = 0 if histogram is None else histogram.numel()
    label_groups = next((t.numel() for t in (group_sums, group_counts) if t is not None), 0)
    numbers = (below, histogram, group_sums, group_counts)
    programs = sum(t.numel() for t in numbers if t is not None)
    if rows == 0 or programs == 0:
        return
    _sample_statistics[(programs,)](
        *(sqnorms, thresholds, groups, rows, real, float(unit)),
        *(below, edges, histogram, bins),
        *(labels, table, 0 if table is None else table.numel(), shares),
        *(group_sums, group_counts, label_groups),
        REAL_ON_DEVICE=isinstance(real, Tensor),
        BLOCK=_BLOCK,
        num_warps=4,
    )


def aot() -> list[Variant]:
    pairs = {
        "below": {"below": "*fp64"},
        "histogram": {"edges": "*fp64", "histogram": "*fp64"},
        "groups": {
            **dict.fromkeys(("labels", "table"), "*i64"),
            **dict.fromkeys(("shares", "group_sums", "group_counts"), "*fp64"),
        },
    }
    everything = {name: kind for pair in pairs.values() for name, kind in pair.items()}
    made = []
    for label, given in {**pairs, "all": everything}.items():
        signature = {
            **dict.fromkeys(("sqnorms", "thresholds"), "*fp64"),
            **dict.fromkeys(("groups", "rows", "bins", "classes", "label_groups"), "i32"),
            **{"real": "*i64" if label == "all" else "i32", "unit": "fp64"},
            **given,
        }
        missing = dict.fromkeys(everything.keys() - given.keys())
        constants = {"REAL_ON_DEVICE": label == "all", "BLOCK": _BLOCK, **missing}
        made.append(Variant(_sample_statistics, signature, constants, label=label))
    return made
