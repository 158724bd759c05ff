"""The CUDA convolution norms without a GPU: the kernel's own source, run thread by thread on the CPU.

`tests/emulation/cuda_emulator.h` says what that finds and what it cannot. Truth is adaclip.reference in float64.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from core_calls import conv_sizes, nans

from adaclip import reference

ROOT = Path(__file__).parent.parent
AMPERE, HOPPER, ADA = 163 * 1024, 227 * 1024, 99 * 1024  # bytes of shared memory that a block may have
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FACTS = [
    "relative",
    "absolute",
    "shared",
    "warps",
    "warp_tiles",
    "samples",
    "depth",
    "pieces",
    "x_vector",
    "g_vector",
]
SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    path = tmp_path_factory.mktemp("emulation") / "conv_sample_norms.so"
    sources = [ROOT / "tests/emulation/conv_sample_norms.cpp", ROOT / "csrc/cuda/conv_norms_plan.cpp"]
    # No contraction: the kernel asks for an FMA where it wants one.
    flags = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
    ]
    subprocess.run([compiler, *flags, "-I", ROOT / "csrc", *sources, "-o", path], check=True)
    return ctypes.CDLL(str(path))


def flat(sizes):
    return (ctypes.c_int64 * 22)(*(int(v) for s in sizes for v in (s if isinstance(s, tuple) else (s,))))


def strides(t):
    """Of sample, channel and position; a plane's rows must lie next to each other."""
    steps = (t.stride(0), t.stride(1), t.stride(-1))
    assert t.dim() == 3 or t.shape[3] == 1 or t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3)
    return (ctypes.c_int64 * 3)(*steps)


def extent(t):
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def run(emulator, x, g, geometry, *, shared=HOPPER, early=False, seed=0):
    """(sqnorms, magnitudes, {fact: value}); outputs are NaN where nothing was written."""
    sqnorms, magnitudes = (nans(x.shape[0], dtype=torch.float64) for _ in range(2))
    facts = np.zeros(len(FACTS))
    message = ctypes.create_string_buffer(200)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, g, sqnorms, magnitudes)]
    emulator.conv_norms(
        flat(conv_sizes(x, g, geometry)),
        DTYPES.index(x.dtype),
        pointers[0],
        strides(x),
        pointers[1],
        strides(g),
        (ctypes.c_int64 * 2)(extent(x), extent(g)),
        shared,
        int(early),
        seed,
        *pointers[2:],
        facts.ctypes.data_as(ctypes.c_void_p),
        message,
        200,
    )
    assert not message.value, message.value.decode()
    return sqnorms, magnitudes, dict(zip(FACTS, facts.tolist(), strict=True))


def truth(x, g, geometry):
    kernel, stride, padding, dilation, groups = geometry
    args = (list(kernel), list(stride), list(padding), list(dilation), groups)
    x, g = x.double(), g.double()
    grads = reference.conv_sample_grads(x, g, *args)
    return grads.flatten(1).square().sum(1), reference.position_norms_product(x, g, *args)


def check(emulator, x, g, geometry, **options):
    """Upper bounds, and no further off than the plan says."""
    sqnorms, magnitudes, facts = run(emulator, x, g, geometry, **options)
    exact, scale = truth(x, g, geometry)
    assert bool((magnitudes >= scale).all())
    assert bool((magnitudes <= 1.001 * scale + 1e-20).all())
    assert bool((sqnorms >= exact).all())
    assert bool((sqnorms <= exact + 2.01 * facts["relative"] * magnitudes + 2 * facts["absolute"]).all())
    return sqnorms, magnitudes, facts


def out_sizes(size, geometry):
    kernel, stride, padding, dilation, _ = geometry
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def integers(*shape, dtype, memory=torch.channels_last):
    """Small integers: every product and sum is exact in float32, in any order."""
    t = torch.randint(-3, 4, shape).to(dtype)
    return t.contiguous(memory_format=memory) if len(shape) == 4 else t


def check_exactly(emulator, x, g, geometry, **options):
    """With integers nothing rounds: without its margin the result is the truth, whatever the order."""
    sqnorms, magnitudes, facts = check(emulator, x, g, geometry, **options)
    exact, _ = truth(x, g, geometry)
    margin = facts["relative"] * magnitudes + facts["absolute"]
    torch.testing.assert_close(sqnorms - margin, exact, rtol=1e-12, atol=1e-9)
    return facts


SHAPES = [
    # batch, channels in and out, input size, geometry
    (3, 40, 24, (2, 2), SAME),
    (9, 16, 8, (2, 2), SAME),
    (5, 24, 40, (4, 4), SAME),
    (2, 8, 16, (5, 5), SAME),
    (2, 16, 8, (7, 7), SAME),
    (2, 8, 72, (8, 8), SAME),
    (1, 8, 8, (10, 9), SAME),
    (1, 8, 8, (11, 11), SAME),
    (2, 8, 8, (13, 12), SAME),
    (1, 8, 8, (14, 14), SAME),
    (1, 24, 40, (16, 16), SAME),
    (2, 8, 8, (12, 12), ((3, 3), (2, 2), (1, 1), (1, 1), 1)),
    (2, 8, 8, (15, 11), ((3, 1), (2, 1), (1, 0), (1, 1), 2)),
    (2, 8, 8, (9, 9), ((1, 1), (3, 3), (0, 0), (1, 1), 1)),
    (2, 8, 8, (6, 6), ((3, 3), (1, 1), (4, 4), (1, 1), 1)),
    (2, 8, 8, (12, 12), ((3, 3), (2, 2), (2, 2), (2, 2), 1)),
    (2, 8, 8, (14, 14), ((7, 7), (1, 1), (3, 3), (1, 1), 1)),
    (2, 8, 8, (9, 9), ((8, 8), (2, 2), (3, 3), (1, 1), 1)),
    (3, 16, 32, (4, 4), ((3, 3), (1, 1), (1, 1), (1, 1), 4)),
    (2, 6, 10, (5, 3), ((2, 3), (1, 1), (0, 1), (2, 1), 2)),
    (2, 3, 5, (1, 1), ((1, 1), (1, 1), (0, 0), (1, 1), 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", SHAPES, ids=lambda c: f"{c[1]}-{c[2]}@{c[3][0]}x{c[3][1]}k{c[4][0][0]}g{c[4][4]}"
)
def test_every_index(emulator, case, dtype):
    batch, cin, cout, size, geometry = case
    x = integers(batch, cin, *size, dtype=dtype)
    g = integers(batch, cout, *out_sizes(size, geometry), dtype=dtype)
    check_exactly(emulator, x, g, geometry, early=batch % 2 == 0, seed=batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_tensors_and_odd_channels(emulator, dtype):
    for cin, cout, size in ((5, 7, (4, 4)), (8, 33, (6, 5)), (3, 16, (12, 12))):
        x = integers(2, cin, *size, dtype=dtype, memory=torch.contiguous_format)
        g = integers(2, cout, *size, dtype=dtype)
        facts = check_exactly(emulator, x, g, SAME)
        assert not facts["x_vector"]
        assert facts["g_vector"] == (cout == 16)
    # An address that 16-byte accesses cannot take.
    whole = integers(1, 8 * 16 + 1, 1, 1, dtype=dtype).flatten()
    x = whole[1:].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    assert not check_exactly(emulator, x, integers(1, 8, 4, 4, dtype=dtype), SAME)["x_vector"]


def test_one_dimension(emulator):
    geometry = ((5,), (1,), (2,), (2,), 1)
    x, g = integers(2, 8, 60, dtype=torch.bfloat16), integers(2, 16, 56, dtype=torch.bfloat16)
    check_exactly(emulator, x, g, geometry)


def test_padding_only_behind(emulator):
    # Asymmetric ("same" with an even kernel): the extent of g says how far the image is padded.
    x, g = (integers(2, 8, 7, 7, dtype=torch.float32) for _ in range(2))
    geometry = ((2, 2), (1, 1), (0, 0), (1, 1), 1)
    sqnorms, magnitudes, facts = run(emulator, x, g, geometry)
    exact, _ = truth(torch.nn.functional.pad(x, (0, 1, 0, 1)), g, geometry)
    torch.testing.assert_close(sqnorms - facts["relative"] * magnitudes, exact, rtol=1e-12, atol=1e-9)


def test_one_block_takes_many_small_samples_or_one_large(emulator):
    def facts(batch, size, shared=HOPPER, dtype=torch.bfloat16):
        x, g = (integers(batch, 8, size, size, dtype=dtype) for _ in range(2))
        return run(emulator, x, g, SAME, shared=shared)[2]

    assert facts(1, 1)["samples"] == 32
    assert facts(1, 2)["samples"] == 8
    assert facts(1, 4)["samples"] == 2
    assert facts(1, 8) | {"samples": 1, "warps": 3, "warp_tiles": 1} == facts(1, 8)
    large = facts(1, 16)
    assert (large["warps"], large["warp_tiles"], large["pieces"]) == (12, 3, 4)
    assert large["shared"] <= HOPPER
    # An A100 has room for shorter stages only, and just so.
    small = facts(1, 16, AMPERE)
    assert (small["depth"], small["pieces"], small["shared"]) == (2, 2, AMPERE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_stays_within_its_bound(emulator, dtype):
    for batch, cin, cout, size, shared in (
        (3, 72, 136, 4, HOPPER),
        (2, 64, 48, 8, HOPPER),
        (1, 32, 48, 16, AMPERE),
    ):
        x = torch.randn(batch, cin, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
        g = (
            (1e-3 * torch.randn(batch, cout, size, size))
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        sqnorms, _, _ = check(emulator, x, g, SAME, shared=shared)
        exact, _ = truth(x, g, SAME)
        # What the margin costs: the norm is too large by less than half a percent.
        assert bool((sqnorms.sqrt() <= 1.005 * exact.sqrt()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_near_null_gradients_are_bounded(emulator, dtype, scale):
    # A large constant image against output gradients that sum to nothing: everything cancels.
    x = (scale * torch.randn(4, 16, 1, 1) + torch.randn(4, 16, 6, 6)).to(dtype)
    g = torch.zeros(4, 8, 6, 6)
    inner = torch.randn(4, 8, 4, 4)
    g[..., 1:-1, 1:-1] = inner - inner.flip((-1, -2))
    check(emulator, x.contiguous(), g.to(dtype), SAME)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, 1e-38, 1e16), (torch.bfloat16, 1e-38, 1e16)]
)
def test_underflow_is_bounded(emulator, dtype, low, high):
    # Products of g alone vanish in float32, and the gradient does not.
    x, g = (high * torch.randn(2, 8, 4, 4)).to(dtype), (low * torch.randn(2, 8, 4, 4)).to(dtype)
    sqnorms, magnitudes, _ = run(emulator, x, g, SAME)
    exact, scale = truth(x, g, SAME)
    assert bool((exact > 0).all())
    assert bool((sqnorms >= exact).all())
    assert bool((magnitudes >= scale).all())
    check(emulator, torch.zeros_like(x), torch.zeros_like(g), SAME)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_one_sample_that_is_not_finite_touches_no_other(emulator, dtype, value, where, size):
    x, g = (integers(5, 8, size, size, dtype=dtype) for _ in range(2))
    clean = run(emulator, x, g, SAME)
    (x if where == "x" else g)[2, 3, 1, 1] = value
    dirty = run(emulator, x, g, SAME)
    for before, after in zip(clean[:2], dirty[:2], strict=True):
        assert not torch.isfinite(after[2])
        others = [0, 1, 3, 4]
        assert torch.equal(after[others], before[others])


def test_overflow_is_not_finite(emulator):
    x, g = torch.full((1, 8, 4, 4), 1e20), torch.ones(1, 8, 4, 4)
    sqnorms, _, _ = run(emulator, x, g, SAME)
    assert not torch.isfinite(sqnorms[0])


@pytest.mark.parametrize(("batch", "size"), [(9, 2), (3, 4), (2, 8), (1, 12)])
def test_no_bit_depends_on_the_schedule_or_on_other_samples(emulator, batch, size):
    x, g = torch.randn(batch, 40, size, size), torch.randn(batch, 24, size, size)
    x = x.contiguous(memory_format=torch.channels_last)
    runs = [run(emulator, x, g, SAME, early=early, seed=seed) for early, seed in ((0, 1), (1, 2), (0, 3))]
    alone = run(emulator, x[-1:], g[-1:], SAME)
    for results in runs[1:]:
        assert torch.equal(results[0], runs[0][0])
        assert torch.equal(results[1], runs[0][1])
    assert torch.equal(alone[0], runs[0][0][-1:])


def test_no_samples(emulator):
    x, g = torch.zeros(0, 8, 4, 4), torch.zeros(0, 8, 4, 4)
    assert run(emulator, x, g, SAME)[0].shape == (0,)


@pytest.mark.parametrize(
    ("x", "g", "geometry", "shared", "why"),
    [
        ((1, 8, 16, 16), (1, 8, 16, 16), SAME, HOPPER, ""),
        ((1, 8, 16, 16), (1, 8, 16, 16), SAME, AMPERE, ""),
        (
            (1, 8, 16, 16),
            (1, 8, 16, 16),
            SAME,
            ADA,
            "it needs 166912 bytes of shared memory, and the device has 101376",
        ),
        ((1, 8, 12, 12), (1, 8, 12, 12), SAME, ADA, ""),
        ((1, 8, 17, 16), (1, 8, 17, 16), SAME, HOPPER, "it has 272 positions, more than 256"),
        (
            (1, 8, 32, 32),
            (1, 8, 16, 16),
            ((2, 2), (2, 2), (0, 0), (1, 1), 1),
            HOPPER,
            "it has 1024 positions, more",
        ),
        (
            (1, 8, 9, 9),
            (1, 8, 1, 1),
            ((9, 9), (1, 1), (0, 0), (1, 1), 1),
            HOPPER,
            "its window is larger than 8 x 8",
        ),
        (
            (1, 8, 4, 4, 4),
            (1, 8, 4, 4, 4),
            ((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, 1),
            HOPPER,
            "three spatial",
        ),
        ((1, 8, 4, 4), (1, 8, 0, 4), SAME, HOPPER, "it has no positions"),
    ],
)
def test_what_it_does_not_take(emulator, x, g, geometry, shared, why):
    message = ctypes.create_string_buffer(200)
    sizes = conv_sizes(torch.empty(x, device="meta"), torch.empty(g, device="meta"), geometry)
    emulator.conv_norms_refusal(flat(sizes), shared, message, 200)
    assert why in message.value.decode()
    assert bool(message.value) == bool(why)
