"""The audits on the real engine: its loader, clipped sum, noise and optimizer, and faults planted in them."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import adaclip.optimizer
from adaclip.accounting import calibrate_noise
from adaclip.auditing import Canaries, EngineStep, component_audit, one_run_audit, two_run_audit
from adaclip.auditing.trace import record
from adaclip.clipped_sum import ClippedSum
from adaclip.clipping import PerLayerClipping
from adaclip.optimizer import DPOptimizer
from adaclip.planned import Part
from adaclip.sampler import PoissonLoader

DELTA = 1e-5


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


def engine_step(*, epsilon=3.0, steps=1000, batch_size=50, size=500, seed=0, **options):
    """A builder of real steps, each with a key of its own from one seeded generator."""
    sigma = calibrate_noise(
        target_epsilon=epsilon, delta=DELTA, sample_rate=batch_size / size, steps=steps, accountant="pld"
    )
    generator = torch.Generator().manual_seed(seed)
    return partial(
        EngineStep,
        noise_multiplier=sigma,
        batch_size=batch_size,
        max_grad_norm=2.0,
        accountant="pld",
        noise_generator=generator,
        **options,
    )


def audit(steps=150, size=150, **options):
    build = engine_step(steps=steps, size=size, batch_size=size // 10, **options)
    return component_audit(build, steps=steps, canaries=size, delta=DELTA, max_grad_norm=2.0)


# --- the step itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clipping": "per_layer"}, {"max_batch_size": 3}, {"pad_to": 16}])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_real_step_releases_the_clipped_canaries_that_it_drew(options, layers):
    made = Canaries(40, np.random.default_rng(0), max_grad_norm=2.0, background=5)
    step = EngineStep(
        made.gradients(),
        noise_multiplier=1e-5,
        batch_size=9,
        max_grad_norm=2.0,
        layers=layers,
        noise_generator=7,
        **options,
    )
    trace = record(step, made, 12)
    assert trace.drawn.any()
    np.testing.assert_allclose(trace.along, trace.drawn, atol=1e-4)
    np.testing.assert_allclose(trace.across, 0.0, atol=1e-4)
    assert trace.sample_rate == 0.2
    assert trace.denominator == 9.0


# --- the component audit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [3.0, 8.0])
def test_the_engine_keeps_its_promise_and_nine_tenths_of_it_are_proven(epsilon):
    report = component_audit(
        engine_step(epsilon=epsilon),
        steps=1000,
        canaries=500,
        delta=DELTA,
        max_grad_norm=2.0,
        accountant="pld",
    )
    assert report.passed, report.reasons
    assert report.epsilon_claimed == pytest.approx(epsilon, rel=1e-3)
    assert 0.9 <= report.epsilon_lower / report.epsilon_claimed <= 1.0
    for measured in report.measurements:
        assert measured.low <= measured.estimate <= measured.high


@pytest.mark.parametrize("options", [{"clipping": "per_layer"}, {"max_batch_size": 4}])
def test_other_ways_through_the_engine_pass(options):
    report = audit(**options)
    assert report.passed, report.reasons


def scaled_noise(monkeypatch, factor):
    update = adaclip.optimizer.noisy_update

    def patched(optimizer, params, stds, *rest, **options):
        update(optimizer, params, [factor * std for std in stds], *rest, **options)

    monkeypatch.setattr(adaclip.optimizer, "noisy_update", patched)


def test_less_noise_than_claimed_is_flagged(monkeypatch):
    scaled_noise(monkeypatch, 0.7)
    report = audit()
    assert not report.passed
    assert any("the noise is" in reason for reason in report.reasons)
    sigma = next(m for m in report.measurements if m.name == "sigma")
    assert sigma.estimate / sigma.claimed == pytest.approx(0.7, rel=0.02)
    assert sigma.high < sigma.claimed
    assert report.epsilon_lower > report.epsilon_claimed


def test_division_by_the_realized_batch_size_is_flagged(monkeypatch):
    accumulate, step = ClippedSum._accumulate, DPOptimizer.step

    def patched_accumulate(self, used, rows):
        self._denominator = max(1, self._batch().rows)
        accumulate(self, used, rows)

    def patched_step(self, closure=None):
        self._expected_batch_size = max(1, self._batch().rows)
        return step(self, closure)

    monkeypatch.setattr(ClippedSum, "_accumulate", patched_accumulate)
    monkeypatch.setattr(DPOptimizer, "step", patched_step)
    report = audit()
    assert not report.passed
    assert any("the noise depends on the realized batch size" in reason for reason in report.reasons)


def test_division_of_the_sum_alone_is_flagged(monkeypatch):
    accumulate = ClippedSum._accumulate

    def patched(self, used, rows):
        self._denominator = max(1, self._batch().rows)
        accumulate(self, used, rows)

    monkeypatch.setattr(ClippedSum, "_accumulate", patched)
    report = audit(steps=400, epsilon=8.0, size=200)
    assert not report.passed
    assert any("contribution depends on the realized batch size" in reason for reason in report.reasons)


def test_shuffled_batches_accounted_as_poisson_are_flagged(monkeypatch):
    rng = np.random.default_rng(0)

    def shuffled(self, start):
        for i, indices in enumerate(np.array_split(rng.permutation(self.dataset_size), self.steps_per_epoch)):
            yield Part(indices, start + i, True, True)

    monkeypatch.setattr(PoissonLoader, "_plan", shuffled)
    report = audit()
    assert not report.passed
    assert all("no Poisson samples" in reason for reason in report.reasons)


def test_noise_that_repeats_itself_is_flagged(monkeypatch):
    update = adaclip.optimizer.noisy_update

    def patched(optimizer, params, stds, source, step, **options):
        update(optimizer, params, stds, source, step % 100, **options)

    monkeypatch.setattr(adaclip.optimizer, "noisy_update", patched)
    report = audit()
    assert not report.passed
    assert any("noise is used more than once" in reason for reason in report.reasons)


class EveryLayerItsOwnC(PerLayerClipping):
    """Clips each of two layers to C and noises each for C: together an example contributes sqrt(2) C."""

    def __init__(self, norm):
        super().__init__([norm, norm])

    @property
    def max_grad_norm(self):
        return self.thresholds[0].item()

    def noise_scale(self):
        return self.thresholds


def test_a_norm_per_layer_noised_like_one_norm_is_flagged():
    report = audit(clipping=EveryLayerItsOwnC(2.0))
    assert not report.passed
    assert any("contributes 1.4" in reason for reason in report.reasons)


# --- one run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (0.5, False)])
def test_one_run_stays_below_the_claim_and_finds_half_the_noise(monkeypatch, factor, passed):
    scaled_noise(monkeypatch, factor)
    build = engine_step(steps=200, size=1000, batch_size=100)
    report = one_run_audit(build, steps=200, canaries=1000, delta=DELTA, max_grad_norm=2.0, accountant="pld")
    assert report.epsilon_claimed == pytest.approx(3.0, rel=1e-3)
    assert report.passed == passed
    assert (report.epsilon_lower <= report.epsilon_claimed) == passed
    assert report.epsilon_lower > 0.3 * report.epsilon_claimed
    free = next(m.estimate for m in report.measurements if m.name == "epsilon of any mechanism")
    assert 0.0 < free <= report.epsilon_lower


@pytest.mark.parametrize("guessed", [0.0, 1.5, math.nan])
def test_a_bad_share_of_guesses_is_refused(guessed):
    with pytest.raises(ValueError, match="guessed"):
        one_run_audit(EngineStep, steps=5, delta=DELTA, guessed=guessed)


# --- two runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (0.15, False)])
def test_two_runs_stay_below_the_claim_and_find_a_seventh_of_the_noise(monkeypatch, factor, passed):
    scaled_noise(monkeypatch, factor)
    build = engine_step(steps=30, size=60, batch_size=6, epsilon=1.0)
    report = two_run_audit(build, steps=30, runs=10, canaries=60, delta=DELTA, max_grad_norm=2.0)
    assert report.passed == passed
    assert (report.epsilon_lower <= report.epsilon_claimed) == passed
    assert report.epsilon_claimed == pytest.approx(1.0, rel=1e-3)
    assert report.assumptions


def test_one_canary_a_run_assumes_nothing():
    build = engine_step(steps=5, size=4, batch_size=2)
    report = two_run_audit(build, steps=5, runs=4, canaries=1, background=3, delta=DELTA, max_grad_norm=2.0)
    assert report.assumptions == ()


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="runs"):
        two_run_audit(EngineStep, steps=5, runs=3, delta=DELTA)
