"""Per-sample weight gradients of a convolution: one matrix product per sample that unfolds while it loads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant
from adaclip.kernels.conv_magnitudes import conv_magnitudes
from adaclip.kernels.products import PRECISION, flat_image, product, rounding, roundings

__all__ = ["conv_sample_grads", "instantiated_norms"]


@triton.jit
def _sample_grads(
    x,
    g,
    kept,
    rows,
    parts,
    groups,
    tiles,
    x_row,
    x_channel,
    x_position,
    g_row,
    g_channel,
    g_position,
    height,
    width,
    out_width,
    positions,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    g_members,
    growth,
    X_MEMBERS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    TAP_FIRST: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An OUT x DEPTH tile of one sample's gradient `P[o, d] = sum_t g[o, t] x[c(d), pos(t, tap(d))]`.

    TAP_FIRST: d counts channels first, which puts a channels_last image's neighbors side by side.
    """
    depth: tl.constexpr = X_MEMBERS * TAPS
    item = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    across: tl.constexpr = (depth + DEPTH - 1) // DEPTH
    o = tile // across * OUT + tl.arange(0, OUT)
    d = tile % across * DEPTH + tl.arange(0, DEPTH)
    if TAP_FIRST:
        tap = d // X_MEMBERS
        c = d % X_MEMBERS
    else:
        tap = d % TAPS
        c = d // TAPS
    down = tap // KERNEL_WIDTH * dilation_y
    right = tap % KERNEL_WIDTH * dilation_x
    group = item % groups
    g_at = g + item // groups * g_row + group * g_members * g_channel
    x_at = x + item // groups * x_row + group * X_MEMBERS * x_channel
    o_in = o < g_members
    d_in = d < depth
    d_step = (down * width + right) * x_position + c * x_channel
    lane = tl.arange(0, POSITIONS)
    acc = tl.zeros([OUT, DEPTH], tl.float32)
    for first in range(0, positions, POSITIONS):
        t = first + lane
        live = t < positions
        top = t // out_width * stride_y - padding_y
        left = t % out_width * stride_x - padding_x
        a = tl.load(
            g_at + (o * g_channel)[:, None] + (t * g_position)[None, :],
            mask=o_in[:, None] & live[None, :],
            other=0.0,
        )
        y = top[:, None] + down[None, :]
        z = left[:, None] + right[None, :]
        hit = live[:, None] & d_in[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        source = ((top * width + left) * x_position)[:, None] + d_step[None, :]
        acc = product(a, tl.load(x_at + source, mask=hit, other=0.0), acc, PRECISION)
    if kept is not None:
        at = kept + item * g_members * depth + (o * depth)[:, None] + d[None, :]
        tl.store(at, acc, mask=o_in[:, None] & d_in[None, :])
    if rows is not None:
        if tile % across == 0:
            total = tl.zeros([OUT], tl.float32)
            for first in range(0, positions, POSITIONS):
                t = first + lane
                mask = o_in[:, None] & (t < positions)[None, :]
                at = g_at + (o * g_channel)[:, None] + (t * g_position)[None, :]
                total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 1)
            tl.store(rows + item * g_members + o, total, mask=o_in)
    squares = tl.sum(acc * acc, 1).to(tl.float64)
    tl.store(parts + tl.program_id(0), tl.sum(squares, 0) * growth + OUT * DEPTH * 2.0**-125)


def conv_sample_grads(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    keep: bool,
    bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sqnorms, kept, rows = _form(x, g, keep=keep, bias=bias, **geometry)
    if not keep:
        sqnorms = _of_exact(sqnorms, conv_magnitudes(x, g, **geometry), g)
    return sqnorms, kept, rows


def instantiated_norms(x: Tensor, g: Tensor, **geometry) -> tuple[Tensor, Tensor]:
    """(sqnorms, magnitudes), both float64 [B], as `conv_sample_norms` gives them; no gradient is written."""
    magnitudes = conv_magnitudes(x, g, **geometry)
    return _of_exact(_form(x, g, keep=False, bias=False, **geometry)[0], magnitudes, g), magnitudes


def _of_exact(sqnorms: Tensor, magnitudes: Tensor, g: Tensor) -> Tensor:
    """Bounds on the exact gradient's squared norm, from those on the computed one's."""
    unit = rounding(roundings(g.shape[2] * g.shape[3], g.dtype))
    return (sqnorms.sqrt() + unit * magnitudes.sqrt()).square() * (1 + 2.0**-40)


def _form(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    keep: bool,
    bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(squared norms of the computed gradients, the gradients, sums of g)."""
    (batch, x_channels), out_channels = x.shape[:2], g.shape[1]
    positions, taps = g.shape[2] * g.shape[3], kernel[0] * kernel[1]
    x_members, g_members = x_channels // groups, out_channels // groups
    (x, x_steps), (g, g_steps) = flat_image(x), flat_image(g)
    tap_first = x_steps[1] == 1 and x_members > 1
    inner = (*kernel, x_members) if tap_first else (x_members, *kernel)
    kept = x.new_empty(batch, out_channels, *inner, dtype=torch.float32) if keep else None
    rows = x.new_empty(batch, out_channels, dtype=torch.float32) if bias else None
    tiling = _tiling(g_members, x_members * taps, positions, x.dtype)
    warps = tiling.pop("num_warps")
    tiles = triton.cdiv(g_members, tiling["OUT"]) * triton.cdiv(x_members * taps, tiling["DEPTH"])
    parts = x.new_empty(batch, groups * tiles, dtype=torch.float64)
    if parts.numel():
        _sample_grads[(batch * groups * tiles,)](
            *(x, g, kept, rows, parts, groups, tiles, *x_steps, *g_steps),
            *(*x.shape[2:], g.shape[3], positions, *stride, *padding, *dilation, g_members),
            1 + 2.0**-23 * (tiling["DEPTH"] + 8),
            X_MEMBERS=x_members,
            KERNEL_WIDTH=kernel[1],
            TAPS=taps,
            TAP_FIRST=tap_first,
            **tiling,
            PRECISION=PRECISION,
            num_warps=warps,
        )
    if kept is not None and tap_first:
        kept = kept.permute(0, 1, 4, 2, 3)
    return parts.sum(1), kept, rows


def _tiling(out: int, depth: int, positions: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of up to 128 x 128, no larger than the gradient."""
    rows = min(128, max(16, triton.next_power_of_2(out)))
    columns = min(128, max(16, triton.next_power_of_2(depth)))
    step = min(64 if dtype != torch.float32 else 32, max(16, triton.next_power_of_2(positions)))
    warps = max(1, min(8, rows * columns // 2048))
    return {"OUT": rows, "DEPTH": columns, "POSITIONS": step, "num_warps": warps}
