"""From per-sample norms to clipping factors, on the device: `adaclip.clip_ops.clip_factors`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant

__all__ = ["clip_factors"]

_BLOCK = 128


@triton.jit(do_not_specialize=["real"])
def _clip_factors(
    sqnorms,
    thresholds,
    weights,
    factors,
    norms,
    shares,
    groups,
    rows,
    real,
    stability: tl.float64,
    slack: tl.float64,
    unit: tl.float64,
    denominator: tl.float64,
    KIND: tl.constexpr,
    REAL_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    samples = tl.load(real) if REAL_ON_DEVICE else real
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    live = inside & (row < samples)
    total = tl.zeros([BLOCK], tl.float64)
    bound = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    at = sqnorms + row
    for k in range(0, groups):
        threshold = tl.load(thresholds + k)
        bound += threshold * threshold
        sqnorm = tl.load(at, mask=inside, other=0.0)
        at += rows
        total += sqnorm
        live = live & (sqnorm >= 0.0) & (sqnorm < float("inf"))
    if weights is not None:
        given = tl.load(weights + row, mask=inside, other=0.0)
        weight = tl.where(given > 0.0, tl.where(given < 1.0, given, 1.0), 0.0)  # nan counts as 0
    else:
        weight = tl.full([BLOCK], 1.0, tl.float64)
    length = tl.zeros([BLOCK], tl.float64)
    at, factor_at = sqnorms + row, factors + row
    for k in range(0, groups):
        limit = tl.load(thresholds + k) * slack
        sqnorm = tl.load(at, mask=live, other=0.0)
        n = tl.sqrt(sqnorm) * unit
        # Written so that n = 0 gives 1 for a threshold and a finite number for the others.
        if KIND == "threshold":
            full = tl.where(limit < n, limit / tl.where(limit < n, n, 1.0), 1.0)
            c = tl.where(weight < full, weight, full)
        else:
            full = limit / (n + stability / (n + stability)) if KIND == "psac" else limit / (n + stability)
            c = weight * full
        length += full * n * (full * n)
        factor = (c * unit / denominator).to(tl.float32)
        # A denormal factor has lost the digits that made it safe.
        factor = tl.where(live & (factor >= 2.0**-100), factor, 0.0)
        tl.store(factor_at, factor, mask=inside)
        at += rows
        factor_at += rows
    tl.store(norms + row, tl.sqrt(total) * unit, mask=inside)
    share = tl.sqrt(length / bound)
    share = tl.where(share < 1.0, share, 1.0)
    tl.store(shares + row, tl.where(live, share, float("nan")), mask=inside)


def clip_factors(
    sqnorms: Tensor,
    thresholds: Tensor,
    kind: str,
    stability: float,
    *,
    slack: float,
    unit: float,
    denominator: float,
    real: int | Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sqnorms float64 [K, B], thresholds float64 [K] -> (factors float32 [K, B], norms [B], shares [B]).

    As `adaclip.clip_ops.clip_factors`, with C_k taken as slack * C_k for the factors. Every operation is a float64 one,
    correctly rounded; the numbers reach the kernel as float64. All inputs contiguous.

    real: a number, or an int64 tensor of one element on the device, which a captured graph reads at every replay.
    """
    groups, rows = sqnorms.shape
    factors = sqnorms.new_empty(groups, rows, dtype=torch.float32)
    norms, shares = sqnorms.new_empty(rows), sqnorms.new_empty(rows)
    if rows:
        _clip_factors[(triton.cdiv(rows, _BLOCK),)](
            *(sqnorms, thresholds, weights, factors, norms, shares, groups, rows, real),
            *(float(stability), float(slack), float(unit), float(denominator)),
            KIND=kind,
            REAL_ON_DEVICE=isinstance(real, Tensor),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return factors, norms, shares


def aot() -> list[Variant]:
    made = []
    for kind, on_device in (("threshold", True), ("threshold", False), ("normalized", True), ("psac", True)):
        signature = {
            **dict.fromkeys(("sqnorms", "thresholds", "weights", "norms", "shares"), "*fp64"),
            "factors": "*fp32",
            **{"groups": "i32", "rows": "i32", "real": "*i64" if on_device else "i32"},
            **dict.fromkeys(("stability", "slack", "unit", "denominator"), "fp64"),
        }
        constants = {"KIND": kind, "REAL_ON_DEVICE": on_device, "BLOCK": _BLOCK}
        if not on_device:  # and without weights
            del signature["weights"]
            constants["weights"] = None
        label = f"{kind}, real {'on the device' if on_device else 'given'}"
        made.append(Variant(_clip_factors, signature, constants, label=label))
    return made
