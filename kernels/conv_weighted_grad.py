"""Clip-weighted weight gradient of a convolution with 16-bit inputs: products on tensor cores, sums in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant
from adaclip.kernels.products import PRECISION, flat_image, product
from adaclip.kernels.weighted_sum import add_pieces

__all__ = ["conv_weighted_grad", "roundings_in_a_row"]

# Positions that one program sums in float32 at most, but for a sample that has more. Public: how far a sum rounds
# must not depend on how many samples there are.
_LONGEST = 1 << 16

# Programs that fill a GPU, of which there are two on a multiprocessor. More would only write more partial sums.
_PROGRAMS = 256


@triton.jit
def _weighted_grad(
    x,
    g,
    factors,
    out,
    batch,
    span,
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
    X_MEMBERS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    TAP_FIRST: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    ONE_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An OUT x DEPTH tile of `sum_b factors_b sum_t g_b[o, t] x_b[c(d), pos(t, tap(d))]`, over `span` samples.

    TAP_FIRST: d counts channels first, which puts a channels_last image's neighbors side by side.
    ONE_STEP: a sample has no more than POSITIONS positions.
    """
    depth: tl.constexpr = X_MEMBERS * TAPS
    across: tl.constexpr = (depth + DEPTH - 1) // DEPTH
    # Programs that run at the same time read the same samples.
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    piece = tl.program_id(0) // tiles // groups
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
    o_in = o < g_members
    d_in = d < depth
    g_at = g + group.to(tl.int64) * g_members * g_channel
    x_at = x + group.to(tl.int64) * X_MEMBERS * x_channel
    d_step = (down * width + right) * x_position + c * x_channel
    lane = tl.arange(0, POSITIONS)
    first = piece * span
    last = tl.minimum(batch, first + span)
    steps = (positions + POSITIONS - 1) // POSITIONS
    total = tl.zeros([OUT, DEPTH], tl.float32)
    acc = tl.zeros([OUT, DEPTH], tl.float32)
    for i in range(first * steps, last * steps):
        if ONE_STEP:
            sample = i
            t = lane
        else:
            sample = i // steps
            t = i % steps * POSITIONS + lane
        live = t < positions
        top = t // out_width * stride_y - padding_y
        left = t % out_width * stride_x - padding_x
        a = tl.load(
            g_at + sample.to(tl.int64) * g_row + (o * g_channel)[:, None] + (t * g_position)[None, :],
            mask=o_in[:, None] & live[None, :],
            other=0.0,
        )
        y = top[:, None] + down[None, :]
        z = left[:, None] + right[None, :]
        hit = live[:, None] & d_in[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        source = ((top * width + left) * x_position)[:, None] + d_step[None, :]
        b = tl.load(x_at + sample.to(tl.int64) * x_row + source, mask=hit, other=0.0)
        # A dropped sample may hold anything, and zero times that would be anything. It is multiplied all the same: loads
        # that wait for a factor are no longer in flight early enough.
        if ONE_STEP:
            factor = tl.load(factors + sample)
            total += tl.where(factor != 0.0, factor * product(a, b, acc, PRECISION), 0.0)
        else:
            acc = product(a, b, acc, PRECISION)
            if (i + 1) % steps == 0:
                factor = tl.load(factors + sample)
                total += tl.where(factor != 0.0, factor * acc, 0.0)
                acc = tl.zeros([OUT, DEPTH], tl.float32)
    out += (piece.to(tl.int64) * groups + group) * g_members * depth
    tl.store(out + (o * depth)[:, None] + d[None, :], total, mask=o_in[:, None] & d_in[None, :])


def conv_weighted_grad(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """float32 [Cout, Cin/groups, kh, kw]: `sum_b factors_b dL_b/dweight`; rows with factor 0 do not enter.

    x [B, Cin, H, W], g [B, Cout, H', W'], both bfloat16 or both float16, each contiguous or channels_last (anything else
    is copied); fewer than 2^31 values in a sample. factors: float32 [B], finite.

    The result lies in memory as a weight of x's own layout would, channels_last or contiguous. Equal inputs give
    equal bits: partial sums are written and added up by a second kernel, in float64.

    How far it rounds. A factor times a 16-bit gradient would no longer be 16 bits wide, and rounding it would lengthen
    what a sample adds by up to 2^-9 of its magnitude. So the factor comes after: each sample's own gradient is summed
    on tensor cores, whose 16-bit products are exact in float32, and is scaled when it is whole. What is left is
    the sums' own rounding: an entry passes through `roundings_in_a_row`, each of a unit of float32, and no operand
    is rounded at all.
    """
    (batch, x_channels), out_channels = x.shape[:2], g.shape[1]
    positions, taps = g.shape[2] * g.shape[3], kernel[0] * kernel[1]
    x_members, g_members = x_channels // groups, out_channels // groups
    (x, x_steps), (g, g_steps) = flat_image(x), flat_image(g)
    tap_first = x_steps[1] == 1 and x_members > 1
    inner = (*kernel, x_members) if tap_first else (x_members, *kernel)
    out = x.new_empty(out_channels, *inner, dtype=torch.float32)
    if out.numel() * batch * positions == 0:
        out.zero_()
    else:
        tiling = _tiling(g_members, x_members * taps, positions, tap_first)
        warps = tiling.pop("num_warps")
        tiles = triton.cdiv(g_members, tiling["OUT"]) * triton.cdiv(x_members * taps, tiling["DEPTH"])
        span = _span(batch, positions, groups * tiles)
        pieces = triton.cdiv(batch, span)
        parts = out if pieces == 1 else x.new_empty(pieces, out.numel(), dtype=torch.float32)
        _weighted_grad[(pieces * groups * tiles,)](
            *(x, g, factors, parts, batch, span, groups, tiles, *x_steps, *g_steps),
            *(*x.shape[2:], g.shape[3], positions, *stride, *padding, *dilation, g_members),
            X_MEMBERS=x_members,
            KERNEL_WIDTH=kernel[1],
            TAPS=taps,
            TAP_FIRST=tap_first,
            **tiling,
            PRECISION=PRECISION,
            num_warps=warps,
        )
        if pieces > 1:
            add_pieces(parts, out.view(-1))
    return out.permute(0, 3, 1, 2) if tap_first else out


def roundings_in_a_row(positions: int) -> int:
    """Float32 additions that an entry of a sample's gradient passes through at most; no function of the batch.

    Those of its own positions, then one for each sample of a piece, the product with the factor, and the last rounding.
    """
    return positions + _most(positions) + 2


def _most(positions: int) -> int:
    """Samples of a piece at most."""
    return max(1, _LONGEST // max(1, positions))


def _span(batch: int, positions: int, programs: int) -> int:
    """Samples of a piece: as many pieces as fill a GPU, and no longer ones than the rounding allows."""
    pieces = max(triton.cdiv(_PROGRAMS, programs), triton.cdiv(batch, _most(positions)))
    return triton.cdiv(batch, min(batch, pieces))


def _tiling(out: int, depth: int, positions: int, tap_first: bool) -> dict[str, int]:
    """Tiles of up to 128 x 128, of which each sample's and the whole sum stay in registers.

    Where neighbors of d are no neighbors in memory every value has an address of its own, which takes registers.
    """
    rows = min(128, max(16, triton.next_power_of_2(out)))
    columns = min(128 if tap_first else 64, max(16, triton.next_power_of_2(depth)))
    step = min(64 if tap_first else 32, max(16, triton.next_power_of_2(positions)))
    warps = 8 if rows * columns >= 1 << 13 else 4 if rows * columns >= 1 << 11 else 1
    return {
        "OUT": rows,
        "DEPTH": columns,
        "POSITIONS": step,
        "ONE_STEP": positions <= step,
        "num_warps": warps,
    }


def aot() -> list[Variant]:
    # VGG's layers: 64 -> 64 at 32 x 32, 128 -> 128 at 16 x 16, 256 -> 256 at 8 x 8, 512 -> 512 at 2 x 2.
    cases = [("bf16", 64, 64, 1024, True), ("bf16", 128, 128, 256, True), ("bf16", 256, 256, 64, True)]
    cases += [("bf16", 512, 512, 4, True), ("fp16", 128, 128, 256, True), ("fp16", 64, 128, 256, False)]
    return [_variant(*case) for case in cases]


def _variant(dtype: str, x_members: int, out: int, positions: int, channels_last: bool) -> Variant:
    """A 3 x 3 convolution of a square image, padded by 1."""
    tiling = _tiling(out, 9 * x_members, positions, channels_last)
    warps = tiling.pop("num_warps")
    inner = "channel" if channels_last else "position"
    ones = ["groups", *(f"{n}_{axis}" for n in ("stride", "padding", "dilation") for axis in "yx")]
    constants = tiling | dict.fromkeys([*ones, f"x_{inner}", f"g_{inner}"], 1) | {"PRECISION": PRECISION}
    constants |= {"X_MEMBERS": x_members, "KERNEL_WIDTH": 3, "TAPS": 9, "TAP_FIRST": channels_last}
    pointers = {"x": dtype, "g": dtype, "factors": "fp32", "out": "fp32"}
    sizes = [n for n in _weighted_grad.arg_names if n not in (*constants, *pointers)]
    signature = {n: f"*{kind}" for n, kind in pointers.items()} | dict.fromkeys(sizes, "i32")
    aligned = ["batch", "x_row", "g_row", "g_members", "x_channel", "g_channel", "x_position", "g_position"]
    aligned += ["positions"] if positions % 16 == 0 else []
    label = f"{dtype}, {x_members} -> {out} channels, {positions} positions, {inner} innermost"
    divisible = tuple(n for n in aligned if n in sizes)
    return Variant(_weighted_grad, signature, constants, warps, hot=True, label=label, divisible=divisible)
