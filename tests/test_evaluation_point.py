"""The point gradients are taken at: smoothing, look-ahead, the way back, and the condition on tau."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from adaclip.noise import STREAM_SMOOTHING, NoiseSource, chunks
from adaclip.smoothing import DiSK, EvaluationPoint, NoiseCorrectedNadam, SmoothedLoss
from adaclip.smoothing import point as moving
from adaclip.update import noisy_update

ALWAYS = SmoothedLoss(tau=0.1, signal="always", refresh=1)


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3, bias=False))


def _sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def _values(model):
    return [p.detach().clone() for p in model.parameters()]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _moved(point, model, step):
    point.enter(step)
    values = _values(model)
    point.leave()
    return values


def test_the_way_back_is_exact_and_leaves_gradients_and_graphs_alone():
    model = _model()
    params, before = list(model.parameters()), _values(model)
    point = EvaluationPoint(_sgd(model), ALWAYS, NoiseSource(1))
    x = torch.randn(5, 30)
    versions = [p._version for p in params]
    point.enter(0)
    assert point.inside
    there = _values(model)
    assert not any(torch.equal(a, b) for a, b in zip(before, there, strict=True))
    loss = model(x).square().sum()
    loss.backward()
    grads = [p.grad for p in params]
    point.leave()
    assert not point.inside
    assert _equal(_values(model), before)
    assert [p.grad for p in params] == grads
    assert list(model.parameters()) == params
    assert [p._version for p in params] == versions
    # They are the gradients at the point.
    twin = copy.deepcopy(model)
    for p, value in zip(twin.parameters(), there, strict=True):
        p.data.copy_(value)
    twin.zero_grad()
    twin(x).square().sum().backward()
    assert _equal([p.grad for p in twin.parameters()], grads)


def test_the_perturbation_is_the_keystreams_at_the_scale_of_each_tensor():
    model = _model()
    nn.init.zeros_(model[0].bias)
    before = _values(model)
    key = NoiseSource(7)
    point = EvaluationPoint(_sgd(model), ALWAYS, key)
    first = 0
    for p, moved in zip(before, _moved(point, model, 4), strict=True):
        std = 0.1 * p.double().square().mean().sqrt().item()
        z = key.normal_(torch.empty_like(p), 4, STREAM_SMOOTHING, std, first)
        assert torch.equal(moved, p + z)
        first += chunks(p.numel())
    assert torch.equal(model[0].bias, torch.zeros(20))


def test_a_step_has_one_point_and_other_steps_and_keys_have_others():
    model = _model()
    point = EvaluationPoint(_sgd(model), ALWAYS, NoiseSource(7))
    third = _moved(point, model, 3)
    # For every physical batch of the step the same, entered twice, left in between, or made by another process.
    assert _equal(_moved(point, model, 3), third)
    point.enter(3)
    point.enter(3)
    assert _equal(_values(model), third)
    assert not _equal(_moved(point, model, 4), third)
    assert _equal(_moved(point, model, 3), third)
    assert _equal(_moved(EvaluationPoint(_sgd(model), ALWAYS, NoiseSource(7)), model, 3), third)
    assert not _equal(_moved(EvaluationPoint(_sgd(model), ALWAYS, NoiseSource(8)), model, 3), third)
    assert not _equal(_moved(EvaluationPoint(_sgd(model), ALWAYS), model, 3), third)
    # Entering another step leaves the one before.
    before = _values(model)
    point.enter(3)
    point.enter(5)
    point.leave()
    assert _equal(_values(model), before)


def test_the_point_follows_the_parameters():
    model = _model()
    point = EvaluationPoint(_sgd(model), ALWAYS, NoiseSource(7))
    before, first = _values(model), _moved(point, model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for a, b, c in zip(_moved(point, model, 0), first, before, strict=True):
        # The scale stays what it was when training began.
        torch.testing.assert_close(a - (c + 1), b - c, rtol=0, atol=1e-6)


@pytest.mark.parametrize("refresh", [2, 4])
def test_steps_that_share_a_draw_have_opposite_signs(refresh):
    model = _model()
    before = _values(model)
    settings = SmoothedLoss(tau=0.1, signal="always", refresh=refresh)
    point = EvaluationPoint(_sgd(model), settings, NoiseSource(7))
    shifts = [
        [m - b for m, b in zip(_moved(point, model, t), before, strict=True)] for t in range(2 * refresh)
    ]
    for t, shift in enumerate(shifts):
        base = shifts[t - t % refresh]
        sign = -1 if t % 2 else 1
        for a, b in zip(shift, base, strict=True):
            torch.testing.assert_close(a, sign * b, rtol=0, atol=1e-6)
    assert not _equal(shifts[refresh], shifts[0])
    # Begun in the middle, as a resumed run does, it is the same.
    late = EvaluationPoint(_sgd(model), settings, NoiseSource(7))
    assert _equal(_moved(late, model, 1), _moved(point, model, 1))


@pytest.mark.parametrize(
    "settings", [SmoothedLoss(tau=0.0, signal="always"), SmoothedLoss(signal="snr"), None]
)
def test_where_nothing_is_smoothed_nothing_moves(settings):
    model = _model()
    point = EvaluationPoint(_sgd(model), settings)
    memory = [p.data_ptr() for p in model.parameters()]
    point.enter(0)
    assert not point.inside
    assert [p.data_ptr() for p in model.parameters()] == memory
    point.leave()


@pytest.mark.parametrize("refresh", [1, 2])
def test_one_pass_over_memory_makes_what_torch_makes(refresh, simd_level, set_threads, monkeypatch):
    shapes = [(161,), (50_001,), (0,), (), (8, 3, 5, 5)]
    settings = SmoothedLoss(tau=0.1, signal="always", refresh=refresh)
    made = {}
    for fused in (True, False):
        for threads in (1, 3):
            set_threads(threads)
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(s)) for s in shapes]
            params[4].data = params[4].data.contiguous(memory_format=torch.channels_last)
            optimizer = DiSK(params, lr=0.3)
            point = EvaluationPoint(optimizer, settings, NoiseSource(3))
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            if fused:
                monkeypatch.delattr(moving, "_make")
            else:
                monkeypatch.setattr(moving, "_alike", lambda move: False)
            for step in (1, 2, 3):
                point.enter(step)
                made[fused, threads, step] = [p.detach().clone() for p in params]
            monkeypatch.undo()
    for step in (1, 2, 3):
        assert _equal(made[True, 1, step], made[True, 3, step])
        for a, b in zip(made[True, 1, step], made[False, 1, step], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_model_that_changes_its_dtype_gets_a_new_draw():
    model = _model()
    point = EvaluationPoint(_sgd(model), SmoothedLoss(tau=0.1, signal="always"), NoiseSource(7))
    shifted = [m - p for m, p in zip(_moved(point, model, 0), _values(model), strict=True)]
    model.double()
    for moved, p, shift in zip(_moved(point, model, 1), _values(model), shifted, strict=True):
        torch.testing.assert_close(moved, p - shift, rtol=0, atol=1e-6)


def test_frozen_parameters_stay():
    model = _model()
    model[0].weight.requires_grad_(False)
    point = EvaluationPoint(_sgd(model), ALWAYS)
    before = _values(model)
    moved = _moved(point, model, 0)
    assert torch.equal(moved[0], before[0])
    assert not torch.equal(moved[1], before[1])
    # Thawed, it joins.
    model[0].weight.requires_grad_(True)
    assert not torch.equal(_moved(point, model, 1)[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_layouts_move_too(dtype):
    p = nn.Parameter(torch.randn(8, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last))
    before = p.detach().clone()
    point = EvaluationPoint(torch.optim.SGD([p], lr=0.1), ALWAYS)
    point.enter(0)
    assert p.stride() == before.stride()
    assert not torch.equal(p.detach(), before)
    point.leave()
    assert torch.equal(p.detach(), before)


def test_a_block_away_sees_the_parameters():
    model = _model()
    before = _values(model)
    point = EvaluationPoint(_sgd(model), ALWAYS)
    with point.away():
        assert _equal(_values(model), before)
    assert not point.inside
    point.enter(0)
    there = _values(model)
    with contextlib.suppress(KeyError), point.away():
        assert _equal(_values(model), before)
        raise KeyError
    assert _equal(_values(model), there)


@pytest.mark.parametrize("exchanged", [True, False])
def test_what_is_written_there_is_reported(exchanged):
    model = _model()
    before = _values(model)
    point = EvaluationPoint(_sgd(model), ALWAYS)
    point.enter(0)
    if exchanged:
        model[0].weight.data = torch.zeros_like(model[0].weight)
    else:
        with torch.no_grad():
            model[0].weight.add_(1.0)
    with pytest.raises(
        RuntimeError, match="1 parameters were changed while they were at the evaluation point"
    ):
        point.leave()
    assert _equal(_values(model), before)
    assert not point.inside
    point.enter(0)
    point.leave()


def test_state_dicts_hold_the_parameters_and_copies_are_ordinary():
    model = _model()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    point = EvaluationPoint(_sgd(model), ALWAYS)
    point.attach(model)
    point.enter(0)
    there = _values(model)
    saved = model.state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[n], before[n]) for n in before)
    assert point.inside
    assert _equal(_values(model), there)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(twin.state_dict())
        assert point.inside
    model.load_state_dict({n: v + 1 for n, v in before.items()})
    assert not point.inside
    assert all(torch.equal(v, before[n] + 1) for n, v in model.state_dict().items())
    point.enter(1)
    point.detach()
    assert not model._state_dict_pre_hooks
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks
    assert all(torch.equal(v, before[n] + 1) for n, v in model.state_dict().items())


# --- look-ahead --------------------------------------------------------------------------------------------


def test_disk_has_its_gradients_ahead():
    # On a quadratic whose gradient is the parameter itself, the published recursion in float64.
    p = nn.Parameter(torch.randn(20, dtype=torch.float64))
    kappa, lr = 0.4, 0.3
    optimizer = DiSK([p], lr=lr, kappa=kappa)
    point = EvaluationPoint.needed(optimizer, None, NoiseSource(1))
    theta, last, filtered = p.detach().clone(), None, None
    for step in range(8):
        d = torch.zeros_like(theta) if last is None else theta - last
        # kappa g(theta + gamma d) with gamma = (1 - kappa) / kappa is kappa g + (1 - kappa) (g + H d - g) here.
        g = theta + (1 - kappa) / kappa * d
        filtered = g if filtered is None else (1 - kappa) * filtered + kappa * g
        theta, last = theta - lr * filtered, theta
        point.enter(step)
        optimizer.zero_grad()
        (0.5 * p.square().sum()).backward()
        point.leave()
        optimizer.step()
        torch.testing.assert_close(p.detach(), theta, rtol=1e-12, atol=1e-12)


def test_look_ahead_and_smoothing_add_up():
    p, q = (nn.Parameter(torch.ones(20)) for _ in range(2))
    made = []
    for parameter, smoothing in ((p, None), (q, ALWAYS)):
        optimizer = DiSK([parameter], lr=0.3)
        parameter.grad = torch.ones(20)
        point = EvaluationPoint(optimizer, smoothing, NoiseSource(3))
        optimizer.step()
        point.enter(1)
        made.append(parameter.detach().clone())
    z = NoiseSource(3).normal_(torch.empty(20), 1, STREAM_SMOOTHING, 0.1)
    torch.testing.assert_close(made[1] - made[0], z, rtol=0, atol=1e-6)


def test_a_point_is_made_where_one_is_needed():
    params = [nn.Parameter(torch.ones(3))]
    source = NoiseSource(1)
    assert EvaluationPoint.needed(torch.optim.SGD(params, lr=0.1), None, source) is None
    assert EvaluationPoint.needed(torch.optim.SGD(params, lr=0.1), ALWAYS, source) is not None
    assert EvaluationPoint.needed(DiSK(params, lr=0.1), None, source) is not None


# --- checkpoints and refusals ----------------------------------------------------------------------


def test_state_comes_back_to_the_last_bit():
    def start(seed):
        model = _model(seed)
        optimizer = NoiseCorrectedNadam(model.parameters(), lr=0.05)
        settings = SmoothedLoss(0.1, "snr", threshold=1e6, every=2)
        return model, optimizer, EvaluationPoint(optimizer, settings, NoiseSource(4))

    def run(model, optimizer, point, steps):
        params = list(model.parameters())
        for t in steps:
            point.enter(t)
            optimizer.zero_grad()
            model(torch.full((3, 30), float(t))).square().mean().backward()
            point.leave()
            noisy_update(optimizer, params, [0.1] * len(params), NoiseSource(5), t)
            point.observe([0.1] * len(params))

    ours = start(0)
    run(*ours, range(5))
    saved = pickle.loads(pickle.dumps((ours[0].state_dict(), ours[1].state_dict(), ours[2].state_dict())))
    theirs = start(1)
    for part, state in zip(theirs, saved, strict=True):
        part.load_state_dict(state)
    assert theirs[2].config() == ours[2].config()
    assert theirs[2].signal_to_noise == ours[2].signal_to_noise is not None
    assert theirs[2].tau == 0.1
    run(*ours, range(5, 10))
    run(*theirs, range(5, 10))
    assert _equal(_values(ours[0]), _values(theirs[0]))


def test_a_state_of_another_run_is_refused():
    model = _model()
    point = EvaluationPoint(_sgd(model), SmoothedLoss())
    with pytest.raises(ValueError, match="of 1 parameters, got 3"):
        point.load_state_dict({"scales": [1.0], "signal": {}})
    with pytest.raises(ValueError, match="another smoothing"):
        point.load_state_dict({"scales": [1.0] * 3, "signal": None})


def test_a_condition_needs_a_momentum_and_a_point_settings():
    model = _model()
    for optimizer in (_sgd(model, 0.0), torch.optim.RMSprop(model.parameters())):
        EvaluationPoint(optimizer, ALWAYS)
        with pytest.raises(ValueError, match="signal='plateau' needs an optimizer with momentum"):
            EvaluationPoint(optimizer, SmoothedLoss(signal="plateau"))
    with pytest.raises(TypeError, match="smoothing must be a SmoothedLoss or None, got float"):
        EvaluationPoint(_sgd(model), 0.1)
