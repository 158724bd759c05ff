"""The engine beside the rest of torch: optimizers, schedulers, copies, compilation."""

import copy
import io

import pytest
import torch
from small_engine import data, flat, private, small_model, train
from torch import nn

from adaclip.layers import WSConv2d
from adaclip.testing import square_loss


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
def test_optimizers(kind):
    model = small_model()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    _, model, optimizer, loader = private(model, optimizer=optimizer)
    before = flat(model)
    train(model, optimizer, loader)
    assert bool(flat(model).isfinite().all())
    assert not torch.equal(before, flat(model))


def test_learning_rate_schedulers():
    _, model, optimizer, loader = private()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, loader)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_copies_and_pickles_of_a_private_model_are_ordinary():
    _, model, _optimizer, _loader = private()
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, y = data(4)
    expected = model.eval()(x)
    for other in (copied, loaded):
        assert torch.equal(other.eval()(x), expected)
        square_loss(other.train()(x), y).backward()
        assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_gradients_are_the_users():
    _, model, _optimizer, _loader = private()
    x, _ = data(4)
    x.requires_grad_()
    model.eval()
    (saliency,) = torch.autograd.grad(model(x).sum(), x)
    assert saliency.shape == x.shape


def test_gradient_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_model()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    one, two = private(), private(Checkpointed())
    train(*one[1:])
    train(*two[1:])
    assert torch.allclose(flat(one[1]), flat(two[1]), atol=1e-6)


def test_unfreezing_later():
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _, model, optimizer, loader = private(model, optimizer=optimizer)
    before = model[0].weight.clone()
    train(model, optimizer, loader)
    assert torch.equal(before, model[0].weight)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, loader)
    assert not torch.equal(before, model[0].weight)


def standardized_model():
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


@pytest.mark.parametrize("make", [small_model, standardized_model])
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_forward_and_backward(backend, make):
    one, two = private(make(), sigma=0.0), private(make(), sigma=0.0)
    train(*one[1:])
    _, model, optimizer, loader = two
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for x, y in loader:
        optimizer.zero_grad()
        square_loss(compiled(x), y).backward()
        optimizer.step()
    assert torch.allclose(flat(one[1]), flat(model), atol=1e-5)
