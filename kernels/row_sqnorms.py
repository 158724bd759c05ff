"""Squared norms of rows: what clips gradients that exist in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant

__all__ = ["row_sqnorms"]

# What one block reads of a row. A constant, so that a row's bits depend on its length alone, and small enough
# for a few long rows to keep a GPU busy.
_SEGMENT = 16384
_BLOCK = 1024

# See `row_sqnorms`: what a sum is multiplied by to be an upper bound.
_GROWTH = 1 + 2.0**-30


@triton.jit
def _segment_sqnorms(
    x, out, width, stride, segments, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, GROWTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) // segments
    first = tl.program_id(0).to(tl.int64) % segments * SEGMENT
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tl.minimum(SEGMENT, width - first).to(tl.int32), BLOCK):
        column = first + start + lanes
        value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float64)
        acc += value * value
    tl.store(out + tl.program_id(0), tl.sum(acc, 0) * GROWTH)


@triton.jit
def _add_segments(parts, out, segments, BLOCK: tl.constexpr, GROWTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, segments, BLOCK):
        column = start + lanes
        acc += tl.load(parts + row * segments + column, mask=column < segments, other=0.0)
    tl.store(out + row, tl.sum(acc, 0) * GROWTH)


def row_sqnorms(x: Tensor) -> Tensor:
    """x [B, n] -> float64 [B]: upper bounds on the rows' squared norms, at most 1 + 2^-20 times them.

    x: float32, bfloat16 or float16; contiguous rows, any distance apart. A row that is not finite gives inf or nan and
    touches no other. Bits depend on the row alone.

    The bound: products of float32 are exact in float64, and neither overflow nor underflow there. A value passes
    through at most d = 16 + 10 additions in its segment and ceil(n / 2^24) + 10 over the segments, each with a
    relative error up to u = 2^-53, so a computed sum is at least (1 - d u) times the exact one. For n < 2^44 that
    is above 1 - 2^-31 for either sum; multiplied by 1 + 2^-30, and rounded, each is an upper bound of what it
    adds, and both together are within (1 + 2^-29)^2.
    """
    rows, width = x.shape
    if rows == 0 or width == 0:
        return x.new_zeros(rows, dtype=torch.float64)
    segments = triton.cdiv(width, _SEGMENT)
    parts = x.new_empty(rows * segments, dtype=torch.float64)
    block = min(_BLOCK, triton.next_power_of_2(width))
    _segment_sqnorms[(rows * segments,)](
        *(x, parts, width, x.stride(0), segments),
        SEGMENT=_SEGMENT,
        BLOCK=block,
        GROWTH=_GROWTH,
        num_warps=_warps(block),
    )
    if segments == 1:
        return parts
    out = x.new_empty(rows, dtype=torch.float64)
    block = min(_BLOCK, triton.next_power_of_2(segments))
    _add_segments[(rows,)](parts, out, segments, BLOCK=block, GROWTH=_GROWTH, num_warps=_warps(block))
    return out


def _warps(block: int) -> int:
    return max(1, min(4, block // 128))


def aot() -> list[Variant]:
    made = []
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {"x": f"*{dtype}", "out": "*fp64", "width": "i32", "stride": "i32", "segments": "i32"}
        for block in (64, _BLOCK):
            constants = {"SEGMENT": _SEGMENT, "BLOCK": block, "GROWTH": _GROWTH}
            aligned = ("width", "stride") if block == _BLOCK else ()
            label = f"{dtype}, {block}"
            made.append(
                Variant(_segment_sqnorms, signature, constants, _warps(block), label=label, divisible=aligned)
            )
    signature = {"parts": "*fp64", "out": "*fp64", "segments": "i32"}
    made.append(Variant(_add_segments, signature, {"BLOCK": 128, "GROWTH": _GROWTH}, 1))
    return made
