"""Scripts in Opacus's style run on adaclip.opacus: the same batches' clipped sums, the same epsilon, or a clear error."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_processes import run

import adaclip
from adaclip.accounting import create_accountant, gdp_epsilon
from adaclip.accounting.releases import Event, SubsampledGaussian
from adaclip.groups import LabelGroups
from adaclip.opacus import PrivacyEngine, accountants
from adaclip.opacus.optimizers import DPOptimizer
from adaclip.opacus.utils.batch_memory_manager import BatchMemoryManager
from adaclip.opacus.validators import ModuleValidator
from adaclip.opacus.validators.errors import IllegalModuleConfigurationError

opacus = pytest.importorskip("opacus", reason="what is compared with")

ROOT = Path(__file__).parents[1]
KEY = bytes(range(32))
CLASSES = 3


@pytest.fixture
def migration(monkeypatch):
    # Behind the installed packages: only bench is meant.
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from bench import migration

    return migration


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, CLASSES),
    )


def examples(n=50):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 8, 8, generator=g) * torch.logspace(-1, 1, n)[:, None, None, None]
    return TensorDataset(x, torch.arange(n) % CLASSES)


def loader(n=50, batch_size=8, **options):
    return DataLoader(examples(n), batch_size=batch_size, **options)


def private(engine=None, *, model=None, lr=0.1, data=None, **options):
    """(engine, model, optimizer, loader, …) of adaclip.opacus."""
    engine = engine or PrivacyEngine()
    model = model or network()
    options.setdefault("noise_multiplier", 1.0)
    options.setdefault("max_grad_norm", 1.0)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        data_loader=loader() if data is None else data,
        **options,
    )
    return engine, *made


def train(model, optimizer, loader, criterion=None, steps=None):
    criterion = criterion or nn.CrossEntropyLoss()
    for i, (x, y) in enumerate(loader):
        if i == steps:
            return
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


# --- the clipped gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("clipping", "norm"), [("flat", 0.8), ("per_layer", [0.3, 0.05, 0.2, 0.1, 0.4, 0.5, 0.02])]
)
def test_the_private_gradient_is_opacus_s(clipping, norm, reduction):
    """Without noise, on the batch that our loader drew: also what is divided by is the same."""
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    options = {"clipping": clipping, "max_grad_norm": norm, "loss_reduction": reduction}
    _, model, optimizer, ours = private(noise_multiplier=0.0, noise_generator=KEY, **options)
    x, y = next(iter(ours))
    criterion(model(x), y).backward()
    mine = [p.grad.clone() for p in model.parameters()]

    other = network()
    wrapped, theirs, _ = opacus.PrivacyEngine().make_private(
        module=other,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=0.0,
        **options,
    )
    criterion(wrapped(x), y).backward()
    theirs.step()
    if reduction == "mean":
        assert optimizer.expected_batch_size == theirs.expected_batch_size == 7
    assert optimizer.max_grad_norm == pytest.approx(theirs.max_grad_norm, rel=1e-6)
    for a, p in zip(mine, other.parameters(), strict=True):
        assert (a - p.grad).norm() <= 1e-5 * p.grad.norm()
    # Something was clipped, and something was not.
    assert bool((optimizer.sample_norms > optimizer.max_grad_norm).any())
    optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_the_noise_is_opacus_s(clipping):
    """Its standard deviation on every parameter: sigma C over the denominator, C of all layers together."""
    norm = 0.8 if clipping == "flat" else [0.3, 0.05, 0.2, 0.1, 0.4, 0.5, 0.02]
    _, model, optimizer, ours = private(
        noise_multiplier=1000.0, clipping=clipping, max_grad_norm=norm, lr=1.0
    )
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, ours, steps=1)
    std = 1000 * float(np.linalg.norm(norm)) / 7
    moved = [(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    for values in moved:
        # The least and the most that the mean square of so many normals is, but for one in 10^6.
        z = (values.square().sum() / std**2 / len(values)).item()
        spread = 5 * (2 / len(values)) ** 0.5 + 30 / len(values)
        assert max(0.0, 1 - spread) <= z <= 1 + spread
    assert torch.cat(moved).std().item() == pytest.approx(std, rel=0.25)


def test_one_use_of_a_parameter_each_is_no_condition_of_per_parameter_norms():
    """A layer used twice, and a norm for each of its parameters: the slow path, the same numbers."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    torch.manual_seed(2)
    model = Twice()
    per_sample = []
    for b in range(6):
        loss = (model(x[b : b + 1]) - y[b : b + 1]).square().mean()
        per_sample.append(torch.autograd.grad(loss, list(model.parameters())))
    norms = [0.2, 0.1]
    wanted = [sum(g[i] * min(1.0, c / g[i].norm()) for g in per_sample) / 6 for i, c in enumerate(norms)]
    data = DataLoader(TensorDataset(x, y), batch_size=6)
    _, model, _, ours = private(
        model=model, data=data, clipping="per_layer", max_grad_norm=norms, noise_multiplier=0.0
    )
    xs, ys = next(iter(ours))
    (model(xs) - ys).square().mean().backward()
    for p, w in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, w, rtol=1e-4, atol=1e-6)


def test_a_norm_is_wanted_for_every_parameter():
    with pytest.raises(ValueError, match=r"each of the 7 trained parameters, got 4"):
        private(clipping="per_layer", max_grad_norm=[1.0] * 4)


# --- epsilon -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size", "drop_last"), [(50, 8, False), (50, 8, True), (49, 1, False)])
def test_rate_and_denominator_are_opacus_s(n, batch_size, drop_last):
    data = loader(n, batch_size, drop_last=drop_last)
    _, _, optimizer, ours = private(data=data)
    model = network()
    _, other, theirs = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert (ours.sample_rate, len(ours)) == (theirs.sample_rate, len(theirs))
    # For 49 batches of one Opacus's denominator comes out as 0, by one rounding.
    assert optimizer.expected_batch_size == max(1, other.expected_batch_size)


def test_epsilon_of_a_run():
    engine, model, optimizer, ours = private()
    train(model, optimizer, ours)
    assert engine.accountant.history == [(1.0, 1 / 7, 7)]
    assert len(engine.accountant) == 7

    prv = opacus.accountants.PRVAccountant()
    prv.history = engine.accountant.history
    lower, _, upper = prv._get_dprv(0.01, 1e-8).compute_epsilon(1e-5, 1e-8, 0.01)
    assert lower <= engine.accountant.get_epsilon(delta=1e-5) <= upper
    assert engine.get_epsilon(1e-5) == engine.engine.get_epsilon(1e-5) == engine.accountant.get_epsilon(1e-5)


HISTORIES = [
    [(1.0, 1 / 938, 9380)],
    [(1.5, 1 / 25, 200), (1.2, 1 / 25, 50)],
    [(0.6, 0.001, 1000)],
    [(4.0, 1.0, 3), (2.0, 0.3, 2)],
]


@pytest.mark.parametrize("history", HISTORIES)
def test_rdp_is_opacus_s_at_its_orders(history):
    ours, theirs = accountants.RDPAccountant(), opacus.accountants.RDPAccountant()
    ours.history = theirs.history = history
    wanted, order = theirs.get_privacy_spent(delta=1e-5)
    assert ours.get_privacy_spent(delta=1e-5) == (pytest.approx(wanted, rel=1e-8), order)
    assert ours.get_epsilon(1e-5, alphas=theirs.DEFAULT_ALPHAS) == pytest.approx(wanted, rel=1e-8)
    # Ours are more, so never above.
    assert ours.get_epsilon(1e-5) <= wanted * (1 + 1e-8)
    assert ours.DEFAULT_ALPHAS == theirs.DEFAULT_ALPHAS


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.floats(0.7, 8), st.floats(1e-3, 0.3), st.integers(1, 2000), st.floats(1e-8, 1e-3))
def test_rdp_is_opacus_s_for_any_run(sigma, q, steps, delta):
    ours, theirs = accountants.RDPAccountant(), opacus.accountants.RDPAccountant()
    ours.history = theirs.history = [(sigma, q, steps)]
    wanted = max(0.0, theirs.get_epsilon(delta))
    assert ours.get_privacy_spent(delta=delta)[0] == pytest.approx(wanted, rel=1e-7, abs=1e-9)


def test_gdp_is_shown_but_never_accounted_with():
    theirs = opacus.accountants.GaussianAccountant()
    theirs.history = [(1.1, 0.01, 500)]
    figure = gdp_epsilon([Event(SubsampledGaussian(0.01, 1.1), 500)], 1e-5)
    assert figure == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
    # And this is why.
    true = create_accountant("pld")
    true.step(0.01, 1.1, 500)
    assert figure < true.epsilon_bounds(1e-5)[0]
    for refuse in (lambda: PrivacyEngine(accountant="gdp"), lambda: accountants.create_accountant("gdp")):
        with pytest.raises(ValueError, match=r"approximation.*gdp_epsilon"):
            refuse()
    with pytest.raises(ImportError, match=r"gdp_epsilon"):
        exec("from adaclip.opacus.accountants import GaussianAccountant")
    with pytest.raises(ValueError, match=r"'prv' or 'rdp', got 'moments'"):
        PrivacyEngine(accountant="moments")


@pytest.mark.parametrize("mechanism", ["rdp", "prv"])
def test_noise_multiplier_is_opacus_s(mechanism):
    wanted = {"target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 0.02, "accountant": mechanism}
    ours = accountants.get_noise_multiplier(epochs=4, epsilon_tolerance=0.01, **wanted)
    assert ours == accountants.get_noise_multiplier(steps=200, **wanted)
    theirs = opacus.accountants.utils.get_noise_multiplier(epochs=4, **wanted)
    # Theirs may stop 0.01 of epsilon below, and for PRV keep another 0.01 of its error away.
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours <= theirs * (1 + 1e-3)
    with pytest.raises(ValueError, match="exactly one of epochs and steps"):
        accountants.get_noise_multiplier(epochs=4, steps=200, **wanted)
    with pytest.raises(TypeError, match="tolerence"):
        accountants.get_noise_multiplier(epochs=4, tolerence=1, **wanted)


def test_a_target_is_enforced():
    model = network()
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, ours = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        epsilon_tolerance=0.01,
    )
    theirs = opacus.accountants.utils.get_noise_multiplier(
        target_epsilon=4.0, target_delta=1e-5, sample_rate=1 / 7, epochs=2, accountant="rdp"
    )
    assert optimizer.noise_multiplier == pytest.approx(theirs, rel=0.02)
    train(model, optimizer, ours)
    train(model, optimizer, ours)
    assert 3.9 < engine.get_epsilon(1e-5) <= 4.0
    with pytest.raises(adaclip.PrivacyBudgetExceeded):
        train(model, optimizer, ours, steps=1)


def test_accountants_of_ones_own():
    ours = accountants.create_accountant("rdp")
    theirs = opacus.accountants.create_accountant("rdp")
    assert bool(ours)
    assert (len(ours), ours.get_epsilon(1e-5), ours.get_privacy_spent(delta=1e-5)) == (0, 0, (0, 0))
    for accountant in (ours, theirs):
        for sigma in (1.0, 1.0, 2.0):
            accountant.step(noise_multiplier=sigma, sample_rate=0.1)
    assert ours.history == theirs.history == [(1.0, 0.1, 2), (2.0, 0.1, 1)]
    assert ours.state_dict() == theirs.state_dict()
    assert ours.mechanism() == theirs.mechanism() == "rdp"
    fresh = accountants.RDPAccountant()
    fresh.load_state_dict(theirs.state_dict())
    assert fresh.get_epsilon(1e-5) == ours.get_epsilon(1e-5)
    with pytest.raises(ValueError, match=r"mechanism 'prv', got 'rdp'"):
        accountants.PRVAccountant().load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="'history' and 'mechanism'"):
        fresh.load_state_dict({})
    with pytest.raises(TypeError, match="eps_eror"):
        fresh.get_epsilon(1e-5, eps_eror=0.1)
    for alphas in ([], [1.0], [2.0, float("inf")]):
        with pytest.raises(ValueError, match="alphas must be finite numbers above 1"):
            fresh.get_epsilon(1e-5, alphas=alphas)


def test_what_an_engine_released_stays_on_its_account():
    engine, model, optimizer, ours = private()
    saved = accountants.PRVAccountant()
    saved.step(noise_multiplier=2.0, sample_rate=0.1)
    engine.accountant.load_state_dict(saved.state_dict())
    train(model, optimizer, ours, steps=2)
    assert engine.accountant.history == [(2.0, 0.1, 1), (1.0, 1 / 7, 2)]
    with pytest.raises(RuntimeError, match="history must not be set"):
        engine.accountant.history = []
    with pytest.raises(RuntimeError, match="before the engine's first release"):
        engine.accountant.load_state_dict(saved.state_dict())
    with pytest.raises(AttributeError, match="would book it twice"):
        engine.accountant.get_optimizer_hook_fn(sample_rate=0.1)


def test_shuffled_batches_are_accounted_as_they_are():
    with pytest.warns(UserWarning, match="no privacy amplification"):
        engine, model, optimizer, ours = private(data=loader(shuffle=True), poisson_sampling=False)
    assert optimizer.expected_batch_size == 7
    train(model, optimizer, ours)
    exact = create_accountant("pld")
    exact.step(1.0, 1.0)
    assert engine.get_epsilon(1e-5) == pytest.approx(exact.get_epsilon(1e-5), rel=1e-3)
    with pytest.raises(ValueError, match="Poisson batches only"):
        _ = engine.accountant.history


# --- what scripts touch --------------------------------------------------------------------------------


def test_large_batches_in_pieces():
    """The sum of the pieces is the sum of the batch, booked once."""
    from opacus.utils.batch_memory_manager import wrap_data_loader

    whole = private(noise_multiplier=0.0, noise_generator=KEY)
    train(*whole[1:])
    engine, model, optimizer, ours = private(noise_multiplier=0.0, noise_generator=KEY)
    with BatchMemoryManager(data_loader=ours, max_physical_batch_size=3, optimizer=optimizer) as pieces:
        assert len(pieces) == len(
            wrap_data_loader(
                data_loader=opacus.data_loader.DPDataLoader.from_data_loader(loader()),
                max_batch_size=3,
                optimizer=None,
            )
        )
        assert pieces.dataset is ours.dataset
        sizes = []
        for x, y in pieces:
            sizes.append(len(x))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert max(sizes) == 3
    assert len(engine.accountant) == 7
    for a, b in zip(model.parameters(), whole[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert max(len(x) for x, _ in ours) > 3
    with pytest.raises(TypeError, match="data_loader must be the one that make_private returned"):
        BatchMemoryManager(data_loader=loader(), max_physical_batch_size=3, optimizer=optimizer)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BatchMemoryManager(data_loader=ours, max_physical_batch_size=0, optimizer=optimizer)


def test_empty_batches_are_releases():
    engine, model, optimizer, ours = private(
        data=loader(50, 1), max_grad_norm=[0.1] * 7, clipping="per_layer"
    )
    empty = 0
    with BatchMemoryManager(data_loader=ours, max_physical_batch_size=1, optimizer=optimizer) as pieces:
        for x, y in pieces:
            empty += ours.current.rows == 0
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert empty > 3
    assert engine.accountant.history == [(1.0, 1 / 50, 50)]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_private_model_has_a_functional_form():
    from adaclip.opacus.grad_sample.functorch import make_functional

    _, model, _, _ = private()
    function, params = make_functional(model)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(function(params, x), network()(x))


def test_a_loader_is_made_private_again_for_another_run():
    _, _, _, first = private()
    _, _, optimizer, second = private(data=first)
    assert second is not first
    assert second.sample_rate == first.sample_rate
    assert optimizer.expected_batch_size == 7


def test_without_wrapping_comes_a_handle():
    model = network()
    hooks, optimizer, ours = private(model=model, wrap_model=False, rand_on_empty=True)[1:]
    train(model, optimizer, ours)
    hooks.cleanup()
    model(torch.randn(1, 1, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="was not clipped"):
        optimizer.step()


def test_ghost_mode_returns_the_criterion():
    engine, model, optimizer, criterion, ours = private(grad_sample_mode="ghost")
    assert isinstance(criterion, nn.CrossEntropyLoss)
    train(model, optimizer, ours, criterion)
    assert len(engine.accountant) == 7
    mine = nn.CrossEntropyLoss(reduction="none")
    made = private(grad_sample_mode="ghost", criterion=mine, loss_reduction="sum")
    assert (made[3].reduction, mine.reduction) == ("sum", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_first": False}, "batch_first must be True"),
        ({"grad_sample_mode": "no_op"}, "clip_and_noise"),
        ({"grad_sample_mode": "magic"}, "grad_sample_mode must be one of"),
        ({"loss_reduction": "sum", "clipping": "adaptive"}, "loss_reduction must be 'mean'"),
        (
            {"loss_reduction": "sum", "groups": LabelGroups(groups=CLASSES)},
            "loss_reduction must be 'mean' for label",
        ),
        ({"clipping": "adaptive", "unclipped_num_std": 2.0}, "all or none of"),
        ({"unclipped_num_std": 2.0}, "must come with clipping='adaptive'"),
        ({"max_grad_nrom": 1.0}, "max_grad_nrom"),
        ({"data": loader(4, 8, drop_last=True)}, "at least 1 batch"),
        ({"data": [1, 2]}, "torch.utils.data.DataLoader, got list"),
    ],
)
def test_refused_before_anything_changes(options, message):
    model = network()
    with pytest.raises((ValueError, TypeError), match=message):
        private(model=model, **options)
    private(model=model)


def test_secure_mode_has_no_seed():
    engine = PrivacyEngine(secure_mode=True)
    with pytest.raises(ValueError, match="noise_generator must be None with secure_mode"):
        private(engine, noise_generator=KEY)
    _, model, optimizer, ours = private(engine)
    assert optimizer.secure_mode
    train(model, optimizer, ours)


def test_adaptive_clipping_is_translated():
    options = {
        "target_unclipped_quantile": 0.3,
        "clipbound_learning_rate": 0.5,
        "max_clipbound": 1.1,
        "min_clipbound": 0.9,
        "unclipped_num_std": 2.0,
    }
    _, model, optimizer, ours = private(clipping="adaptive", noise_multiplier=1.5, **options)
    # Theorem 1 of Andrew et al. 2021, which Opacus computes as well.
    assert optimizer.gradient_noise_multiplier == pytest.approx((1.5**-2 - 4.0**-2) ** -0.5, rel=1e-9)
    assert (optimizer.clipping.quantile, optimizer.clipping.rate) == (0.3, 0.5)
    for _ in range(3):
        train(model, optimizer, ours)
    norms = optimizer.clipping.history
    assert 0.9 <= norms.min() < norms.max() <= 1.1
    # The bounds are what holds it: the same run without them goes further.
    options |= {"max_clipbound": 100.0, "min_clipbound": 0.01}
    _, model, optimizer, ours = private(clipping="adaptive", noise_multiplier=1.5, **options)
    for _ in range(3):
        train(model, optimizer, ours)
    assert not bool(((optimizer.clipping.history >= 0.9) & (optimizer.clipping.history <= 1.1)).all())


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 3.0), (0.1, 0.5), (0.0, 2.0), (0.5,)])
def test_bounds_of_an_adaptive_norm(bounds):
    with pytest.raises(ValueError, match="bounds must be"):
        adaclip.clipping.AdaptiveClipping(1.0, bounds=bounds)


SCHEDULERS = [
    ("ExponentialNoise", "noise_multiplier", {"gamma": 0.9}),
    ("StepNoise", "noise_multiplier", {"step_size": 2, "gamma": 0.5}),
    ("LambdaNoise", "noise_multiplier", {"noise_lambda": lambda epoch: 1 / (epoch + 1)}),
    ("ExponentialGradClip", "max_grad_norm", {"gamma": 0.9}),
    ("StepGradClip", "max_grad_norm", {"step_size": 2, "gamma": 0.5}),
    ("LambdaGradClip", "max_grad_norm", {"scheduler_function": lambda epoch: 1 / (epoch + 1)}),
]


@pytest.mark.parametrize(("name", "attribute", "options"), SCHEDULERS)
def test_schedulers(name, attribute, options):
    from adaclip.opacus import schedulers

    _, model, optimizer, ours = private()
    other = network()
    _, theirs, _ = opacus.PrivacyEngine().make_private(
        module=other,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    mine = getattr(schedulers, name)(optimizer, **options)
    wanted = getattr(opacus.schedulers, name)(theirs, **options)
    for epoch in range(5):
        assert getattr(optimizer, attribute) == pytest.approx(getattr(theirs, attribute), rel=1e-12)
        train(model, optimizer, ours, steps=1)
        if epoch == 2:
            # Neither the optimizer nor a function is in the state.
            state = mine.state_dict()
            assert all(isinstance(v, (int, float)) for v in state.values())
            mine = getattr(schedulers, name)(optimizer, **options)
            mine.load_state_dict(state)
        mine.step()
        wanted.step()
    with pytest.raises(TypeError, match="the one that make_private returned"):
        getattr(schedulers, name)(torch.optim.SGD(other.parameters(), lr=0.1), **options)


def test_a_scheduled_noise_is_booked_as_it_is():
    from adaclip.opacus.schedulers import ExponentialNoise

    engine, model, optimizer, ours = private()
    scheduler = ExponentialNoise(optimizer, gamma=0.5)
    train(model, optimizer, ours)
    scheduler.step()
    train(model, optimizer, ours)
    assert engine.accountant.history == [(1.0, 1 / 7, 7), (0.5, 1 / 7, 7)]


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_the_noise_follows_a_norm_that_is_set(clipping):
    norm = 1.0 if clipping == "flat" else [0.1 * (k + 1) for k in range(7)]
    _, model, optimizer, ours = private(clipping=clipping, max_grad_norm=norm)
    before, scale = optimizer.max_grad_norm, optimizer.clipping.noise_scale().clone()
    thresholds = optimizer.clipping.thresholds.clone()
    optimizer.max_grad_norm = before / 4
    assert optimizer.max_grad_norm == pytest.approx(before / 4, rel=1e-12)
    assert torch.allclose(optimizer.clipping.thresholds, thresholds / 4)
    assert torch.allclose(optimizer.clipping.noise_scale(), scale / 4)
    x, y = next(iter(ours))
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"after step\(\) and before the next backward"):
        optimizer.max_grad_norm = before
    optimizer.step()
    for wrong in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_grad_norm must be a positive finite number"):
            optimizer.max_grad_norm = wrong
    adaptive = private(clipping="adaptive", noise_multiplier=0.5)[2]
    with pytest.raises(ValueError, match="left to the 'adaptive' clipping"):
        adaptive.max_grad_norm = 2.0


def test_optimizer_attributes():
    _, model, optimizer, _ = private()
    assert isinstance(optimizer, DPOptimizer)
    assert isinstance(optimizer, adaclip.DPOptimizer)
    assert optimizer.params == list(model.parameters())
    assert optimizer.accumulated_iterations == 1
    for name, instead in [
        ("attach_step_hook", "register_step_post_hook"),
        ("grad_samples", "sample_norms"),
        ("signal_skip_step", "BatchMemoryManager"),
        ("pre_step", "one pass"),
        ("generator", "ChaCha20"),
    ]:
        with pytest.raises(AttributeError, match=instead):
            getattr(optimizer, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = optimizer.no_such


def test_a_step_hook():
    """What is said to replace attach_step_hook runs once a release, and keeps the books."""
    engine, model, optimizer, ours = private()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(len(engine.accountant)))
    train(model, optimizer, ours)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_old_names_say_what_replaces_them():
    engine = PrivacyEngine()
    for name, instead in [
        ("steps", r"len\(privacy_engine.accountant\)"),
        ("attach", "make_private"),
        ("get_privacy_spent", "get_epsilon"),
        ("virtual_step", "BatchMemoryManager"),
    ]:
        with pytest.raises(AttributeError, match=instead):
            getattr(engine, name)


def test_validation():
    bad = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16))
    engine = PrivacyEngine()
    assert ModuleValidator.is_valid(network())
    assert not ModuleValidator.is_valid(bad)
    assert not engine.is_compatible(module=bad, optimizer=None, data_loader=None)
    problems = ModuleValidator.validate(bad, strict=False)
    assert [type(p) for p in problems] == [adaclip.UnsupportedModuleError]
    with pytest.raises(IllegalModuleConfigurationError, match="GroupNorm"):
        engine.validate(module=bad, optimizer=None, data_loader=None)
    for fixed in (ModuleValidator.fix(bad), engine.get_compatible_module(bad)):
        assert isinstance(fixed[1], nn.GroupNorm)
        engine.validate(module=fixed, optimizer=None, data_loader=None)
    assert isinstance(bad[1], nn.BatchNorm2d)


@pytest.mark.parametrize("tracked", [True, False])
def test_make_functional(tracked):
    from opacus.grad_sample.functorch import make_functional as theirs

    from adaclip.opacus.grad_sample.functorch import make_functional

    model, x = network(), torch.randn(2, 1, 8, 8)
    function, params = make_functional(model, disable_autograd_tracking=not tracked)
    _, wanted = theirs(model, disable_autograd_tracking=not tracked)
    assert [p.requires_grad for p in params] == [p.requires_grad for p in wanted]
    assert torch.equal(function(params, x), model(x))
    doubled = [p * 2 for p in params]
    assert not torch.equal(function(doubled, x), model(x))
    # The values are not kept: only shapes.
    assert all(a is p for a, p in zip(params, model.parameters(), strict=True)) == tracked


def _an_epoch(wrapped):
    """(parameters, history) after one, in each process of a group, or in one alone."""
    from adaclip.opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP

    model = network()
    if wrapped:
        with torch.no_grad():
            for p in model.parameters():
                p += torch.distributed.get_rank()
        model = DPDDP(model)
        # The first process's, before anything else could have made them so.
        assert all(map(torch.equal, model.parameters(), network().parameters()))
    engine, model, optimizer, ours = private(
        model=model, clipping="per_layer", max_grad_norm=[0.3] * 7, noise_generator=KEY
    )
    with BatchMemoryManager(data_loader=ours, max_physical_batch_size=2, optimizer=optimizer) as pieces:
        train(model, optimizer, pieces)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), engine.accountant.history


def test_distributed_data_parallel():
    from adaclip.opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP

    with pytest.raises(RuntimeError, match="init_process_group"):
        DPDDP(network())
    alone, history = _an_epoch(False)
    assert history == [(1.0, 1 / 7, 7)]
    for parameters, booked in run(_an_epoch, True):
        assert booked == history
        assert (parameters - alone).norm() <= 1e-5 * alone.norm()


def test_what_opacus_made_is_not_wrapped_once_more():
    model = network()
    wrapped, optimizer, data = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    rest = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    for engine in (PrivacyEngine(), adaclip.PrivacyEngine()):
        with pytest.raises(TypeError, match=r"the model itself.*to_standard_module"):
            engine.make_private(module=wrapped, optimizer=optimizer, data_loader=loader(), **rest)
        model = wrapped.to_standard_module()
        with pytest.raises(TypeError, match=r"optimizer\.original_optimizer"):
            engine.make_private(module=model, optimizer=optimizer, data_loader=loader(), **rest)
        ordinary = optimizer.original_optimizer
        with pytest.raises(ValueError, match=r"batch_sampler must be the default one"):
            engine.make_private(module=model, optimizer=ordinary, data_loader=data, **rest)
        engine.make_private(module=model, optimizer=ordinary, data_loader=loader(), **rest)
        engine = getattr(engine, "engine", engine)
        engine.detach()
        wrapped = opacus.GradSampleModule(model)


def test_the_plain_engine_knows_opacus_s_accountants():
    with pytest.raises(ValueError, match="'prv' corresponds to 'pld'"):
        adaclip.PrivacyEngine(accountant="prv")
    with pytest.raises(ValueError, match="gdp_epsilon"):
        adaclip.PrivacyEngine(accountant="gdp")


# --- checkpoints ---------------------------------------------------------------------------------------


def test_checkpoints_go_on(tmp_path):
    from adaclip.opacus.schedulers import ExponentialGradClip, ExponentialNoise

    path = tmp_path / "run.pt"
    engine, model, optimizer, ours = private()
    noise = ExponentialNoise(optimizer, gamma=0.5)
    norm = ExponentialGradClip(optimizer, gamma=0.5)
    train(model, optimizer, ours)
    engine.save_checkpoint(
        path=path,
        module=model,
        noise_scheduler=noise,
        grad_clip_scheduler=norm,
        checkpoint_dict={"epoch": 3},
    )
    spent = engine.get_epsilon(1e-5)

    engine, other, optimizer, ours = private()
    noise = ExponentialNoise(optimizer, gamma=0.5)
    norm = ExponentialGradClip(optimizer, gamma=0.5)
    train(other, optimizer, ours, steps=1)
    extra = engine.load_checkpoint(
        path=path, module=other, optimizer=optimizer, noise_scheduler=noise, grad_clip_scheduler=norm
    )
    assert extra == {"epoch": 3}
    assert (noise.last_epoch, norm.last_epoch) == (0, 0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    # The step made here counts as well.
    assert engine.get_epsilon(1e-5) > spent
    with pytest.raises(ValueError, match="torch_save_kwargs must be left out"):
        engine.save_checkpoint(path=path, module=other, torch_save_kwargs={"pickle_protocol": 2})
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is damaged"):
        engine.load_checkpoint(path=path, module=other)


def opacus_checkpoint(path, steps=3):
    model = network()
    engine = opacus.PrivacyEngine()
    model, optimizer, data = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader(),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    train(model, optimizer, data, steps=steps)
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 1})
    return model, optimizer


def test_a_checkpoint_of_opacus_s_goes_on(tmp_path):
    path = tmp_path / "opacus.pt"
    theirs, their_optimizer = opacus_checkpoint(path)
    model = network()
    engine = PrivacyEngine()
    model, optimizer, ours = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader(),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    extra = engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert extra == {"epoch": 1}
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    momenta = [s["momentum_buffer"] for s in their_optimizer.state.values()]
    assert all(map(torch.equal, momenta, [s["momentum_buffer"] for s in optimizer.state.values()]))
    assert engine.accountant.history == [(2.0, 1 / 7, 3)]
    train(model, optimizer, ours)
    assert engine.accountant.history == [(2.0, 1 / 7, 10)]


def test_a_checkpoint_of_opacus_s_that_does_not_fit(tmp_path):
    path = tmp_path / "opacus.pt"
    opacus_checkpoint(path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    engine, model, optimizer, _ = private(model=other)
    with pytest.raises(ValueError, match="another model"):
        engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert len(engine.accountant) == 0

    model = network()
    engine = PrivacyEngine()
    engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader(),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    with pytest.raises(RuntimeError, match="set_budget"):
        engine.load_checkpoint(path=path, module=model)
    state = torch.load(path, weights_only=True)
    state["privacy_accountant_state_dict"]["history"].append((1.0, 2.0, 5))
    torch.save(state, path)
    engine, model, optimizer, _ = private()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="q must be in"):
        engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert len(engine.accountant) == 0
    assert all(map(torch.equal, before, model.parameters()))


# --- the examples themselves ---------------------------------------------------------------------------


def test_only_import_lines_change(migration):
    text = (
        "import opacus\nimport opacus.schedulers as s\n  from opacus import PrivacyEngine  # opacus\n"
        "from opacus.utils.batch_memory_manager import BatchMemoryManager\n"
        "import opacustoo\nx = 'from opacus import'\n# import opacus\n"
    )
    assert migration.rewrite_imports(text) == (
        "import adaclip.opacus as opacus\nimport adaclip.opacus.schedulers as s\n"
        "  from adaclip.opacus import PrivacyEngine  # opacus\n"
        "from adaclip.opacus.utils.batch_memory_manager import BatchMemoryManager\n"
        "import opacustoo\nx = 'from opacus import'\n# import opacus\n"
    )
    with pytest.raises(ValueError, match="by `from` or with `as`"):
        migration.rewrite_imports("import opacus.schedulers\n")


def test_what_is_imported():
    """No module imports opacus, and the accountants need no torch."""
    code = (
        "import sys, adaclip.opacus.accountants.utils\n"
        "assert 'torch' not in sys.modules\n"
        "import importlib, pkgutil\n"
        "for m in pkgutil.walk_packages(adaclip.opacus.__path__, 'adaclip.opacus.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert 'opacus' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not (os.environ.get("ADACLIP_OPACUS_EXAMPLES") and os.environ.get("ADACLIP_DATA")),
    reason="ADACLIP_OPACUS_EXAMPLES (Opacus's folder examples) and ADACLIP_DATA (MNIST and CIFAR-10) are not both set",
)
@pytest.mark.parametrize("name", ["mnist", "cifar10, per layer"])
def test_opacus_examples_run(migration, name):
    pytest.importorskip("tqdm", reason="the examples show their progress with it")
    script, *flags = migration.RUNS[name]
    root = Path(os.environ["ADACLIP_DATA"]).resolve() / ("mnist" if script == "mnist.py" else "")
    text = migration.examples(os.environ["ADACLIP_OPACUS_EXAMPLES"])[script]
    result = migration.compare(name, flags, text, root)
    assert migration.passed(result), result
    assert result["share of samples clipped"][1] > 0
