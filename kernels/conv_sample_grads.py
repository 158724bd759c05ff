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
        kept += item * g_members * depth
        tl.store(kept + (o * depth)[:, None] + d[None, :], acc, mask=o_in[:, None] & d_in[None, :])
    if rows is not None and tile % across == 0:
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
    """(sqnorms float64 [B], kept float32 [B, Cout, Cin/groups, kh, kw] or None, rows float32 [B, Cout] or None).

    x [B, Cin, H, W], g [B, Cout, H', W'], both float32, bfloat16 or float16, each contiguous or channels_last (anything
    else is copied); fewer than 2^31 values in a sample. rows: `sum_t g_t`, with `bias`.

    With keep, sqnorms are upper bounds of the squared norms of `kept` as stored, at most (DEPTH + 8) 2^-23 above; without,
    of those of the exact gradients. A sample that is not finite gets a norm that is not, and touches no other.

    `kept` lies in memory as the weight's own layout would: [B, Cout, kh, kw, Cin/groups] for a channels_last x, whose
    loads and stores then go along channels, contiguous for a contiguous one. Either way a sample is one run of memory.

    The bounds, with u = 2^-23. A sum of squares adds DEPTH of them in float32 and then goes on in float64:
    1 + (DEPTH + 8) u times it, plus 2^-125 for each square that underflows, is at least the exact one. The gradient's
    entries are sums of T products, so in the Frobenius norm they are off by at most (e^(n_T u) - 1) sqrt(M), n_T the units
    of `products.roundings` and M of `conv_magnitudes`: entry (o, c, tap) of the absolute values' product is squared
    and summed over o and c to `sum_tap (sum_t |g_t| |x_pos|)^2` at most, by Cauchy-Schwarz. Not keeping adds that to the norm.
    """
    geometry = {
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
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
    tiling = _tiling(g_members, x_members * taps, positions, x.dtype, tap_first)
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


def _tiling(out: int, depth: int, positions: int, dtype: torch.dtype, tap_first: bool) -> dict[str, int]:
    """Tiles of up to 128 x 128, no larger than the gradient, in the longest steps that spill nothing.

    Where neighbors of d are no neighbors in memory every value has an address of its own, which takes registers.
    """
    rows = min(128, max(16, triton.next_power_of_2(out)))
    columns = min(128 if tap_first else 64, max(16, triton.next_power_of_2(depth)))
    step = (64 if tap_first else 32) if dtype != torch.float32 else 16
    step = min(step, max(16, triton.next_power_of_2(positions)))
    warps = 8 if rows * columns >= 1 << 14 else 4 if rows * columns >= 1 << 11 else 1
    return {"OUT": rows, "DEPTH": columns, "POSITIONS": step, "num_warps": warps}


def aot() -> list[Variant]:
    # VGG's first layers: 3 -> 64 and 64 -> 64 at 32 x 32, and 64 -> 128 at 16 x 16.
    first, second, third = (3, 64, 1024), (64, 64, 1024), (64, 128, 256)
    cases = [("bf16", *first, True, True), ("bf16", *second, True, True), ("bf16", *third, True, False)]
    cases += [("fp32", *first, True, True), ("fp32", *second, True, True), ("fp32", *third, True, False)]
    cases += [("bf16", *second, False, True), ("fp32", *first, False, True), ("fp16", *second, True, False)]
    return [_variant(*case) for case in cases]


def _variant(
    dtype: str, x_members: int, out: int, positions: int, channels_last: bool, keep: bool
) -> Variant:
    """A 3 x 3 convolution of a square image, padded by 1, with a bias if gradients are kept."""
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    tiling = _tiling(out, 9 * x_members, positions, torch_dtype, channels_last)
    warps = tiling.pop("num_warps")
    inner = "channel" if channels_last else "position"
    ones = [f"{n}_{axis}" for n in ("stride", "padding", "dilation") for axis in "yx"]
    constants = tiling | dict.fromkeys([*ones, f"x_{inner}", f"g_{inner}"], 1) | {"PRECISION": PRECISION}
    constants |= {"X_MEMBERS": x_members, "KERNEL_WIDTH": 3, "TAPS": 9, "TAP_FIRST": channels_last}
    pointers = {"x": dtype, "g": dtype, "parts": "fp64"}
    pointers |= {"kept": "fp32", "rows": "fp32"} if keep else {}
    constants |= {} if keep else {"kept": None, "rows": None}
    sizes = [n for n in _sample_grads.arg_names if n not in (*constants, *pointers, "growth")]
    signature = (
        {n: f"*{kind}" for n, kind in pointers.items()} | dict.fromkeys(sizes, "i32") | {"growth": "fp32"}
    )
    aligned = [
        "x_row",
        "g_row",
        "g_members",
        "positions",
        "g_channel",
        "g_position",
        "height",
        "width",
        "out_width",
    ]
    aligned += [f"x_{n}" for n in ("channel", "position") if not channels_last or x_members % 16 == 0]
    label = f"{dtype}, {x_members} -> {out} channels, {positions} positions, {inner} innermost, keep={keep}"
    divisible = tuple(n for n in aligned if n in sizes)
    return Variant(_sample_grads, signature, constants, warps, hot=True, label=label, divisible=divisible)
