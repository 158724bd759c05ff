"""Triton's clip-weighted gradient of 16-bit convolutions against the reference in float64."""

import math

import pytest
import torch

pytest.importorskip("triton")

from test_triton_conv import GEOMETRIES, SAME, exact, images, named

from adaclip import reference
from adaclip.backends import ConvGeometry, choice, cudnn_grads, triton_grads
from adaclip.backends import triton as backend
from adaclip.layers.base import rounding_bound
from adaclip.testing import private_step, relative_error, square_loss

HALVES = [torch.bfloat16, torch.float16]


def ours(x, g, factors, geometry):
    from adaclip.kernels.conv_weighted_grad import conv_weighted_grad

    return conv_weighted_grad(x, g, factors.to(x.device), **named(geometry))


def some_factors(batch):
    factors = torch.rand(batch) + 0.1
    factors[1::3] = 0.0
    return factors


def check(x, g, factors, geometry):
    """Every entry within what adding up in float32 can lose; nothing else is rounded."""
    found = ours(x, g, factors, geometry).cpu()
    truth = reference.weighted_sum(exact(x, g, geometry)[0], factors.double())
    scale = reference.weighted_sum(exact(x.abs(), g.abs(), geometry)[0], factors.double())
    assert found.dtype == torch.float32
    assert found.shape == truth.shape
    assert bool(((found - truth).abs() <= 1e-6 * scale).all())


@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_any_geometry(gpu_or_interpreter, case):
    batch, cin, cout, size, geometry = GEOMETRIES[case]
    for channels_last in (False, True) if case in (2, 3) else (case % 2 == 0,):
        x, g = images(gpu_or_interpreter, batch, cin, cout, size, geometry, HALVES[case % 2], channels_last)
        check(x, g, some_factors(batch), geometry)


def test_several_tiles_of_channels(gpu_or_interpreter):
    x, g = images(gpu_or_interpreter, 2, 20, 140, (3, 3), SAME, torch.bfloat16, channels_last=True)
    check(x, g, some_factors(2), SAME)


def test_samples_are_shared_among_programs(gpu_or_interpreter, monkeypatch):
    import adaclip.kernels.conv_weighted_grad as module

    x, g = images(gpu_or_interpreter, 7, 3, 4, (9, 8), SAME, torch.float16, channels_last=True)
    factors = some_factors(7)
    assert module._span(7, 72, 1) == 1
    for longest, span in ((1 << 16, 7), (3 * 72, 3), (1, 1)):
        monkeypatch.setattr(module, "_PROGRAMS", 1)
        monkeypatch.setattr(module, "_LONGEST", longest)
        assert module._span(7, 72, 1) == span
        check(x, g, factors, SAME)
        assert torch.equal(ours(x, g, factors, SAME), ours(x, g, factors, SAME))


def test_roundings_in_a_row_do_not_depend_on_the_batch(monkeypatch):
    from adaclip.kernels.conv_weighted_grad import _span, roundings_in_a_row

    for positions in (1, 4, 64, 1024, 1 << 17):
        for batch in (1, 7, 4096, 1 << 20):
            for programs in (1, 9, 1000):
                assert positions + _span(batch, positions, programs) + 2 <= roundings_in_a_row(positions)


def test_it_lies_as_the_image_does(gpu_or_interpreter):
    for channels_last in (False, True):
        x, g = images(gpu_or_interpreter, 2, 3, 4, (4, 4), SAME, torch.bfloat16, channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert ours(x, g, torch.ones(2), SAME).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single(gpu_or_interpreter, batch):
    x, g = images(gpu_or_interpreter, batch, 3, 4, (4, 4), SAME, torch.bfloat16)
    check(x, g, torch.full((batch,), 0.5), SAME)
    assert not bool(ours(x, g, torch.zeros(batch), SAME).any())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [4, 9])
def test_dropped_samples_do_not_enter(gpu_or_interpreter, value, size):
    x, g = images(gpu_or_interpreter, 4, 3, 5, (size, size), SAME, torch.float16, channels_last=True)
    factors = torch.tensor([0.5, 0.0, 1.0, 0.0])
    clean = ours(x, g, factors, SAME)
    x[1, 2], g[3, 1] = value, value
    assert torch.equal(ours(x, g, factors, SAME), clean)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_a_sample_adds_is_within_its_bound(gpu_or_interpreter, dtype):
    """Positions that cancel, with factors that no 16-bit number times g could hold."""
    x = 50 * torch.randn(3, 4, 1, 1) + torch.randn(3, 4, 6, 6)
    inner, g = torch.randn(3, 4, 4, 4), torch.zeros(3, 4, 6, 6)
    g[..., 1:-1, 1:-1] = inner - inner.flip((-1, -2))
    x, g = x.to(gpu_or_interpreter, dtype), g.to(gpu_or_interpreter, dtype)
    _, squares, scales = exact(x, g, SAME)
    geometry = ConvGeometry(*SAME)
    rounding = triton_grads.conv_grad_rounding(x, g, geometry)
    assert rounding.operands == 0.0
    bounds = rounding_bound(squares, scales, rounding).sqrt()
    for b in range(3):
        factors = torch.zeros(3)
        factors[b] = factor = float(torch.tensor(0.3 / float(bounds[b])))
        added = ours(x, g, factors, SAME).double().norm().cpu()
        assert float(added) <= factor * float(bounds[b])
    # In TF32, g times the factor is rounded, and the bound is looser.
    looser = rounding_bound(squares, scales, cudnn_grads.conv_grad_rounding(x, g, geometry)).sqrt()
    assert bool((bounds < looser).all())


# --- where it runs -------------------------------------------------------------------------------------


def test_who_sums_which_layer():
    same = ConvGeometry([3, 3], [1, 1], [1, 1], [1, 1], 1)

    def sums(size, dtype, channels=256):
        return choice.conv_sums(torch.device("cpu"), (size, size), channels, channels, same, dtype)

    assert sums(16, torch.bfloat16) == sums(8, torch.float16) == "triton"
    # A sample of few positions is scaled as often as it is multiplied; and the kernel is for 16 bits.
    assert sums(2, torch.bfloat16) == sums(16, torch.float32) == sums(16, torch.float64) == "cudnn"


def test_without_triton_the_library_sums(monkeypatch):
    same = ConvGeometry([3, 3], [1, 1], [1, 1], [1, 1], 1)
    x = torch.zeros(1, 64, 16, 16, dtype=torch.bfloat16)
    assert backend._conv_sums(x, x, same) is triton_grads
    monkeypatch.setattr(backend.support, "triton_missing", lambda: "it is not installed")
    assert backend._conv_sums(x, x, same) is not triton_grads


@pytest.mark.parametrize("sums", ["triton", "cudnn"])
def test_a_measured_table_decides(sums, gpu_or_interpreter, monkeypatch):
    same = ConvGeometry([3, 3], [1, 1], [1, 1], [1, 1], 1)
    kind = choice.conv_class((4, 4), 3, 4, same, torch.bfloat16, "conv_weighted_grad")
    monkeypatch.setattr(choice, "measured", lambda device, key: {"backend": sums} if key == kind else None)
    x, g = images(gpu_or_interpreter, 3, 3, 4, (4, 4), SAME, torch.bfloat16)
    factors, weight = some_factors(3).to(gpu_or_interpreter), torch.empty(4, 3, 3, 3, device=x.device)
    found = backend._conv_sums(x, g, same)
    assert found.conv_weighted_grad(x, g, factors, weight, same).shape == weight.shape
    assert (found is triton_grads) == (sums == "triton")


@pytest.mark.parametrize("axes", [1, 3])
def test_other_axes_are_images(gpu_or_interpreter, axes):
    """Signals, and samples of several views: the second axis of three is the image's own."""
    shapes = {1: ((3, 4, 7), (3, 6, 4)), 3: ((3, 4, 2, 5, 4), (3, 6, 2, 3, 4))}
    geometry = {
        1: ConvGeometry([3], [2], [1], [1], 2),
        3: ConvGeometry([1, 3, 3], [1, 2, 1], [0, 1, 1], [1, 1, 1], 2),
    }[axes]
    x, g = (torch.randn(s).bfloat16().to(gpu_or_interpreter) for s in shapes[axes])
    factors = some_factors(3)
    weight = x.new_empty(6, 2, *geometry.kernel)
    found = triton_grads.conv_weighted_grad(x, g, factors.to(x.device), weight, geometry)
    args = [*map(list, geometry[:4]), geometry.groups]
    grads = reference.conv_sample_grads(x.double().cpu(), g.double().cpu(), *args)
    truth = reference.weighted_sum(grads, factors.double())
    torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_a_step_under_autocast_is_summed_here(gpu_or_interpreter, monkeypatch):
    """Kept sums aside, what is released is what float64 says of the same 16-bit tensors, clipped to their bounds."""
    calls, run = [], triton_grads.conv_weighted_grad

    def counted(*arguments):
        calls.append(arguments[0].dtype)
        return run(*arguments)

    monkeypatch.setattr(triton_grads, "conv_weighted_grad", counted)
    device, rng = gpu_or_interpreter, torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, c, 8, 8, generator=rng).to(device) for c in (16, 12))
    found = {}
    for name in ("triton", "reference"):
        torch.manual_seed(1)
        model = torch.nn.Conv2d(16, 12, 3, padding=1).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            found[name] = private_step(model, x, y, square_loss, max_grad_norm=5.0, backend=name)
    assert calls == [torch.bfloat16]
    (ours, norms), (theirs, expected) = found["triton"], found["reference"]
    assert bool((norms >= expected * (1 - 1e-6)).all() and (norms <= expected * 1.01).all())
    for name, total in ours.items():
        assert relative_error(total, theirs[name]) <= 0.03
