"""The condition on smoothing: the momentum's signal-to-noise ratio, from released values and public noise."""

import math

import pytest
import torch
from torch import nn

from adaclip.noise import NoiseSource
from adaclip.smoothing import DiSK, NoiseCorrectedNadam, SmoothedLoss
from adaclip.smoothing.loss import NoiseSignal
from adaclip.update import noisy_update

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
    lambda p: torch.optim.Adam(p, betas=(0.7, 0.99)),
    lambda p: torch.optim.NAdam(p),
    lambda p: NoiseCorrectedNadam(p),
    lambda p: DiSK(p, lr=0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_pure_noise_has_no_signal(make, steps):
    params = [nn.Parameter(torch.zeros(60_000)), nn.Parameter(torch.zeros(40_000))]
    optimizer = make(params)
    signal = NoiseSignal(SmoothedLoss(every=steps), optimizer)
    for t in range(steps):
        stds = [0.3 * 1.5**t, 0.1]
        noisy_update(optimizer, params, stds, NoiseSource(2), t)
        assert signal.ratio is None
        signal.observe(params, stds)
    # Its standard deviation is sqrt(2 / 100,000) at least, and larger where one tensor dominates.
    assert abs(signal.ratio) < 0.03


def test_the_ratio_is_that_of_signal_and_noise():
    p = nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.SGD([p], lr=0.0, momentum=0.9)
    signal = NoiseSignal(SmoothedLoss(threshold=2.0, every=100), optimizer)
    for t in range(100):
        p.grad = torch.full_like(p, 0.5)
        noisy_update(optimizer, [p], [1.0], NoiseSource(2), t)
        signal.observe([p], torch.tensor([1.0]))
    # m is 10 times the gradient, and its noise has variance 1 / (1 - 0.81).
    assert signal.ratio == pytest.approx((0.5 * 10) ** 2 * 0.19, rel=0.03)
    assert signal.tau == 0.0


def _fed(settings, ratios):
    """tau after each look, for a momentum with these ratios."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    signal = NoiseSignal(settings, optimizer)
    taus = [signal.tau]
    for ratio in ratios:
        signal._variance.clear()
        optimizer.state[p]["momentum_buffer"] = torch.full((4,), math.sqrt(1 + ratio))
        signal.observe([p], [1.0])
        taus.append(signal.tau)
    return taus


def test_tau_is_conditional():
    always, snr, plateau = (
        SmoothedLoss(0.1, signal, threshold=0.5, every=1, decay=0.0)
        for signal in ("always", "snr", "plateau")
    )
    ratios = [2.0, 0.6, 0.4, 0.7, 4.0, 1.9]
    assert _fed(always, ratios) == [0.1] * 7
    assert _fed(snr, ratios) == [0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0]
    assert _fed(plateau, ratios) == [0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 0.1]
    # An average over looks: 2, 1.3, 0.85, 0.775, ...
    slow = SmoothedLoss(0.1, "snr", threshold=0.8, every=1, decay=0.5)
    assert _fed(slow, ratios) == [0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0]


def test_without_noise_nothing_is_smoothed():
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    signal = NoiseSignal(SmoothedLoss(every=1), optimizer)
    for grad in (torch.zeros(4), torch.ones(4)):
        p.grad = grad
        noisy_update(optimizer, [p], [0.0], NoiseSource(1), 0)
        signal.observe([p], [0.0])
        assert signal.tau == 0.0


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "tau must be finite and at least 0, got -1", {"tau": -1}),
        (ValueError, "tau must be finite and at least 0, got nan", {"tau": math.nan}),
        (ValueError, "signal must be 'always', 'snr' or 'plateau', got 'loss'", {"signal": "loss"}),
        (ValueError, "threshold must be finite and above 0, got 0", {"threshold": 0}),
        (ValueError, r"decay must be in \[0, 1\), got 1", {"decay": 1}),
        (ValueError, "every must be at least 1, got 0", {"every": 0}),
        (TypeError, "refresh must be an int, got 2.0", {"refresh": 2.0}),
    ],
)
def test_bad_settings_are_refused(error, message, options):
    with pytest.raises(error, match=message):
        SmoothedLoss(**options)
