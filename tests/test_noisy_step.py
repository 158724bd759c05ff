"""The fused noisy update against torch's own optimizers, and what it guarantees beside them."""

import copy
import math

import pytest
import torch
from core_calls import LEVELS, simd
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip import update
from adaclip.noise import NoiseSource, chunks
from adaclip.smoothing import DiSK, DPAdamBC, NoiseCorrectedNadam
from adaclip.update import noisy_update

SHAPES = [(7,), (160,), (161,), (33, 21), (8, 3, 5, 5), (0,), ()]


def _params(seed=0, shapes=SHAPES, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=rng, dtype=dtype)) for s in shapes]


def _set_grads(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype).as_strided(p.shape, p.stride())


def _twins(make, **kwargs):
    """The same parameters twice, each with its own optimizer."""
    ours, theirs = _params(**kwargs), _params(**kwargs)
    return ours, make(ours), theirs, make(theirs)


def _assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * scale)


@pytest.fixture
def must_fuse(monkeypatch):
    def refuse(*args):
        raise AssertionError("the generic way was taken")

    monkeypatch.setattr(update, "_generic_update", refuse)


sgd = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.1, 1.0]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "dampening": st.sampled_from([0.0, 0.1]),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
    }
).filter(lambda o: not o["nesterov"] or (o["momentum"] > 0 and o["dampening"] == 0))
adam = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.05]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.3, 0.5)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "maximize": st.booleans(),
    }
)
nadam = st.builds(
    lambda o, psi, decoupled: {**o, "momentum_decay": psi, "decoupled_weight_decay": decoupled},
    adam,
    st.sampled_from([4e-3, 0.1]),
    st.booleans(),
)
corrected = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.05]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.3, 0.5)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "noise_std": st.just(0.0),
        "absolute_floor": st.sampled_from([0.0, 0.1]),
        "nesterov": st.booleans(),
    }
)
disk = st.fixed_dictionaries(
    {"lr": st.just(0.1), "kappa": st.sampled_from([0.3, 1.0]), "weight_decay": st.sampled_from([0.0, 1e-2])}
)
any_optimizer = st.one_of(
    st.tuples(st.just(torch.optim.SGD), sgd),
    st.tuples(st.just(torch.optim.Adam), adam),
    st.tuples(st.just(torch.optim.AdamW), adam),
    st.tuples(st.just(torch.optim.NAdam), nadam),
    st.tuples(st.just(NoiseCorrectedNadam), corrected),
    st.tuples(st.just(DiSK), disk),
)
KINDS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (NoiseCorrectedNadam, {"lr": 0.01, "floor": 0.3, "weight_decay": 0.01}),
    (DPAdamBC, {"lr": 0.01, "gamma": 0.01}),
    (DiSK, {"lr": 0.1, "weight_decay": 0.01}),
]


@settings(max_examples=60, deadline=None)
@given(any_optimizer, st.sampled_from(LEVELS))
def test_without_noise_twenty_steps_equal_torch(choice, level):
    kind, options = choice
    with simd(level):
        ours, our_optimizer, theirs, their_optimizer = _twins(lambda p: kind(p, **options))
        assert update._fusable(our_optimizer, ours)
        for step in range(20):
            _set_grads(ours, 100 + step)
            _set_grads(theirs, 100 + step)
            noisy_update(our_optimizer, ours, [0.0] * len(ours), NoiseSource(1), step)
            their_optimizer.step()
        _assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_noise_is_added_to_the_gradient_as_normal_draws_it(kind, options, must_fuse):
    ours, our_optimizer, theirs, their_optimizer = _twins(lambda p: kind(p, **options))
    stds = [0.5 + 0.1 * i for i in range(len(ours))]
    for step in range(3):
        _set_grads(ours, step)
        _set_grads(theirs, step)
        noisy_update(our_optimizer, ours, stds, NoiseSource(7), step, stream=3)
        first = 0
        for p, std in zip(theirs, stds, strict=True):
            NoiseSource(7).normal_(p.grad, step, stream=3, std=std, first_chunk=first, add=True)
            first += chunks(p.numel())
        if hasattr(their_optimizer, "note_noise"):
            their_optimizer.note_noise(theirs, stds)
        their_optimizer.step()
    _assert_close(ours, theirs)


def test_zero_gradient_and_unit_rate_give_exactly_minus_the_noise(simd_level):
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    noisy_update(torch.optim.SGD(params, lr=1.0), params, [0.3] * len(params), NoiseSource(5), 9)
    first = 0
    for p in params:
        z = NoiseSource(5).normal_(torch.empty(p.shape), 9, std=0.3, first_chunk=first)
        assert torch.equal(p.detach(), -z)
        first += chunks(p.numel())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_missing_gradients_are_zeros_and_still_get_noise(kind, options, must_fuse):
    ours, our_optimizer, theirs, their_optimizer = _twins(lambda p: kind(p, **options))
    for p in theirs:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in ours]
    noisy_update(our_optimizer, ours, [1.0] * len(ours), NoiseSource(5), 0)
    noisy_update(their_optimizer, theirs, [1.0] * len(ours), NoiseSource(5), 0)
    assert all(p.grad is None for p in ours)
    for a, b, c in zip(ours, theirs, before, strict=True):
        assert torch.equal(a, b)
        assert a.numel() == 0 or (a != c).any()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_bits_do_not_depend_on_threads(kind, options, set_threads):
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        params = _params(shapes=[(50_000,), (3,), (7001, 3)])
        optimizer = kind(params, **options)
        for step in range(2):
            _set_grads(params, step)
            noisy_update(optimizer, params, [0.1, 0.2, 0.0], NoiseSource(5), step)
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_state_is_torchs_own_and_travels_both_ways(kind, options, must_fuse):
    ours, our_optimizer, theirs, their_optimizer = _twins(lambda p: kind(p, **options))

    def ours_step(optimizer, params, seed):
        _set_grads(params, seed)
        noisy_update(optimizer, params, [0.0] * len(params), NoiseSource(1), seed)

    def theirs_step(optimizer, params, seed):
        _set_grads(params, seed)
        optimizer.step()

    for seed in range(3):
        ours_step(our_optimizer, ours, seed)
        theirs_step(their_optimizer, theirs, seed)
    mine, torchs = our_optimizer.state_dict(), their_optimizer.state_dict()
    assert mine["state"].keys() == torchs["state"].keys()
    for i in torchs["state"]:
        assert mine["state"][i].keys() == torchs["state"][i].keys()
        for name, value in torchs["state"][i].items():
            if isinstance(value, torch.Tensor):
                assert mine["state"][i][name].dtype == value.dtype
                _assert_close([mine["state"][i][name]], [value])
            else:
                assert mine["state"][i][name] == value
    # Swap the states: torch goes on from ours, we go on from torch's.
    our_optimizer.load_state_dict(copy.deepcopy(torchs))
    their_optimizer.load_state_dict(copy.deepcopy(mine))
    for seed in range(3, 6):
        ours_step(our_optimizer, ours, seed)
        theirs_step(their_optimizer, theirs, seed)
    _assert_close(ours, theirs)


def test_groups_keep_their_options_and_schedulers_their_rates(must_fuse):
    def make(p):
        return torch.optim.SGD([{"params": p[:2], "lr": 0.5}, {"params": p[2:], "momentum": 0.9}], lr=0.1)

    ours, our_optimizer, theirs, their_optimizer = _twins(make)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (our_optimizer, their_optimizer)]
    for seed in range(4):
        _set_grads(ours, seed)
        _set_grads(theirs, seed)
        noisy_update(our_optimizer, ours, [0.0] * len(ours), NoiseSource(1), seed)
        their_optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    _assert_close(ours, theirs)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_sees_that_the_optimizer_stepped(must_fuse):
    params = _params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    noisy_update(optimizer, params, [1.0] * len(params), NoiseSource(1), 0)
    scheduler.step()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_parameters_not_listed_are_left_alone(kind, options):
    for options_here in (options, {**options, "lr": torch.tensor(options["lr"])}):
        params = _params()
        optimizer = kind(params, **options_here)
        _set_grads(params, 0)
        before = [p.detach().clone() for p in params]
        grads = [p.grad for p in params]
        noisy_update(optimizer, params[1:3], [1.0, 1.0], NoiseSource(1), 0)
        for i, p in enumerate(params):
            assert torch.equal(p.detach(), before[i]) == (i not in (1, 2))
            assert p.grad is grads[i]
            assert i in (1, 2) or not optimizer.state.get(p)


def test_channels_last_parameters_are_flat_memory(must_fuse):
    start = torch.randn(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for fused in (True, False):
        p = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
        p.grad = torch.ones_like(p)
        assert p.grad.stride() == p.stride() != torch.empty(8, 3, 5, 5).stride()
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        if fused:
            noisy_update(optimizer, [p], [0.5], NoiseSource(1), 0)
        else:
            NoiseSource(1).normal_(p.grad, 0, std=0.5, add=True)
            optimizer.step()
        results.append(p.detach())
    _assert_close(results[:1], results[1:])


class _Halving(torch.optim.Optimizer):
    """Some optimizer of the user's."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.5)


GENERIC = [
    lambda p: _Halving(p),
    lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
    lambda p: torch.optim.RMSprop(p, lr=0.01),
]


@pytest.mark.parametrize("make", GENERIC)
def test_any_other_optimizer_takes_noise_first_then_its_own_step(make):
    ours, our_optimizer, theirs, their_optimizer = _twins(make)
    assert not update._fusable(our_optimizer, ours)
    _set_grads(ours, 0)
    _set_grads(theirs, 0)
    ours[0].grad = None
    theirs[0].grad = torch.zeros_like(theirs[0])
    noisy_update(our_optimizer, ours, [0.5] * len(ours), NoiseSource(1), 0)
    first = 0
    for p in theirs:
        NoiseSource(1).normal_(p.grad, 0, std=0.5, first_chunk=first, add=True)
        first += chunks(p.numel())
    their_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[0].grad is None


def test_float64_goes_the_generic_way():
    params = _params(dtype=torch.float64)
    optimizer = torch.optim.SGD(params, lr=1.0)
    before = [p.detach().clone() for p in params]
    noisy_update(optimizer, params, [0.25] * len(params), NoiseSource(1), 0)
    first = 0
    for p, old in zip(params, before, strict=True):
        z = NoiseSource(1).normal_(torch.empty(p.shape, dtype=p.dtype), 0, std=0.25, first_chunk=first)
        assert torch.equal(p.detach(), old - z)
        first += chunks(p.numel())


def test_step_hooks_run():
    params = _params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    noisy_update(optimizer, params, [0.0] * len(params), NoiseSource(1), 0)
    assert seen == ["post"]


def test_versions_of_parameters_and_state_are_bumped(must_fuse):
    params = _params()
    optimizer = torch.optim.Adam(params)
    noisy_update(optimizer, params, [1.0] * len(params), NoiseSource(1), 0)
    mutated = [*params, *(optimizer.state[p]["exp_avg"] for p in params)]
    versions = [t._version for t in mutated]
    noisy_update(optimizer, params, [1.0] * len(params), NoiseSource(1), 1)
    assert all(t._version > v for t, v in zip(mutated, versions, strict=True))


def test_a_saved_activation_that_the_update_overwrote_is_caught(must_fuse):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    noisy_update(torch.optim.SGD([weight], lr=0.1), [weight], [1.0], NoiseSource(1), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_tensor_of_stds_is_the_same_as_a_list(kind, options, must_fuse):
    ours, our_optimizer, theirs, their_optimizer = _twins(lambda p: kind(p, **options))
    stds = torch.rand(len(ours), dtype=torch.float64)
    for params, optimizer, given_stds in (
        (ours, our_optimizer, stds),
        (theirs, their_optimizer, stds.tolist()),
    ):
        _set_grads(params, 0)
        noisy_update(optimizer, params, given_stds, NoiseSource(5), 0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bad_arguments_are_refused_before_anything_changes():
    params = _params()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    _set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    good, source = [1.0] * len(params), NoiseSource(1)
    stranger = torch.nn.Parameter(torch.zeros(3))
    cases = [
        ("stds must be one per parameter", (params, good[1:], 0)),
        ("std must be finite and at least 0, got -1.0", (params, [*good[1:], -1.0], 0)),
        ("std must be finite and at least 0, got nan", (params, [*good[1:], math.nan], 0)),
        ("must be a parameter of the optimizer", ([*params, stranger], [*good, 1.0], 0)),
        ("stds must be floating and of shape", (params, torch.ones(len(params), 1), 0)),
        ("stds must be floating and of shape", (params, torch.ones(len(params), dtype=torch.int64), 0)),
        ("std must be finite and at least 0, got nan", (params, torch.full((len(params),), math.nan), 0)),
        ("is there twice", ([*params, params[0]], [*good, 1.0], 0)),
        ("step must be an int in", (params, good, -1)),
    ]
    for message, (which, stds, step) in cases:
        with pytest.raises(ValueError, match=message):
            noisy_update(optimizer, which, stds, source, step)
    with pytest.raises(ValueError, match="stream must be an int in"):
        noisy_update(optimizer, params, good, source, 0, stream=-1)
    with pytest.raises(ValueError, match="must take one gradient per step, got LBFGS"):
        noisy_update(torch.optim.LBFGS(params), params, good, source, 0)
    params[0].grad = torch.zeros(7).to_sparse()
    with pytest.raises(ValueError, match="must have a dense gradient"):
        noisy_update(optimizer, params, good, source, 0)
    assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state
