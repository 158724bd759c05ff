"""Matrix products on tensor cores, how images lie in memory, and how far such products can round.

What the norm kernels' bounds rest on, with u = 2^-23:

1. A product of two bfloat16 or float16 values is exact in float32. Tensor cores add such products in float32 but may
   truncate where IEEE arithmetic would round, so every term of a sum counts with u instead of u/2. NVIDIA does not say
   how they add. Measured: those of A100 and Ada add 8 products (4 of TF32) and the sum so far, cut at u/2 of the
   largest, those of H100 and B200 16 (8), cut at u/4, and cut the result to 24 bits: (8/2 + 1) u for 8 products at most,
   (4/2 + 1) u for 4, (16/4 + 1) u for 16 (Fasi et al. 2021, PeerJ CS 7:e330; Khattak, Mikaitis 2025, arXiv
   2512.07004).
2. float32 operands are split into two TF32 values, hi + lo, of which three products are taken ("tf32x3"). What a
   value loses is below 2^-20 of it even if both halves are truncated, and so is the product lo lo that is left out:
   a product is off by less than 2^-18 = 32 u of itself. One TF32 product alone, 2^-10, would drown near-null gradients.
3. So a computed `sum_c a_c b_c` of n terms is off by at most `roundings(n, dtype) u |a| |b|` (Cauchy-Schwarz),
   roundings = n, or n + 32 for float32, plus what underflows: less than 2^-126 (n + |a|_1 + |b|_1).
4. Underflow is paid for by GUARD: the norms |a| that a bound is made of are raised to `sqrt(|a|^2 + n GUARD)`,
   at least 2^-50 sqrt(n) each, so that u |a| |b| exceeds all of it. What that adds to a norm is far below anything that
   a gradient is clipped to.
5. Overflow gives inf or nan, and so does an input that is not finite: such a sample's norm is not finite, which drops it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["GUARD", "PRECISION", "flat_image", "growth", "product", "rounding", "roundings"]

GUARD = 2.0**-100
PRECISION = "tf32x3"
_UNIT = 2.0**-23

# The interpreter multiplies with numpy, which has no bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION is for float32 operands; others have one only."""
    if _INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc)
    return acc


def roundings(length: int, dtype: torch.dtype) -> int:
    """Units by which a sum of `length` products of this dtype can be off, relative to the norms' product."""
    return length + (32 if dtype == torch.float32 else 0)


def rounding(terms: int) -> float:
    """What `terms` relative errors of one unit each, one upon the other, amount to; a little more."""
    return math.expm1(terms * _UNIT) * (1 + 2.0**-20) + 2.0**-40


def growth(length: int, dtype: torch.dtype) -> float:
    """What a computed sum of `length` squares is multiplied by to be at least the exact one.

    The four further roundings: of this multiplication, and of a square root taken after it that the
    hardware approximates.
    """
    return 1 / (1 - min(rounding(roundings(length, dtype) + 8), 0.5))


def flat_image(t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """[B, C, H, W] contiguous or channels_last -> (t, its steps from sample to sample, channel, position).

    Positions are numbered row by row. Anything else is copied.
    """
    _, channels, height, width = t.shape
    if not t.is_contiguous():
        if t.is_contiguous(memory_format=torch.channels_last):
            return t, (channels * height * width, 1, channels)
        t = t.contiguous()
    return t, (channels * height * width, height * width, 1)
