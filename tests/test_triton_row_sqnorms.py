"""Triton's squared norms of rows: upper bounds, close ones, and every row by itself."""

import math
from fractions import Fraction

import pytest
import torch

pytest.importorskip("triton")

from adaclip import reference
from adaclip.kernels import row_sqnorms as module
from adaclip.kernels.row_sqnorms import row_sqnorms

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (3, 300), (2, 1025), (1, 20000)])
def test_any_size(gpu_or_interpreter, dtype, shape):
    x = torch.randn(shape).to(dtype)
    got = row_sqnorms(x.to(gpu_or_interpreter)).cpu()
    exact = reference.row_sqnorms(x)
    assert got.dtype == torch.float64
    assert got.shape == shape[:1]
    assert (got >= exact).all()
    assert (got <= exact * (1 + 2.0**-20)).all()


def test_never_below_the_exact_norm(gpu_or_interpreter):
    # Every lane starts at 1 and then meets squares below half of its last bit: a float64 sum drops them all.
    x = torch.full((2, 5 * module._BLOCK), 2.0**-27)
    x[:, : module._BLOCK] = 1.0
    x[1, module._BLOCK :] *= 1.4
    for row, got in zip(x, row_sqnorms(x.to(gpu_or_interpreter)).tolist(), strict=True):
        exact = sum(Fraction(v) ** 2 for v in row.tolist())
        assert exact <= Fraction(got) <= exact * (1 + Fraction(1, 2**20))


def test_segments_add_up_to_the_row(gpu_or_interpreter, monkeypatch):
    monkeypatch.setattr(module, "_SEGMENT", 64)
    monkeypatch.setattr(module, "_BLOCK", 32)
    x = torch.randn(2, 64 * 40 + 5)
    got, exact = row_sqnorms(x.to(gpu_or_interpreter)).cpu(), reference.row_sqnorms(x)
    assert (got >= exact).all()
    assert (got <= exact * (1 + 2.0**-20)).all()


def test_numbers_of_any_size_neither_overflow_nor_vanish(gpu_or_interpreter):
    x = torch.tensor([[3.4e38, 3.4e38], [1e-45, 0.0], [0.0, 0.0]], device=gpu_or_interpreter)
    big, small, zero = row_sqnorms(x).tolist()
    assert math.isfinite(big)
    assert big >= 2 * Fraction(x[0, 0].item()) ** 2
    assert small >= Fraction(2) ** -298
    assert zero == 0.0


def test_a_row_that_is_not_finite_touches_no_other(gpu_or_interpreter):
    x = torch.randn(4, 70, device=gpu_or_interpreter)
    clean = row_sqnorms(x)
    x[1, 3], x[2, 69] = float("nan"), float("-inf")
    dirty = row_sqnorms(x)
    assert not dirty[1:3].isfinite().any()
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])


def test_bits_depend_on_the_row_alone(gpu_or_interpreter):
    # Rows with room between them, alone and among others.
    x = torch.randn(5, 400, device=gpu_or_interpreter)[:, :333]
    whole = row_sqnorms(x)
    assert torch.equal(whole, torch.cat([row_sqnorms(row[None]) for row in x]))
    assert torch.equal(whole, row_sqnorms(x.contiguous()))
