"""Triton's step of a threshold after a quantile, against the reference."""

import math

import pytest
import torch

pytest.importorskip("triton")

from test_clip_ops import f64

from adaclip import reference
from adaclip.kernels.follow_quantile import follow_quantile

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's, in the interpreter
]


def follow(device, start, drawn, *, accelerate, low=1e-6, high=1e6, **numbers):
    """Every step on both; (thresholds, run) of ours at the end."""
    low, high = start * low, start * high
    ours = [t.to(device) for t in (start.clone(), torch.zeros_like(start))]
    theirs = [start.clone(), torch.zeros_like(start)]
    rest = numbers["denominator"], numbers["quantile"], numbers["rate"], accelerate
    for noisy in drawn:
        follow_quantile(*ours, noisy.to(device), low.to(device), high.to(device), *rest)
        reference.follow_quantile(*theirs, noisy, low, high, *rest)
        torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-13, atol=0, equal_nan=True)
        assert torch.equal(ours[1].cpu(), theirs[1])
    return [t.cpu() for t in ours]


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 70])
def test_steps_are_the_reference(gpu_or_interpreter, accelerate, groups):
    start = torch.rand(groups, dtype=torch.float64) + 0.5
    drawn = torch.randn(12, groups, dtype=torch.float64) * 8
    drawn[:, 0] = 32.0
    drawn[7:, 0] = 0.0
    drawn[:, -1] = -32.0
    numbers = {"denominator": 64.1, "quantile": 0.3, "rate": 0.2, "accelerate": accelerate}
    _, run = follow(gpu_or_interpreter, start, drawn, **numbers)
    # Twelve saturated steps in a row reach every speed.
    assert run[-1] == (-12 if accelerate else 0)


def test_a_threshold_keeps_its_limits_whatever_the_noise(gpu_or_interpreter):
    drawn = f64([[1e9, -1e9, math.inf, -math.inf]])
    numbers = {"denominator": 1.0, "quantile": 0.5, "rate": 0.2, "accelerate": True, "low": 0.1, "high": 10.0}
    ended = follow(gpu_or_interpreter, torch.ones(4, dtype=torch.float64), drawn, **numbers)[0]
    assert ended.tolist() == [0.1, 10.0, 0.1, 10.0]


def test_what_is_no_number_is_not_hidden(gpu_or_interpreter):
    numbers = {"denominator": 1.0, "quantile": 0.5, "rate": 0.2, "accelerate": False}
    ended = follow(gpu_or_interpreter, f64([1.0, 1.0]), f64([[math.nan, 0.0]]), **numbers)[0]
    assert ended[0].isnan()
    assert ended[1] == 1.0


def test_no_thresholds(gpu_or_interpreter):
    none = torch.empty(0, dtype=torch.float64, device=gpu_or_interpreter)
    follow_quantile(none, none, none, none, none, 1.0, 0.5, 0.2, True)


def test_numbers_reach_the_kernel_in_float64(gpu_or_interpreter):
    # The gap is 2^-40, which a quantile in float32 would round away.
    numbers = {"denominator": 1.0, "quantile": 0.5 - 2.0**-40, "rate": 2.0**20, "accelerate": False}
    ended = follow(gpu_or_interpreter, f64([1.0]), f64([[0.0]]), **numbers)[0]
    assert ended.item() == pytest.approx(math.exp(-(2.0**-20)), rel=1e-15)
