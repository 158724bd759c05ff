"""Keystream, normals and sums with noise in Triton: bits of the CPU core's."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from noise_cases import KEY, STEP, STREAM, around, device_key, placed, same_bits, spread

from adaclip import _core

pytest.importorskip("triton")

import triton
import triton.language as tl

from adaclip.kernels.chacha20 import keystream_blocks
from adaclip.kernels.clip_and_noise import noisy_sum
from adaclip.kernels.normal import element, normals_of_words
from adaclip.kernels.normal_fill import normal_fill, signed_stream

LANES = 128


@triton.jit(do_not_specialize=["stream", "one"])
def _store_words(key, step, stream, one, first_block, out, lanes: tl.constexpr):
    lane = tl.arange(0, lanes)
    counters = tl.load(first_block).to(tl.uint32) + lane.to(tl.uint32)
    words = keystream_blocks(key, step, stream, one, counters)
    for w in tl.static_range(16):
        tl.store(out + w * lanes + lane, words[w].to(tl.int32, bitcast=True))


@triton.jit
def _store_normals(words, out, lanes: tl.constexpr):
    at = words + tl.arange(0, lanes)
    w0, w1 = tl.load(at), tl.load(at + lanes)
    w2, w3 = tl.load(at + 2 * lanes), tl.load(at + 3 * lanes)
    w4, w5 = tl.load(at + 4 * lanes), tl.load(at + 5 * lanes)
    w6, w7 = tl.load(at + 6 * lanes), tl.load(at + 7 * lanes)
    w8, w9 = tl.load(at + 8 * lanes), tl.load(at + 9 * lanes)
    w10, w11 = tl.load(at + 10 * lanes), tl.load(at + 11 * lanes)
    w12, w13 = tl.load(at + 12 * lanes), tl.load(at + 13 * lanes)
    w14 = tl.load(at + 14 * lanes)
    z = normals_of_words((w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w14))
    for row in tl.static_range(10):
        tl.store(out + element(row, lanes), z[row])


def _words(device, chunk, step, stream):
    """uint32 [16, LANES] from block 16 chunk on."""
    out = torch.empty(16, LANES, dtype=torch.int32, device=device)
    first = torch.tensor([16 * chunk], device=device)
    _store_words[(1,)](
        *device_key(device, step), signed_stream(stream), 1, first, out, lanes=LANES, num_warps=4
    )
    return out.cpu().numpy().view(np.uint32)


@pytest.mark.parametrize("chunk", [0, (1 << 28) - LANES // 16])
def test_words_are_the_cores_up_to_the_last_counter(chunk, gpu_or_interpreter):
    got = _words(gpu_or_interpreter, chunk, STEP, STREAM)
    for c in range(LANES // 16):
        expected = np.array(_core.chacha20_chunk(KEY, chunk + c, STEP, STREAM), np.uint32).reshape(16, 16)
        assert np.array_equal(got[:, 16 * c :][:, :16], expected)


def test_a_block_is_the_rfcs(gpu_or_interpreter):
    # RFC 8439, section 2.3.2: counter 1 under the nonce 00:00:00:09:00:00:00:4a:00:00:00:00.
    got = _words(gpu_or_interpreter, 0, 0x4A000000_09000000, 0)[:, 1]
    assert got.astype("<u4").tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def _edge_words():
    """uint32 [16, LANES]: both ends of the radius, all quarters of the angle, and random words."""
    high = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    low = [0, 1, 2**31 - 1, 2**32 - 1]
    angle = [0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31 - 1, 2**31, 5 * 2**29, 3 * 2**30, 2**32 - 1]
    triples = np.array([*itertools.product(high, low, angle)], dtype=np.uint32)
    words = np.random.default_rng(5).integers(0, 2**32, (16, LANES), dtype=np.uint32)
    flat = words[:15].reshape(5, 3, LANES).transpose(0, 2, 1).reshape(-1, 3)
    flat[: len(triples)] = triples
    words[:15] = flat.reshape(5, LANES, 3).transpose(0, 2, 1).reshape(15, LANES)
    return words


def test_normals_of_edge_words_have_the_cores_bits(gpu_or_interpreter):
    words = _edge_words()
    out = torch.full((10 * LANES,), float("nan"), device=gpu_or_interpreter)
    given = torch.from_numpy(words.view(np.int32)).to(gpu_or_interpreter).view(torch.uint32)
    _store_normals[(1,)](given, out, lanes=LANES, num_warps=4, enable_fp_fusion=False)
    expected = [
        _core.normals_of_words(words[:, 16 * c :][:, :16].reshape(-1).tolist()) for c in range(LANES // 16)
    ]
    assert same_bits(out, torch.tensor(expected, dtype=torch.float32).reshape(-1))


@pytest.mark.parametrize(("n", "add"), [(0, False), (1, True), (161, False), (1281, True), (1280, False)])
def test_fill_has_the_cores_bits_and_writes_nothing_else(n, add, gpu_or_interpreter):
    first = (1 << 28) - 9
    out = placed(spread(n, 1), gpu_or_interpreter, n % 2)
    expected = placed(spread(n, 1), torch.device("cpu"), n % 2)
    std = torch.tensor([0.3], device=gpu_or_interpreter)
    normal_fill(*device_key(gpu_or_interpreter), STREAM, out, std, first, add)
    _core.normal_fill(KEY, STEP, STREAM, first, expected.data_ptr(), n, 0.3, add, 1)
    assert same_bits(around(out), around(expected))


def test_without_noise_fill_zeroes_or_leaves_alone(gpu_or_interpreter):
    std = torch.zeros(1, device=gpu_or_interpreter)
    start = spread(1300, 2)
    start[5] = float("nan")
    out = placed(start, gpu_or_interpreter)
    normal_fill(*device_key(gpu_or_interpreter), 0, out, std, 0, True)
    assert same_bits(out, start)
    normal_fill(*device_key(gpu_or_interpreter), 0, out, std, 0, False)
    assert same_bits(around(out), around(placed(torch.zeros(1300), torch.device("cpu"))))


def _sum(x, factors, std, denominator, device, first=3):
    out = placed(torch.full((x.shape[1],), float("nan")), device)
    noise = torch.tensor([std], device=device)
    noisy_sum(*device_key(device), STREAM, x.to(device), factors.to(device), out, first, noise, denominator)
    assert around(out)[:8].isnan().all()
    assert around(out)[8 + len(out) :].isnan().all()
    return out.cpu()


# Only many columns are taken the wide way; the interpreter is slow, so the limit is lowered.
@pytest.mark.parametrize("way", ["narrow", "wide"])
@pytest.mark.parametrize(("batch", "n"), [(0, 170), (1, 1), (33, 165), (5, 320)])
def test_a_sum_that_rounds_nowhere_has_the_cores_bits(batch, n, way, gpu_or_interpreter, monkeypatch):
    if way == "wide":
        monkeypatch.setattr("adaclip.kernels.clip_and_noise._NARROW_BELOW", 0)
    x = torch.randint(-50, 50, (batch, n)).float()
    factors = torch.randint(0, 5, (batch,)) / 4
    expected = torch.empty(n)
    for b in (factors == 0).nonzero().flatten().tolist():
        x[b, b % n] = (float("nan"), float("inf"))[b % 2]
    at = x.data_ptr(), factors.data_ptr(), batch, n, expected.data_ptr()
    _core.noisy_sum(KEY, STEP, STREAM, *at, 3, 0.7, 3.0, 1)
    assert same_bits(_sum(x, factors, 0.7, 3.0, gpu_or_interpreter), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_is_the_exact_one_rounded_once(dtype, gpu_or_interpreter):
    x = (torch.randn(40, 50) * 10.0 ** torch.randint(-4, 4, (40, 1))).to(dtype)
    x[:20] = -x[20:] * (1 + 2.0**-6)  # much cancels
    factors = torch.rand(20).repeat(2)
    expected = (factors.double() @ x.double()).float()
    got = _sum(x, factors, 0.0, 1.0, gpu_or_interpreter)
    assert (got - expected).abs().max() <= 2.0**-23 * expected.abs().max()
    assert (got == expected).float().mean() > 0.9


def test_compiled_arithmetic_rounds_every_operation():
    """The bits of a GPU, without one: no contraction, no approximation, no flushing to zero in the code for it."""
    script = """
from adaclip.kernels import clip_and_noise, noisy_step, normal_fill, perturb
from adaclip.kernels.aot import compile_variant
for module in normal_fill, noisy_step, perturb, clip_and_noise:
    print(compile_variant(module.aot()[0], 90).ptx)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True)
    for wanted in ("div.rn.f32", "sqrt.rn.f32", "mul.rn.f32"):
        assert wanted in done.stdout
    for unwanted in ("fma", ".ftz", ".approx", "div.full", "mul.f32", "add.f32", "sub.f32"):
        assert unwanted not in done.stdout
