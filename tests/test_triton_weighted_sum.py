"""Triton's weighted sum of rows, against exact sums; dropped rows are not read."""

import pytest
import torch

pytest.importorskip("triton")

from adaclip import reference
from adaclip.kernels.weighted_sum import weighted_sum

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 300), (70, 7), (33, 513), (200, 65)])
def test_any_size(gpu_or_interpreter, dtype, shape):
    x, factors = torch.randn(shape).to(dtype), torch.rand(shape[0])
    factors[::3] = 0
    got = weighted_sum(x.to(gpu_or_interpreter), factors.to(gpu_or_interpreter)).cpu()
    exact = reference.weighted_sum(x.double(), factors.double())
    assert got.dtype == torch.float32
    assert torch.equal(got, exact.float())


def test_rows_of_factor_zero_are_not_read(gpu_or_interpreter):
    x = torch.randn(40, 30, device=gpu_or_interpreter)
    factors = torch.rand(40, device=gpu_or_interpreter)
    factors[[0, 17, 39]] = 0
    clean = weighted_sum(x, factors)
    x[0], x[17], x[39] = float("nan"), float("inf"), float("-inf")
    assert torch.equal(weighted_sum(x, factors), clean)
    assert clean.isfinite().all()
    assert torch.equal(weighted_sum(x, torch.zeros_like(factors)), torch.zeros_like(clean))


def test_rounding_does_not_grow_with_the_number_of_rows(gpu_or_interpreter):
    # In float32 the large values would swallow the small ones.
    x = torch.full((200, 3), 2.0**-20)
    x[0], x[-1] = 2.0**10, -(2.0**10)
    factors = torch.full((200,), 1 / 3)
    got = weighted_sum(x.to(gpu_or_interpreter), factors.to(gpu_or_interpreter)).cpu()
    exact = reference.weighted_sum(x.double(), factors.double())
    assert ((got.double() - exact).abs() <= 2.0**-23 * exact.abs()).all()


def test_rows_with_room_between_them(gpu_or_interpreter):
    x = torch.randn(9, 50, device=gpu_or_interpreter)[:, :33]
    factors = torch.rand(9, device=gpu_or_interpreter)
    assert torch.equal(weighted_sum(x, factors), weighted_sum(x.contiguous(), factors))


def test_one_call_gives_the_bits_of_the_next(gpu_or_interpreter):
    x, factors = torch.randn(130, 90).to(gpu_or_interpreter), torch.rand(130).to(gpu_or_interpreter)
    assert torch.equal(weighted_sum(x, factors), weighted_sum(x, factors))
