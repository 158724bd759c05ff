"""The CUDA C++ kernels on a GPU, small enough for compute-sanitizer (`make sanitize-gpu`); skipped elsewhere."""

import os

import pytest
import torch
from lossy_sums import gram_norms, lossy_images
from noise_cases import (
    ROUNDS,
    SIZES,
    STREAM,
    addresses,
    assert_same_memory,
    core_step,
    device_key,
    first_chunks,
    step_case,
)

from adaclip import _core, reference
from adaclip.backends import load, support

MISSING = support.cuda_missing() or (None if torch.cuda.is_available() else "torch finds no CUDA GPU")
# Where they are what is to be looked at, skipping them must not look like success.
WANTED = "ADACLIP_NEEDS_CUDA" in os.environ
pytestmark = pytest.mark.skipif(MISSING is not None and not WANTED, reason=str(MISSING))

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SAME = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
CONVOLUTIONS = [
    # batch, channels in and out, input size, geometry
    (9, 16, 8, (2, 2), SAME),
    (3, 40, 24, (4, 4), SAME),
    (2, 5, 33, (8, 7), SAME),
    (1, 24, 40, (16, 16), SAME),
    (2, 8, 16, (12, 12), SAME | {"stride": (2, 2), "dilation": (2, 2), "padding": (2, 2)}),
    (3, 16, 32, (4, 4), SAME | {"groups": 4}),
]


@pytest.fixture(autouse=True)
def there():
    if MISSING is not None:
        pytest.fail(MISSING)


def check_norms(x, g, geometry):
    sqnorms, magnitudes = load("cuda").gram(x, g, **geometry)
    args = [list(v) if isinstance(v, tuple) else v for v in geometry.values()]
    x, g = x.double().cpu(), g.double().cpu()
    exact = reference.row_sqnorms(reference.conv_sample_grads(x, g, *args))
    scale = reference.position_norms_product(x, g, *args)
    sqnorms, magnitudes = sqnorms.cpu(), magnitudes.cpu()
    assert bool((sqnorms >= exact).all())
    assert bool((sqnorms <= exact + 1e-4 * scale + 1e-20).all())
    assert bool((magnitudes >= scale).all())
    assert bool((magnitudes <= 1.001 * scale + 1e-20).all())


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: f"{c[1]}-{c[2]}@{c[3][0]}x{c[3][1]}")
def test_convolution_norms_are_tight_bounds(case, dtype, memory):
    batch, cin, cout, size, geometry = case
    x = torch.randn(batch, cin, *size)
    settings = {k: v for k, v in geometry.items() if k != "kernel"}
    g = torch.randn_like(
        torch.nn.functional.conv2d(x, torch.zeros(cout, cin // geometry["groups"], 3, 3), **settings)
    )
    check_norms(*(t.to("cuda", dtype).contiguous(memory_format=memory) for t in (x, g)), geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [17, 130, 2048])
def test_sums_that_lose_bits_stay_bounded(dtype, length):
    """Whether this GPU's tensor cores add no worse than `ConvNormsPlan::relative` says they do."""
    x, g = lossy_images(length, 200, dtype, "cuda")
    sqnorms, magnitudes = load("cuda").gram(
        x, g, kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
    )
    squares, scales = gram_norms(x, g)
    assert bool((sqnorms.cpu() >= squares - 1e-12 * scales).all())
    assert bool((magnitudes.cpu() >= (1 - 1e-12) * scales).all())


def test_convolution_norms_are_repeatable_and_keep_samples_apart():
    x, g = (
        torch.randn(9, 16, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    clean = load("cuda").gram(x, g, **SAME)
    again = load("cuda").gram(x, g, **SAME)
    x[4, 3, 1, 1] = float("nan")
    dirty = load("cuda").gram(x, g, **SAME)
    for before, same, after in zip(clean, again, dirty, strict=True):
        assert torch.equal(before, same)
        assert not torch.isfinite(after[4])
        others = [b for b in range(9) if b != 4]
        assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("round", ROUNDS)
def test_updates_have_the_cores_bits(round, offset):
    from adaclip.kernels.step_table import StepTable

    device = torch.device("cuda", torch.cuda.current_device())
    rows, rules = step_case(round, device, offset)
    expected, _ = step_case(round, torch.device("cpu"), offset)
    table = StepTable.make(addresses(rows), SIZES, first_chunks(), rules, device)
    key, step = device_key(device)
    arrays = table.pointers, table.numel, table.first_chunk, table.rules, table.tiles
    stream = torch.cuda.current_stream(device)
    _core.cuda.noisy_step(
        *(key.data_ptr(), step.data_ptr(), STREAM),
        *(t.data_ptr() for t in arrays),
        *(len(table.tiles), device.index, stream.cuda_stream),
    )
    torch.cuda.synchronize()
    core_step(expected, rules)
    assert_same_memory(rows, expected)
