"""Triton's linear norms and per-sample gradients against the reference in float64."""

import math

import pytest
import torch

pytest.importorskip("triton")

from adaclip import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOM = 1e-4


def inputs(device, batch, positions, din, dout, dtype=torch.float32):
    a, g = torch.randn(batch, positions, din), torch.randn(batch, positions, dout)
    return a.to(device, dtype), g.to(device, dtype)


def exact(a, g):
    """(gradients, squared norms, magnitudes) in float64."""
    a, g = a.double().cpu(), g.double().cpu()
    grads = reference.linear_sample_grads(a, g)
    return grads, reference.row_sqnorms(grads), (a.norm(dim=2) * g.norm(dim=2)).sum(1).square()


def check_norms(a, g):
    from adaclip.kernels.linear_sample_norms import linear_sample_norms

    _, squares, scales = exact(a, g)
    sqnorms, magnitudes = (t.cpu() for t in linear_sample_norms(a, g))
    assert sqnorms.dtype == magnitudes.dtype == torch.float64
    assert bool((sqnorms >= squares).all())
    assert bool((sqnorms <= squares + ROOM * scales + 1e-20).all())
    assert bool((magnitudes >= scales).all())
    assert bool((magnitudes <= scales * (1 + ROOM) + 1e-20).all())


def check_grads(a, g):
    from adaclip.kernels.linear_sample_norms import linear_sample_grads

    grads, squares, scales = exact(a, g)
    sqnorms, kept = (t.cpu() for t in linear_sample_grads(a, g, True))
    assert kept.shape == grads.shape
    assert kept.is_contiguous()
    assert bool(((kept.double() - grads).flatten(1).norm(dim=1) <= 1e-5 * scales.sqrt()).all())
    stored = reference.row_sqnorms(kept)
    assert bool(((sqnorms >= stored) & (sqnorms <= stored * (1 + ROOM) + 1e-20)).all())
    sqnorms, kept = linear_sample_grads(a, g, False)
    assert kept is None
    assert bool((sqnorms.cpu() >= squares).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "positions", "din", "dout"),
    [
        (3, 1, 20, 11),
        (2, 1, 1100, 3),
        (1, 5, 33, 30),
        (2, 20, 40, 50),
        (2, 70, 90, 100),
        (2, 70, 5, 3),
        (0, 3, 4, 5),
    ],
)
def test_shapes_and_dtypes(gpu_or_interpreter, dtype, batch, positions, din, dout):
    a, g = inputs(gpu_or_interpreter, batch, positions, din, dout, dtype)
    check_norms(a, g)
    check_grads(a, g)


@pytest.mark.parametrize("sizes", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_to_sum(gpu_or_interpreter, sizes):
    from adaclip.kernels.linear_sample_norms import linear_sample_norms

    for out in linear_sample_norms(*inputs(gpu_or_interpreter, *sizes)):
        assert out.tolist() == [0, 0]


@pytest.mark.parametrize(("positions", "din"), [(1, 20), (5, 40), (34, 50), (70, 5)])
@pytest.mark.parametrize(("where", "value"), [("a", math.inf), ("g", math.nan)])
def test_a_sample_that_is_not_finite_touches_no_other(gpu_or_interpreter, value, positions, din, where):
    from adaclip.kernels.linear_sample_norms import linear_sample_grads, linear_sample_norms

    a, g = inputs(gpu_or_interpreter, 3, positions, din, din)

    def everything():
        return [*linear_sample_norms(a, g), *linear_sample_grads(a, g, True)]

    clean = everything()
    (a if where == "a" else g)[1, positions // 2, 3] = value
    dirty = everything()
    assert not bool(torch.isfinite(dirty[0][1]) | torch.isfinite(dirty[2][1]))
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_null_gradients_keep_their_norm(gpu_or_interpreter, dtype):
    a = 100 * torch.randn(4, 1, 40) + 0.01 * torch.randn(4, 12, 40)
    g = torch.randn(4, 6, 50)
    g = torch.cat([g, -g.flip(1)], dim=1)
    a, g = a.to(gpu_or_interpreter, dtype), g.to(gpu_or_interpreter, dtype)
    check_norms(a, g)
    check_grads(a, g)


@pytest.mark.parametrize("positions", [1, 5])
def test_underflow_stays_bounded(gpu_or_interpreter, positions):
    from adaclip.kernels.linear_sample_norms import linear_sample_norms

    a, g = inputs(gpu_or_interpreter, 2, positions, 20, 30)
    a, g = a * 1e-25, g * 1e-25
    sqnorms, _ = linear_sample_norms(a, g)
    assert bool((sqnorms.cpu() >= exact(a, g)[1]).all())
    assert bool(torch.isfinite(sqnorms).all())
