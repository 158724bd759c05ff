"""Standard normals from the ChaCha20 keystream, as device functions; layout and formulas: csrc/core/normal.h.

Their bits are the CPU's: every operation is one correctly rounded IEEE operation. So a kernel that calls these must
be launched with `enable_fp_fusion=False` (no multiply-add contracts), and divides and takes roots with `div_rn` and
`sqrt_rn`.

A lane is a block of the keystream, and has ten normals. Chunks are 16 blocks and 160 normals: of the element that
`element` of lane i, row k gives, counted from the first lane's chunk, this is normal k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chacha20 import keystream_blocks

__all__ = ["CHUNK_BLOCKS", "CHUNK_NORMALS", "element", "normals", "normals_of_words"]

CHUNK_BLOCKS = tl.constexpr(16)
CHUNK_NORMALS = tl.constexpr(160)

_TWO_TO_MINUS_31 = tl.constexpr(2.0**-31)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(
    float.fromhex("0x1.921fb6p-32")
)  # 2 pi / 2^32, times 4 / 4: the angle's low 30 bits count


@triton.jit
def _minus_two_log(high, low):
    """-2 ln u, where u = (high * 2^31 + (low mod 2^31 | 1)) / 2^63."""
    above = high.to(tl.int32, bitcast=True) < 0
    low = ((low & 0x7FFFFFFF) | 1).to(tl.int32, bitcast=True)
    c = high.to(tl.int32, bitcast=True).to(tl.float32) + low.to(tl.float32) * _TWO_TO_MINUS_31
    bits = c.to(tl.uint32, bitcast=True)
    e = ((bits >> 23).to(tl.int32, bitcast=True) - 127).to(tl.float32) - 31.0
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    f = tl.where(above, c * _TWO_TO_MINUS_32, mantissa - 1.0)
    e = tl.where(above, 0.0, e * -1.38629436112)
    s = tl.math.div_rn(f, f + 2.0)
    z = s * s
    t = z * -0.560489177507 - 0.559982821407
    t = t * z - 0.800433981192
    t = t * z - 1.33332826265
    t = t * (z * s) - s * 4.0
    return t + e


@triton.jit
def _box_muller(high, low, angle):
    """The two normals of one pair: cosine, sine."""
    radius = tl.math.sqrt_rn(_minus_two_log(high, low))
    x = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    y = x * x
    s = y * -0.000195172989843 + 0.00833217814618
    c = y * -0.00135978231103 + 0.0416562945787
    s = s * y - 0.166666549437
    c = c * y - 0.499998947814
    s = (s * y) * x + x
    c = c * y + 1.0
    quarter = angle + 0x20000000
    swap = (quarter & 0x40000000) != 0
    cosine = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ ((quarter + 0x40000000) & 0x80000000)
    sine = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ (quarter & 0x80000000)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit
def normals_of_words(words):
    """Ten float32 tensors from the tuple of 16 that `keystream_blocks` gives."""
    z0, z1 = _box_muller(words[0], words[1], words[2])
    z2, z3 = _box_muller(words[3], words[4], words[5])
    z4, z5 = _box_muller(words[6], words[7], words[8])
    z6, z7 = _box_muller(words[9], words[10], words[11])
    z8, z9 = _box_muller(words[12], words[13], words[14])
    return z0, z1, z2, z3, z4, z5, z6, z7, z8, z9


@triton.jit
def normals(key, step, stream, one, chunk, LANES: tl.constexpr):
    """Ten float32 tensors [LANES]: the normals of LANES / 16 chunks of the stream, from int64 `chunk` on."""
    counters = (chunk * CHUNK_BLOCKS).to(tl.uint32) + tl.arange(0, LANES).to(tl.uint32)
    return normals_of_words(keystream_blocks(key, step, stream, one, counters))


@triton.jit
def element(row: tl.constexpr, LANES: tl.constexpr):
    """int32 [LANES]: where the lanes' normals of that row, 0 to 9, are, counted from the first lane's chunk."""
    lane = tl.arange(0, LANES)
    return lane // CHUNK_BLOCKS * CHUNK_NORMALS + row * CHUNK_BLOCKS + lane % CHUNK_BLOCKS
