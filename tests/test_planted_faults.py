"""Checks of what a private step must keep to, each shown to fail on an engine with that one fault planted."""

import math

import numpy as np
import planted
import pytest
import torch
from one_step import KEY, backward, formula, one_step, private
from scipy.stats import chi2

from adaclip.auditing import Canaries, EngineStep
from adaclip.auditing.side_releases import side_checks
from adaclip.clipping import AdaptiveClipping, DCSGDClipping
from adaclip.groups import LabelGroups
from adaclip.noise import STREAM_STATISTICS, NoiseSource

C = 1.0


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


def rows_of(norms, width=8):
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(len(norms), width, generator=g, dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True) * torch.tensor(norms)[:, None]).float()


def flat(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


# --- the noise is that of the threshold that was clipped to --------------------------------------------------


def check_noise_follows_the_threshold():
    """With gradients of zero a step moves the weights by noise alone: sigma_g C_t/(q N) in each of 20,000."""
    width = 20_000
    model, optimizer, loader = private(
        torch.zeros(40, width),
        clipping=AdaptiveClipping(C, sigma_b=2.0),
        sample_rate=0.5,
        noise_multiplier=1.0,
    )
    seen = []
    for _ in range(8):
        before = flat(model)
        backward(model, optimizer, loader)
        norm = optimizer.max_grad_norm
        optimizer.step()
        std = norm * optimizer.gradient_noise_multiplier / optimizer.expected_batch_size
        squares = float(((flat(model) - before) / std).square().sum())
        tail = min(chi2.cdf(squares, width), chi2.sf(squares, width))
        assert tail > 1e-6, f"noise of {math.sqrt(squares / width):.3f} times sigma_g C_t"
        seen.append(norm)
    assert seen[-1] < 0.5 * seen[0], "the threshold must move for this to be a test"


# --- nothing is let out without its noise ---------------------------------------------------------------------


def audited(clipping, groups=None):
    """A builder of real steps over one canary and an example without gradient, at q = 1/2."""
    generator = torch.Generator().manual_seed(3)

    def build(gradients):
        return EngineStep(
            gradients,
            noise_multiplier=4.0,
            sample_rate=0.5,
            max_grad_norm=None,
            clipping=clipping,
            groups=groups,
            noise_generator=generator,
        )

    return build


def check_covered(clipping, groups=None, trials=500):
    """No number that a step lets out tells the canary better than the booked noise multiplier allows."""
    lone = Canaries(1, np.random.default_rng(0), max_grad_norm=C).lone()
    for check in side_checks(audited(clipping, groups), lone, trials=trials):
        assert check.p_value > 1e-6, check.finding


def check_quantile_is_covered():
    check_covered(AdaptiveClipping(C, sigma_b=2.5))


def check_histogram_is_covered():
    check_covered(DCSGDClipping(C, sigma_h=6.0, memory=0.0))


def check_selection_is_covered():
    check_covered("flat", LabelGroups(groups=2, sigma_s=8.0, sigma_n=8.0))


# --- denominators are public ----------------------------------------------------------------------------------


def check_the_sum_is_divided_by_q_n():
    rows = rows_of(np.geomspace(0.1, 10, 60))
    model, optimizer, loader = private(rows, clipping="flat", sample_rate=0.2)
    realized = set()
    for _ in range(6):
        seen = backward(model, optimizer, loader)
        realized.add(len(seen))
        made = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        torch.testing.assert_close(made, formula(seen, "flat", C) / 12, rtol=0, atol=1e-6)
        optimizer.step()
    assert len(realized) > 1


def check_the_quantile_is_divided_by_q_n():
    rows = rows_of(np.geomspace(0.1, 10, 60))
    clipping = AdaptiveClipping(C, sigma_b=2.0, accelerate=False)
    model, optimizer, loader = private(rows, clipping=clipping, sample_rate=0.2)
    grid = 2.0 / 64
    for t in range(6):
        norms = backward(model, optimizer, loader).double().norm(dim=1)
        before = optimizer.max_grad_norm
        optimizer.step()
        z = NoiseSource(KEY).normal_(torch.empty(1, dtype=torch.float64), t, STREAM_STATISTICS).item()
        noisy = round((float((norms <= before).double().sub(0.5).sum()) + 2.0 * z) / grid) * grid
        after = before * math.exp(-0.2 * (noisy / 12))
        assert optimizer.max_grad_norm == pytest.approx(after, rel=1e-12)


# --- a sample is clipped once, after its views were averaged --------------------------------------------------


def opposite(images, generator):
    """Views in pairs that all but cancel; the generator is not needed."""
    sign = torch.tensor([1.0, -0.9]).repeat(len(images) // 2)
    return images * sign.reshape(-1, *[1] * (images.dim() - 1))


def check_views_are_averaged_before_the_clip():
    rows = rows_of([0.1, 1.0, 5.0, 10.0])
    made = one_step(rows, AdaptiveClipping(C, sigma_b=5.0), views_per_sample=2, augmentation=opposite)
    torch.testing.assert_close(made.gradient, formula(0.05 * rows, "flat", C), rtol=0, atol=1e-5)


# --- statistics are those of the logical batch ----------------------------------------------------------------


def check_statistics_cover_the_logical_batch():
    norms = [0.1, 0.2, 0.3, 5.0, 6.0, 0.4, 7.0]
    made = one_step(
        rows_of(norms),
        AdaptiveClipping(C, sigma_b=5.0),
        groups=LabelGroups(groups=3),
        max_batch_size=2,
        pad_to=2,
    )
    counts = [3.0, 2.0, 2.0]
    sums = [sum(min(n, C) for n in norms[k::3]) for k in range(3)]
    want = torch.tensor([0.5 * 4 - 0.5 * 3, *sums, *counts], dtype=torch.float64)
    torch.testing.assert_close(made.statistics, want, rtol=1e-6, atol=0)


CONTROLS = {
    "noise not scaled by C_t": (check_noise_follows_the_threshold, planted.noise_of_the_first_threshold),
    "stale C": (check_noise_follows_the_threshold, planted.noise_of_the_last_threshold),
    "C of the step after": (check_noise_follows_the_threshold, planted.noise_of_the_next_threshold),
    "raw quantile": (check_quantile_is_covered, planted.statistics_without_noise),
    "raw histogram": (check_histogram_is_covered, planted.statistics_without_noise),
    "raw sums and counts": (check_selection_is_covered, planted.statistics_without_noise),
    "raw argmin": (check_selection_is_covered, planted.selection_without_noise),
    "sum divided by |B_t|": (check_the_sum_is_divided_by_q_n, planted.division_by_the_realized_batch),
    "quantile divided by |B_t|": (
        check_the_quantile_is_divided_by_q_n,
        planted.quantile_of_the_realized_batch,
    ),
    "clipping per view": (check_views_are_averaged_before_the_clip, planted.clipping_per_view),
    "counts of the last micro-batch": (
        check_statistics_cover_the_logical_batch,
        planted.counts_of_the_last_micro_batch,
    ),
    "counts of padding": (check_statistics_cover_the_logical_batch, planted.counts_of_padding),
}


@pytest.mark.parametrize("check", dict(CONTROLS.values()), ids=lambda f: f.__name__)
def test_the_engine_passes(check):
    check()


@pytest.mark.parametrize("fault", CONTROLS)
def test_a_planted_fault_is_noticed(fault, monkeypatch):
    check, plant = CONTROLS[fault]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
