"""Corners in which a step could release more than is booked: detached runs, keys, attributes, budgets on resume."""

import pytest
import torch
from small_engine import KEY, batch_of, flat, labeled, private, small_model, train, train_labeled
from torch import nn

from adaclip import PrivacyBudgetExceeded
from adaclip.accounting import Event, SubsampledGaussian
from adaclip.clipping import AdaptiveClipping, DCSGDClipping
from adaclip.groups import LabelGroups
from adaclip.schedules import Linear
from adaclip.testing import square_loss


def attach_again(engine, loader, **options):
    """A second run of the same engine, with a model of its own."""
    model = small_model()
    options = {"noise_generator": bytes(32), "noise_multiplier": 4.0, **options}
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(loader.dataset, batch_size=10),
        **options,
    )


def test_an_optimizer_of_a_detached_run_cannot_step_on_the_next_runs_account():
    engine, model, optimizer, loader = private(sigma=0.1)
    x, y = batch_of(loader)
    # The graph, and with the optimizer the old sum, outlive the detach.
    loss = square_loss(model(x), y)
    engine.detach(model)
    attach_again(engine, loader)
    loss.backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match="detached"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert len(engine.accountant) == 0


def test_a_key_serves_one_run_of_an_engine():
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.detach(model)
    # Release 0 would get the noise that release 0 had.
    with pytest.raises(ValueError, match="noise_generator must be a key that"):
        attach_again(engine, loader, noise_generator=KEY)
    _, again, loader = attach_again(engine, loader)
    assert again.releases == 0


def test_a_key_without_a_release_can_be_used_again():
    engine, model, _, loader = private()
    engine.detach(model)
    attach_again(engine, loader, noise_generator=KEY)


@pytest.mark.parametrize("schedule", [None, Linear(1.0, 0.5, 8)])
def test_what_the_statistics_cost_is_what_their_noise_is(schedule):
    groups = LabelGroups(groups=3, sigma_s=10.0, sigma_n=10.0)
    _, model, optimizer, loader = labeled(
        groups=groups, clipping=AdaptiveClipping(sigma_b=5.0), noise_schedule=schedule
    )
    # Their noise was drawn up when the run began: it does not become more by saying so.
    optimizer.groups.sigma_s = optimizer.groups.sigma_n = 1e6
    optimizer.clipping.side.sigma_b = 1e6
    if schedule is None:
        optimizer.noise_multiplier = 1.0
    train_labeled(model, optimizer, loader, 1)
    cost = 0.1**2 + 0.1**2 + 0.1**2
    assert optimizer.gradient_noise_multiplier == pytest.approx((1.0 - cost) ** -0.5, rel=1e-12)


def test_a_resumed_filter_keeps_its_terms(tmp_path):
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    engine.set_budget(30.0, 1e-5)
    train(model, optimizer, loader)
    order = engine._budget.filter.state_dict()["order"]
    assert order is not None
    engine.save_checkpoint(path, module=model, optimizer=optimizer)

    engine, model, optimizer, loader = private()
    engine.set_budget(30.0, 1e-5)
    engine.load_checkpoint(path, module=model, optimizer=optimizer)
    # Another order, chosen after the first releases, would be the best of many.
    assert engine._budget.filter.state_dict()["order"] == order


def test_a_resumed_run_does_not_leave_its_plan(tmp_path):
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    engine.detach(model)
    options = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}

    def planned():
        engine, model, _, loader = private()
        engine.detach(model)
        model = small_model()
        return engine, *engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(loader.dataset, batch_size=10),
            **options,
        )

    engine, model, optimizer, loader = planned()
    train(model, optimizer, loader)
    sigma = optimizer.noise_multiplier
    engine.save_checkpoint(path, module=model, optimizer=optimizer)

    engine, model, optimizer, loader = private(sigma=sigma)
    engine.set_budget(8.0, 1e-3)
    before = flat(model)
    with pytest.raises(ValueError, match="budget must be the checkpoint's plan"):
        engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert torch.equal(flat(model), before)
    assert len(engine.accountant) == 0

    engine, model, optimizer, loader = planned()
    engine.load_checkpoint(path, module=model, optimizer=optimizer)
    train(model, optimizer, loader)
    assert engine.accountant.history == [Event(SubsampledGaussian(0.25, sigma), 8)]
    with pytest.raises(PrivacyBudgetExceeded, match="all 8 releases"):
        train(model, optimizer, loader)


class _Fails(torch.autograd.Function):
    """The identity, whose backward breaks off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise FloatingPointError("broken off")


@pytest.mark.parametrize("drop", [False, True])
def test_a_backward_that_breaks_off_counts_no_sample_twice(drop):
    """Parts of a logical batch before and after it are released once, in gradient and statistics alike."""
    _, model, optimizer, loader = labeled(
        clipping=DCSGDClipping(1e-6), groups=LabelGroups(groups=3), max_batch_size=5, sigma=0.0
    )
    sums, counted = optimizer._sum.statistics.sums, 0
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        if i == 1:
            with pytest.raises(FloatingPointError):
                _Fails.apply(nn.functional.cross_entropy(model[:3](x).flatten(1), y)).backward()
            if drop:
                optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        counted += loader.current.rows
        assert float(sums[-3:].sum()) == counted
        total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm() * 20
        assert float(total) <= counted * 1e-6 * (1 + 1e-5)
        if loader.current.last:
            break
    optimizer.step()
    assert optimizer.releases == 1
    assert not sums.any()


def test_a_crash_between_noise_and_statistics_releases_neither_again(monkeypatch):
    engine, model, optimizer, loader = labeled(clipping="adaptive", groups=LabelGroups(groups=3))
    statistics = optimizer._sum.statistics
    batches = iter(loader)
    x, y = next(batches)
    nn.functional.cross_entropy(model(x), y).backward()

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(statistics), "release", crash)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.step()
    x, y = next(batches)
    optimizer.zero_grad()
    assert not statistics.sums.any()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.releases == engine.accountant.ledger.steps == 2


@pytest.mark.parametrize("own", [torch.optim.SGD, torch.optim.Adagrad])
def test_a_parameter_frozen_before_the_step_keeps_no_sum(own):
    """It gets no noise, so nothing of the batch may stay in it, or be released when it is trained again."""
    model = small_model()
    _, model, optimizer, loader = private(model, optimizer=own(model.parameters(), lr=0.1))
    batches, bias = iter(loader), model[4].bias
    x, y = next(batches)
    square_loss(model(x), y).backward()
    before = bias.detach().clone()
    bias.requires_grad_(False)
    optimizer.step()
    assert torch.equal(bias, before)
    assert bias.grad is None
    bias.requires_grad_(True)
    x, y = next(batches)
    optimizer.zero_grad()
    square_loss(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(bias, before)


def test_steps_before_a_checkpoint_of_another_process_is_loaded_count_too(tmp_path):
    """Equal entries of two ledgers are not the same releases: 2 steps here and 4 there are 6."""
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    train(model, optimizer, loader)
    # Back and forth in its own process: nothing new.
    engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert engine.accountant.ledger.steps == 8

    for before in (1, 2):
        other, model, optimizer, loader = private()
        train(model, optimizer, loader, epochs=before)
        other.load_checkpoint(path, module=model, optimizer=optimizer)
        assert other.accountant.ledger.steps == 4 * before + 4
        # The same file once more.
        other.load_checkpoint(path, module=model, optimizer=optimizer)
        assert other.accountant.ledger.steps == 4 * before + 4


def test_a_later_checkpoint_of_another_process_adds_what_it_did_since(tmp_path):
    paths = tmp_path / "early.pt", tmp_path / "late.pt"
    engine, model, optimizer, loader = private()
    for path in paths:
        train(model, optimizer, loader)
        engine.save_checkpoint(path, module=model, optimizer=optimizer)

    other, model, optimizer, loader = private()
    for path, steps in zip((*paths, paths[0]), (4, 12, 12), strict=True):
        other.load_checkpoint(path, module=model, optimizer=optimizer)
        assert other.accountant.ledger.steps == steps
        if steps == 4:
            train(model, optimizer, loader)


def test_a_checkpoint_amid_a_logical_batch_holds_nothing_of_it(tmp_path):
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = labeled(
        clipping="adaptive", groups=LabelGroups(groups=3), max_batch_size=5
    )
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    clean = torch.load(path, weights_only=True)
    x, y = batch_of(loader)
    nn.functional.cross_entropy(model(x), y).backward()
    assert optimizer._sum.statistics.sums.any()
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    amid = torch.load(path, weights_only=True)
    assert amid.pop("loader")["step"] == clean.pop("loader")["step"] + 1
    assert str(amid) == str(clean)

    # Loading drops the batch in hand, which can no longer be released.
    engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert not optimizer._sum.statistics.sums.any()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="needs a batch"):
        optimizer.step()
    assert len(engine.accountant) == 0


class _Wrapped(nn.Module):
    """Its parts can be called without it."""

    def __init__(self, generic):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.PReLU() if generic else nn.Identity(), nn.Linear(36, 3))

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
@pytest.mark.parametrize("generic", [False, True])
def test_two_backwards_over_half_a_batch_are_not_a_batch(generic):
    """Past the whole model's forward, which is counted, too: as many rows as samples, but some of them twice."""
    engine, model, optimizer, loader = private(_Wrapped(generic), n=10, batch_size=10)
    x, y = batch_of(loader)
    loss = square_loss(model.net(x[:5]), y[:5])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="two backward passes over one forward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="last backward failed"):
        optimizer.step()
    assert len(engine.accountant) == 0
    # Each half once is in order.
    optimizer.zero_grad()
    for part in (slice(0, 5), slice(5, 10)):
        square_loss(model.net(x[part]), y[part]).backward()
    optimizer.step()
    assert len(engine.accountant) == 1
