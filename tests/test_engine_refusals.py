"""What the engine refuses, before anything is released or changed."""

import pytest
import torch
from small_engine import batch_of, data, flat, private, small_model
from torch import nn

from adaclip import UnsupportedModuleError
from adaclip.accounting import Event, SubsampledGaussian
from adaclip.clipping import FlatClipping
from adaclip.testing import square_loss


def test_backward_twice_over_one_forward():
    _, model, _optimizer, loader = private()
    x, y = batch_of(loader)
    loss = square_loss(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="two backward passes"):
        loss.backward()


def test_one_backward_over_two_forwards():
    _, model, _optimizer, loader = private()
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match="two forward passes"):
        (square_loss(model(x), y) + square_loss(model(x), y)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_the_same_batch_twice():
    _, model, _optimizer, loader = private()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="may enter a step once"):
        square_loss(model(x), y).backward()


def test_two_steps_on_one_batch():
    engine, model, optimizer, loader = private()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.step()
    assert len(engine.accountant) == 1


def test_two_logical_batches_in_one_step():
    _, model, _optimizer, loader = private()
    batches = iter(loader)
    x, y = next(batches)
    square_loss(model(x), y).backward()
    x, y = next(batches)
    with pytest.raises(RuntimeError, match="two logical batches"):
        square_loss(model(x), y).backward()


def test_an_abandoned_logical_batch_is_dropped():
    one, two = private(max_batch_size=3), private(max_batch_size=3)
    for i, (_, model, _optimizer, loader) in enumerate((one, two)):
        batches = iter(loader)
        for _ in range(i):
            x, y = next(batches)
            square_loss(model(x), y).backward()
        x, y = next(iter(loader))
        assert loader.current.first
        square_loss(model(x), y).backward()
    sums = [[p.grad for p in made[1].parameters()] for made in (one, two)]
    assert all(a.abs().max() > 0 for a in sums[1])
    assert all(p.grad.norm() <= 3 / 10 for p in two[1].parameters())


def test_step_without_the_private_loader():
    engine, model, optimizer, _loader = private()
    x, y = data(4)
    square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="private loader"):
        optimizer.step()
    assert len(engine.accountant) == 0


def test_a_changed_gradient():
    engine, model, optimizer, loader = private()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    before = flat(model)
    with pytest.raises(RuntimeError, match="changed between"):
        optimizer.step()
    assert torch.equal(before, flat(model))
    assert len(engine.accountant) == 0


def test_training_in_evaluation_mode():
    engine, model, optimizer, loader = private()
    x, y = batch_of(loader)
    model.eval()
    square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="not clipped"):
        optimizer.step()
    assert len(engine.accountant) == 0


def test_a_parameter_used_behind_its_modules_back():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_model()

        def forward(self, x):
            return self.body(x) + self.body[4].weight.sum()

    _engine, model, optimizer, loader = private(Peeks())
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match=r"body\.4\.weight.*not clipped"):
        square_loss(model(x), y).backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_rows_folded_away_from_the_batch():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 3)

        def forward(self, x):
            h = self.first(x.reshape(-1, 6))
            return self.second(h.reshape(x.shape[0], -1, 6).sum(1))

    _, model, _optimizer, loader = private(Folds())
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match="different numbers of rows"):
        square_loss(model(x), y).backward()


class TimeFirst(nn.Module):
    """Sees [T, B, ...]: a row along dimension 0 is a moment of all samples."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 3)

    def forward(self, x):
        return self.mix(x[:, 0].transpose(0, 1)).sum(0)


def test_rows_that_are_not_samples():
    engine, model, optimizer, loader = private(TimeFirst())
    x, y = batch_of(loader)
    assert len(x) != 6
    square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="every sample must come once, as one row"):
        optimizer.step()
    assert len(engine.accountant) == 0


def test_two_samples_folded_into_one_row_by_submodules():
    _, model, optimizer, loader = private(n=40, batch_size=40)
    x, y = batch_of(loader)

    def run(rows):
        return model[4](model[3](model[2](model[1](model[0](rows)))))

    (square_loss(run(x[:20]), y[:20]) + square_loss(run(x[20:]), y[20:])).backward()
    with pytest.raises(RuntimeError, match="every sample must come once, as one row"):
        optimizer.step()


def test_submodules_called_one_by_one_are_private_as_well():
    one, two = private(), private()
    for (_, model, optimizer, loader), whole in ((one, True), (two, False)):
        model(data(3)[0])  # a warm-up pass that gets no backward
        for x, y in loader:
            optimizer.zero_grad()
            if whole:
                out = model(x)
            else:
                out = x
                for part in model:
                    out = part(out)
            square_loss(out, y).backward()
            optimizer.step()
    assert torch.equal(flat(one[1]), flat(two[1]))


def test_a_batch_fetched_ahead():
    _, model, optimizer, loader = private(pad_to=25)
    batches = iter(loader)
    x, y = next(batches)
    rows = loader.current.rows
    while loader.current.rows == rows:
        following = next(batches)
    assert following is not None
    square_loss(model(x[:rows]), y[:rows]).backward()
    with pytest.raises(RuntimeError, match="do not fetch batches ahead"):
        optimizer.step()


def test_reentrant_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 1, 1)
            self.body = small_model()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, self.first(x), use_reentrant=True)

    engine, model, optimizer, loader = private(Checkpointed())
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False|may enter a step once"):
        square_loss(model(x), y).backward()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert len(engine.accountant) == 0


@pytest.mark.parametrize("call", ["step", "unscale_"])
@pytest.mark.parametrize("scale", [4.0, 0.25])
def test_a_gradient_scaler(scale, call):
    engine, model, optimizer, loader = private()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    batches = iter(loader)
    x, y = next(batches)
    before = flat(model)
    scaler.scale(square_loss(model(x), y)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"GradScaler.*without it"):
        getattr(scaler, call)(optimizer)
    assert len(engine.accountant) == 0
    assert torch.equal(flat(model), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    # The loop goes on without it.
    x, y = next(batches)
    optimizer.zero_grad()
    square_loss(model(x), y).backward()
    optimizer.step()
    assert len(engine.accountant) == 1


def test_what_a_gradient_scaler_hands_over():
    engine, _, optimizer, loader = private()
    batch_of(loader)
    optimizer.grad_scale = optimizer.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match="GradScaler"):
        optimizer.step(lambda: pytest.fail("the closure must not run"))
    assert len(engine.accountant) == 0
    optimizer.step()
    assert len(engine.accountant) == 1


def test_a_scaler_that_is_switched_off_does_nothing():
    engine, model, optimizer, loader = private()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = batch_of(loader)
    scaler.scale(square_loss(model(x), y)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert len(engine.accountant) == 1


def test_what_decides_the_noise_cannot_be_set():
    _, _, optimizer, _ = private()
    with pytest.raises(AttributeError):
        optimizer.expected_batch_size = 1e6
    with pytest.raises(AttributeError):
        optimizer._sum.clipping.max_grad_norm = 0.1


def test_noise_that_falls_within_an_epoch():
    engine, model, optimizer, loader = private(poisson_sampling=False, sigma=2.0)
    batches = iter(loader)
    for sigma in (2.0, 1.0):
        x, y = next(batches)
        optimizer.noise_multiplier = sigma
        square_loss(model(x), y).backward()
        if sigma == 2.0:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="must not fall within an epoch"):
                optimizer.step()
    assert engine.accountant.history == [Event(SubsampledGaussian(1.0, 2.0, "shuffled"), 1)]


def test_a_step_after_detach():
    engine, model, optimizer, loader = private()
    x, y = batch_of(loader)
    square_loss(model(x), y).backward()
    engine.detach(model)
    with pytest.raises(RuntimeError, match="detached"):
        optimizer.step()


def test_batch_norm_is_refused_with_the_cure():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedModuleError, match=r"adaclip\.fix"):
        private(model)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be a positive"),
        ({"max_grad_norm": [1.0, 2.0]}, "max_grad_norm must be a positive"),
        ({"max_grad_norm": [1.0], "clipping": "per_layer"}, "each of the 3 layers"),
        ({"clipping": FlatClipping(5.0), "max_grad_norm": 1.0}, "must be left out"),
        ({"sigma": -0.5}, "noise_multiplier must be"),
        ({"sigma": float("inf")}, "noise_multiplier must be"),
        ({"clipping": "sideways"}, "clipping must be one of"),
        ({"loss_reduction": "none"}, "loss_reduction must be"),
        ({"backend": "abacus"}, "backend must be"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"noise_generator": b"short"}, "32"),
    ],
)
def test_bad_arguments(options, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        private(model, **options)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_an_optimizer_of_another_model():
    with pytest.raises(ValueError, match="parameters of module only"):
        private(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
