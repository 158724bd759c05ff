"""What rounding in a convolution's weight gradient scales with: sums of products of position norms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant
from adaclip.kernels.products import GUARD, flat_image, growth

__all__ = ["conv_magnitudes"]


@triton.jit
def _position_norms(
    t,
    out,
    groups,
    t_row,
    t_channel,
    t_position,
    members,
    positions,
    tiles,
    growth,
    guard,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out [B, groups, positions]: norms over a group's channels, rounded up."""
    item = (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS)
    lane = tl.arange(0, CHANNELS)
    at = t + item // groups * t_row + item % groups * members * t_channel + position * t_position
    squares = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for first in range(0, members, CHANNELS):
        c = first + lane
        mask = (position < positions)[:, None] & (c < members)[None, :]
        value = tl.load(at[:, None] + c[None, :] * t_channel, mask=mask, other=0.0).to(tl.float32)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1) * growth + guard)
    tl.store(out + item * positions + position, norm, mask=position < positions)


@triton.jit
def _sum_of_taps(
    x_norms,
    g_norms,
    out,
    height,
    width,
    out_width,
    g_positions,
    kernel_width,
    taps,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    BLOCK: tl.constexpr,
):
    """out [B, groups]: `sum_tap (sum_t |g_t| |x_pos(t, tap)|)^2`, one program for each."""
    item = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([1], tl.float64)
    for tap in range(taps):
        products = tl.zeros([BLOCK], tl.float64)
        for first in range(0, g_positions, BLOCK):
            t = first + lane
            y = t // out_width * stride_y - padding_y + tap // kernel_width * dilation_y
            z = t % out_width * stride_x - padding_x + tap % kernel_width * dilation_x
            hit = (t < g_positions) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            left = tl.load(g_norms + item * g_positions + t, mask=hit, other=0.0).to(tl.float64)
            right = tl.load(x_norms + item * height * width + y * width + z, mask=hit, other=0.0)
            products += left * right
        along = tl.sum(products, 0)
        total += along * along
    tl.store(out + item + tl.arange(0, 1), total)


def conv_magnitudes(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """`M[b] = sum_{group, tap} (sum_t |g_t| |x_pos(t, tap)|)^2`, float64 [B], rounded up: see `reference`.

    x [B, Cin, H, W], g [B, Cout, H', W'], both float32, bfloat16 or float16, contiguous or channels_last. At least
    `reference.position_norms_product`, and at most (1 + n 2^-22) times it, n = Cin + Cout of a group + 20,
    plus what `products.GUARD` adds to the norms.
    """
    batch, (height, width), (out_height, out_width) = x.shape[0], x.shape[2:], g.shape[2:]
    positions = out_height * out_width
    out = x.new_empty(batch, groups, dtype=torch.float64)
    if out.numel() == 0 or positions * height * width == 0:
        return out.zero_().sum(1)
    block = min(256, triton.next_power_of_2(positions))
    _sum_of_taps[(batch * groups,)](
        *(_norms_of(x, groups), _norms_of(g, groups), out),
        *(height, width, out_width, positions, kernel[1], kernel[0] * kernel[1]),
        *(*stride, *padding, *dilation),
        BLOCK=block,
        num_warps=1 if block <= 64 else 4,
    )
    return out.sum(1) if groups > 1 else out.squeeze(1)


def _norms_of(t: Tensor, groups: int) -> Tensor:
    """[B, C, H, W] -> float32 [B, groups, H W]."""
    batch, channels, height, width = t.shape
    t, steps = flat_image(t)
    positions, members = height * width, channels // groups
    out = t.new_empty(batch, groups, positions, dtype=torch.float32)
    tile, lanes = _tiling(positions, members, steps[1] == 1)
    tiles = triton.cdiv(positions, tile)
    _position_norms[(batch * groups * tiles,)](
        *(t, out, groups, *steps, members, positions, tiles),
        *(growth(members, t.dtype), members * GUARD),
        POSITIONS=tile,
        CHANNELS=lanes,
        num_warps=4 if tile * lanes >= 1024 else 1,
    )
    return out


def _tiling(positions: int, members: int, by_channel: bool) -> tuple[int, int]:
    """(positions, channels) of a step: long in whichever is contiguous."""
    wide = (64, 64) if by_channel else (128, 32)
    return tuple(
        min(most, triton.next_power_of_2(n)) for most, n in zip(wide, (positions, members), strict=True)
    )


def aot() -> list[Variant]:
    made = []
    for dtype, inner in (("bf16", "channel"), ("fp32", "channel"), ("fp16", "position")):
        tile, lanes = _tiling(1024, 64, inner == "channel")
        constants = {"POSITIONS": tile, "CHANNELS": lanes, f"t_{inner}": 1}
        sizes = [n for n in _position_norms.arg_names if n not in ("t", "out", "growth", "guard", *constants)]
        signature = {"t": f"*{dtype}", "out": "*fp32", "growth": "fp32", "guard": "fp32"}
        signature |= dict.fromkeys(sizes, "i32")
        aligned = ("t_row", "t_channel", "t_position", "members", "positions")
        divisible = tuple(n for n in aligned if n in sizes)
        label = f"{dtype}, {inner} innermost"
        made.append(Variant(_position_norms, signature, constants, label=label, divisible=divisible))
    sizes = [n for n in _sum_of_taps.arg_names if n not in ("x_norms", "g_norms", "out", "BLOCK")]
    signature = {"x_norms": "*fp32", "g_norms": "*fp32", "out": "*fp64"} | dict.fromkeys(sizes, "i32")
    return [*made, Variant(_sum_of_taps, signature, {"BLOCK": 256})]
