"""What is booked, when, and that the noise is what was booked; checkpoints of both."""

import copy

import pytest
import torch
from small_engine import batch_of, data, flat, private, small_model, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adaclip.optimizer
from adaclip import PrivacyBudgetExceeded, PrivacyEngine
from adaclip.accounting import Event, SubsampledGaussian
from adaclip.budget import Budget
from adaclip.testing import clipped_sum, relative_error, sample_grads, square_loss


def test_the_budget_is_enforced_and_nothing_changes():
    model = small_model()
    x, y = data()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        target_epsilon=2.0,
        target_delta=1e-3,
        epochs=2,
    )
    train(model, optimizer, loader, epochs=2)
    spent = engine.get_epsilon(1e-3)
    assert 2.0 * (1 - 1e-3) <= spent <= 2.0
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(PrivacyBudgetExceeded, match="all 8 releases that the budget"):
        train(model, optimizer, loader)
    assert torch.equal(before, flat(model))
    assert engine.get_epsilon(1e-3) == spent
    assert len(engine.accountant) == 8
    for key, slots in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(state["state"][key][k])) for k, v in slots.items()
        )


def test_the_event_is_booked_before_the_noise(monkeypatch):
    engine, model, optimizer, loader = private()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()

    def crash(*args, **kwargs):
        assert len(engine.accountant) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(adaclip.optimizer, "noisy_update", crash)
    before = flat(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(before, flat(model))
    assert len(engine.accountant) == 1
    assert optimizer.releases == 1


def test_events_carry_rate_and_noise():
    engine, model, optimizer, loader = private(sigma=1.3)
    train(model, optimizer, loader)
    assert engine.accountant.history == [Event(SubsampledGaussian(0.25, 1.3), 4)]


def test_shuffled_batches_are_booked_once_an_epoch_without_amplification():
    with pytest.warns(UserWarning, match="poisson_sampling=True cures it"):
        engine, model, optimizer, loader = private(poisson_sampling=False)
    train(model, optimizer, loader, epochs=3)
    assert engine.accountant.adjacency == "zero_out"
    assert engine.accountant.history == [Event(SubsampledGaussian(1.0, 1.0, "shuffled"), 3)]
    poisson = PrivacyEngine().accountant
    poisson.step(0.25, 1.0, 12)
    assert engine.get_epsilon(1e-5) > 1.2 * poisson.get_epsilon(1e-5)


def test_noise_has_the_standard_deviation_that_was_booked():
    model = nn.Linear(300, 300, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.zeros(20, 300), torch.zeros(20, 300)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=4),
        noise_multiplier=1.5,
        max_grad_norm=0.8,
    )
    a, b = batch_of(loader)
    square_loss(model(a), b).backward()
    optimizer.step()
    expected = 1.5 * 0.8 / 4
    assert abs(float(model.weight.detach().std()) / expected - 1) < 0.02
    assert abs(float(model.weight.detach().mean())) < 5 * expected / 300


def test_per_layer_noise_covers_the_whole_release():
    _engine, model, optimizer, loader = private(
        clipping="per_layer", max_grad_norm=[0.5, 1.0, 2.0], sigma=1.7
    )
    clipping = optimizer.clipping
    stds = 1.7 * clipping.noise_scale()
    assert float((clipping.thresholds / stds).square().sum()) == pytest.approx(1 / 1.7**2, rel=1e-12)
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    truth = sample_grads(copy.deepcopy(model), x, y, square_loss)
    for names, bound in (
        (("0.weight", "0.bias"), 0.5),
        (("1.weight", "1.bias"), 1.0),
        (("4.weight", "4.bias"), 2.0),
    ):
        expected = clipped_sum({n: truth[n] for n in names}, bound)
        for n in names:
            assert relative_error(model.get_parameter(n).grad * 10, expected[n]) < 1e-5


def test_checkpoint_continues_the_same_run(tmp_path):
    path = tmp_path / "run.pt"
    whole = private(optimizer=None)
    train(*whole[1:], epochs=2)
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer, extra={"note": 7})
    engine, model, optimizer, loader = private()
    assert engine.load_checkpoint(path, module=model, optimizer=optimizer) == {"note": 7}
    train(model, optimizer, loader)
    assert torch.equal(flat(model), flat(whole[1]))
    assert engine.accountant.history == whole[0].accountant.history


def test_checkpoints_that_do_not_fit_change_nothing(tmp_path):
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)

    other = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), *list(small_model())[1:])
    engine, model, optimizer, loader = private(other)
    before = flat(model)
    with pytest.raises(ValueError, match="another model"):
        engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert torch.equal(before, flat(model))

    engine, model, optimizer, loader = private(sigma=2.0)
    with pytest.raises(ValueError, match="noise_multiplier"):
        engine.load_checkpoint(path, module=model, optimizer=optimizer)
    engine, model, optimizer, loader = private(max_grad_norm=2.0)
    with pytest.raises(ValueError, match="clipping"):
        engine.load_checkpoint(path, module=model, optimizer=optimizer)

    path.write_bytes(path.read_bytes()[:-100])
    engine, model, optimizer, loader = private()
    with pytest.raises(ValueError, match="damaged"):
        engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert len(engine.accountant) == 0


def test_loading_never_forgets_what_was_spent(tmp_path):
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    train(model, optimizer, loader)
    spent = engine.get_epsilon(1e-5)
    engine.set_budget(spent * 1.01, 1e-5)
    # Back to the earlier weights: the later steps were released all the same.
    engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert engine.get_epsilon(1e-5) == spent
    assert engine._budget == Budget(spent * 1.01, 1e-5)

    # An engine with another past adds the checkpoint's.
    engine, model, optimizer, loader = private(sigma=1.0)
    engine.accountant.step(0.5, 2.0, 3)
    engine.load_checkpoint(path, module=model, optimizer=optimizer)
    expected = [Event(SubsampledGaussian(0.5, 2.0), 3), Event(SubsampledGaussian(0.25, 1.0), 4)]
    assert engine.accountant.history == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 20}, "expected batch size"),
        ({"n": 80, "batch_size": 10}, "data set size"),
        ({"poisson_sampling": False}, "loader"),
        ({"optimizer": "Adam"}, "optimizer"),
    ],
)
def test_checkpoints_of_another_set_up(tmp_path, changes, message):
    path = tmp_path / "run.pt"
    engine, model, optimizer, loader = private()
    train(model, optimizer, loader)
    engine.save_checkpoint(path, module=model, optimizer=optimizer)
    model = small_model()
    if "optimizer" in changes:
        changes = {"optimizer": torch.optim.Adam(model.parameters())}
    engine, model, optimizer, loader = private(model, **changes)
    before, state = flat(model), loader.state_dict()
    with pytest.raises(ValueError, match=message):
        engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert torch.equal(before, flat(model))
    assert loader.state_dict() == state
    assert len(engine.accountant) == 0


def test_parameters_tied_after_make_private():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    x, y = torch.randn(8, 4), torch.randn(8, 4)
    engine, model = PrivacyEngine(), Two()
    model, _, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
    )
    model.b.weight = model.a.weight
    a, b = batch_of(loader)
    square_loss(model(a), b).backward()
    plain = Two()
    plain.b.weight = plain.a.weight
    plain.load_state_dict(model.state_dict())
    truth = clipped_sum(sample_grads(plain, x, y, square_loss), 0.5)
    assert relative_error(model.a.weight.grad * 8, truth["a.weight"]) < 1e-5
