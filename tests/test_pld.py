"""Certified ε and δ of training steps, against an exact reference, closed forms, and Google's dp_accounting."""

import math

import mpmath
import numpy as np
import pld_reference as reference
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from pld_checks import CLOSE, EXACT, check, events, judge, nested_delta, sampled

from adaclip.accounting.pld import delta_bounds, epsilon_bounds

ROWS = [
    (256 / 60000, 1.1, 14_000),
    (4096 / 50000, 3.0, 2_500),
    (0.01, 0.8, 1_000),
    (1e-4, 0.6, 100_000),
    (0.5, 10.0, 1_000),
    (1.0, 20.0, 100),
]
SCHEDULE = [(0.01, sigma, 1) for sigma in np.linspace(0.8, 1.6, 200).tolist()]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows(row):
    check(epsilon_bounds(events(row), 1e-5), reference.epsilon_both_ways(sampled(row), 1e-5))


def test_two_hundred_different_steps():
    lower, upper = epsilon_bounds(events(*SCHEDULE), 1e-5)
    assert upper - lower <= CLOSE * upper
    # The example with against without; the other way δ is below 1e-26 here.
    steps = [(reference.sampled_group(q, sigma), count) for q, sigma, count in SCHEDULE]
    contour = reference.Contour(steps, epsilon=upper, least=1e-5)
    assert contour.delta(upper) <= 1e-5 <= contour.delta(lower)


def test_an_outlier_among_many_events():
    """Events that are alike are planned for together; one that is not must not be taken for its neighbors."""
    steps = [(0.05, 1.0 + 0.01 * i, 20 + i % 3) for i in range(17)] + [(0.01, 0.4, 3)]
    bounds = epsilon_bounds(events(*steps), 1e-5)
    judge(bounds, sampled(*steps), 1e-5)
    assert bounds[1] - bounds[0] <= CLOSE * bounds[1]


@pytest.mark.parametrize("delta", [1e-12, 1e-15])
def test_small_delta(delta):
    """Where the power of a plain transform loses all digits: peers say 4.11 to 5.3 and 8.1."""
    with mp.workdps(25):
        steps = [(reference.sampled_group(*ROWS[0][:2]), ROWS[0][2])]
        truth = reference.epsilon_both_ways(steps, delta, digits=20)
    assert float(truth) == pytest.approx(
        {1e-12: 4.165177560815726, 1e-15: 4.761278488296008}[delta], rel=1e-14
    )
    check(epsilon_bounds(events(ROWS[0]), delta), truth)


SMALL_CASES = [
    (0.5, 4.0, 1, 1e-4),
    (0.9, 2.0, 4, 1e-3),
    (0.9, 3.0, 7, 1e-9),
    (0.3, 2.5, 5, 1e-5),
    (0.2, 2.0, 16, 1e-6),
    (0.2, 1.0, 40, 1e-6),
    (0.5, 0.7, 20, 1e-12),
    (0.7, 10.0, 2, 1e-3),
    (0.1, 1.5, 50, 1e-5),
    (0.1, 5.0, 64, 1e-10),
    (0.05, 0.9, 200, 1e-7),
    (0.05, 20.0, 300, 1e-4),
    (0.02, 1.2, 800, 1e-5),
    (0.02, 0.6, 500, 1e-3),
    (0.01, 1.0, 5_000, 1e-8),
    (1e-3, 0.5, 200_000, 1e-8),
    (1e-3, 1.0, 100_000, 1e-6),
    (1e-3, 40.0, 1_000_000, 1e-5),
    (0.8, 1.5, 10, 1e-6),
    (1.0, 3.0, 10, 1e-9),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_twenty_digits(case):
    q, sigma, count, delta = case
    with mp.workdps(25):
        release = reference.sampled_group(q, sigma) if q < 1.0 else reference.Sampled(q, sigma)
        truth = reference.epsilon_both_ways([(release, count)], delta, digits=20)
    check(epsilon_bounds(events((q, sigma, count)), delta), truth)


def configuration(seed):
    rng = np.random.default_rng(seed)
    q = 10.0 ** rng.uniform(-6.0, 0.0) if rng.random() > 0.1 else 1.0
    sigma = 0.3 * (50.0 / 0.3) ** rng.random()
    return q, sigma, int(10.0 ** rng.uniform(0.0, 6.0)), 10.0 ** rng.uniform(-12.0, -3.0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_configurations(seed):
    q, sigma, count, delta = configuration(seed)
    note(f"{q=}, {sigma=}, {count=}, {delta=}")
    lower, upper = epsilon_bounds(events((q, sigma, count)), delta)
    assert 0.0 <= lower <= upper
    if mean_loss(q, sigma, count) <= 200.0:
        assert lower > 100.0 or upper - lower <= CLOSE * upper


def mean_loss(q, sigma, count):
    """Mean privacy loss; where it is twice 100, ε at these δ is above 100."""
    x = np.linspace(-10.0 * sigma, 10.0 * sigma + 1.0, 2001)
    ratio = (2.0 * x - 1.0) / (2.0 * sigma**2)
    loss = np.logaddexp(math.log1p(-q), math.log(q) + ratio) if q < 1.0 else ratio
    density = np.exp(loss - x * x / (2.0 * sigma**2)) / (sigma * math.sqrt(2.0 * math.pi))
    return count * (density * loss).sum() * (x[1] - x[0])


def test_random_configurations_against_the_reference():
    """Where few examples are ever sampled and σ is small, the reference is slow: those cases are passed over."""
    judged = 0
    for seed in range(48):
        q, sigma, count, delta = configuration(seed)
        lower, upper = epsilon_bounds(events((q, sigma, count)), delta)
        if lower > 100.0 or count == 1 or (count * q < 1.0 and sigma < 8.0):
            continue
        try:
            judge((lower, upper), sampled((q, sigma, count)), delta, blocks=12)
        except ArithmeticError:
            continue
        judged += 1
    assert judged >= 20


FEW_STEPS = [
    (5e-4, 1.5, 2, 1.6e-4),
    (3e-5, 0.5, 2, 1.1e-5),
    (1e-5, 1.0, 2, 1e-8),
    (2e-6, 0.6, 3, 2e-11),
    (4e-6, 0.5, 3, 3e-8),
    (2e-4, 0.65, 3, 2e-5),
    (1e-3, 3.0, 3, 1e-6),
    (0.02, 0.8, 3, 1e-5),
]


@pytest.mark.parametrize("case", FEW_STEPS, ids=str)
def test_few_steps_at_tiny_rates(case):
    """Losses of two scales, far apart: against integrals over the outputs, which know no transform."""
    q, sigma, count, delta = case
    lower, upper = epsilon_bounds(events((q, sigma, count)), delta)
    at = nested_delta(q, sigma, count, np.array([lower, upper]))
    assert lower > 0.0
    assert at[0] >= delta * (1 - 1e-5)
    assert at[1] <= delta * (1 + 1e-5)


WIDE = pytest.mark.xfail(strict=True, reason="the upper bound is 0.1 to 35 % high here")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=WIDE) if c in FEW_STEPS[1:2] + FEW_STEPS[3:6] else c for c in FEW_STEPS],
    ids=str,
)
def test_few_steps_at_tiny_rates_are_close(case):
    q, sigma, count, delta = case
    lower, upper = epsilon_bounds(events((q, sigma, count)), delta)
    assert upper - lower <= CLOSE * upper


def closed_epsilon(q, sigma, delta):
    """Root of one step's closed δ(ε); removing is the worse direction for one step."""
    q, sigma = mpf(q), mpf(sigma)

    def over(epsilon):
        k = mpmath.exp(epsilon)
        t = sigma**2 * mpmath.log((k - 1 + q) / q) + mpf(1) / 2
        return q * mpmath.ncdf((1 - t) / sigma) - (k - 1 + q) * mpmath.ncdf(-t / sigma) > delta

    low, high = mpf(0), mpf(1)
    if not over(low):
        return low
    while over(high):
        low, high = high, 2 * high
    while high - low > mpf(10) ** -18 * high:
        low, high = ((low + high) / 2, high) if over((low + high) / 2) else (low, (low + high) / 2)
    return high


def test_one_step_is_the_closed_form():
    rng = np.random.default_rng(7)
    with mp.workdps(40):
        for _ in range(40):
            q, sigma = 10.0 ** rng.uniform(-5.0, 0.0), 0.3 * (50.0 / 0.3) ** rng.random()
            delta = 10.0 ** rng.uniform(-12.0, -3.0)
            truth = float(closed_epsilon(q, sigma, delta))
            lower, upper = epsilon_bounds(events((q, sigma, 1)), delta)
            assert lower <= truth <= upper
            assert upper - lower <= 1e-9 * upper


def test_full_batch_is_the_gaussian_mechanism():
    with mp.workdps(40):
        for sigma, count, delta in (
            (20.0, 100, 1e-5),
            (0.5, 3, 1e-12),
            (50.0, 1, 1e-9),
            (3.0, 1_000_000, 1e-6),
        ):
            truth = float(closed_epsilon(1.0, sigma / math.sqrt(count), delta))
            lower, upper = epsilon_bounds(events((1.0, sigma, count)), delta)
            assert lower * (1 - 1e-9) <= truth <= upper * (1 + 1e-9)
            assert upper - lower <= 1e-9 * upper


def test_counts_are_sums_of_events():
    once = epsilon_bounds(events((0.02, 1.0, 600)), 1e-5)
    split = epsilon_bounds(events((0.02, 1.0, 100), (0.02, 1.0, 500)), 1e-5)
    assert split == pytest.approx(once, rel=CLOSE)


def test_nothing_released():
    for none in (
        [],
        events((0.5, 1.0, 0)),
        events((0.0, 1.0, 10)),
        events((0.5, math.inf, 10)),
        events((0.0, 0.0, 1)),
    ):
        assert epsilon_bounds(none, 1e-5) == (0.0, 0.0)
        assert delta_bounds(none, 1.0) == (0.0, 0.0)
    some = events((0.02, 1.0, 600))
    with_silence = [*some, *events((0.0, 0.5, 7), (0.3, math.inf, 2))]
    assert epsilon_bounds(with_silence, 1e-5) == epsilon_bounds(some, 1e-5)


def test_no_noise():
    assert epsilon_bounds(events((0.5, 0.0, 1)), 1e-5) == (math.inf, math.inf)
    assert epsilon_bounds(events((1.0, 0.0, 1), (0.1, 1.0, 10)), 1e-5) == (math.inf, math.inf)
    lower, upper = epsilon_bounds(events((1e-9, 0.0, 1)), 1e-5)
    assert upper == math.inf
    assert lower == 0.0
    assert delta_bounds(events((0.5, 0.0, 2)), 3.0) == (pytest.approx(0.75), 1.0)


@pytest.mark.parametrize("q", [1e-300, 1e-12])
def test_tiny_rates(q):
    for count in (1, 100):
        lower, upper = epsilon_bounds(events((q, 0.5, count)), 1e-5)
        assert lower == upper == 0.0  # the total variation is at most count·q
        lower, upper = delta_bounds(events((q, 0.5, count)), 0.0)
        assert 0.0 <= lower <= upper <= count * q


@pytest.mark.parametrize("step", [(0.1, 2.0, 50), (1e-3, 0.7, 10_000), (0.7, 30.0, 400)], ids=str)
def test_delta_close_to_the_total_variation(step):
    """ε → 0 as δ rises to δ(0), and is 0 from there on."""
    variation = float(reference.delta_both_ways(sampled(step), 0.0))
    assert epsilon_bounds(events(step), variation * 1.01) == (0.0, 0.0)
    last = math.inf
    for part in (0.5, 0.9, 0.99):
        bounds = epsilon_bounds(events(step), part * variation)
        judge(bounds, sampled(step), part * variation)
        assert bounds[1] < last
        last = bounds[1]


def test_monotone():
    for q, sigma, count, delta in (
        (0.01, 0.8, 500, 1e-5),
        (1e-4, 0.6, 20_000, 1e-7),
        (0.5, 10.0, 300, 1e-10),
    ):
        bounds = epsilon_bounds(events((q, sigma, count)), delta)
        assert epsilon_bounds(events((q, sigma, 2 * count)), delta)[0] > bounds[1]
        assert epsilon_bounds(events((q, 1.1 * sigma, count)), delta)[1] < bounds[0]
        assert epsilon_bounds(events((1.1 * q, sigma, count)), delta)[0] > bounds[1]
        assert epsilon_bounds(events((q, sigma, count)), delta / 10)[0] > bounds[1]


def test_heterogeneous():
    steps = [(0.01, 1.0, 300), (0.05, 2.0, 100), (1.0, 30.0, 4), (0.002, 0.7, 1_000), (0.3, 5.0, 9)]
    known = [(reference.sampled_group(q, sigma), count) for q, sigma, count in steps]
    for delta in (1e-3, 1e-11):
        check(epsilon_bounds(events(*steps), delta), reference.epsilon_both_ways(known, delta))


@pytest.mark.parametrize(
    "case", [(*row, e) for row, e in zip(ROWS, (2.0, 9.0, 1.0, 0.9, 4.0, 3.0), strict=True)], ids=str
)
def test_delta(case):
    step, epsilon = case[:3], case[3]
    truth = float(reference.delta_both_ways(sampled(step), epsilon))
    lower, upper = delta_bounds(events(step), epsilon)
    assert lower * (1 - 1e-9) <= truth <= upper * (1 + 1e-9)
    assert upper - lower <= 0.02 * upper
    low, high = epsilon_bounds(events(step), truth)
    assert low <= epsilon * (1 + EXACT)
    assert high >= epsilon * (1 - EXACT)


@pytest.mark.parametrize("rel", [1e-2, 1e-4])
def test_tolerance(rel):
    truth = reference.epsilon_both_ways(sampled(ROWS[2]), 1e-5)
    check(epsilon_bounds(events(ROWS[2]), 1e-5, rel=rel), truth, rel)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[4], ROWS[5]], ids=str)
def test_dp_accounting(row):
    """Google's pessimistic value is above our lower bound, its optimistic one below our upper bound."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    q, sigma, count = row
    bounds = epsilon_bounds(events(row), 1e-5)
    for pessimistic in (True, False):
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=1e-4, pessimistic_estimate=pessimistic
        )
        theirs = one.self_compose(count).get_epsilon_for_delta(1e-5)
        assert theirs >= bounds[0] if pessimistic else theirs <= bounds[1]
        if pessimistic:
            assert theirs == pytest.approx(bounds[1], rel=CLOSE)
