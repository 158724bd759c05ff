"""Optimizers for noisy gradients against their formulas, alone and in the fused pass."""

import copy
import math
import pickle

import pytest
import torch
from core_calls import LEVELS, simd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaclip import update
from adaclip.noise import NoiseSource, chunks
from adaclip.smoothing import DiSK, DPAdamBC, NoiseCorrectedNadam, moving_average
from adaclip.update import noisy_update

SHAPES = [(7,), (161,), (33, 21), (0,), ()]


def _params(seed=0, shapes=SHAPES, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)) for s in shapes]


def _grad(p, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype)


def _close(a, b, tolerance=5e-6):
    scale = b.abs().max().item() if b.numel() else 0.0
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale)


def nadam_formula(p, grads, stds, *, lr, betas, eps, weight_decay, floor, absolute_floor, nesterov):
    """Formula 7.4(b) in float64, with sums over all steps in place of running averages."""
    beta1, beta2 = betas
    p = p.detach().double().clone()
    grads = [g.double() for g in grads]
    for t in range(1, len(grads) + 1):
        past = range(t)
        m = sum((1 - beta1) * beta1 ** (t - 1 - i) * grads[i] for i in past)
        v = sum((1 - beta2) * beta2 ** (t - 1 - i) * grads[i] ** 2 for i in past)
        phi = sum((1 - beta2) * beta2 ** (t - 1 - i) * stds[i] ** 2 for i in past)
        if nesterov:
            move = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * grads[t - 1] / (1 - beta1**t)
        else:
            move = m / (1 - beta1**t)
        least = torch.tensor(max((floor * stds[t - 1]) ** 2, absolute_floor**2), dtype=torch.float64)
        signal = torch.maximum((v - phi) / (1 - beta2**t), least)
        p = p - lr * weight_decay * p - lr * move / (signal.sqrt() + eps)
    return p


nadam_options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.5]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.8, 0.5)]),
        "eps": st.sampled_from([0.0, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.02]),
        "floor": st.sampled_from([0.3, 1.0, 3.0]),
        "absolute_floor": st.sampled_from([0.0, 0.2]),
        "nesterov": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(nadam_options, st.integers(0, 1000))
def test_alone_it_is_its_formula(options, seed):
    (p,) = _params(seed, [(50,)], torch.float64)
    start, std = p.detach().clone(), 0.7
    optimizer = NoiseCorrectedNadam([p], noise_std=std, **options)
    grads = [_grad(p, seed + i) for i in range(8)]
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    _close(p.detach(), nadam_formula(start, grads, [std] * 8, **options), 1e-12)


@settings(max_examples=25, deadline=None)
@given(nadam_options, st.integers(0, 1000), st.sampled_from(LEVELS))
def test_in_the_fused_pass_it_is_its_formula_under_noise_that_changes(options, seed, level):
    with simd(level):
        params = _params(seed)
        start = [p.detach().clone() for p in params]
        optimizer = NoiseCorrectedNadam(params, **options)
        source = NoiseSource(seed)
        noisy = [[] for _ in params]
        levels = [[0.25 * (i + 1) * 0.8**t for i in range(len(params))] for t in range(6)]
        for t, stds in enumerate(levels):
            first = 0
            for i, p in enumerate(params):
                p.grad = _grad(p, seed + 10 * t + i)
                z = source.normal_(torch.empty_like(p), t, std=stds[i], first_chunk=first)
                noisy[i].append(p.grad + z.detach())
                first += chunks(p.numel())
            assert update._fusable(optimizer, params)
            noisy_update(optimizer, params, stds, source, t)
        for i, p in enumerate(params):
            _close(
                p.detach(),
                nadam_formula(start[i], noisy[i], [s[i] for s in levels], **options),
                tolerance=2e-4,
            )


def test_adambc_is_the_special_case():
    (p,) = _params(0, [(300,)], torch.float64)
    start, gamma, std = p.detach().clone(), 0.01, 0.9
    optimizer = DPAdamBC([p], lr=0.1, betas=(0.9, 0.99), gamma=gamma, noise_std=std)
    m = v = torch.zeros_like(p.detach())
    expected = start
    for t in range(1, 13):
        p.grad = _grad(p, t)
        m, v = 0.9 * m + 0.1 * p.grad, 0.99 * v + 0.01 * p.grad**2
        # With a constant std the bias-corrected average of its square is the square.
        corrected = v / (1 - 0.99**t) - std**2
        expected = expected - 0.1 * m / (1 - 0.9**t) / corrected.clamp(min=gamma).sqrt()
        optimizer.step()
    _close(p.detach(), expected, 1e-12)


def test_without_noise_it_is_adam():
    ours, theirs = _params(), _params()
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
    our_optimizer = NoiseCorrectedNadam(ours, nesterov=False, **options)
    their_optimizer = torch.optim.Adam(theirs, **options)
    for seed in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad, b.grad = _grad(a, seed), _grad(b, seed)
        our_optimizer.step()
        their_optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        _close(a.detach(), b.detach())


def test_of_pure_noise_nothing_is_left_but_the_floor():
    p = nn.Parameter(torch.zeros(200_000))
    optimizer = NoiseCorrectedNadam([p], lr=0.0, betas=(0.9, 0.999), floor=0.2)
    std = 0.03
    for t in range(200):
        noisy_update(optimizer, [p], [std], NoiseSource(3), t)
    state = optimizer.state[p]
    unbias = 1 / (1 - 0.999**200)
    # Adam would divide by std; what is left here is the error of the estimate, centered at zero.
    left = (state["exp_avg_sq"].double() - state["noise_sq"]) * unbias
    assert abs(float(left.mean())) < 1e-3 * std**2
    assert float((left > (0.5 * std) ** 2).double().mean()) < 0.02
    assert state["noise_sq"].item() * unbias == pytest.approx(std**2, rel=1e-6)


def test_a_high_floor_is_momentum_in_units_of_the_noise():
    # A step does not depend on the scale of gradient and noise, so the learning rate does not depend on C.
    moved = []
    for scale in (1.0, 1e-3, 1e4):
        (p,) = _params(0, [(500,)])
        start = p.detach().clone()
        optimizer = NoiseCorrectedNadam([p], lr=0.1, floor=50.0, eps=0.0)
        for t in range(5):
            p.grad = scale * _grad(p, t)
            noisy_update(optimizer, [p], [0.5 * scale], NoiseSource(2), t)
        moved.append(p.detach() - start)
    _close(moved[1], moved[0], 1e-4)
    _close(moved[2], moved[0], 1e-4)
    (m,) = [optimizer.state[p]["exp_avg"]]
    assert float(m.abs().max()) < 50 * 0.5 * 1e4


@pytest.mark.parametrize("fused", [True, False])
def test_state_resumes_to_the_last_bit(fused):
    def step(optimizer, params, t):
        for i, p in enumerate(params):
            p.grad = _grad(p, 7 * t + i)
        stds = [0.1 / (t + 1)] * len(params)
        if fused:
            noisy_update(optimizer, params, stds, NoiseSource(1), t)
        else:
            optimizer.note_noise(params, stds)
            optimizer.step()

    ours = _params()
    optimizer = NoiseCorrectedNadam(ours, lr=0.01)
    for t in range(4):
        step(optimizer, ours, t)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    resumed = NoiseCorrectedNadam(theirs, lr=0.5)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert all(resumed.state[p]["noise_sq"].dtype == torch.float64 for p in theirs)
    for t in range(4, 8):
        step(optimizer, ours, t)
        step(resumed, theirs, t)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_noted_noise_holds_for_one_step():
    (p,) = _params(0, [(5,)])
    optimizer = NoiseCorrectedNadam([p], noise_std=2.0, betas=(0.9, 0.5))
    p.grad = _grad(p, 0)
    optimizer.note_noise([p], [4.0])
    optimizer.step()
    assert optimizer.state[p]["noise_sq"].item() == 0.5 * 16
    optimizer.step()
    assert optimizer.state[p]["noise_sq"].item() == 0.5 * 8 + 0.5 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_on_a_tensor_is_never_read(dtype):
    # What an accelerator's step does, run on the CPU: stds as 0-dimensional tensors.
    numbers, tensors = _params(dtype=dtype), _params(dtype=dtype)
    made = [NoiseCorrectedNadam(p, floor=0.7, absolute_floor=0.3) for p in (numbers, tensors)]
    for t in range(4):
        stds = torch.rand(len(numbers), dtype=torch.float64)
        for params, optimizer, given_stds in ((numbers, made[0], stds.tolist()), (tensors, made[1], stds)):
            for i, p in enumerate(params):
                p.grad = _grad(p, 10 * t + i)
            optimizer.note_noise(params, given_stds)
            optimizer.step()
    for a, b in zip(numbers, tensors, strict=True):
        assert b.dtype == dtype
        _close(a.detach(), b.detach(), 1e-13 if dtype == torch.float64 else 1e-5)


def test_optimizers_can_be_copied_and_pickled():
    for kind in (NoiseCorrectedNadam, DPAdamBC, DiSK):
        (p,) = _params(0, [(5,)])
        p.grad = torch.ones_like(p)
        optimizer = kind([p], lr=0.1)
        optimizer.step()
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            (q,) = twin.param_groups[0]["params"]
            q.grad = torch.ones_like(q)
            twin.step()
            assert torch.isfinite(q).all()


def test_steps_take_closures_and_skip_missing_gradients():
    for kind in (NoiseCorrectedNadam, DiSK):
        p, q = _params(0, [(5,), (3,)])
        untouched = q.detach().clone()
        optimizer = kind([p, q], lr=0.1)

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        assert optimizer.step(closure) < first
        assert torch.equal(q.detach(), untouched)
        assert q not in optimizer.state


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NoiseCorrectedNadam, {"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        (NoiseCorrectedNadam, {"lr": math.nan}, "lr must be finite and at least 0, got nan"),
        (NoiseCorrectedNadam, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        (NoiseCorrectedNadam, {"eps": -1e-8}, "eps must be finite and at least 0"),
        (NoiseCorrectedNadam, {"noise_std": math.inf}, "noise_std must be finite and at least 0, got inf"),
        (NoiseCorrectedNadam, {"floor": 0.0}, "floor or absolute_floor must be above 0"),
        (NoiseCorrectedNadam, {"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
        (DPAdamBC, {"gamma": 0.0}, "gamma must be finite and above 0, got 0.0"),
        (DiSK, {"lr": math.inf}, "lr must be finite and at least 0, got inf"),
        (DiSK, {"lr": 0.1, "kappa": 0.0}, r"kappa must be in \(0, 1\], got 0.0"),
        (DiSK, {"lr": 0.1, "kappa": 1.1}, r"kappa must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(_params(), **options)
    optimizer = kind(_params(0, [(2,)]), lr=0.1)
    if kind is not DPAdamBC:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": _params(1, [(2,)]), **options})
    assert len(optimizer.param_groups) == 1


def test_a_subclass_takes_the_step_of_its_own():
    class Mine(NoiseCorrectedNadam):
        pass

    params = _params()
    assert update._fusable(NoiseCorrectedNadam(params), params)
    assert not update._fusable(Mine(params), params)


# --- DiSK --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.3, 0.7, 1.0])
def test_disk_filters_gradients(kappa):
    (p,) = _params(0, [(50,)], torch.float64)
    optimizer = DiSK([p], lr=0.2, kappa=kappa, weight_decay=0.01)
    expected, filtered = p.detach().clone(), None
    for t in range(6):
        p.grad = _grad(p, t)
        g = p.grad + 0.01 * expected
        filtered = g if filtered is None else (1 - kappa) * filtered + kappa * g
        expected = expected - 0.2 * filtered
        optimizer.step()
    _close(p.detach(), expected, 1e-12)


def test_disk_looks_ahead_along_its_last_move():
    (p,) = _params(0, [(50,)], torch.float64)
    optimizer = DiSK([p], lr=0.2, kappa=0.4, weight_decay=0.01)
    group = optimizer.param_groups[0]
    assert optimizer.lookahead(group, p) is None
    for t in range(3):
        before = p.detach().clone()
        p.grad = _grad(p, t)
        optimizer.step()
        # A scheduler that changes lr after the step does not change how far the last move was.
        group["lr"] *= 0.5
        direction, length = optimizer.lookahead(group, p)
        _close(length * direction, 1.5 * (p.detach() - before), 1e-9)
    group["lookahead"] = False
    assert optimizer.lookahead(group, p) is None


# --- the average of the weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_an_average_decays(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        moving_average(nn.Linear(2, 2), decay)
