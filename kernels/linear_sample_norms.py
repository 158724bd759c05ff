"""Per-sample norms of a linear layer's weight gradient: a product of norms, or Gram matrices over positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant
from adaclip.kernels.conv_sample_grads import conv_sample_grads, instantiated_norms
from adaclip.kernels.products import GUARD, PRECISION, growth, product, rounding, roundings

__all__ = ["linear_sample_grads", "linear_sample_norms"]

_POINTWISE = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


@triton.jit
def _square(row, width, BLOCK: tl.constexpr):
    """Squared norm of a row, in float64, where squares of float32 are exact: float64 [1]."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, width, BLOCK):
        value = tl.load(row + first + lane, mask=first + lane < width, other=0.0).to(tl.float64)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def _product_of_norms(a, g, out, a_width, g_width, BLOCK: tl.constexpr):
    """out[b] = |a_b|^2 |g_b|^2, rounded up."""
    b = tl.program_id(0).to(tl.int64)
    square = _square(a + b * a_width, a_width, BLOCK) * _square(g + b * g_width, g_width, BLOCK)
    tl.store(out + b, square * (1 + 2.0**-24))


@triton.jit
def _gram_tile(
    x_at,
    y_at,
    x_in,
    y_in,
    width,
    SAME: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y' of two sets of TILE rows, which SAME says are one."""
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, width, BLOCK):
        c = first + lane
        live = (c < width)[None, :]
        x = tl.load(x_at[:, None] + c[None, :], mask=x_in[:, None] & live, other=0.0)
        if SAME:
            acc = product(x, tl.trans(x), acc, PRECISION)
        else:
            y = tl.load(y_at[:, None] + c[None, :], mask=y_in[:, None] & live, other=0.0)
            acc = product(x, tl.trans(y), acc, PRECISION)
    return acc


@triton.jit
def _gram_rows(
    a,
    g,
    out,
    batch,
    positions,
    tiles,
    a_width,
    g_width,
    a_growth,
    a_guard,
    g_growth,
    g_guard,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row of tiles from the diagonal on: out [2, B, tiles], sums of K o S and of products of norms."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles
    lane = tl.arange(0, TILE)
    row = i * TILE + lane
    row_in = row < positions
    a_row = a + (b * positions + row) * a_width
    g_row = g + (b * positions + row) * g_width
    k = _gram_tile(a_row, a_row, row_in, row_in, a_width, True, TILE, BLOCK, PRECISION)
    s = _gram_tile(g_row, g_row, row_in, row_in, g_width, True, TILE, BLOCK, PRECISION)
    diagonal = lane[:, None] == lane[None, :]
    k_square = tl.sum(tl.where(diagonal, k, 0.0), 1)
    s_square = tl.sum(tl.where(diagonal, s, 0.0), 1)
    norms = tl.sqrt(k_square * a_growth + a_guard).to(tl.float64)
    norms *= tl.sqrt(s_square * g_growth + g_guard)
    total = tl.sum(tl.sum(k * s, 1).to(tl.float64), 0)
    if not ONE_TILE:
        for j in range(i + 1, tiles):
            column = j * TILE + lane
            column_in = column < positions
            a_column = a + (b * positions + column) * a_width
            g_column = g + (b * positions + column) * g_width
            k = _gram_tile(a_row, a_column, row_in, column_in, a_width, False, TILE, BLOCK, PRECISION)
            s = _gram_tile(g_row, g_column, row_in, column_in, g_width, False, TILE, BLOCK, PRECISION)
            total += 2 * tl.sum(tl.sum(k * s, 1).to(tl.float64), 0)
    tl.store(out + tl.program_id(0), total)
    at = out + tl.cast(batch, tl.int64) * tiles + tl.program_id(0)
    tl.store(at, tl.sum(tl.where(row_in, norms, 0.0), 0))


def linear_sample_norms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(sqnorms, magnitudes), both float64 [B], of the gradients `sum_t g_t a_t'`.

    a [B, T, Din], g [B, T, Dout], both float32, bfloat16 or float16, contiguous. sqnorms are upper bounds of the exact
    squared norms; magnitudes are at least `M = (sum_t |a_t| |g_t|)^2`, and above it by a relative
    (Din + Dout + 90) 2^-22 at most, plus what `products.GUARD` adds to the norms. A sample that is not finite gets
    norms that are not and touches no other; bits depend on the sample and the sizes of one alone.

    T = 1: `|a|^2 |g|^2` in float64, where nothing underflows and at most (width / 1024 + 20) additions in a row round
    by 2^-53 each; 1 + 2^-24 covers that for widths below 2^38.

    T > 1: `sum_{t,t'} K[t,t'] S[t,t']` of the Gram matrices K of a's rows and S of g's, half of them by symmetry; or
    the gradient itself, where that is less arithmetic (`conv_sample_grads`). With u = 2^-23 and n_a, n_g the units of
    `products.roundings`, an entry of K is off by n_a u |a_t| |a_t'|, one of S by n_g u |g_t| |g_t'|; their product and
    a sum of TILE of them in a row, in float32, by TILE + 2 units more, relative to the absolute values; what follows is
    in float64. All of that sums to

        |computed - exact| <= (e^((n_a + n_g + TILE + 4) u) - 1) M + T^2 2^-120,

    the last term for products that underflow. sqnorms are the computed sums plus this bound.
    """
    (batch, positions, a_width), g_width = a.shape, g.shape[2]
    if batch * positions * a_width * g_width == 0:
        return a.new_zeros(batch, dtype=torch.float64), a.new_zeros(batch, dtype=torch.float64)
    if positions == 1:
        out = a.new_empty(batch, dtype=torch.float64)
        block = min(1024, triton.next_power_of_2(max(a_width, g_width)))
        _product_of_norms[(batch,)](
            a, g, out, a_width, g_width, BLOCK=block, num_warps=1 if block < 1024 else 4
        )
        return out, out.clone()
    if positions * (a_width + g_width) > 2 * a_width * g_width:
        return instantiated_norms(_as_image(a), _as_image(g), **_POINTWISE)
    tile, block, warps = _tiling(positions, a.dtype)
    tiles = triton.cdiv(positions, tile)
    out = a.new_empty(2, batch, tiles, dtype=torch.float64)
    _gram_rows[(batch * tiles,)](
        *(a, g, out, batch, positions, tiles, a_width, g_width),
        *(growth(a_width, a.dtype), a_width * GUARD, growth(g_width, g.dtype), g_width * GUARD),
        ONE_TILE=tiles == 1,
        TILE=tile,
        BLOCK=block,
        PRECISION=PRECISION,
        num_warps=warps,
    )
    total, norms = out.sum(2) if tiles > 1 else out.squeeze(2)
    magnitudes = norms.square() * (1 + 2.0**-40)
    unit = rounding(roundings(a_width, a.dtype) + roundings(g_width, g.dtype) + tile + 4)
    return total + (unit * magnitudes + positions**2 * 2.0**-120), magnitudes


def linear_sample_grads(a: Tensor, g: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(sqnorms float64 [B], kept float32 [B, Dout, Din] or None): `sum_t g_t a_t'` by matrix products.

    a, g as in `linear_sample_norms`. With keep, sqnorms bound the squared norms of `kept` as stored; without, those of
    the exact gradients. See `conv_sample_grads`, of which this is the 1 x 1 case.
    """
    if a.shape[1] == 1 and not keep:
        return linear_sample_norms(a, g)[0], None
    sqnorms, kept, _ = conv_sample_grads(_as_image(a), _as_image(g), **_POINTWISE, keep=keep, bias=False)
    return sqnorms, None if kept is None else kept.flatten(2)


def _as_image(t: Tensor) -> Tensor:
    """[B, T, D] -> [B, D, 1, T], channels_last, the same memory."""
    return t.transpose(1, 2).unsqueeze(2)


def _tiling(positions: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(positions of a tile, channels of a step, warps)."""
    tile = min(64, max(16, triton.next_power_of_2(positions)))
    # The longest steps that spill nothing: three TF32 products keep more in registers.
    block = {16: 32, 32: 32, 64: 16}[tile] if dtype == torch.float32 else 64
    return tile, block, {16: 1, 32: 4, 64: 8 if dtype == torch.float32 else 4}[tile]


def aot() -> list[Variant]:
    made = []
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        pointers = {"a": f"*{dtype}", "g": f"*{dtype}", "out": "*fp64"}
        widths = dict.fromkeys(("a_width", "g_width"), "i32")
        made.append(
            Variant(
                _product_of_norms, pointers | widths, {"BLOCK": 1024}, label=dtype, divisible=("a_width",)
            )
        )
        floats = dict.fromkeys(("a_growth", "a_guard", "g_growth", "g_guard"), "fp32")
        sizes = dict.fromkeys(("batch", "positions", "tiles"), "i32")
        for positions in (16, 256):
            tile, block, warps = _tiling(positions, torch_dtype)
            constants = {"ONE_TILE": positions <= tile, "TILE": tile, "BLOCK": block, "PRECISION": PRECISION}
            signature = pointers | sizes | widths | floats
            label = f"{dtype}, {positions} positions"
            made.append(
                Variant(
                    _gram_rows, signature, constants, warps, label=label, divisible=("a_width", "g_width")
                )
            )
    return made
