"""The point that gradients are taken at, for all parameters in one launch: csrc/core/perturb.h on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .normal import CHUNK_NORMALS, element, normals
from .normal_fill import signed_stream
from .step_table import TILE_CHUNKS, StepTable

if TYPE_CHECKING:
    from torch import Tensor

    from .aot import Variant

__all__ = ["MOVE_NUMBERS", "perturb"]

MOVE_NUMBERS = 2
"""Numbers of a tensor's move: the standard deviation of its shift and its length along the direction."""

_LANES = TILE_CHUNKS * 16  # blocks of keystream in a tile, one for each thread
_WARPS = _LANES // 32
_RULE = tl.constexpr(MOVE_NUMBERS)


@triton.jit(do_not_specialize=["stream", "one"])
def _perturb(
    key,
    step,
    stream,
    one,
    sign,
    pointers,
    numel,
    first_chunk,
    rules,
    tiles,
    DRAW: tl.constexpr,
    LANES: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(tile).to(tl.int64)
    chunk = tl.load(tile + 1).to(tl.int64)
    at = chunk * CHUNK_NORMALS
    left = tl.load(numel + tensor) - at
    places = pointers + tensor * 4
    has_shift = tl.load(places + 2) != 0
    has_direction = tl.load(places + 3) != 0
    param = tl.load(places).to(tl.pointer_type(tl.float32)) + at
    out = tl.load(places + 1).to(tl.pointer_type(tl.float32)) + at
    shift = tl.load(places + 2).to(tl.pointer_type(tl.float32)) + at
    direction = tl.load(places + 3).to(tl.pointer_type(tl.float32)) + at
    std = tl.load(rules + tensor * _RULE)
    length = tl.load(rules + tensor * _RULE + 1)

    if DRAW and has_shift:
        z = normals(key, step, stream, one, tl.load(first_chunk + tensor) + chunk, LANES)
        for row in tl.static_range(10):
            i = element(row, LANES)
            inside = i < left
            drawn = std * z[row]
            tl.store(shift + i, drawn, mask=inside)
            moved = tl.load(param + i, mask=inside) + sign * drawn
            if has_direction:
                moved += length * tl.load(direction + i, mask=inside)
            tl.store(out + i, moved, mask=inside)
    else:
        for row in tl.static_range(10):
            i = element(row, LANES)
            inside = i < left
            moved = tl.load(param + i, mask=inside)
            if has_shift:
                moved += sign * tl.load(shift + i, mask=inside)
            if has_direction:
                moved += length * tl.load(direction + i, mask=inside)
            tl.store(out + i, moved, mask=inside)


def perturb(key: Tensor, step: Tensor, stream: int, table: StepTable, draw: bool, sign: float) -> None:
    """out = param + sign shift + length direction, for every tensor of the table, in float32.

    key int32 [8], step int64 [1] (their bits: unsigned), and all of the table: read on the device. stream: 0 to
    2^32 - 1. Columns of `table.pointers`: param, out, shift (0: none), direction (0: none); `table.rules` is float32
    [P, MOVE_NUMBERS], std and length. With `draw` the shifts are made first, std times the normals of their chunks,
    and kept; else they are read as they are. No two of a row's tensors overlap. The caller keeps every chunk below
    the stream's 2^28.

    Bits are those of `adaclip._core.perturb`.
    """
    if len(table.tiles) == 0:
        return
    where = key, step, signed_stream(stream), 1
    arrays = table.pointers, table.numel, table.first_chunk, table.rules, table.tiles
    _perturb[(len(table.tiles),)](
        *where, float(sign), *arrays, DRAW=draw, LANES=_LANES, num_warps=_WARPS, enable_fp_fusion=False
    )


def aot() -> list[Variant]:
    from .aot import Variant

    signature = {
        "key": "*i32",
        "step": "*i64",
        "stream": "i32",
        "one": "i32",
        "sign": "fp32",
        "pointers": "*i64",
        "numel": "*i64",
        "first_chunk": "*i64",
        "rules": "*fp32",
        "tiles": "*i32",
    }
    return [
        Variant(
            _perturb,
            signature,
            {"DRAW": draw, "LANES": _LANES},
            num_warps=_WARPS,
            hot=True,
            label="draw" if draw else "read",
            options={"enable_fp_fusion": False},
        )
        for draw in (True, False)
    ]
