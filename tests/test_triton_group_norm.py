"""Triton's group normalization backward against float64 autograd, in both layouts."""

import pytest
import torch
from test_core_group_norm import forward, truth

pytest.importorskip("triton")

from adaclip.kernels.group_norm import group_norm_backward

pytestmark = pytest.mark.usefixtures("one_thread")
# (B, C, *in), groups: channels of a group and positions that are no powers of two, one group, one channel a
# group, more tiles than are summed in float32.
CASES = [
    ((3, 12, 5, 7), 4),
    ((2, 18, 3, 3), 6),
    ((1, 4, 80, 80), 4),
    ((2, 70, 4), 1),
    ((2, 160, 2, 1), 32),
    ((2, 6, 2, 3, 2), 3),
    ((3, 8), 2),
]


def run(device, g, x, mean, rstd, weight, groups):
    weight = None if weight is None else weight.to(device)
    made = group_norm_backward(g.to(device), x.to(device), mean.to(device), rstd.to(device), weight, groups)
    return [t.cpu() for t in made]


def layout(t, channels_last):
    if not channels_last or t.dim() < 4:
        return t
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_any_shape(gpu_or_interpreter, shape, groups, affine, channels_last):
    x, g = torch.randn(shape) + 1, torch.randn(shape)
    weight = torch.randn(shape[1]) if affine else None
    _, mean, rstd = forward(x, weight, groups)
    x, g = layout(x, channels_last), layout(g, channels_last)
    made = run(gpu_or_interpreter, g, x, mean, rstd, weight, groups)
    assert made[0].stride() == x.stride()
    assert [t.dtype for t in made] == [torch.float32] * 3
    assert all(
        error(ours, exact) < 2e-6 for ours, exact in zip(made, truth(g, x, weight, groups), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_16_bit_inputs_are_widened_first(gpu_or_interpreter, dtype, channels_last):
    x, g = (layout(torch.randn(3, 12, 5, 7).to(dtype), channels_last) for _ in range(2))
    weight = torch.randn(12)
    _, mean, rstd = forward(x.float(), weight, 4)
    dx, dgamma, dbeta = run(gpu_or_interpreter, g, x, mean, rstd, weight, 4)
    exact = truth(g, x, weight, 4)
    assert (dx.dtype, dgamma.dtype, dbeta.dtype) == (dtype, torch.float32, torch.float32)
    assert error(dx, exact[0]) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert error(dgamma, exact[1]) < 2e-6
    assert error(dbeta, exact[2]) < 2e-6


def test_any_layouts(gpu_or_interpreter):
    x, g, weight = torch.randn(2, 8, 3, 5), torch.randn(2, 8, 3, 5), torch.randn(8)
    _, mean, rstd = forward(x, weight, 2)
    exact = truth(g, x, weight, 2)
    sliced = torch.randn(2, 8, 3, 10)[..., ::2].copy_(x)
    for given_x, given_g in (
        (x, layout(g, True)),
        (layout(x, True), g),
        (sliced, g),
        (x, torch.ones_like(g[..., :1])),
    ):
        want = exact if given_g.shape == g.shape else truth(given_g.expand_as(x), x, weight, 2)
        made = run(gpu_or_interpreter, given_g.expand_as(x), given_x, mean, rstd, weight, 2)
        assert all(error(ours, true) < 2e-6 for ours, true in zip(made, want, strict=True))


def test_statistics_of_half_precision_are_read_as_they_are(gpu_or_interpreter):
    x, g, weight = torch.randn(2, 8, 9), torch.randn(2, 8, 9), torch.randn(8).bfloat16()
    _, mean, rstd = forward(x, None, 2)
    mean, rstd = mean.bfloat16(), rstd.bfloat16()
    narrow = run(gpu_or_interpreter, g, x, mean, rstd, weight, 2)
    wide = run(gpu_or_interpreter, g, x, mean.float(), rstd.float(), weight.float(), 2)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sample_that_is_not_finite_touches_no_other(gpu_or_interpreter, channels_last):
    x, g, weight = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.randn(6)
    _, mean, rstd = forward(x, weight, 2)
    clean = run(gpu_or_interpreter, layout(g, channels_last), layout(x, channels_last), mean, rstd, weight, 2)
    g[1, 2, 3, 3], x[2, 5, 0, 0] = float("nan"), float("inf")
    mean[2, 1] = rstd[2, 1] = float("nan")
    dirty = run(gpu_or_interpreter, layout(g, channels_last), layout(x, channels_last), mean, rstd, weight, 2)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(after[[0, 3]], before[[0, 3]])
    for b, channel, others in ((1, 2, slice(3, 6)), (2, 5, slice(0, 3))):
        assert not dirty[1][b, channel].isfinite()
        # Groups of one program stay apart too.
        assert torch.equal(dirty[0][b, others], clean[0][b, others])


def test_bits_of_a_sample_do_not_depend_on_the_others(gpu_or_interpreter):
    x, g, weight = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4), torch.randn(8)
    _, mean, rstd = forward(x, weight, 4)
    whole = run(gpu_or_interpreter, g, x, mean, rstd, weight, 4)
    for b in range(3):
        one = run(gpu_or_interpreter, *(t[b : b + 1] for t in (g, x, mean, rstd)), weight, 4)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(one, whole, strict=True))


def test_empty(gpu_or_interpreter):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        x = torch.empty(shape)
        stats = torch.zeros(shape[0], 2)
        dx, dgamma, dbeta = run(gpu_or_interpreter, x, x, stats, stats, torch.ones(4), 2)
        assert dx.shape == shape
        assert not dgamma.any()
        assert not dbeta.any()
        assert dgamma.shape == dbeta.shape == (shape[0], 4)
