"""Per-sample norms of a convolution's weight gradient by the shifted Gram, which never forms the gradient."""

from __future__ import annotations

import functools

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

_SCRATCH = 1 << 26

# What the cost model counts in multiply-adds... 
_SHIFT, _READ = 160, 350


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
    return coordinate.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


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
        row_corner = (row_slot * X_SLOT + row_top * width + row_left) * X_ROWS
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
            column_corner = column_slot * X_SLOT + column_top * width + column_left
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
                step = down * width + right
                hit = _inside(row_top + down, height) & _inside(row_left + right, width)
                row_source = tl.where(hit, row_corner + step * X_ROWS, -(2**30))
                hit = _inside(column_top + down, height) & _inside(column_left + right, width)
                column_source = tl.where(hit, column_corner + step, -(2**30))
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
    batch, (height, width), (out_height, out_width) = x.shape[0], x.shape[2:], g.shape[2:]
    x_positions, g_positions, taps = height * width, out_height * out_width, kernel[0] * kernel[1]
    x_members, g_members = x.shape[1] // groups, g.shape[1] // groups
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if not _gram_is_cheaper(x_positions, g_positions, x_members, g_members, taps):
        return instantiated_norms(x, g, **geometry)
    out = x.new_empty(2, batch, groups, dtype=torch.float64)
    if out.numel() == 0 or x_positions * g_positions * x_members * g_members == 0:
        return out.zero_().sum(2).unbind()
    tiling = _tiling(x_positions, g_positions, x.dtype)
    pack, warps = tiling["PACK"], tiling.pop("num_warps")
    side, length = tiling["X_TILES"] * tiling["X_TILE"], tiling["G_TILES"] * tiling["G_TILE"]
    (x, x_steps), (g, g_steps) = flat_image(x), flat_image(g)
    roundings_of_one = roundings(x_members, x.dtype) + roundings(g_members, g.dtype)
    items = triton.cdiv(batch, pack) * groups
    programs = min(items, max(1, _SCRATCH // (4 * side * side)))
    k = x.new_empty(programs, side, side, dtype=torch.float32)
    norms = x.new_empty(programs, side + length, dtype=torch.float32)
    for first in range(0, items, programs):
        _shifted_gram[(min(programs, items - first),)](
            *(x, g, k, norms, out, batch, groups, first, *x_steps, *g_steps),
            *(height, width, out_width, x_positions, g_positions, kernel[1], taps),
            *(*stride, *padding, *dilation, x_members, g_members),
            *(growth(x_members, x.dtype), x_members * GUARD, growth(g_members, g.dtype), g_members * GUARD),
            rounding(roundings_of_one + taps + tiling["G_TILE"] + 4),
            g_positions**2 * taps * 2.0**-120,
            **tiling,
            PRECISION=PRECISION,
            num_warps=warps,
        )
    return out.unbind() if False else tuple(out.sum(2)) if groups > 1 else tuple(out.squeeze(2))


def _gram_is_cheaper(x_positions: int, g_positions: int, x_members: int, g_members: int, taps: int) -> bool:
    if max(x_positions, g_positions) > _LARGEST:
        return False
    gram = x_positions**2 * x_members + g_positions**2 * (g_members + _SHIFT * taps / 2)
    formed = 2 * g_positions * g_members * x_members * taps
    return gram <= formed + _READ * (x_positions * x_members + g_positions * g_members)


def _tiling(x_positions: int, g_positions: int, dtype: torch.dtype) -> dict[str, int]:
    slots = [triton.next_power_of_2(n) for n in (x_positions, g_positions)]
    pack = max(1, 16 // max(slots))
    tiles = [min(64, max(16, pack * n)) for n in slots]
    counts = [triton.cdiv(pack * n, t) if pack == 1 else 1 for n, t in zip((x_positions, g_positions), tiles)]
    largest = max(tiles)
    return {
        "PACK": pack,
        "X_SLOT": slots[0],
        "G_SLOT": slots[1],
        "X_TILE": tiles[0],
        "G_TILE": tiles[1],
        "X_TILES": counts[0],
        "G_TILES": counts[1],
        "CHANNELS": 64 if largest == 16 and dtype != torch.float32 else 32,
        "num_warps": {16: 1, 32: 4, 64: 8}[largest],
    }
