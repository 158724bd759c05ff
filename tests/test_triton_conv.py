"""Triton's convolution norms and per-sample gradients against the reference in float64."""

import math

import pytest
import torch
from lossy_sums import gram_norms, lossy_images

pytest.importorskip("triton")

from adaclip import reference

KEYS = ("kernel", "stride", "padding", "dilation", "groups")
SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Upper bounds lie this far above what they bound, relative to the magnitudes, and no further.
ROOM = 1e-4


def images(device, batch, cin, cout, size, geometry, dtype=torch.float32, channels_last=False, scale=1.0):
    kernel, stride, padding, dilation, _ = geometry
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    x = (torch.randn(batch, cin, *size) * scale).to(device, dtype)
    g = torch.randn(batch, cout, *out).to(device, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout), g.contiguous(memory_format=layout)


def exact(x, g, geometry):
    """(gradients, squared norms, magnitudes) in float64."""
    *pairs, groups = geometry
    x, g = x.double().cpu(), g.double().cpu()
    args = (*map(list, pairs), groups)
    grads = reference.conv_sample_grads(x, g, *args)
    return grads, reference.row_sqnorms(grads), reference.position_norms_product(x, g, *args)


def named(geometry):
    return dict(zip(KEYS, geometry, strict=True))


def gram(x, g, geometry):
    from adaclip.kernels.conv_sample_norms import conv_sample_norms

    return conv_sample_norms(x, g, **named(geometry))


def formed(x, g, geometry):
    from adaclip.kernels.conv_sample_grads import instantiated_norms

    return instantiated_norms(x, g, **named(geometry))


def check_norms(found, x, g, geometry):
    sqnorms, magnitudes = (t.cpu() for t in found)
    _, squares, scales = exact(x, g, geometry)
    assert sqnorms.dtype == magnitudes.dtype == torch.float64
    assert sqnorms.shape == magnitudes.shape == squares.shape
    assert bool((sqnorms >= squares).all())
    assert bool((sqnorms <= squares + ROOM * scales + 1e-20).all())
    assert bool((magnitudes >= scales).all())
    assert bool((magnitudes <= scales * (1 + ROOM) + 1e-20).all())


def check_grads(x, g, geometry):
    from adaclip.kernels.conv_sample_grads import conv_sample_grads

    grads, _, scales = exact(x, g, geometry)
    sqnorms, kept, rows = (t.cpu() for t in conv_sample_grads(x, g, **named(geometry), keep=True, bias=True))
    assert kept.shape == grads.shape
    assert kept.dtype == rows.dtype == torch.float32
    error = (kept.double() - grads).flatten(1).norm(dim=1)
    assert bool((error <= 1e-5 * scales.sqrt()).all())
    stored = reference.row_sqnorms(kept)
    assert bool((sqnorms >= stored).all())
    assert bool((sqnorms <= stored * (1 + ROOM) + 1e-20).all())
    g = g.double().cpu()
    assert bool(((rows - g.sum((2, 3))).abs() <= 1e-5 * g.abs().sum((2, 3))).all())


# Positions that fill no tile, several tiles, packs of samples; every number of a geometry at least once.
GEOMETRIES = [
    (3, 5, 7, (4, 4), SAME),
    (5, 3, 20, (2, 2), SAME),
    (2, 5, 20, (9, 10), SAME),
    (2, 6, 4, (9, 7), ((3, 2), (2, 1), (1, 0), (1, 2), 2)),
    (1, 6, 4, (13, 12), ((5, 3), (1, 2), (2, 4), (2, 1), 2)),
    (17, 3, 4, (1, 1), ((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (2, 4, 8, (5, 5), ((5, 5), (1, 1), (0, 0), (1, 1), 4)),
    (2, 4, 4, (3, 5), ((3, 3), (1, 1), (4, 4), (1, 1), 1)),
]


@pytest.mark.parametrize("norms", [gram, formed])
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_norms_of_any_geometry(gpu_or_interpreter, case, norms):
    batch, cin, cout, size, geometry = GEOMETRIES[case]
    dtype, channels_last = DTYPES[case % 3], case % 2 == 1
    x, g = images(gpu_or_interpreter, batch, cin, cout, size, geometry, dtype, channels_last)
    check_norms(norms(x, g, geometry), x, g, geometry)


@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_gradients_of_any_geometry(gpu_or_interpreter, case):
    batch, cin, cout, size, geometry = GEOMETRIES[case]
    dtype, channels_last = DTYPES[case % 3], case % 2 == 0
    x, g = images(gpu_or_interpreter, batch, cin, cout, size, geometry, dtype, channels_last)
    check_grads(x, g, geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("cin", "cout", "size"), [(130, 20, 2), (20, 70, 4)])
def test_dtypes_and_layouts(gpu_or_interpreter, dtype, channels_last, cin, cout, size):
    x, g = images(gpu_or_interpreter, 2, cin, cout, (size, size), SAME, dtype, channels_last)
    check_norms(gram(x, g, SAME), x, g, SAME)
    check_norms(formed(x, g, SAME), x, g, SAME)
    check_grads(x, g, SAME)


def test_kept_gradients_lie_as_the_image_does(gpu_or_interpreter):
    from adaclip.kernels.conv_sample_grads import conv_sample_grads

    for channels_last in (False, True):
        x, g = images(gpu_or_interpreter, 2, 5, 4, (4, 4), SAME, channels_last=channels_last)
        _, kept, _ = conv_sample_grads(x, g, **named(SAME), keep=True, bias=False)
        memory = kept.permute(0, 1, 3, 4, 2) if channels_last else kept
        assert memory.is_contiguous()


def test_tensors_of_two_layouts_and_of_neither(gpu_or_interpreter):
    x, g = images(gpu_or_interpreter, 2, 5, 4, (4, 4), SAME, channels_last=True)
    for a, b in (
        (x, g.contiguous()),
        (x.contiguous(), g),
        (x.transpose(2, 3), g.contiguous().transpose(2, 3)),
    ):
        check_norms(gram(a, b, SAME), a, b, SAME)
        check_grads(a, b, SAME)


def test_padding_behind(gpu_or_interpreter):
    geometry = ((2, 2), (1, 1), (0, 0), (1, 1), 1)
    x = torch.randn(2, 3, 4, 4, device=gpu_or_interpreter)
    g = torch.randn(2, 4, 4, 4, device=gpu_or_interpreter)
    _, squares, scales = exact(torch.nn.functional.pad(x, (0, 1, 0, 1)), g, geometry)
    for norms in (gram, formed):
        sqnorms, magnitudes = norms(x, g, geometry)
        assert bool((sqnorms.cpu() >= squares).all() and (sqnorms.cpu() <= squares + ROOM * scales).all())
        torch.testing.assert_close(magnitudes.cpu(), scales, rtol=ROOM, atol=0)


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single(gpu_or_interpreter, batch):
    from adaclip.kernels.conv_sample_grads import conv_sample_grads

    x, g = images(gpu_or_interpreter, batch, 3, 4, (4, 4), SAME)
    for norms in (gram, formed):
        check_norms(norms(x, g, SAME), x, g, SAME)
    for keep in (False, True):
        sqnorms, kept, rows = conv_sample_grads(x, g, **named(SAME), keep=keep, bias=True)
        assert sqnorms.shape == (batch,)
        assert rows.shape == (batch, 4)
        assert (kept is not None) == keep


def test_no_positions(gpu_or_interpreter):
    geometry = ((3, 3), (1, 1), (0, 1), (1, 1), 1)
    x = torch.randn(2, 3, 2, 4, device=gpu_or_interpreter)
    g = torch.randn(2, 5, 0, 4, device=gpu_or_interpreter)
    for norms in (gram, formed):
        for out in norms(x, g, geometry):
            assert out.tolist() == [0, 0] or bool((out <= 1e-30).all())


@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize(("where", "value"), [("x", math.nan), ("g", math.inf)])
def test_a_sample_that_is_not_finite_touches_no_other(gpu_or_interpreter, value, size, where):
    from adaclip.kernels.conv_sample_grads import conv_sample_grads

    x, g = images(gpu_or_interpreter, 5 if size == 2 else 3, 3, 5, (size, size), SAME)

    def everything():
        kept = conv_sample_grads(x, g, **named(SAME), keep=True, bias=True)
        return [*gram(x, g, SAME), *formed(x, g, SAME), *kept]

    clean = everything()
    (x if where == "x" else g)[1, 2, 1, 1] = value
    dirty = everything()
    assert not bool(torch.isfinite(dirty[0][1]) | torch.isfinite(dirty[2][1]) | torch.isfinite(dirty[4][1]))
    others = [b for b in range(x.shape[0]) if b != 1]
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[others], after[others])


def test_results_repeat(gpu_or_interpreter):
    x, g = images(gpu_or_interpreter, 3, 6, 8, (9, 9), SAME, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(gram(x, g, SAME), gram(x, g, SAME), strict=True))


def test_scratch_is_shared_by_launches(gpu_or_interpreter, monkeypatch):
    import adaclip.kernels.conv_sample_norms as module

    x, g = images(gpu_or_interpreter, 5, 4, 6, (4, 4), SAME)
    whole = gram(x, g, SAME)
    monkeypatch.setattr(module, "_SCRATCH", 2 * 4 * 16 * 16)
    assert all(torch.equal(a, b) for a, b in zip(gram(x, g, SAME), whole, strict=True))


def test_large_images_are_instantiated(gpu_or_interpreter):
    x, g = images(gpu_or_interpreter, 1, 2, 3, (24, 24), SAME)
    found = gram(x, g, SAME)
    check_norms(found, x, g, SAME)
    assert all(torch.equal(a, b) for a, b in zip(found, formed(x, g, SAME), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_near_null_gradients_keep_their_norm(gpu_or_interpreter, dtype, scale):
    """Opposite output gradients under an almost constant image: the Gram sum cancels."""
    x = scale * torch.randn(6, 8, 1, 1) + torch.randn(6, 8, 6, 6)
    g = torch.zeros(6, 4, 6, 6)
    inner = torch.randn(6, 4, 4, 4)
    g[..., 1:-1, 1:-1] = inner - inner.flip((-1, -2))
    x, g = x.to(gpu_or_interpreter, dtype), g.to(gpu_or_interpreter, dtype)
    for norms in (gram, formed):
        check_norms(norms(x, g, SAME), x, g, SAME)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e9])
def test_underflow_and_large_values_stay_bounded(gpu_or_interpreter, scale):
    x, g = images(gpu_or_interpreter, 2, 3, 4, (4, 4), SAME, scale=scale)
    g *= 1e-10
    _, squares, _ = exact(x, g, SAME)
    for norms in (gram, formed):
        sqnorms, magnitudes = (t.cpu() for t in norms(x, g, SAME))
        assert bool((sqnorms >= squares).all())
        assert bool(torch.isfinite(magnitudes).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [17, 130] + [2048] * torch.cuda.is_available())
def test_sums_that_lose_bits_stay_bounded(gpu_or_interpreter, dtype, length):
    """On a GPU: whether its tensor cores add no worse than `products` says they do."""
    count = 200 if torch.cuda.is_available() else 2
    x, g = lossy_images(length, count, dtype, gpu_or_interpreter)
    geometry = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    squares, scales = gram_norms(x, g)
    for norms in (gram, formed):
        sqnorms, magnitudes = (t.cpu() for t in norms(x, g, geometry))
        assert bool((sqnorms >= squares - 1e-12 * scales).all())
        assert bool((magnitudes >= (1 - 1e-12) * scales).all())
        assert bool((sqnorms <= squares + 4e-3 * scales).all())
