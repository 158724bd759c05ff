"""How tensor cores add, as measured by others, against what the norm kernels' bounds take for granted.

The model: products of a block, and the sum so far, are aligned to the largest exponent among them, cut (not rounded)
some bits below float32's last one, added exactly, and the result is cut to 24 bits. Sizes and bits: Fasi et al. 2021
(PeerJ CS 7:e330) and Khattak, Mikaitis 2025 (arXiv 2512.07004). What a GPU that is here does: test_triton_conv and
test_cuda_kernels.
"""

import pytest
import torch
from lossy_sums import lossy_rows

pytest.importorskip("triton", reason="triton is not installed")

from adaclip.kernels.products import roundings

UNIT = 2.0**-23
# Products of a block, bits kept below the last one.
CORES = {
    "A100, Ada": (8, 1),
    "A100, Ada, TF32": (4, 1),
    "H100, B200": (16, 2),
    "H100, B200, TF32": (8, 2),
    "no more than a float32 has": (4, 0),
}
LENGTHS = (1, 2, 3, 8, 9, 17, 64, 513, 2048)


def exponent(t):
    """Of float64 values; far below all others for 0."""
    return torch.where(t == 0, -2000, torch.frexp(t).exponent - 1).double()


def cut(t, step):
    return torch.trunc(t / step) * step


def summed(a, b, block, bits):
    """sum_c a_c b_c of float64 [S, n] as such cores form it."""
    total = torch.zeros(len(a), dtype=torch.float64)
    for x, y in zip(a.split(block, 1), b.split(block, 1), strict=True):
        # Not normalized: the product of two significands may be above 2.
        products = torch.cat([x * y, total[:, None]], 1)
        exponents = torch.cat([exponent(x) + exponent(y), exponent(total)[:, None]], 1)
        step = torch.exp2(exponents.amax(1).clamp_min(-140) - 23 - bits)
        total = cut(products, step[:, None]).sum(1)
        total = cut(total, torch.exp2(exponent(total).clamp_min(-140) - 23))
    return total


@pytest.mark.parametrize("core", CORES)
def test_a_sum_is_off_by_a_unit_a_product_at_most(core):
    worst = 0.0
    for length in LENGTHS:
        a, b = lossy_rows(length)
        error = (summed(a, b, *CORES[core]) - (a * b).sum(1)).abs()
        allowed = roundings(length, torch.bfloat16) * UNIT * (a * b).abs().sum(1)
        assert bool((error <= allowed).all()), (length, float((error / allowed).max()))
        worst = max(worst, float((error / allowed).max()))
    # The inputs are hard ones: a quarter of what is allowed is lost, and half of it where there is no bit to spare.
    assert worst > (0.4 if CORES[core][1] == 0 else 0.2)
