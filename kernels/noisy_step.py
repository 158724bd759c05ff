"""The noisy update of all parameters in one launch: csrc/core/noisy_step.h on a GPU, with the same bits."""

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

__all__ = ["RULE_NUMBERS", "StepTable", "noisy_step"]

RULE_NUMBERS = 14
"""Numbers of a rule: StepRule of csrc/core/noisy_step.h in its order, std first, then adaclip.step_rule.StepRule."""

_LANES = TILE_CHUNKS * 16  # blocks of keystream in a tile, one for each thread
_WARPS = _LANES // 32
_RULE = tl.constexpr(RULE_NUMBERS)


@triton.jit
def _noisy_gradient(grad, has_grad, held, i, std, z):
    """grad + std z; where std is 0 the gradient as it is, and where there is none just the noise."""
    g = tl.load(grad + i, mask=i < held, other=0.0)
    noise = std * z
    return tl.where(std != 0.0, tl.where(has_grad, g + noise, noise), g)


@triton.jit(do_not_specialize=["stream", "one"])
def _noisy_step(key, step, stream, one, pointers, numel, first_chunk, rules, tiles, LANES: tl.constexpr):
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(tile).to(tl.int64)
    chunk = tl.load(tile + 1).to(tl.int64)
    at = chunk * CHUNK_NORMALS
    left = tl.load(numel + tensor) - at
    places = pointers + tensor * 4
    has_grad = tl.load(places + 1) != 0
    # Elements that have a gradient: the interpreter of Triton 3.9 takes no mask made of `has_grad` itself.
    held = tl.where(has_grad, left, 0)
    has_momentum = tl.load(places + 2) != 0
    has_square = tl.load(places + 3) != 0
    param = tl.load(places).to(tl.pointer_type(tl.float32)) + at
    grad = tl.load(places + 1).to(tl.pointer_type(tl.float32)) + at
    momentum = tl.load(places + 2).to(tl.pointer_type(tl.float32)) + at
    square = tl.load(places + 3).to(tl.pointer_type(tl.float32)) + at
    rule = rules + tensor * _RULE
    std, sign, l2, shrink = tl.load(rule), tl.load(rule + 1), tl.load(rule + 2), tl.load(rule + 3)
    decay, keep = tl.load(rule + 4), tl.load(rule + 5)
    direct, follow = tl.load(rule + 6), tl.load(rule + 7)

    zero = tl.zeros([LANES], tl.float32)
    z = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    if std != 0.0:
        z = normals(key, step, stream, one, tl.load(first_chunk + tensor) + chunk, LANES)

    if has_square:
        square_decay, square_keep = tl.load(rule + 8), tl.load(rule + 9)
        scale, eps = tl.load(rule + 10), tl.load(rule + 11)
        variance, floor_sq = tl.load(rule + 12), tl.load(rule + 13)
        corrected = floor_sq >= 0.0
        for row in tl.static_range(10):
            i = element(row, LANES)
            inside = i < left
            n = _noisy_gradient(grad, has_grad, held, i, std, z[row])
            p = tl.load(param + i, mask=inside)
            g = sign * n + l2 * p
            m = decay * tl.load(momentum + i, mask=inside) + keep * g
            v = square_decay * tl.load(square + i, mask=inside) + square_keep * (g * g)
            tl.store(momentum + i, m, mask=inside)
            tl.store(square + i, v, mask=inside)
            signal = v * scale - variance
            signal = tl.where(signal > floor_sq, signal, floor_sq)
            root = tl.math.sqrt_rn(tl.where(corrected, signal, v))
            divisor = tl.where(corrected, root, root * scale) + eps
            move = tl.math.div_rn(direct * g + follow * m, divisor)
            tl.store(param + i, shrink * p - move, mask=inside)
    elif has_momentum:
        for row in tl.static_range(10):
            i = element(row, LANES)
            inside = i < left
            n = _noisy_gradient(grad, has_grad, held, i, std, z[row])
            p = tl.load(param + i, mask=inside)
            g = sign * n + l2 * p
            m = decay * tl.load(momentum + i, mask=inside) + keep * g
            tl.store(momentum + i, m, mask=inside)
            tl.store(param + i, shrink * p - (direct * g + follow * m), mask=inside)
    else:
        for row in tl.static_range(10):
            i = element(row, LANES)
            inside = i < left
            n = _noisy_gradient(grad, has_grad, held, i, std, z[row])
            p = tl.load(param + i, mask=inside)
            g = sign * n + l2 * p
            tl.store(param + i, shrink * p - direct * g, mask=inside)


def noisy_step(key: Tensor, step: Tensor, stream: int, table: StepTable) -> None:
    """One step of every parameter of the table, in place: noise, sum and update in one pass, in float32.

    key int32 [8], step int64 [1] (their bits: unsigned), and all of the table: read on the device, so a captured
    graph may be replayed after they changed. stream: 0 to 2^32 - 1. Columns of `table.pointers`: parameter, gradient
    (0: zeros), momentum (0: none), square (0: none; not without momentum). `table.rules` is float32
    [P, RULE_NUMBERS]. The caller keeps every chunk below the stream's 2^28.

    Where a rule's std is 0 no noise is made. Bits are those of `adaclip._core.noisy_step`, whatever the addresses
    and sizes; the result of an element depends on no other one.
    """
    if len(table.tiles) == 0:
        return
    where = key, step, signed_stream(stream), 1
    arrays = table.pointers, table.numel, table.first_chunk, table.rules, table.tiles
    _noisy_step[(len(table.tiles),)](*where, *arrays, LANES=_LANES, num_warps=_WARPS, enable_fp_fusion=False)


def aot() -> list[Variant]:
    from .aot import Variant

    signature = {
        "key": "*i32",
        "step": "*i64",
        "stream": "i32",
        "one": "i32",
        "pointers": "*i64",
        "numel": "*i64",
        "first_chunk": "*i64",
        "rules": "*fp32",
        "tiles": "*i32",
    }
    options = {"enable_fp_fusion": False}
    return [Variant(_noisy_step, signature, {"LANES": _LANES}, num_warps=_WARPS, hot=True, options=options)]
