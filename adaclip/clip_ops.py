"""From per-sample norms to factors, statistics and thresholds: `adaclip.ops` for [K, B] numbers.

These run once a backward or once a step, outside of graphs, in float64, and never read a value back to the
host from a device. K groups of parameters, B rows of a physical batch of which the first `real` are samples
and the others padding.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from adaclip.backends import check_backend, implementation

__all__ = ["clip_factors", "follow_quantile", "sample_statistics"]

_KINDS = ("threshold", "normalized", "psac")


class Rule(Protocol):
    """How a norm becomes a factor: `adaclip.clipping.Rule`."""

    kind: str
    stability: float


@torch.no_grad()
def clip_factors(
    sqnorms: Tensor,
    thresholds: Tensor,
    rule: Rule,
    *,
    unit: float,
    denominator: float,
    real: int | Tensor,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What each sample's gradient is multiplied by, from its squared norms.

    Args:
        sqnorms: float64 [K, B], upper bounds on the squared norms of the gradients as autograd made them.
        thresholds: float64 [K], C_k > 0.
        rule: with n_k = unit sqrt(sqnorm_k) and weight w, kind "threshold" gives c_k = min(w, C_k / n_k),
          "normalized" w C_k / (n_k + s), "psac" w C_k / (n_k + s / (n_k + s)); s is its `stability`, > 0.
        unit: what autograd's gradients lack: B for a mean loss.
        denominator: of the released sum, the public q N.
        real: how many of the B rows are samples. It may be an int64 tensor [1] on the device of the norms, which is
          read there when the operation runs, and so by every replay of a captured graph; on a GPU it is not checked.
        weights: float64 [B] in [0, 1]; None: 1 each. Above 1 counts as 1, nan as 0.

    Returns:
        factors float32 [K, B], c_k unit / denominator; norms float64 [B], over all K; shares float64 [B], the norm
        of the contribution at weight 1 in units of the largest possible, in [0, 1].

    Padding and samples with a norm that is not finite in any group have factor 0 everywhere and share nan.

    Guarantee: c_k |g_k| <= C_k (1 + 2^-20) for the float32 arithmetic that follows, for every w <= 1. For a rule
    whose factor falls or rises with n this needs only sqnorm_k >= |g_k|^2 / unit^2: |g| c(n) <= n c(n) <= C.

    Raises:
        ValueError: shapes that do not fit, real outside [0, B], an unknown kind, numbers out of range.
    """
    _, rows, real = _check(sqnorms, thresholds, unit, real, backend)
    if rule.kind not in _KINDS:
        raise ValueError(f"rule.kind must be one of {_KINDS}, got {rule.kind!r}")
    if rule.kind != "threshold" and not 0.0 < rule.stability < math.inf:
        raise ValueError(f"rule.stability must be a positive finite number, got {rule.stability!r}")
    _positive("denominator", denominator)
    if weights is not None and weights.shape != (rows,):
        raise ValueError(f"weights must be [{rows}], got {tuple(weights.shape)}")
    given = [t for t in (sqnorms, thresholds, weights) if t is not None]
    numbers = {"unit": unit, "denominator": denominator, "real": real, "weights": weights}
    run = implementation("clip_factors", backend, *given)
    return run(sqnorms, thresholds, rule.kind, rule.stability, **numbers)


@torch.no_grad()
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
    backend: str = "auto",
) -> None:
    """Add what the samples contribute to the sums that are released beside the gradient, in place.

    Args:
        sqnorms, thresholds, unit, real, backend: as in `clip_factors`.
        shares: float64 [B] from `clip_factors`; needed for group_sums.
        below: float64 [K] += 1[n_k <= C_k] - 1/2, of norm sqrt(K)/2 a sample.
        edges: float64 [M-1], ascending, with histogram.
        histogram: float64 [M] += 1 at the first bin m with n <= edges[m], the last one open; n over all K.
        labels: int64 [B], with table; those of padding are not looked at.
        table: int64 [classes], the group of each label, each in [0, G).
        group_sums: float64 [G] += the sample's share at its group.
        group_counts: float64 [G] += 1 at its group.

    A sample with a norm that is not finite contributes nothing to any of them. The sums are tensors that the
    caller owns, contiguous; their version counters move.

    Raises:
        ValueError, before anything is added: shapes that do not fit, one of a pair missing, a label outside the
        table (on the CPU; on a device such a sample belongs to no group).
    """
    groups, rows, real = _check(sqnorms, thresholds, unit, real, backend)
    _check_counts(groups, rows, shares, below, edges, histogram, labels, table, group_sums, group_counts)
    if labels is not None and labels.device.type == "cpu" and real:
        low, high = (int(v) for v in labels[:real].aminmax())
        if low < 0 or high >= len(table):
            raise ValueError(
                f"labels must be in [0, {len(table)}), the classes that have a group, got labels from {low} to {high}"
            )
    outputs = [t for t in (below, histogram, group_sums, group_counts) if t is not None]
    doubles = [t for t in (sqnorms, thresholds, shares, edges, *outputs) if t is not None]
    implementation("sample_statistics", backend, *doubles)(
        *(sqnorms, thresholds),
        unit=unit,
        real=real,
        shares=shares,
        below=below,
        edges=edges,
        histogram=histogram,
        labels=labels,
        table=table,
        group_sums=group_sums,
        group_counts=group_counts,
    )


@torch.no_grad()
def follow_quantile(
    thresholds: Tensor,
    run: Tensor,
    noisy_below: Tensor,
    *,
    low: Tensor,
    high: Tensor,
    denominator: float,
    quantile: float,
    rate: float,
    accelerate: bool,
    backend: str = "auto",
) -> None:
    """Move thresholds towards a quantile of the norms, in place (Andrew et al. 2021, arXiv 1905.03871).

    With b = 1/2 + noisy_below / denominator: C *= exp(-rate f (b - quantile)), kept in [low, high].

    Args:
        thresholds, low, high: float64 [K], 0 < low <= high.
        run: float64 [K], how many steps in a row were saturated, negative where thresholds rise; state of
          `accelerate`, otherwise left alone.
        noisy_below: float64 [K], noise plus the sum over the batch of 1[n_k <= C_k] - 1/2.
        denominator: q N. quantile in (0, 1), rate > 0.
        accelerate: f = min(2^max(0, |run| - 2), 8), where a step is saturated if b - quantile is beyond 3/4 of
          what it can be without noise (1 - quantile above, -quantile below); False: f = 1.

    Raises:
        ValueError: shapes that do not fit, numbers out of range.
    """
    check_backend(backend)
    tensors = {"run": run, "noisy_below": noisy_below, "low": low, "high": high}
    for name, t in tensors.items():
        if t.shape != thresholds.shape or t.dim() != 1:
            raise ValueError(f"{name} must be [{thresholds.numel()}], got {tuple(t.shape)}")
    _positive("denominator", denominator)
    _positive("rate", rate)
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile must be in (0, 1), got {quantile!r}")
    for name, t in (("thresholds", thresholds), ("run", run)):
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    implementation("follow_quantile", backend, thresholds, *tensors.values())(
        *(thresholds, run, noisy_below, low, high), denominator, quantile, rate, accelerate
    )


def _check(
    sqnorms: Tensor, thresholds: Tensor, unit: float, real: int | Tensor, backend: str
) -> tuple[int, int, int | Tensor]:
    """(K, B, real), where `real` is a tensor only if it is on a device whose values are not read here."""
    check_backend(backend)
    if sqnorms.dim() != 2 or sqnorms.dtype != torch.float64:
        raise ValueError(f"sqnorms must be float64 [K, B], got {sqnorms.dtype} {tuple(sqnorms.shape)}")
    groups, rows = sqnorms.shape
    if thresholds.shape != (groups,):
        raise ValueError(f"thresholds must be [{groups}], one for each group, got {tuple(thresholds.shape)}")
    if isinstance(real, Tensor):
        if real.dtype != torch.int64 or real.shape != (1,) or real.device != sqnorms.device:
            raise ValueError(
                f"real must be an int, or int64 [1] on {sqnorms.device}, got {real.dtype} {list(real.shape)} on "
                f"{real.device}"
            )
        real = int(real) if real.device.type == "cpu" else real
    if not isinstance(real, Tensor) and not 0 <= real <= rows:
        raise ValueError(f"real must be in [0, {rows}], the rows there are, got {real!r}")
    _positive("unit", unit)
    return groups, rows, real


def _check_counts(groups, rows, shares, below, edges, histogram, labels, table, sums, counts) -> None:
    if (edges is None) != (histogram is None):
        raise ValueError("edges and histogram must be given together")
    if (labels is None) != (sums is None and counts is None) or (labels is None) != (table is None):
        raise ValueError("labels, table and group_sums or group_counts must be given together")
    if sums is not None and shares is None:
        raise ValueError("group_sums needs shares")
    for name, t, shape in (
        ("shares", shares, (rows,)),
        ("below", below, (groups,)),
        ("labels", labels, (rows,)),
        ("edges", edges, None if histogram is None else (len(histogram) - 1,)),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {tuple(t.shape)}")
    for name, t in (("labels", labels), ("table", table)):
        if t is not None and t.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {t.dtype}")
    if sums is not None and counts is not None and sums.shape != counts.shape:
        raise ValueError(f"group_counts must be [{sums.numel()}] like group_sums, got {tuple(counts.shape)}")
    for name, t in (
        ("below", below),
        ("histogram", histogram),
        ("group_sums", sums),
        ("group_counts", counts),
    ):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def _positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
