"""Bernoulli draws; the normals' distribution, addressing and repeatability; what a key may do."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from core_calls import LEVELS, simd
from scipy import stats

from adaclip import _core
from adaclip.noise import STREAM_SAMPLER, NoiseSource, checked_std, rounded_up

COUNTING_KEY = bytes(range(32))


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 70_001])
@pytest.mark.parametrize("q", [0.0, 2.0**-70, 0.01, 0.5, 1 - 2.0**-53, 1.0])
def test_bernoulli_is_the_exact_threshold_on_64_bit_draws(n, q, simd_level):
    words = [_core.chacha20_chunk(COUNTING_KEY, c, 5, STREAM_SAMPLER) for c in range(-(-n // 128))]
    halves = np.array(words, dtype=np.uint64).reshape(-1, 8, 2, 16)
    draws = ((halves[:, :, 0] << np.uint64(32)) | halves[:, :, 1]).reshape(-1)[:n]
    threshold = math.floor(q * 2**64)
    expected = [i for i, draw in enumerate(draws.tolist()) if draw < threshold]
    got = NoiseSource(COUNTING_KEY).bernoulli(n, q, step=5)
    assert got.dtype == np.int64
    assert got.tolist() == expected


def test_bernoulli_is_the_same_for_any_thread_count(set_threads):
    source = NoiseSource(3)
    set_threads(1)
    one = source.bernoulli(1_000_003, 0.03, 9)
    set_threads(2)
    assert np.array_equal(one, source.bernoulli(1_000_003, 0.03, 9))


def test_bernoulli_counts_and_gaps_follow_the_distribution():
    source, n, q = NoiseSource(17), 2_000_000, 0.02
    taken = source.bernoulli(n, q, 0)
    assert abs(len(taken) - n * q) < 5 * math.sqrt(n * q * (1 - q))
    # Gaps between taken examples are geometric.
    gaps = np.diff(taken)
    edges = np.array([0, 5, 10, 20, 35, 50, 75, 100, 150, 200])
    expected = np.diff(np.append(1 - (1 - q) ** edges, 1.0)) * len(gaps)
    observed = np.histogram(gaps, np.append(edges + 1, 10**9))[0]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_bernoulli_includes_every_position_equally_often():
    source, n, q, steps = NoiseSource(23), 640, 0.25, 2000
    hits = np.zeros(n)
    for step in range(steps):
        hits[source.bernoulli(n, q, step)] += 1
    chi2 = ((hits - steps * q) ** 2).sum() / (steps * q * (1 - q))
    assert 1e-4 < stats.chi2.sf(chi2, n) < 1 - 1e-4


def _reference_normals(words):
    """Box-Muller in float64 on one chunk of words [16 words, 16 blocks]: (values, radii), both [160]."""
    high, low, angle = (np.asarray(words, np.uint64)[i:15:3].astype(object) for i in range(3))
    u = (high * 2**31 + (low % 2**31 | 1)) / 2**63
    # 1 - u in integers: u itself cannot hold what is left of it near 1.
    rest = (2**63 - high * 2**31 - (low % 2**31 | 1)) / 2**63
    u, rest = u.astype(float), rest.astype(float)
    radius = np.sqrt(-2 * np.where(u < 0.5, np.log(u), np.log1p(-np.minimum(rest, 0.6))))
    theta = 2 * np.pi * angle.astype(float) / 2**32
    values = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return values.reshape(-1), np.stack([radius, radius], axis=1).reshape(-1)


def test_normals_are_box_muller_on_the_keystream(simd_level):
    step, stream, first = 11, 4, 1000
    got = NoiseSource(COUNTING_KEY).normal_(torch.empty(160 * 40), step, stream, first_chunk=first).numpy()
    for c in range(40):
        words = np.array(_core.chacha20_chunk(COUNTING_KEY, first + c, step, stream)).reshape(16, 16)
        values, radius = _reference_normals(words)
        assert (np.abs(got[160 * c :][:160] - values) <= 3e-7 * radius).all()


def test_normals_are_accurate_at_both_ends_of_the_radius_and_all_quarters(simd_level):
    edge = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    angles = [0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31 - 1, 2**31, 5 * 2**29, 3 * 2**30, 2**32 - 1]
    rows = [(h, low, a) for h in edge for low in (0, 1, 2**31 - 1, 2**32 - 1) for a in angles]
    rows += [(0, 0, 0)] * (-len(rows) % 80)
    for part in np.array(rows).reshape(-1, 16, 5, 3):
        words = np.zeros((16, 16), np.uint64)
        words[:15] = part.transpose(1, 2, 0).reshape(15, 16)
        got = np.array(_core.normals_of_words(words.reshape(-1).tolist()))
        values, radius = _reference_normals(words)
        # 2^-56 of u is what 24 bits of the low word resolve where the high word leaves nothing.
        assert (np.abs(got - values) <= 3e-7 * radius + 2.0**-56 / radius).all()
    tail = np.zeros((16, 16), np.uint64)
    assert _core.normals_of_words(tail.reshape(-1).tolist())[0] == pytest.approx(math.sqrt(126 * math.log(2)))


@pytest.fixture(scope="module")
def ten_million():
    return NoiseSource(2024).normal_(torch.empty(10_000_000), step=1).numpy()


def test_ten_million_normals_have_the_moments_of_a_normal(ten_million):
    z, n = ten_million.astype(np.float64), len(ten_million)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_ten_million_normals_pass_kolmogorov_smirnov(ten_million):
    assert stats.kstest(ten_million, "norm").pvalue > 1e-3
    # Cosines and sines apart: an error in one of them could hide in the other.
    halves = ten_million[: 160 * 50_000].reshape(-1, 10, 16)
    assert stats.kstest(halves[:, 0::2].reshape(-1), "norm").pvalue > 1e-3
    assert stats.kstest(halves[:, 1::2].reshape(-1), "norm").pvalue > 1e-3


@pytest.mark.parametrize("sigmas", [0.001, 0.01, 0.5, 1, 2, 3, 4, 4.5, 5])
@pytest.mark.parametrize("side", [-1, 1])
def test_tail_counts_to_five_sigma_are_binomial(ten_million, sigmas, side):
    p = stats.norm.sf(sigmas)
    count = int((side * ten_million > sigmas).sum())
    assert stats.binomtest(count, len(ten_million), p).pvalue > 1e-4


def test_noise_of_other_steps_streams_tensors_and_keys_is_uncorrelated():
    n = 1_000_000
    source = NoiseSource(8)
    draws = [
        source.normal_(torch.empty(n), 0),
        source.normal_(torch.empty(n), 1),
        source.normal_(torch.empty(n), 1 << 32),
        source.normal_(torch.empty(n), 0, stream=1),
        source.normal_(torch.empty(n), 0, first_chunk=n // 160),
        NoiseSource(9).normal_(torch.empty(n), 0),
    ]
    correlation = np.corrcoef(torch.stack(draws).double().numpy())
    assert np.abs(correlation - np.eye(len(draws))).max() < 5 / math.sqrt(n)
    z = draws[0].double().numpy()
    for lag in (1, 2, 15, 16, 17, 32, 144, 159, 160, 161):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)
        # Pairs share a radius: uncorrelated is not enough, so compare squares too.
        assert abs(((z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1)).mean()) < 5 * 2 / math.sqrt(n)


def test_normals_have_the_same_bits_for_any_threads_and_instruction_set(set_threads):
    source, n = NoiseSource(31), 1_000_003
    set_threads(1)
    expected = source.normal_(torch.empty(n), 2, std=0.3)
    for level in LEVELS:
        for count in (1, 2, 3):
            set_threads(count)
            with simd(level):
                assert torch.equal(source.normal_(torch.empty(n), 2, std=0.3), expected)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 159, 160, 161, 319, 1000])
def test_normals_write_their_tensor_and_nothing_else(n, simd_level):
    room = torch.full((n + 64,), math.nan)
    NoiseSource(1).normal_(room[32 : 32 + n], 0)
    assert room[:32].isnan().all()
    assert room[32 + n :].isnan().all()
    assert torch.equal(room[32 : 32 + n], NoiseSource(1).normal_(torch.empty(2000), 0)[:n])


def test_first_chunk_moves_along_the_stream():
    source = NoiseSource(1)
    whole = source.normal_(torch.empty(480), 0)
    assert torch.equal(source.normal_(torch.empty(320), 0, first_chunk=1), whole[160:])


def test_std_scales_and_add_adds(simd_level):
    source, start = NoiseSource(1), torch.randn(777)
    z = source.normal_(torch.empty(777), 0)
    assert torch.equal(source.normal_(torch.empty(777), 0, std=0.25), 0.25 * z)
    assert torch.equal(source.normal_(start.clone(), 0, std=0.25, add=True), start + 0.25 * z)
    assert torch.equal(source.normal_(start.clone(), 0, std=0.0, add=True), start)
    assert torch.equal(source.normal_(start.clone(), 0, std=0.0), torch.zeros(777))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_same_noise_in_their_precision(dtype):
    source, start = NoiseSource(1), torch.randn(500).to(dtype)
    z = source.normal_(torch.empty(500), 0)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(
        source.normal_(torch.empty(500, dtype=dtype), 0, std=0.5), (0.5 * z.to(wide)).to(dtype)
    )
    expected = (start.to(wide) + 0.5 * z.to(wide)).to(dtype)
    assert torch.equal(source.normal_(start.clone(), 0, std=0.5, add=True), expected)


def test_dense_tensors_take_noise_in_memory_order_others_in_index_order():
    source = NoiseSource(1)
    z = source.normal_(torch.empty(120), 0)
    last = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(source.normal_(last, 0).permute(0, 2, 3, 1).reshape(-1), z)
    doubles = last.double()
    assert torch.equal(source.normal_(doubles, 0), last.double())
    gaps = torch.zeros(120, 2)
    assert torch.equal(source.normal_(gaps[:, 0], 0), z)
    assert (gaps[:, 1] == 0).all()


def test_noise_on_a_parameter_bumps_its_version_and_leaves_no_graph():
    weight = torch.nn.Parameter(torch.zeros(10))
    version = weight._version
    NoiseSource(1).normal_(weight, 0, add=True)
    assert weight._version > version
    assert weight.is_leaf


def test_std_is_never_rounded_down():
    for std in (0.1, 1 / 3, 1e-3, 1.1, 1.0, 1e-50):
        assert checked_std(std) >= std
        assert checked_std(std) <= max(std * (1 + 2.0**-23), 2.0**-149)


def test_bad_noise_arguments_are_refused_before_anything_changes():
    source, x = NoiseSource(1), torch.ones(5)
    for std in (-1.0, math.nan, math.inf, 1e39):
        with pytest.raises(ValueError, match="std must be finite and at least 0"):
            source.normal_(x, 0, std=std)
    for first in (-1, 0.5, True):
        with pytest.raises(ValueError, match="first_chunk must be an int of at least 0"):
            source.normal_(x, 0, first_chunk=first)
    with pytest.raises(ValueError, match="a stream holds 2\\^28 chunks of 160 normals, asked for 1"):
        source.normal_(x, 0, first_chunk=1 << 28)
    with pytest.raises(ValueError, match="tensor must have a floating dtype"):
        source.normal_(torch.ones(5, dtype=torch.int64), 0)
    assert (x == 1).all()
    source.normal_(x, 0, first_chunk=(1 << 28) - 1)
    assert (x != 1).all()


def test_keys_come_from_the_operating_system_unless_given():
    assert NoiseSource().secure
    assert not np.array_equal(NoiseSource().bernoulli(4096, 0.5, 0), NoiseSource().bernoulli(4096, 0.5, 0))
    for key in (COUNTING_KEY, int.from_bytes(COUNTING_KEY, "little")):
        given = NoiseSource(key)
        assert not given.secure
        expected = NoiseSource(bytearray(COUNTING_KEY)).bernoulli(99, 0.5, 0)
        assert np.array_equal(given.bernoulli(99, 0.5, 0), expected)


def test_a_torch_generator_seeds_the_key():
    def draw(seed):
        return NoiseSource(torch.Generator().manual_seed(seed)).bernoulli(999, 0.5, 0)

    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


@pytest.mark.parametrize("key", [b"short", b"x" * 33, -1, 1 << 256])
def test_bad_key_values_are_refused(key):
    with pytest.raises(ValueError, match="key must be"):
        NoiseSource(key)


@pytest.mark.parametrize("key", ["text", 1.5, True])
def test_bad_key_types_are_refused(key):
    with pytest.raises(TypeError, match="key must be None, 32 bytes, an int"):
        NoiseSource(key)


def test_the_key_never_shows_or_travels():
    source = NoiseSource(COUNTING_KEY)
    assert repr(source) == "NoiseSource(<given key>)"
    assert repr(NoiseSource()) == "NoiseSource(<secret key>)"
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            leak(source)


def test_bad_addresses_and_rates_are_refused():
    source = NoiseSource(1)
    for step in (-1, 1 << 64, 1.0, True):
        with pytest.raises(ValueError, match="step must be an int in"):
            source.bernoulli(1, 0.5, step)
    with pytest.raises(ValueError, match="stream must be an int in"):
        source.bernoulli(1, 0.5, 0, 1 << 32)
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"q must be in \[0, 1\]"):
            source.bernoulli(1, q, 0)
    for n in (-1, (1 << 35) + 1, 2.0):
        with pytest.raises(ValueError, match="n must be an int in"):
            source.bernoulli(n, 0.5, 0)


def test_standard_deviations_of_tensors_are_rounded_up_like_numbers():
    values = [0.0, 1.0, 0.1, 1 + 2.0**-30, 3.3e-5, 2.0**-140, 1e30]
    ours = rounded_up(torch.tensor(values, dtype=torch.float64))
    assert ours.dtype == torch.float32
    assert ours.tolist() == [checked_std(value) for value in values]
