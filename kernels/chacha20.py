"""The ChaCha20 keystream (RFC 8439) as device functions: word w of block j under (key, step, stream).

The addresses are those of csrc/core/chacha20.h, so the words are the CPU's, bit for bit. One lane of a tensor is
one block: its 16 words are 16 tensors, and all arithmetic stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keystream_blocks"]


@triton.jit
def _quarter_round(a, b, c, d, one):
    a += b * one
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d * one
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b * one
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d * one
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def keystream_blocks(key, step, stream, one, counters):
    """Sixteen uint32 tensors like `counters`: the words of those blocks.

    key: pointer to int32 [8], each word little-endian of 4 bytes of the key. step: pointer to int64 [1], whose bits
    are the step's, up to 2^64 - 1. stream: an int32 whose bits are the stream's. counters: uint32, block numbers.

    one: the argument `one` of a kernel that does not specialize it. The compiler must not know that it is 1: a sum
    written as a multiply-add then goes to the multipliers' pipe, where that of exclusive ors and rotations would have
    to take all twelve operations of a quarter round.
    """
    k0 = tl.load(key).to(tl.uint32, bitcast=True)
    k1 = tl.load(key + 1).to(tl.uint32, bitcast=True)
    k2 = tl.load(key + 2).to(tl.uint32, bitcast=True)
    k3 = tl.load(key + 3).to(tl.uint32, bitcast=True)
    k4 = tl.load(key + 4).to(tl.uint32, bitcast=True)
    k5 = tl.load(key + 5).to(tl.uint32, bitcast=True)
    k6 = tl.load(key + 6).to(tl.uint32, bitcast=True)
    k7 = tl.load(key + 7).to(tl.uint32, bitcast=True)
    nonce = tl.load(step).to(tl.uint64, bitcast=True)
    n0 = nonce.to(tl.uint32)
    n1 = (nonce >> 32).to(tl.uint32)
    n2 = stream.to(tl.uint32)

    one = one.to(tl.uint32)
    zeros = tl.zeros_like(counters)
    x0, x1 = zeros + 0x61707865, zeros + 0x3320646E
    x2, x3 = zeros + 0x79622D32, zeros + 0x6B206574
    x4, x5, x6, x7 = zeros + k0, zeros + k1, zeros + k2, zeros + k3
    x8, x9, x10, x11 = zeros + k4, zeros + k5, zeros + k6, zeros + k7
    x12, x13, x14, x15 = counters, zeros + n0, zeros + n1, zeros + n2
    for _ in tl.range(10, loop_unroll_factor=2):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12, one)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13, one)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14, one)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15, one)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15, one)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12, one)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13, one)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14, one)
    return (
        x0 + 0x61707865,
        x1 + 0x3320646E,
        x2 + 0x79622D32,
        x3 + 0x6B206574,
        x4 + k0,
        x5 + k1,
        x6 + k2,
        x7 + k3,
        x8 + k4,
        x9 + k5,
        x10 + k6,
        x11 + k7,
        x12 + counters,
        x13 + n0,
        x14 + n1,
        x15 + n2,
    )
