"""Thresholds that follow a noisy quantile or histogram: do they get there, and does their state come back?"""

import math

import pytest
import torch
from one_step import backward, private

from adaclip import ops
from adaclip.clipping import AdaptiveClipping, DCSGDClipping, PerLayerClipping, Setting
from adaclip.noise import NoiseSource
from adaclip.step_release import Statistics

QN = 256
EXAMPLES = 2560


def bound(clipping, layers=1, expected=QN):
    clipping.bind(Setting(layers, (1000,) * layers, expected, torch.device("cpu")))
    clipping.note_noise(1.0)
    return clipping


def follow(clipping, norms, steps, seed):
    """`steps` Poisson batches of the given norms float64 [K, N] through the kernels and the noise."""
    g = torch.Generator().manual_seed(seed)
    statistics, source = Statistics([clipping.side], torch.device("cpu")), NoiseSource(seed)
    for t in range(steps):
        drawn = norms[:, torch.rand(norms.shape[1], generator=g) < QN / EXAMPLES]
        for part in drawn.split(100, dim=1):
            ops.sample_statistics(
                part.square(), clipping.thresholds, unit=1.0, real=part.shape[1], **statistics.outputs()
            )
        statistics.release(source, t)
    return clipping


def lognormal(spread, seed, groups=1):
    g = torch.Generator().manual_seed(seed)
    return torch.exp(spread * torch.randn(groups, EXAMPLES, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_threshold_finds_the_quantile_from_a_hundred_times_off(start, quantile, seed):
    norms = lognormal(0.25, seed)
    truth = norms[0].quantile(quantile).item()
    clipping = follow(bound(AdaptiveClipping(start * truth, quantile=quantile)), norms, 59, seed)
    assert clipping.sigma_b == QN / 20
    assert clipping.max_grad_norm == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_it_is_found_in_training(start):
    norms = lognormal(0.25, 1)[0]
    truth = norms.quantile(0.5).item()
    rows = torch.zeros(EXAMPLES, 4)
    rows[:, 0] = norms.float()
    model, optimizer, loader = private(
        rows, clipping=AdaptiveClipping(start * truth), sample_rate=0.1, max_batch_size=100
    )
    assert optimizer.expected_batch_size == QN
    for _ in range(59):
        backward(model, optimizer, loader)
        optimizer.step()
    assert optimizer.max_grad_norm == pytest.approx(truth, rel=0.05)


def test_it_stays_there_and_follows_when_norms_shrink():
    clipping = bound(AdaptiveClipping(1.0))
    follow(clipping, lognormal(0.25, 4), 80, 4)
    assert clipping.history[30:].log().abs().max() < 0.12
    follow(clipping, lognormal(0.25, 5) / 50, 60, 5)
    assert clipping.max_grad_norm == pytest.approx(1 / 50, rel=0.06)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_every_layer_finds_its_own_quantile(start):
    norms = lognormal(0.25, 6, groups=3) * torch.tensor([[0.1], [1.0], [7.0]], dtype=torch.float64)
    truth = norms.quantile(0.5, dim=1)
    clipping = bound(PerLayerClipping((truth * start).tolist(), quantile=0.5), layers=3)
    follow(clipping, norms, 59, 6)
    torch.testing.assert_close(clipping.thresholds, truth, rtol=0.07, atol=0)


def test_without_acceleration_it_is_the_papers_update():
    clipping = bound(AdaptiveClipping(1.0, quantile=0.3, rate=0.2, accelerate=False))
    for t, noisy in enumerate([10.0, -40.0, 128.0, 128.0, 128.0, 128.0]):
        before = clipping.max_grad_norm
        clipping.side.absorb(torch.tensor([noisy], dtype=torch.float64), t)
        after = before * math.exp(-0.2 * (0.5 + noisy / QN - 0.3))
        assert clipping.max_grad_norm == pytest.approx(after, rel=1e-14)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_histogram_finds_the_percentile(start, quantile):
    norms = lognormal(0.5, 7)
    truth = norms[0].quantile(quantile).item()
    clipping = follow(bound(DCSGDClipping(start * truth, percentile=quantile)), norms, 40, 7)
    assert clipping.max_grad_norm == pytest.approx(truth, rel=0.1)


def expected_error(norms, c, sigma_g, parameters):
    return (sigma_g * c / QN) ** 2 * parameters + (norms[0] - c).clamp_min(0).square().mean().item()


@pytest.mark.parametrize("parameters", [1_000, 100_000, 3_000_000])
def test_the_expected_error_is_close_to_the_least(parameters):
    norms = lognormal(0.5, 8)
    clipping = DCSGDClipping(1.0, criterion="error", bins=80)
    clipping.bind(Setting(1, (parameters,), QN, torch.device("cpu")))
    clipping.note_noise(1.3)
    follow(clipping, norms, 40, 8)
    grid = torch.logspace(-3, 3, 2000, dtype=torch.float64).tolist()
    least = min(expected_error(norms, c, 1.3, parameters) for c in grid)
    assert expected_error(norms, clipping.max_grad_norm, 1.3, parameters) < 1.3 * least


def test_more_noise_in_the_gradient_asks_for_a_smaller_threshold():
    found = []
    for sigma_g in (0.1, 10.0):
        clipping = DCSGDClipping(1.0, criterion="error")
        clipping.bind(Setting(1, (100_000,), QN, torch.device("cpu")))
        clipping.note_noise(sigma_g)
        found.append(follow(clipping, lognormal(0.5, 9), 20, 9).max_grad_norm)
    assert found[1] < 0.5 * found[0]


def test_a_histogram_of_noise_alone_leaves_the_threshold():
    for criterion in ("percentile", "error"):
        clipping = bound(DCSGDClipping(1.0, criterion=criterion))
        follow(clipping, torch.empty(1, 0, dtype=torch.float64), 100, 10)
        assert clipping.max_grad_norm == 1.0


def test_norms_outside_the_grid_pin_the_threshold_to_its_ends():
    for scale, end in ((1e-9, 1e-3), (1e9, 1e3)):
        clipping = bound(DCSGDClipping(1.0))
        follow(clipping, lognormal(0.1, 11) * scale, 10, 11)
        assert clipping.max_grad_norm == pytest.approx(end, rel=1e-9)


STRATEGIES = {
    "adaptive": lambda: bound(AdaptiveClipping(0.02)),
    "per_layer_adaptive": lambda: bound(PerLayerClipping(0.02, quantile=0.4), layers=3),
    "dc_sgd": lambda: bound(DCSGDClipping(0.02)),
    "dc_sgd_error": lambda: bound(DCSGDClipping(0.02, criterion="error")),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("after", [0, 3, 70, 200])
def test_state_comes_back_to_the_bit(name, after):
    norms = lognormal(0.4, 12, groups=3 if name == "per_layer_adaptive" else 1)
    first = follow(STRATEGIES[name](), norms, after, 1)
    second = STRATEGIES[name]()
    state = first.state_dict()
    second.check_state(state)
    second.load_state_dict(state)
    for clipping in (first, second):
        follow(clipping, norms, 130, 2)
    for key, value in first.state_dict().items():
        theirs = second.state_dict()[key]
        assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs
    assert first.config() == second.config()


def broken(state):
    """States that cannot be loaded: one entry missing, of another shape, or out of range."""
    yield {}
    yield []
    for key, value in state.items():
        yield {k: v for k, v in state.items() if k != key}
        if isinstance(value, torch.Tensor):
            yield {**state, key: value.float()}
            yield {**state, key: torch.cat([value, value], dim=-1)}
            yield {**state, key: torch.full_like(value, math.nan)}
        else:
            yield {**state, key: -1.0}
            yield {**state, key: "much"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_damaged_state_is_refused_with_nothing_changed(name):
    norms = lognormal(0.4, 13, groups=3 if name == "per_layer_adaptive" else 1)
    clipping = follow(STRATEGIES[name](), norms, 5, 1)
    before = clipping.state_dict()
    for state in broken(before):
        with pytest.raises(ValueError, match="clipping state"):
            clipping.check_state(state)
    for key, value in clipping.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]


def test_the_history_is_every_threshold_that_was_in_force():
    clipping, seen = bound(AdaptiveClipping(0.3)), [0.3]
    for t in range(150):
        clipping.side.absorb(torch.tensor([20.0 * math.sin(t)], dtype=torch.float64), t)
        seen.append(clipping.max_grad_norm)
    assert clipping.history.tolist() == pytest.approx(seen, rel=0)
