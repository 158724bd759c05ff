"""The clipped sum of per-sample gradients that exist in memory, with its noise: one pass over them.

`noisy_sum` of csrc/core/clip_and_sum.h on a GPU. Its normals have the CPU's bits; its sum is kept in float64, where
the CPU's is in float32, and so is the nearer one to the exact sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .normal import CHUNK_BLOCKS, CHUNK_NORMALS, element, normals
from .normal_fill import signed_stream

if TYPE_CHECKING:
    from torch import Tensor

    from .aot import Variant

__all__ = ["noisy_sum"]

_WARPS = 8
_WIDE = {"ROWS": 1, "LANES": 256}  # a thread has ten columns, and takes the rows one after the other
_NARROW = {"ROWS": 32, "LANES": 16}  # few columns: the rows of a program's one chunk are taken in parallel
# Columns. From here on wide programs, of 2560 each, are twice as many as a large GPU has multiprocessors.
_NARROW_BELOW = 2560 * 256


@triton.jit
def _add(total, x, weights, taken, left, row: tl.constexpr, LANES: tl.constexpr):
    """total [ROWS, LANES] plus weights times the columns of that row of normals; x [ROWS, 1] points at rows."""
    i = element(row, LANES)[None, :]
    # The product is exact in float64: two significands of 24 bits.
    return total + weights * tl.load(x + i, mask=taken & (i < left), other=0.0).to(tl.float64)


@triton.jit
def _finish(total, out, left, std, z, denominator, row: tl.constexpr, LANES: tl.constexpr):
    i = element(row, LANES)
    value = tl.sum(total, axis=0).to(tl.float32)
    value = tl.where(std != 0.0, value + std * z, value)
    tl.store(out + i, tl.math.div_rn(value, tl.zeros_like(value) + denominator), mask=i < left)


@triton.jit(do_not_specialize=["stream", "one", "first_chunk", "batch", "n"])
def _noisy_sum(
    key,
    step,
    stream,
    one,
    x,
    factors,
    out,
    batch,
    n,
    first_chunk,
    std,
    denominator,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64) * (LANES // CHUNK_BLOCKS)
    at = chunk * CHUNK_NORMALS
    left = n - at
    b = tl.arange(0, ROWS)[:, None].to(tl.int64)
    zero = tl.zeros([ROWS, LANES], tl.float64)
    t0, t1, t2, t3, t4 = zero, zero, zero, zero, zero
    t5, t6, t7, t8, t9 = zero, zero, zero, zero, zero
    first = 0
    while first < batch:
        weights = tl.load(factors + first + b, mask=first + b < batch, other=0.0)
        taken = weights != 0.0  # a row of weight 0 is not read: it may hold nan
        weights = weights.to(tl.float64)
        rows = x + (first + b) * n + at
        t0 = _add(t0, rows, weights, taken, left, 0, LANES)
        t1 = _add(t1, rows, weights, taken, left, 1, LANES)
        t2 = _add(t2, rows, weights, taken, left, 2, LANES)
        t3 = _add(t3, rows, weights, taken, left, 3, LANES)
        t4 = _add(t4, rows, weights, taken, left, 4, LANES)
        t5 = _add(t5, rows, weights, taken, left, 5, LANES)
        t6 = _add(t6, rows, weights, taken, left, 6, LANES)
        t7 = _add(t7, rows, weights, taken, left, 7, LANES)
        t8 = _add(t8, rows, weights, taken, left, 8, LANES)
        t9 = _add(t9, rows, weights, taken, left, 9, LANES)
        first += ROWS
    totals = t0, t1, t2, t3, t4, t5, t6, t7, t8, t9

    scale = tl.load(std)
    none = tl.zeros([LANES], tl.float32)
    z = none, none, none, none, none, none, none, none, none, none
    if scale != 0.0:
        z = normals(key, step, stream, one, first_chunk + chunk, LANES)
    for row in tl.static_range(10):
        _finish(totals[row], out + at, left, scale, z[row], denominator, row, LANES)


def noisy_sum(
    key: Tensor,
    step: Tensor,
    stream: int,
    x: Tensor,
    factors: Tensor,
    out: Tensor,
    first_chunk: int,
    std: Tensor,
    denominator: float,
) -> None:
    """out[i] = (sum_b factors[b] x[b, i] + std z[i]) / denominator, in one pass over x.

    key int32 [8], step int64 [1] (their bits: unsigned), std float32 [1]: read on the device. stream: 0 to 2^32 - 1.
    x [B, n] contiguous, float32, bfloat16 or float16; factors float32 [B]; out float32 [n], written. z[i] is normal
    i % 160 of chunk first_chunk + i // 160, bit for bit the CPU's; where std is 0 no noise is made. A row whose
    factor is 0 is not read: it may hold nan or inf. The caller keeps first_chunk + ceil(n / 160) within the stream's
    2^28 chunks, and denominator above 0.

    Rows are added in float64, in an order that only B and n set, and rounded to float32 once: before that one
    rounding the sum is off by at most B 2^-53 sum_b |factors[b] x[b, i]|.
    """
    batch, n = x.shape
    if n == 0:
        return
    way = _NARROW if n < _NARROW_BELOW else _WIDE
    grid = (triton.cdiv(n, way["LANES"] // 16 * 160),)
    where = key, step, signed_stream(stream), 1
    numbers = batch, n, first_chunk, std, float(denominator)
    _noisy_sum[grid](*where, x, factors, out, *numbers, **way, num_warps=_WARPS, enable_fp_fusion=False)


def aot() -> list[Variant]:
    from .aot import Variant

    def signature(dtype: str) -> dict[str, str]:
        return {
            "key": "*i32",
            "step": "*i64",
            "stream": "i32",
            "one": "i32",
            "x": dtype,
            "factors": "*fp32",
            "out": "*fp32",
            "batch": "i32",
            "n": "i64",
            "first_chunk": "i32",
            "std": "*fp32",
            "denominator": "fp32",
        }

    return [
        Variant(
            _noisy_sum,
            signature(dtype),
            dict(way),
            num_warps=_WARPS,
            hot=True,
            label=f"{name} {dtype[1:]}",
            options={"enable_fp_fusion": False},
        )
        for name, way in (("wide", _WIDE), ("narrow", _NARROW))
        for dtype in ("*fp32", "*bf16")
    ]
