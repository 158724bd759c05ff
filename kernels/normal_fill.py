"""Fill float32 memory with normals, or add them to it: csrc/core/normal.h's `normal_fill` on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .normal import CHUNK_BLOCKS, CHUNK_NORMALS, element, normals

if TYPE_CHECKING:
    from torch import Tensor

    from .aot import Variant

__all__ = ["normal_fill", "signed_stream"]

_LANES = 128  # one block of keystream for each thread of four warps


@triton.jit(do_not_specialize=["stream", "one", "first_chunk", "n"])
def _normal_fill(key, step, stream, one, out, n, std, first_chunk, ADD: tl.constexpr, LANES: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64) * (LANES // CHUNK_BLOCKS)
    at = chunk * CHUNK_NORMALS
    left = n - at
    scale = tl.load(std)
    if scale != 0.0:
        z = normals(key, step, stream, one, first_chunk + chunk, LANES)
        for row in tl.static_range(10):
            i = element(row, LANES)
            value = scale * z[row]
            if ADD:
                value = tl.load(out + at + i, mask=i < left) + value
            tl.store(out + at + i, value, mask=i < left)
    elif not ADD:
        for row in tl.static_range(10):
            i = element(row, LANES)
            tl.store(out + at + i, tl.zeros([LANES], tl.float32), mask=i < left)


def signed_stream(stream: int) -> int:
    """The int32 with the bits of a stream below 2^32: kernels then have one type for it, whatever its value."""
    return stream - (1 << 32) if stream >= 1 << 31 else stream


def normal_fill(
    key: Tensor, step: Tensor, stream: int, out: Tensor, std: Tensor, first_chunk: int, add: bool
) -> None:
    """out[i] = std z[i], or out[i] += std z[i] if `add`, where z[i] is normal i % 160 of chunk first_chunk + i // 160.

    key int32 [8], step int64 [1] (their bits: unsigned), std float32 [1]: read on the device, at every replay of a
    captured graph. stream: 0 to 2^32 - 1. out: float32, one block of memory, any address and size; written in
    place. Where std is 0 no noise is made: `out` is zeroed, or with `add` not touched. The bits are those of
    `adaclip._core.normal_fill`. The caller keeps first_chunk + ceil(n / 160) within the stream's 2^28 chunks.
    """
    n = out.numel()
    if n == 0:
        return
    grid = (triton.cdiv(n, _LANES // 16 * 160),)
    where = key, step, signed_stream(stream), 1
    _normal_fill[grid](
        *where, out, n, std, first_chunk, ADD=add, LANES=_LANES, num_warps=4, enable_fp_fusion=False
    )


def aot() -> list[Variant]:
    from .aot import Variant

    signature = {
        "key": "*i32",
        "step": "*i64",
        "stream": "i32",
        "one": "i32",
        "out": "*fp32",
        "n": "i64",
        "std": "*fp32",
        "first_chunk": "i32",
    }
    return [
        Variant(
            _normal_fill,
            signature,
            {"ADD": add, "LANES": _LANES},
            hot=True,
            label="add" if add else "fill",
            options={"enable_fp_fusion": False},
        )
        for add in (False, True)
    ]
