"""The audit of real steps that release more than the gradient: they pass, and planted faults are flagged."""

import numpy as np
import planted
import pytest
import torch

from adaclip.auditing import Canaries, EngineStep, component_audit
from adaclip.clipping import AdaptiveClipping, FlatClipping
from adaclip.groups import LabelGroups
from adaclip.schedules import Linear

C = 2.0
SIGMA = 1.5


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


def build(gradients, *, start=C, groups=None, seed=None, sample_rate=0.1, **options):
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return EngineStep(
        gradients,
        noise_multiplier=SIGMA,
        sample_rate=sample_rate,
        max_grad_norm=None,
        clipping=AdaptiveClipping(start, sigma_b=3.0),
        groups=groups,
        noise_generator=generator,
        **options,
    )


GENERATOR = torch.Generator().manual_seed(11)


def audit(groups=None, start=C, steps=120, side_trials=200, **options):
    def made(gradients):
        seed = int(torch.randint(1 << 40, (1,), generator=GENERATOR))
        return build(gradients, groups=groups, start=start, seed=seed, **options)

    return component_audit(
        made, steps=steps, canaries=150, background=300, delta=1e-5, max_grad_norm=C, side_trials=side_trials
    )


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 20}])
def test_a_step_reports_the_threshold_it_clipped_to_and_how_its_noise_is_split(options):
    step = build(Canaries(20, np.random.default_rng(0), background=40).gradients(), seed=1, **options)
    told = [step() for _ in range(6)]
    history = step.optimizer.clipping.history.tolist()
    assert [released.max_grad_norm for released in told] == history[:6]
    assert len(set(history)) == 7
    for released, after in zip(told, history[1:], strict=True):
        assert released.side == {"threshold 0 of the next step": after}
        assert released.total_sigma == SIGMA
        assert released.sigma == pytest.approx((SIGMA**-2 - 6.0**-2) ** -0.5, rel=1e-12)


def test_a_step_reports_its_groups_with_noise():
    groups = LabelGroups(groups=2)
    step = build(Canaries(20, np.random.default_rng(0)).gradients(), groups=groups, seed=1)
    side = step().side
    assert side["the selected group"] in (0, 1)
    assert {f"group {g} of the noisy {what}" for g in (0, 1) for what in ("sums", "counts")} < side.keys()


def test_a_scheduled_noise_is_reported_as_it_was():
    gradients = Canaries(10, np.random.default_rng(0)).gradients()
    step = EngineStep(
        gradients,
        noise_multiplier=2.0,
        sample_rate=0.2,
        max_grad_norm=None,
        clipping=FlatClipping(1.0, schedule=Linear(1.0, 0.5, 4)),
        noise_schedule=Linear(1.0, 0.5, 4),
        noise_generator=3,
    )
    told = [step() for _ in range(4)]
    for t, released in enumerate(told):
        share = Linear(1.0, 0.5, 4)(t)
        assert released.sigma == released.total_sigma == 2.0 * share
        assert released.max_grad_norm == share


def test_adaptive_steps_with_groups_pass():
    report = audit(groups=LabelGroups(groups=3))
    assert report.passed, report.reasons
    assert report.epsilon_lower > 0.6 * report.epsilon_claimed
    assert any("the clipping norm" in check.name for check in report.checks)


def test_noise_that_does_not_follow_the_threshold_is_flagged(monkeypatch):
    planted.noise_of_the_first_threshold(monkeypatch)
    report = audit(start=0.1 * C)
    assert not report.passed
    assert any("the noise" in reason for reason in report.reasons), report.reasons


def test_noise_of_the_last_threshold_is_flagged(monkeypatch):
    planted.noise_of_the_last_threshold(monkeypatch)
    report = audit(start=0.1 * C)
    assert not report.passed
    assert any("the last change of the clipping norm" in reason for reason in report.reasons), report.reasons


def test_statistics_without_noise_are_flagged(monkeypatch):
    planted.statistics_without_noise(monkeypatch)
    report = audit(groups=LabelGroups(groups=2), steps=20, side_trials=600, sample_rate=0.5)
    assert not report.passed
    assert any("released beside the gradient" in reason for reason in report.reasons), report.reasons


@pytest.mark.parametrize("given", [{}, {"batch_size": 1, "sample_rate": 0.5}])
def test_exactly_one_of_batch_size_and_sample_rate_is_asked_for(given):
    with pytest.raises(ValueError, match="exactly one of batch_size and sample_rate"):
        EngineStep(np.ones((2, 4)), noise_multiplier=1.0, **given)


def test_a_small_data_set_is_filled_up_to_the_sampling_rate():
    step = EngineStep(np.ones((1, 4)), noise_multiplier=1.0, sample_rate=0.1, noise_generator=1)
    assert step.sample_rate == 0.1
    assert step.denominator == 1.0
    assert step().sampled.shape == (1,)
    with pytest.raises(ValueError, match="sample_rate must be in"):
        EngineStep(np.ones((1, 4)), noise_multiplier=1.0, sample_rate=0.0)
