"""Triton's clipping factors against the reference: the same float64 arithmetic, on a device."""

import math

import pytest
import torch

pytest.importorskip("triton")

from test_clip_ops import RULES, f64

from adaclip import reference
from adaclip.kernels.clip_factors import clip_factors

pytestmark = pytest.mark.usefixtures("one_thread")


def both(device, sqnorms, thresholds, rule, *, weights=None, real, real_on_device=False, **numbers):
    """(ours, the reference's), each (factors, norms, shares) on the CPU."""
    given = [t if t is None else t.to(device) for t in (sqnorms, thresholds, weights)]
    count = torch.tensor([real], device=device) if real_on_device else real
    kind = rule.kind, rule.stability
    ours = clip_factors(
        given[0], given[1], *kind, slack=reference.SLACK, weights=given[2], real=count, **numbers
    )
    theirs = reference.clip_factors(sqnorms, thresholds, *kind, weights=weights, real=real, **numbers)
    return [t.cpu() for t in ours], theirs


def same(ours, theirs):
    for got, want, rtol in zip(ours, theirs, (1.2e-7, 1e-14, 1e-14), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9, 300])
def test_factors_are_the_reference(gpu_or_interpreter, rule, groups, weighted, rows):
    sqnorms = torch.rand(groups, rows, dtype=torch.float64) * 9
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    thresholds = torch.rand(groups, dtype=torch.float64) + 0.5
    numbers = {"unit": 7.0, "denominator": 40.1, "real": max(0, rows - 2)}
    same(*both(gpu_or_interpreter, sqnorms, thresholds, rule, weights=weights, **numbers))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
def test_the_number_of_samples_may_live_on_the_device(gpu_or_interpreter, rule):
    sqnorms, thresholds = torch.rand(2, 150, dtype=torch.float64), f64([0.5, 0.7])
    for real in (0, 1, 140, 150):
        numbers = {"unit": 1.0, "denominator": 3.0, "real": real}
        ours, theirs = both(gpu_or_interpreter, sqnorms, thresholds, rule, real_on_device=True, **numbers)
        same(ours, theirs)
        assert not ours[0][:, real:].any()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
def test_no_sample_contributes_more_than_its_threshold(gpu_or_interpreter, rule):
    n = torch.logspace(-150, 150, 601, base=10, dtype=torch.float64)
    weights = torch.rand(601, dtype=torch.float64)
    for c in (1e-3, 0.7, 1e3):
        numbers = {"unit": 1.0, "denominator": 1.0, "real": 601, "weights": weights}
        (factors, norms, shares), theirs = both(
            gpu_or_interpreter, n.square()[None], f64([c]), rule, **numbers
        )
        same((factors, norms, shares), theirs)
        assert (factors[0].double() * n <= c * (1 + 2.0**-20)).all()
        assert ((shares >= 0) & (shares <= 1)).all()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.kind)
def test_rows_that_are_not_finite_or_padding_have_no_part(gpu_or_interpreter, rule):
    nan, inf = math.nan, math.inf
    sqnorms = f64([[1.0, nan, 4.0, inf, 1.0, 0.0, 9.0, nan], [1.0, 1.0, inf, 1.0, -1.0, 0.0, 9.0, 1.0]])
    numbers = {"unit": 1.0, "denominator": 2.0, "real": 6}
    (factors, norms, shares), theirs = both(gpu_or_interpreter, sqnorms, f64([1.0, 1.0]), rule, **numbers)
    same((factors, norms, shares), theirs)
    assert (factors[:, [1, 2, 3, 4, 6, 7]] == 0).all()
    assert shares[[1, 2, 3, 4, 6, 7]].isnan().all()
    assert factors[:, 0].min() > 0
    assert shares[5] == 0
    assert factors.isfinite().all()


def test_weights_stay_in_their_range_and_denormal_factors_vanish(gpu_or_interpreter):
    sqnorms, weights = f64([[1e-4] * 5]), f64([2.0, math.nan, -1.0, 0.25, math.inf])
    numbers = {"unit": 1.0, "denominator": 1.0, "real": 5}
    ours, _ = both(gpu_or_interpreter, sqnorms, f64([1.0]), RULES[0], weights=weights, **numbers)
    assert ours[0].tolist() == [[1.0, 0.0, 0.0, 0.25, 1.0]]
    numbers["denominator"] = 1e31
    assert not both(gpu_or_interpreter, sqnorms, f64([1.0]), RULES[0], **numbers)[0][0].any()


def test_numbers_reach_the_kernel_in_float64(gpu_or_interpreter):
    # Each would be another number in float32.
    numbers = {"unit": 1 + 2.0**-40, "denominator": 3 + 2.0**-40, "real": 1}
    _, norms, shares = both(gpu_or_interpreter, f64([[4.0]]), f64([3.0]), RULES[0], **numbers)[0]
    assert norms.item() == 2 + 2.0**-39
    assert shares.item() == pytest.approx((2 + 2.0**-39) / 3, rel=1e-15)
