"""Scripts in Opacus's style give on adaclip.opacus the clipped sums and the epsilon that they give on Opacus."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus_style import KEY, loader, network, private, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adaclip
from adaclip.accounting import create_accountant, gdp_epsilon
from adaclip.accounting.releases import Event, SubsampledGaussian
from adaclip.opacus import PrivacyEngine, accountants

opacus = pytest.importorskip("opacus", reason="what is compared with")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def migration(monkeypatch):
    # Behind the installed packages: only bench is meant.
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from bench import migration

    return migration


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
