"""Steps of every kind in numpy: the audit passes a correct one and flags each faulty twin."""

import numpy as np
import pytest
from audit_steps import AdaptiveStep, PlainStep, SelectionStep, ViewsStep

from adaclip.accounting import create_accountant
from adaclip.auditing import Released, component_audit

DELTA = 1e-5


def audit(kind, *, steps=150, canaries=150, background=0, seed=0, **options):
    rng = np.random.default_rng(seed)
    return component_audit(
        lambda gradients: kind(gradients, rng, **options),
        steps=steps,
        canaries=canaries,
        background=background,
        delta=DELTA,
        side_trials=1000,
    )


@pytest.mark.parametrize("kind", [PlainStep, AdaptiveStep, SelectionStep, ViewsStep])
def test_correct_steps_pass(kind):
    report = audit(kind, background=300 if kind is AdaptiveStep else 0)
    assert report.passed, report.reasons
    assert report.epsilon_lower > 0.6 * report.epsilon_claimed


CONTROLS = {
    "noise not scaled by C_t": (AdaptiveStep, {"fault": "unscaled"}, "depends on the clipping norm"),
    "stale C": (AdaptiveStep, {"fault": "stale"}, "the last change of the clipping norm"),
    "raw quantile": (AdaptiveStep, {"fault": "raw quantile"}, "the quantile, released beside"),
    "raw argmin": (SelectionStep, {"fault": "raw argmin"}, "the selected group, released beside"),
    "clipping per view": (ViewsStep, {"per_view": True}, "times the claimed clipping norm"),
    "noise x 0.7": (PlainStep, {"noise": 0.7}, "the noise is"),
}


@pytest.mark.parametrize("fault", CONTROLS)
def test_faulty_twins_are_flagged_for_their_fault(fault):
    kind, options, reason = CONTROLS[fault]
    report = audit(kind, background=300 if kind is AdaptiveStep else 0, **options)
    assert not report.passed
    assert any(reason in text for text in report.reasons), report.reasons


def test_the_lower_bound_covers_the_truth():
    truth = create_accountant("pld")
    truth.step(0.2, 2.0, 40)
    upper = truth.get_epsilon(DELTA)
    bounds = [audit(PlainStep, steps=40, canaries=60, seed=seed, q=0.2).epsilon_lower for seed in range(30)]
    assert np.mean(np.array(bounds) > upper) <= 0.1
    assert np.median(bounds) > 0.6 * upper


class Careless:
    """A step whose report makes no sense."""

    sample_rate, denominator = 0.5, 1.0

    def __init__(self, gradients, **changes):
        self.told = {
            "gradient": np.zeros(gradients.shape[1]),
            "sampled": np.ones(len(gradients), dtype=bool),
            "max_grad_norm": 1.0,
            "sigma": 1.0,
            "total_sigma": 1.0,
            **changes,
        }

    def __call__(self):
        return Released(**self.told)

    def epsilon(self, delta):
        return 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0, "total_sigma": 0.0}, "positive and finite"),
        ({"max_grad_norm": np.nan}, "positive and finite"),
        ({"total_sigma": 2.0}, "total_sigma must be at most sigma"),
        ({"gradient": np.zeros(3)}, "must release a gradient"),
        ({"sampled": np.ones(1, dtype=bool)}, "report sampled"),
    ],
)
def test_a_report_that_no_audit_can_use_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        component_audit(lambda g: Careless(g, **changes), steps=3, canaries=4, delta=DELTA)


def test_a_step_without_noise_is_flagged():
    report = component_audit(Careless, steps=20, canaries=10, delta=DELTA)
    assert not report.passed
    assert "there is no noise at all" in report.reasons


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"confidence": 1.0}, "confidence"),
        ({"canaries": 0}, "count"),
    ],
)
def test_bad_arguments_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        component_audit(Careless, **{"steps": 5, "delta": DELTA, "canaries": 5, **options})
