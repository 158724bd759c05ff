"""Several views of a sample, and gradients at another point than the parameters, inside the engine's step."""

import copy

import pytest
import torch
from small_engine import batch_of, flat, labeled, small_model
from torch import nn

from adaclip.smoothing import SmoothedLoss
from adaclip.testing import clipped_sum, relative_error, sample_grads


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [None, 9])
def test_the_mean_over_views_is_clipped_once(reduction, size):
    model = small_model()
    views = 3
    _, model, optimizer, loader = labeled(
        model=model, views_per_sample=views, augmentation="flip", max_grad_norm=0.5, max_batch_size=size,
        loss_reduction=reduction,
    )  # fmt: skip

    def loss(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction=reduction)

    seen = [], []
    for x, y in loader:
        loss(model(x), y).backward()
        rows = loader.current.rows * views
        seen[0].append(x[:rows])
        seen[1].append(y[:rows])
        assert optimizer.sample_norms.shape == (loader.current.rows,)
        if loader.current.last:
            break
    x, y = (torch.cat(parts) for parts in seen)
    assert not torch.equal(x[0], x[1]) or not torch.equal(x[3], x[4])
    truth = clipped_sum(sample_grads(model, x, y, nn.functional.cross_entropy, views=views), 0.5)
    for name, p in model.named_parameters():
        assert relative_error(p.grad * 20, truth[name]) < 1e-5


def test_rows_that_are_no_whole_samples():
    _, model, _, loader = labeled(views_per_sample=2)
    x, y = batch_of(loader)
    with pytest.raises(RuntimeError, match="2 views of every sample"):
        nn.functional.cross_entropy(model(x[:3]), y[:3]).backward()


def test_gradients_are_taken_at_the_point_and_all_else_is_at_the_parameters(tmp_path):
    model = small_model()
    engine, model, optimizer, loader = labeled(
        model=model, smoothing=SmoothedLoss(0.5, signal="always"), max_batch_size=5, sigma=0.0
    )
    home, keep = flat(model), copy.deepcopy(model.state_dict())
    points = []
    for x, y in loader:
        assert optimizer.smoothing.inside
        points.append(flat(model))
        nn.functional.cross_entropy(model(x), y).backward()
        assert all(torch.equal(a, keep[n]) for n, a in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model(x), nn.Module.__call__(copy_of(keep), x))
        assert torch.equal(flat(model), points[0])
        optimizer.step()
        if loader.current.last:
            break
    assert len(points) > 1
    assert all(torch.equal(p, points[0]) for p in points)
    assert not torch.equal(points[0], home)
    assert not optimizer.smoothing.inside
    engine.save_checkpoint(tmp_path / "c", module=model, optimizer=optimizer)
    next(iter(loader))
    assert optimizer.smoothing.inside
    released = copy.deepcopy(model.state_dict())
    engine.detach(model)
    assert all(torch.equal(p.detach(), released[n]) for n, p in model.named_parameters())


def copy_of(state):
    model = small_model()
    model.load_state_dict(state)
    return model
