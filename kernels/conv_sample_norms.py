"""Per-sample norms of a convolution's weight gradient by the shifted Gram, which never forms the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaclip.kernels.aot import Variant
from adaclip.kernels.conv_sample_grads import instantiated_norms
from adaclip.kernels.products import GUARD, PRECISION, flat_image, growth, product, rounding, roundings

__all__ = ["conv_sample_norms"]

# Above this many positions a Gram matrix is no longer what a cache holds (1 MiB), nor the cheaper way.
_LARGEST = 512

# Bytes of scratch at a time, about what L2 holds.
_SCRATCH = 1 << 26


@triton.jit
def _positions(row, SLOT: tl.constexpr):
    """Row of a Gram matrix -> (which of the packed samples, its position)."""
    return row // SLOT, row % SLOT


@triton.jit
def _corner(position, live, out_width, stride_y, stride_x, padding_y, padding_x):
    """Top left corner of an output position's window; far outside of the image where there is no such position."""
    top = tl.where(live, position // out_width * stride_y - padding_y, -(2**20))
    return top, position % out_width * stride_x - padding_x


@triton.jit
def _inside(coordinate, size):
    """0 <= coordinate < size, in one comparison."""
    return coordinate.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def _shifted_gram(
    x,
    g,
    k,
    norms,
    out,
    batch,
    groups,
    first_item,
    x_row,
    x_channel,
    x_position,
    g_row,
    g_channel,
    g_position,
    height,
    width,
    out_width,
    x_positions,
    g_positions,
    kernel_width,
    taps,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    x_members,
    g_members,
    x_growth,
    x_guard,
    g_growth,
    g_guard,
    rounding,
    floor,
    PACK: tl.constexpr,
    X_SLOT: tl.constexpr,
    G_SLOT: tl.constexpr,
    X_TILE: tl.constexpr,
    G_TILE: tl.constexpr,
    X_TILES: tl.constexpr,
    G_TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One item, PACK samples' one group: K into the program's scratch k, then S against K's shifts."""
    SLOTS: tl.constexpr = 1 if G_SLOT > G_TILE else G_TILE // G_SLOT
    X_ROWS: tl.constexpr = X_TILES * X_TILE
    G_ROWS: tl.constexpr = G_TILES * G_TILE
    program = tl.program_id(0)
    k += program.to(tl.int64) * X_ROWS * X_ROWS
    x_norms = norms + program.to(tl.int64) * (X_ROWS + G_ROWS)
    g_norms = x_norms + X_ROWS
    x_lane = tl.arange(0, X_TILE)
    g_lane = tl.arange(0, G_TILE)
    c_lane = tl.arange(0, CHANNELS)
    item = first_item + program
    first_sample = (item // groups).to(tl.int64) * PACK
    group = (item % groups).to(tl.int64)
    x_at = x + first_sample * x_row + group * x_members * x_channel
    g_at = g + first_sample * g_row + group * g_members * g_channel

    for i in range(X_TILES):
        row = i * X_TILE + x_lane
        slot, position = _positions(row, X_SLOT)
        row_in = (slot < PACK) & (position < x_positions) & (first_sample + slot < batch)
        row_at = x_at + slot.to(tl.int64) * x_row + position * x_position
        for j in range(i, X_TILES):
            column = j * X_TILE + x_lane
            slot, position = _positions(column, X_SLOT)
            column_in = (slot < PACK) & (position < x_positions) & (first_sample + slot < batch)
            column_at = x_at + slot.to(tl.int64) * x_row + position * x_position
            acc = tl.zeros([X_TILE, X_TILE], tl.float32)
            for first in range(0, x_members, CHANNELS):
                c = first + c_lane
                mask = row_in[:, None] & (c < x_members)[None, :]
                a = tl.load(row_at[:, None] + c[None, :] * x_channel, mask=mask, other=0.0)
                if X_TILES == 1:
                    acc = product(a, tl.trans(a), acc, PRECISION)
                else:
                    mask = column_in[:, None] & (c < x_members)[None, :]
                    b = tl.load(column_at[:, None] + c[None, :] * x_channel, mask=mask, other=0.0)
                    acc = product(a, tl.trans(b), acc, PRECISION)
            tl.store(k + row[:, None] * X_ROWS + column[None, :], acc)
            if i == j:
                square = tl.sum(tl.where(row[:, None] == column[None, :], acc, 0.0), 1)
                tl.store(x_norms + row, tl.sqrt(square * x_growth + x_guard))
    # What other threads of this block have stored is read from here on.
    tl.debug_barrier()

    total = tl.zeros([SLOTS], tl.float64)
    for i in range(G_TILES):
        row = i * G_TILE + g_lane
        row_slot, position = _positions(row, G_SLOT)
        row_in = (row_slot < PACK) & (position < g_positions) & (first_sample + row_slot < batch)
        row_at = g_at + row_slot.to(tl.int64) * g_row + position * g_position
        row_top, row_left = _corner(position, row_in, out_width, stride_y, stride_x, padding_y, padding_x)
        for j in range(i, G_TILES):
            # Columns come first: along them the scratch is contiguous, and neighboring threads take
            # neighbors of the first dimension where the compiler sees no contiguity.
            column = j * G_TILE + g_lane
            column_slot, position = _positions(column, G_SLOT)
            column_in = (column_slot < PACK) & (position < g_positions)
            column_in = column_in & (first_sample + column_slot < batch)
            column_at = g_at + column_slot.to(tl.int64) * g_row + position * g_position
            column_top, column_left = _corner(
                position, column_in, out_width, stride_y, stride_x, padding_y, padding_x
            )
            s = tl.zeros([G_TILE, G_TILE], tl.float32)
            for first in range(0, g_members, CHANNELS):
                c = first + c_lane
                mask = column_in[:, None] & (c < g_members)[None, :]
                a = tl.load(column_at[:, None] + c[None, :] * g_channel, mask=mask, other=0.0)
                if G_TILES == 1:
                    s = product(a, tl.trans(a), s, PRECISION)
                else:
                    mask = row_in[:, None] & (c < g_members)[None, :]
                    b = tl.load(row_at[:, None] + c[None, :] * g_channel, mask=mask, other=0.0)
                    s = product(a, tl.trans(b), s, PRECISION)
            if i == j:
                square = tl.sum(tl.where(column[:, None] == row[None, :], s, 0.0), 1)
                tl.store(g_norms + column, tl.sqrt(square * g_growth + g_guard))
            shifted = tl.zeros([G_TILE, G_TILE], tl.float32)
            for tap in range(taps):
                down = tap // kernel_width * dilation_y
                right = tap % kernel_width * dilation_x
                y = row_top + down
                z = row_left + right
                hit = _inside(y, height) & _inside(z, width)
                row_source = tl.where(hit, (row_slot * X_SLOT + y * width + z) * X_ROWS, -(2**30))
                y = column_top + down
                z = column_left + right
                hit = _inside(y, height) & _inside(z, width)
                column_source = tl.where(hit, column_slot * X_SLOT + y * width + z, -(2**30))
                source = column_source[:, None] + row_source[None, :]
                shifted += tl.load(k + source, mask=source >= 0, other=0.0)
            # Pairs of two samples, and the half that symmetry gives, are dropped and not multiplied by 0: they
            # may hold anything, and a sample that is not finite leaves the others alone.
            pair = (column_slot[:, None] == row_slot[None, :]) & (column[:, None] >= row[None, :])
            twice = tl.where(column[:, None] > row[None, :], 2.0, 1.0)
            terms = tl.sum(tl.where(pair, s * shifted * twice, 0.0), 1).to(tl.float64)
            total += tl.sum(tl.reshape(terms, [SLOTS, G_TILE // SLOTS]), 1)
    tl.debug_barrier()

    magnitude = tl.zeros([SLOTS], tl.float64)
    for tap in range(taps):
        along = tl.zeros([SLOTS], tl.float64)
        for i in range(G_TILES):
            row = i * G_TILE + g_lane
            slot, position = _positions(row, G_SLOT)
            y = position // out_width * stride_y - padding_y + tap // kernel_width * dilation_y
            z = position % out_width * stride_x - padding_x + tap % kernel_width * dilation_x
            hit = (slot < PACK) & (position < g_positions) & (first_sample + slot < batch)
            hit = hit & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            left = tl.load(g_norms + row, mask=hit, other=0.0).to(tl.float64)
            right = tl.load(x_norms + slot * X_SLOT + y * width + z, mask=hit, other=0.0)
            along += tl.sum(tl.reshape(left * right, [SLOTS, G_TILE // SLOTS]), 1)
        magnitude += along * along
    slot = tl.arange(0, SLOTS)
    sample = first_sample + slot
    mask = (slot < PACK) & (sample < batch)
    tl.store(out + sample * groups + group, total + rounding * magnitude + floor, mask=mask)
    tl.store(out + (batch + sample) * groups + group, magnitude, mask=mask)


def conv_sample_norms(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """(sqnorms, magnitudes), both float64 [B], of the per-sample weight gradients of a convolution.

    x [B, Cin, H, W], g [B, Cout, H', W'], both float32, bfloat16 or float16, each contiguous or channels_last (anything
    else is copied); fewer than 2^31 values in a sample. The extent of g says how far the image is padded behind.

    sqnorms are upper bounds of the exact squared norms; magnitudes are at least
    `M = reference.position_norms_product`, and above it by a relative (Cin + Cout + 90) 2^-22 of one group at most,
    plus what `products.GUARD` adds to the norms. A sample that is not finite gets norms that are not and touches
    no other. Bits depend on the sample, its place in a pack and the sizes of one sample.

    With K = X'X over positions of the image and S = G'G over those of the output, both symmetric,

        |gradient|^2 = sum_{t,t'} S[t,t'] sum_tap K[pos(t, tap), pos(t', tap)].

    K's half is written to a scratch that one program owns and reads back shifted, tap by tap: at 8 x 8 the 16 KiB
    lie in L1, at 16 x 16 those of all programs in L2. Shifting in registers (`tl.gather`, twice per tap) compiled to
    1.4 times the instructions of this loop, and cannot hold a second tile. Images of more than 512 positions take
    `instantiated_norms`: there the gradient is the cheaper way for all but very many channels.

    The bound. With u = 2^-23 and n_x, n_g the units of `products.roundings`, K[s,s'] is off by n_x u |x_s| |x_s'| and
    S[t,t'] by n_g u |g_t| |g_t'|. Adding up the taps in float32 costs one unit for each, the product with S and
    its weight 2 one more, and the sum over a row of a tile G_TILE of them, all relative to the sum of absolute values;
    what follows is in float64. As sum_{t,t'} |g_t| |g_t'| sum_tap |x_pos| |x_pos'| = M,

        |computed - exact| <= (e^((n_x + n_g + taps + G_TILE + 4) u) - 1) M + T^2 taps 2^-120,

    the last term for products that underflow. sqnorms are the computed sums plus this bound.
    """
    batch, (height, width), (out_height, out_width) = x.shape[0], x.shape[2:], g.shape[2:]
    x_positions, g_positions, taps = height * width, out_height * out_width, kernel[0] * kernel[1]
    x_members, g_members = x.shape[1] // groups, g.shape[1] // groups
    if max(x_positions, g_positions) > _LARGEST:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return instantiated_norms(x, g, kernel=kernel, **geometry)
    out = x.new_empty(2, batch, groups, dtype=torch.float64)
    if batch * x_positions * g_positions * x_members * g_members == 0:
        return x.new_zeros(batch, dtype=torch.float64), x.new_zeros(batch, dtype=torch.float64)
    tiling = _tiling(x_positions, g_positions, x.dtype)
    (x, x_steps), (g, g_steps) = flat_image(x), flat_image(g)
    side, length = tiling["X_TILES"] * tiling["X_TILE"], tiling["G_TILES"] * tiling["G_TILE"]
    items = triton.cdiv(batch, tiling["PACK"]) * groups
    programs = min(items, max(1, _SCRATCH // (4 * side * side)))
    k = x.new_empty(programs, side, side, dtype=torch.float32)
    norms = x.new_empty(programs, side + length, dtype=torch.float32)
    terms = roundings(x_members, x.dtype) + roundings(g_members, g.dtype) + taps + tiling["G_TILE"] + 4
    # One launch after the other, so that they can share the scratch.
    for first in range(0, items, programs):
        _shifted_gram[(min(programs, items - first),)](
            *(x, g, k, norms, out, batch, groups, first, *x_steps, *g_steps),
            *(height, width, out_width, x_positions, g_positions, kernel[1], taps),
            *(*stride, *padding, *dilation, x_members, g_members),
            *(growth(x_members, x.dtype), x_members * GUARD, growth(g_members, g.dtype), g_members * GUARD),
            *(rounding(terms), g_positions**2 * taps * 2.0**-120),
            **tiling,
            PRECISION=PRECISION,
        )
    sqnorms, magnitudes = out.sum(2) if groups > 1 else out.squeeze(2)
    return sqnorms, magnitudes


def _tiling(x_positions: int, g_positions: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's sizes. Images of up to 8 positions are packed, so that a tile of 16 is not mostly empty."""
    slots = [triton.next_power_of_2(n) for n in (x_positions, g_positions)]
    pack = max(1, 16 // max(slots))
    tiles = [min(64, max(16, pack * slot)) for slot in slots]
    counts = [triton.cdiv(n, tile) for n, tile in zip((x_positions, g_positions), tiles, strict=True)]
    largest = max(tiles)
    # The longest steps that spill nothing: three TF32 products keep more in registers.
    channels = {16: 32, 32: 32, 64: 16}[largest] if dtype == torch.float32 else 64
    return {
        "PACK": pack,
        "X_SLOT": slots[0],
        "G_SLOT": slots[1],
        "X_TILE": tiles[0],
        "G_TILE": tiles[1],
        "X_TILES": counts[0],
        "G_TILES": counts[1],
        "CHANNELS": channels,
        "num_warps": {16: 1, 32: 4, 64: 8}[largest],
    }


def aot() -> list[Variant]:
    cases = [("bf16", n, "channel") for n in (256, 64, 16, 4)] + [
        ("fp32", n, "channel") for n in (256, 64, 16)
    ]
    cases += [("bf16", 256, "position"), ("fp32", 64, "position"), ("fp16", 16, "position")]
    return [_variant(*case) for case in cases]


def _variant(dtype: str, positions: int, inner: str) -> Variant:
    """A 3 x 3 convolution of a square image, padded by 1."""
    tiling = _tiling(positions, positions, torch.float32 if dtype == "fp32" else torch.bfloat16)
    warps = tiling.pop("num_warps")
    floats = ("x_growth", "x_guard", "g_growth", "g_guard", "rounding", "floor")
    pointers = {"x": dtype, "g": dtype, "k": "fp32", "norms": "fp32", "out": "fp64"}
    ones = [f"{n}_{axis}" for n in ("stride", "padding", "dilation") for axis in "yx"]
    constants = tiling | dict.fromkeys([*ones, f"x_{inner}", f"g_{inner}"], 1) | {"PRECISION": PRECISION}
    sizes = [n for n in _shifted_gram.arg_names if n not in (*constants, *pointers, *floats)]
    signature = {n: f"*{kind}" for n, kind in pointers.items()}
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(floats, "fp32")
    aligned = [
        "x_row",
        "g_row",
        "x_members",
        "g_members",
        "x_channel",
        "g_channel",
        "x_position",
        "g_position",
    ]
    if positions % 16 == 0:
        aligned += ["x_positions", "g_positions"]
    label = f"{dtype}, {positions} positions, {inner} innermost"
    divisible = tuple(n for n in aligned if n in sizes)
    return Variant(_shifted_gram, signature, constants, warps, hot=True, label=label, divisible=divisible)
