"""The weighted sum of rows: a layer's weight gradient from its kept per-sample gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant

__all__ = ["add_pieces", "weighted_sum"]

_COLUMNS = 256
_ROWS = 8  # that one step reads: 16 bytes in flight for each of 4 loads of a thread
_BLOCKS = 1024  # enough to fill any GPU; fewer columns than that share their rows among blocks


@triton.jit
def _sum_rows(x, factors, out, rows, width, stride, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [pieces, width] += rows [span * piece, span * (piece + 1)) of the weighted x."""
    piece = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float64)
    last = tl.minimum(rows, (piece + 1) * span)
    for first in range(piece * span, last, ROWS):
        row = first + tl.arange(0, ROWS)
        factor = tl.load(factors + row, mask=row < last, other=0.0)
        # A masked element is not read: whatever a dropped sample holds does not enter.
        mask = (factor != 0.0)[:, None] & (columns < width)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        acc += factor.to(tl.float64)[:, None] * value.to(tl.float64)
    total = tl.sum(acc, 0)
    tl.store(out + piece.to(tl.int64) * width + columns, total, mask=columns < width)


@triton.jit
def _add_pieces(parts, out, pieces, width, COLUMNS: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float64)
    at = parts + columns
    for _ in range(0, pieces):
        acc += tl.load(at, mask=columns < width, other=0.0).to(tl.float64)
        at += width
    tl.store(out + columns, acc, mask=columns < width)


def weighted_sum(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, n], factors float32 [B] -> float32 [n]: `sum_b factors_b x_b`; rows with factor 0 are not read.

    x: float32, bfloat16 or float16; contiguous rows, any distance apart. Products are exact and sums are in float64,
    so the result is within 2^-24 |sum| + B 2^-53 sum_b |factors_b x_b| of the exact one, element by element.
    Which rows add up first depends on B and n alone: equal inputs give equal bits.
    """
    rows, width = x.shape
    out = x.new_empty(width, dtype=torch.float32)
    if rows == 0 or width == 0:
        return out.zero_()
    columns = triton.cdiv(width, _COLUMNS)
    pieces = max(1, min(_BLOCKS // columns, triton.cdiv(rows, 4 * _ROWS)))
    span = triton.cdiv(rows, pieces)
    pieces = triton.cdiv(rows, span)
    parts = out if pieces == 1 else x.new_empty(pieces, width, dtype=torch.float64)
    _sum_rows[(columns, pieces)](
        *(x, factors, parts, rows, width, x.stride(0), span), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
    )
    if pieces > 1:
        add_pieces(parts, out)
    return out


def add_pieces(parts: Tensor, out: Tensor) -> None:
    """parts [pieces, n] float64 or float32, contiguous: their sum, in float64 and in order, to out float32 [n]."""
    pieces, width = parts.shape
    _add_pieces[(triton.cdiv(width, _COLUMNS),)](parts, out, pieces, width, COLUMNS=_COLUMNS, num_warps=4)


def aot() -> list[Variant]:
    constants = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
    sizes = {"rows": "i32", "width": "i32", "stride": "i32", "span": "i32"}
    made = []
    for dtype in ("fp32", "bf16", "fp16"):
        for out in ("fp32", "fp64"):
            signature = {"x": f"*{dtype}", "factors": "*fp32", "out": f"*{out}", **sizes}
            label = f"{dtype} to {out}"
            aligned = ("width", "stride")
            made.append(Variant(_sum_rows, signature, constants, label=label, divisible=aligned))
    for parts in ("fp64", "fp32"):
        signature = {"parts": f"*{parts}", "out": "*fp32", "pieces": "i32", "width": "i32"}
        made.append(Variant(_add_pieces, signature, {"COLUMNS": _COLUMNS}, label=f"of {parts}"))
    return made
