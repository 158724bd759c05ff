"""Factors, statistics and the quantile's step: both backends against formulas written one sample at a time."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip import ops
from adaclip.reference import SLACK

BACKENDS = ["cpp", "reference"]


class Rule(NamedTuple):
    kind: str
    stability: float = 0.0


RULES = [Rule("threshold"), Rule("normalized", 0.01), Rule("psac", 0.1)]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def factor(rule, threshold, n):
    if rule.kind == "threshold":
        return min(1.0, threshold / n) if n else 1.0
    s = rule.stability
    return threshold / (n + s) if rule.kind == "normalized" else threshold / (n + s / (n + s))


def expected(sqnorms, thresholds, rule, unit, denominator, real, weights):
    """(factors [K, B], norms [B], shares [B]) as lists, one sample at a time."""
    k, b = sqnorms.shape
    factors, shares = [[0.0] * b for _ in range(k)], [math.nan] * b
    norms = [unit * math.sqrt(sum(sqnorms[:, j].tolist())) for j in range(b)]
    for j in range(b):
        n = [unit * math.sqrt(v) for v in sqnorms[:, j].tolist()]
        if j >= real or not all(map(math.isfinite, n)):
            continue
        full = [factor(rule, SLACK * c, v) for c, v in zip(thresholds.tolist(), n, strict=True)]
        w = 1.0 if weights is None else weights[j].item()
        shares[j] = math.hypot(*(f * v for f, v in zip(full, n, strict=True))) / math.hypot(
            *thresholds.tolist()
        )
        for i in range(k):
            c = min(w, full[i]) if rule.kind == "threshold" else w * full[i]
            value = c * unit / denominator
            factors[i][j] = value if value >= 2.0**-100 else 0.0
    return factors, norms, shares


def close(got, want, rtol):
    torch.testing.assert_close(got.double(), f64(want).reshape(got.shape), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_factors_are_the_formula(backend, rule, groups, weighted, rows):
    sqnorms = torch.rand(groups, rows, dtype=torch.float64) * 9
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    thresholds = torch.rand(groups, dtype=torch.float64) + 0.5
    real = max(0, rows - 2)
    numbers = {"unit": 7.0, "denominator": 40.0, "real": real}
    made = ops.clip_factors(sqnorms, thresholds, rule, weights=weights, backend=backend, **numbers)
    want = expected(sqnorms, thresholds, rule, 7.0, 40.0, real, weights)
    assert made[0].dtype == torch.float32
    for got, values, rtol in zip(made, want, (2e-7, 1e-14, 1e-14), strict=True):
        close(got, values, rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
@given(exponent=st.floats(-12, 12), threshold=st.floats(-3, 3), weight=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_no_sample_contributes_more_than_its_threshold(backend, rule, exponent, threshold, weight):
    n, c = 10.0**exponent, 10.0**threshold
    args = f64([[n * n]]), f64([c]), rule
    numbers = {"unit": 1.0, "denominator": 1.0, "real": 1}
    factors, norms, shares = ops.clip_factors(*args, weights=f64([weight]), backend=backend, **numbers)
    assert factors.item() * n <= c * (1 + 2.0**-20)
    assert norms.item() == pytest.approx(n, rel=1e-14)
    assert 0.0 <= shares.item() <= 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
def test_rows_that_are_not_finite_or_padding_have_no_part(backend, rule):
    sqnorms = f64([[1.0, math.nan, 4.0, math.inf, 1.0, 0.0, 9.0], [1.0, 1.0, math.inf, 1.0, -1.0, 0.0, 9.0]])
    numbers = {"unit": 1.0, "denominator": 2.0, "real": 6}
    factors, norms, shares = ops.clip_factors(sqnorms, f64([1.0, 1.0]), rule, backend=backend, **numbers)
    assert (factors[:, [1, 2, 3, 4, 6]] == 0).all()
    assert shares[[1, 2, 3, 4, 6]].isnan().all()
    assert factors[:, 0].min() > 0
    assert shares[5] == 0
    assert factors.isfinite().all()
    assert not norms[[1, 2, 3]].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_stay_in_their_range_and_denormal_factors_vanish(backend):
    sqnorms = f64([[1e-4] * 4])
    numbers = {"unit": 1.0, "denominator": 1.0, "real": 4}
    weights = f64([2.0, math.nan, -1.0, 0.25])
    made = ops.clip_factors(
        sqnorms, f64([1.0]), Rule("threshold"), weights=weights, backend=backend, **numbers
    )
    assert made[0].tolist() == [[1.0, 0.0, 0.0, 0.25]]
    numbers["denominator"] = 1e31
    tiny = ops.clip_factors(sqnorms, f64([1.0]), Rule("threshold"), backend=backend, **numbers)
    assert (tiny[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("groups", [1, 3])
def test_statistics_are_the_formula(backend, rows, groups):
    sqnorms = torch.rand(groups, rows, dtype=torch.float64) * 4
    if rows > 20:
        sqnorms[0, 3], sqnorms[groups - 1, 7] = math.nan, math.inf
    real, unit = max(0, rows - 4) if rows > 1 else rows, 3.0
    thresholds = torch.linspace(2.0, 5.0, groups, dtype=torch.float64)
    numbers = {"unit": unit, "real": real}
    shares = ops.clip_factors(sqnorms, thresholds, Rule("threshold"), denominator=1.0, **numbers)[2]
    edges = f64([1.0, 2.0, 4.0, 6.0, 8.0])
    labels = torch.randint(0, 5, (rows,))
    labels[real:] = 999
    table = torch.tensor([0, 1, 1, 2, 0])
    sums = [torch.full((n,), 0.5, dtype=torch.float64) for n in (groups, 6, 4, 4)]
    versions = [t._version for t in sums]
    ops.sample_statistics(
        sqnorms,
        thresholds,
        shares=shares,
        below=sums[0],
        edges=edges,
        histogram=sums[1],
        labels=labels,
        table=table,
        group_sums=sums[2],
        group_counts=sums[3],
        backend=backend,
        **numbers,
    )
    want = [[0.5] * len(t) for t in sums]
    for b in range(real):
        n = [unit * math.sqrt(v) for v in sqnorms[:, b].tolist()]
        if not all(map(math.isfinite, n)):
            continue
        for k, c in enumerate(thresholds.tolist()):
            want[0][k] += 0.5 if n[k] <= c else -0.5
        want[1][sum(e < math.hypot(*n) for e in edges.tolist())] += 1
        group = table[labels[b]].item()
        want[2][group] += shares[b].item()
        want[3][group] += 1
    for got, values in zip(sums, want, strict=True):
        close(got, values, 1e-13)
    assert all(t._version > v for t, v in zip(sums, versions, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_whole(backend):
    sqnorms = torch.rand(2, 30, dtype=torch.float64)
    thresholds = f64([0.6, 0.7])
    whole, parts = f64([0.0, 0.0]), f64([0.0, 0.0])
    ops.sample_statistics(sqnorms, thresholds, unit=1.0, real=30, below=whole, backend=backend)
    for piece in sqnorms.split(7, dim=1):
        rows = piece.shape[1]
        ops.sample_statistics(piece, thresholds, unit=1.0, real=rows, below=parts, backend=backend)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_without_a_group_is_refused_with_nothing_added(backend):
    for bad in (3, -1):
        counts, below = f64([0.0, 0.0]), f64([0.0])
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
            ops.sample_statistics(
                f64([[1.0, 1.0]]),
                f64([1.0]),
                unit=1.0,
                real=2,
                below=below,
                labels=torch.tensor([0, bad]),
                table=torch.tensor([0, 1, 1]),
                group_counts=counts,
                backend=backend,
            )
        assert not counts.any()
        assert not below.any()


def speed(run):
    return min(2 ** max(0, abs(run) - 2), 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [False, True])
def test_a_quantile_step_is_the_formula(backend, accelerate):
    quantile, rate, denominator = 0.3, 0.2, 64.0
    thresholds, run = f64([1.0, 2.0, 3.0]), f64([0.0, 0.0, 0.0])
    low, high = thresholds * 1e-6, thresholds * 1e6
    want, runs = thresholds.tolist(), [0, 0, 0]
    drawn = torch.randn(12, 3, dtype=torch.float64) * 8
    drawn[:, 0] = 32.0
    drawn[:, 1] = -32.0
    for noisy in drawn:
        ops.follow_quantile(
            *(thresholds, run, noisy),
            low=low,
            high=high,
            denominator=denominator,
            quantile=quantile,
            rate=rate,
            accelerate=accelerate,
            backend=backend,
        )
        for k in range(3):
            gap = 0.5 + noisy[k].item() / denominator - quantile
            side = 1 if gap > 0.75 * 0.7 else -1 if gap < -0.75 * 0.3 else 0
            runs[k] = runs[k] + side if side * runs[k] > 0 else side
            f = speed(runs[k]) if accelerate else 1.0
            want[k] = min(max(want[k] * math.exp(-rate * f * gap), low[k].item()), high[k].item())
        close(thresholds, want, 1e-12)
    close(run, runs if accelerate else [0.0] * 3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_keeps_its_limits_whatever_the_noise(backend):
    thresholds = f64([1.0, 1.0])
    ops.follow_quantile(
        *(thresholds, f64([0.0, 0.0]), f64([1e9, -1e9])),
        low=f64([0.1, 0.1]),
        high=f64([10.0, 10.0]),
        denominator=1.0,
        quantile=0.5,
        rate=0.2,
        accelerate=True,
        backend=backend,
    )
    assert thresholds.tolist() == [0.1, 10.0]


BAD_FACTORS = {
    "sqnorms": {"sqnorms": torch.ones(2)},
    "thresholds": {"thresholds": f64([1.0])},
    "real": {"real": 4},
    "unit": {"unit": 0.0},
    "denominator": {"denominator": math.inf},
    "weights": {"weights": f64([1.0])},
    "kind": {"rule": Rule("soft")},
    "stability": {"rule": Rule("psac")},
    "backend": {"backend": "none"},
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_bad_arguments_of_factors_are_named(name):
    given = {
        "sqnorms": torch.ones(2, 3, dtype=torch.float64),
        "thresholds": f64([1.0, 1.0]),
        "rule": Rule("threshold"),
        "unit": 1.0,
        "denominator": 1.0,
        "real": 3,
    }
    with pytest.raises(ValueError, match=name):
        ops.clip_factors(**{**given, **BAD_FACTORS[name]})


BAD_COUNTS = {
    "below": {"below": f64([1.0, 1.0])},
    "edges": {"edges": f64([1.0])},
    "table": {"labels": torch.tensor([0, 0, 0]), "group_counts": f64([0.0])},
    "shares": {"labels": torch.zeros(3).long(), "table": torch.tensor([0]), "group_sums": f64([0.0])},
    "labels": {"labels": torch.zeros(2).long(), "table": torch.tensor([0]), "group_counts": f64([0.0])},
    "int64": {"labels": torch.zeros(3), "table": torch.tensor([0]), "group_counts": f64([0.0])},
    "contiguous": {"histogram": torch.zeros(4, dtype=torch.float64)[::2], "edges": f64([1.0])},
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_bad_arguments_of_statistics_are_named(name):
    sqnorms = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=name):
        ops.sample_statistics(sqnorms, f64([1.0]), unit=1.0, real=3, **BAD_COUNTS[name])


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="float64 tensors"):
        ops.clip_factors(
            torch.ones(1, 1, dtype=torch.float64),
            torch.ones(1),
            Rule("threshold"),
            unit=1.0,
            denominator=1.0,
            real=1,
            backend="cpp",
        )
