"""One step of thresholds that follow a quantile of the norms: state that never leaves the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant

__all__ = ["follow_quantile"]

_BLOCK = 64


@triton.jit
def _follow_quantile(
    thresholds,
    run,
    noisy_below,
    low,
    high,
    groups,
    denominator: tl.float64,
    quantile: tl.float64,
    rate: tl.float64,
    ACCELERATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < groups
    gap = tl.load(noisy_below + k, mask=inside, other=0.0) / denominator + 0.5 - quantile
    step = gap * -rate
    if ACCELERATE:
        side = tl.where(gap > 0.75 * (1.0 - quantile), 1.0, tl.where(gap < -0.75 * quantile, -1.0, 0.0))
        side = side.to(tl.float64)
        before = tl.load(run + k, mask=inside, other=0.0)
        after = tl.where(side * before > 0.0, before + side, side)
        tl.store(run + k, after, mask=inside)
        length = tl.abs(after)
        step *= tl.where(length >= 5.0, 8.0, tl.where(length >= 4.0, 4.0, tl.where(length >= 3.0, 2.0, 1.0)))
    moved = tl.load(thresholds + k, mask=inside, other=1.0) * tl.exp(step)
    least, most = tl.load(low + k, mask=inside, other=1.0), tl.load(high + k, mask=inside, other=1.0)
    # Comparisons and not minimum and maximum, which on a GPU would turn nan into a number.
    moved = tl.where(moved < least, least, moved)
    tl.store(thresholds + k, tl.where(moved > most, most, moved), mask=inside)


def follow_quantile(
    thresholds: Tensor,
    run: Tensor,
    noisy_below: Tensor,
    low: Tensor,
    high: Tensor,
    denominator: float,
    quantile: float,
    rate: float,
    accelerate: bool,
) -> None:
    """`C *= exp(-rate f (1/2 + noisy_below / denominator - quantile))` in place: see `adaclip.clip_ops`.

    All tensors float64 [K], contiguous; `run` is only touched to accelerate. In float64 throughout; exp is the
    device's, good to an ulp.
    """
    groups = thresholds.numel()
    if groups == 0:
        return
    _follow_quantile[(triton.cdiv(groups, _BLOCK),)](
        *(thresholds, run, noisy_below, low, high, groups),
        *(float(denominator), float(quantile), float(rate)),
        ACCELERATE=bool(accelerate),
        BLOCK=_BLOCK,
        num_warps=2,
    )


def aot() -> list[Variant]:
    signature = {
        **dict.fromkeys(("thresholds", "run", "noisy_below", "low", "high"), "*fp64"),
        "groups": "i32",
        **dict.fromkeys(("denominator", "quantile", "rate"), "fp64"),
    }
    return [
        Variant(_follow_quantile, signature, {"ACCELERATE": on, "BLOCK": _BLOCK}, 2, label=f"accelerate {on}")
        for on in (False, True)
    ]
