"""Several views of a sample under a private engine: their gradients are averaged, and clipped once."""

import pytest
import torch
from small_engine import small_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.layers.ws_conv import WSConv2d
from adaclip.testing import clipped_sum, private_step, relative_error, sample_grads, square_loss


def rolled(x, generator):
    """View v of an image: the image rolled by v pixels, and darker."""
    v = torch.arange(x.shape[0]) % 3
    moved = torch.stack([torch.roll(x, i, -1) for i in range(3)])
    return moved[v, torch.arange(x.shape[0])] * (1 - 0.3 * v).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def small_data(n):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 6, 6, generator=g), torch.randn(n, 3, generator=g)


def truth_of(model, x, y):
    views = rolled(x.repeat_interleave(3, 0), None), y.repeat_interleave(3, 0)
    grads = sample_grads(model, *views, square_loss, views=3)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    return grads, norms


def total_loss(outputs, targets):
    return square_loss(outputs, targets) * outputs.shape[0]


def apart(found, expected):
    ours, exact = (torch.cat([t.double().flatten() for t in d.values()]) for d in (found, expected))
    return float((ours - exact).norm() / exact.norm())


VIEWS = {"views_per_sample": 3, "augmentation": rolled}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_over_views_is_clipped_once(reduction, backend):
    model, (x, y) = small_model(), small_data(9)
    grads, norms = truth_of(model, x, y)
    bound = float(norms.median())
    loss = square_loss if reduction == "mean" else total_loss
    options = {"max_grad_norm": bound, "reduction": reduction, "backend": backend, **VIEWS}
    found, seen = private_step(model, x, y, loss, **options)
    assert seen.shape == (9,)
    assert relative_error(seen, norms) < 1e-5
    assert apart(found, clipped_sum(grads, bound)) < 1e-5


def private(model, x, y, *, batch_size=None, **options):
    engine = PrivacyEngine()
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "noise_generator": 5, **VIEWS, **options}
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=batch_size or len(x)),
        **settings,
    )


@pytest.mark.parametrize("pad", [None, 4])
def test_physical_batches_hold_whole_samples(pad):
    model, (x, y) = small_model(), small_data(9)
    grads, norms = truth_of(model, x, y)
    bound = float(norms.median())
    _, optimizer, loader = private(model, x, y, max_grad_norm=bound, max_batch_size=14, pad_to=pad)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []
    for inputs, targets in loader:
        assert len(inputs) == 3 * loader.current.padded_rows
        optimizer.zero_grad()
        square_loss(model(inputs), targets).backward()
        seen.append(optimizer.sample_norms)
        optimizer.step()
    assert [len(s) for s in seen] == [4, 4, 1]
    assert relative_error(torch.cat(seen), norms) < 1e-5
    moved = {n: (before[n] - p.detach()) * 9 for n, p in model.named_parameters()}
    assert apart(moved, clipped_sum(grads, bound)) < 1e-4


def test_an_empty_batch_of_views_is_noise_alone():
    model, (x, y) = small_model(), small_data(5000)
    _, optimizer, loader = private(model, x, y, batch_size=1)
    batches = 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        square_loss(model(inputs), targets).backward()
        if loader.current.rows == 0:
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
            batches += 1
        optimizer.step()
        if batches == 3:
            break
    assert batches == 3


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e12, float("inf"), float("nan")])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_sample_moves_the_sum_by_at_most_its_bound(value, backend):
    """One of its views is enough to leave a non-finite sample out, and no other sample's norm moves."""
    model, (x, y) = small_model(), small_data(6)
    bound = 0.7

    def strange(x, generator):
        x = rolled(x, generator)
        x[3 * 4 + 1] *= value
        return x

    def run(targets):
        options = {"views_per_sample": 3, "augmentation": strange, "max_grad_norm": bound, "backend": backend}
        found, norms = private_step(model, x, targets, square_loss, **options)
        return torch.cat([t.double().flatten() for t in found.values()]), norms

    others = [0, 1, 2, 3, 5]
    with_it, norms = run(y)
    without = y.clone()
    without[4] *= 1e3
    other, seen = run(without)
    assert torch.equal(seen[others], norms[others])
    _, plain = private_step(model, x, y, square_loss, max_grad_norm=bound, backend=backend, **VIEWS)
    assert torch.equal(plain[others], norms[others])
    assert bool(with_it.isfinite().all())
    assert float((with_it - other).norm()) <= 2 * bound * (1 + 1e-5)
    if value != value:
        assert not norms[4].isfinite()
        assert torch.equal(with_it, other)


def test_rows_of_another_number_than_the_views_are_refused():
    model, (x, y) = small_model(), small_data(6)
    _, optimizer, loader = private(model, x, y)
    inputs, targets = next(iter(loader))
    with pytest.raises(RuntimeError, match="3 views of every sample"):
        square_loss(model(inputs[:7]), targets[:7]).backward()
    optimizer.zero_grad()
    square_loss(model(inputs[::3]), targets[::3]).backward()
    with pytest.raises(RuntimeError, match="every sample must come once"):
        optimizer.step()


def test_a_batch_may_be_passed_in_pieces_of_whole_samples():
    model, (x, y) = small_model(), small_data(6)
    _, norms = truth_of(model, x, y)
    _, optimizer, loader = private(model, x, y)
    inputs, targets = next(iter(loader))
    optimizer.zero_grad()
    seen = []
    for piece in (slice(0, 6), slice(6, 18)):
        square_loss(model(inputs[piece]), targets[piece]).backward()
        seen.append(optimizer.sample_norms)
    optimizer.step()
    assert [len(s) for s in seen] == [2, 4]
    assert relative_error(torch.cat(seen), norms) < 1e-5


@pytest.mark.filterwarnings("ignore:shuffled batches")
def test_views_reach_the_engine_as_settings():
    x, y = small_data(8)
    options = {"views_per_sample": 4, "augmentation": "crop-flip", "max_batch_size": 16}
    _, _, loader = private(small_model(), x, y, **options)
    assert (loader.views, loader.max_batch_size) == (4, 4)
    _, _, shuffled = private(small_model(), x, y, batch_size=4, poisson_sampling=False, **options)
    inputs, targets = next(iter(shuffled))
    assert inputs.shape == (16, 1, 6, 6)
    assert torch.equal(targets[::4], targets[3::4])
    for bad in ({"views_per_sample": 0}, {"augmentation": "rotate"}, {"max_batch_size": 2}):
        with pytest.raises(ValueError, match=r"views|augmentation"):
            private(small_model(), x, y, **bad)


def test_views_in_a_compiled_model():
    # Earlier tests count towards the number of times that one function may be compiled.
    torch._dynamo.reset()
    x, y = small_data(8)
    ends = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True)):
        model, optimizer, loader = private(small_model(), x, y, max_grad_norm=0.5)
        run = wrap(model)
        for inputs, targets in loader:
            optimizer.zero_grad()
            square_loss(run(inputs), targets).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(20, 30), (20,)),
        (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 6, 6)),
        (lambda: nn.Conv3d(8, 16, 2, bias=False), (8, 4, 4, 4)),
        (lambda: WSConv2d(8, 8, 3, padding=1), (8, 6, 6)),
        (lambda: nn.GroupNorm(2, 800), (800, 5)),
        (lambda: nn.LayerNorm(400), (3, 400)),
        (lambda: nn.RMSNorm(400), (400,)),
    ],
    ids=["Linear", "Conv2d", "Conv3d", "WSConv2d", "GroupNorm", "LayerNorm", "RMSNorm"],
)
@pytest.mark.filterwarnings("ignore:adaclip has no fast", "ignore:Mismatch dtype")
def test_16_bit_views_keep_the_bound(make, shape):
    """Summed in float32: a factor or a sum of views rounded to 8 bits would be off by 2e-3."""
    model = nn.Sequential(make()).bfloat16()
    x = torch.randn(1, *shape).bfloat16()
    y = torch.randn_like(model(x))
    options = {"views_per_sample": 3, "augmentation": rolled}
    _, norms = private_step(model, x, y, square_loss, max_grad_norm=1.0, **options)
    for share in (151.5 / 256, 179.5 / 256, 213.5 / 256):
        bound = float(norms) * share
        found, _ = private_step(model, x, y, square_loss, max_grad_norm=bound, **options)
        assert {t.dtype for t in found.values()} == {torch.float32}
        total = torch.cat([t.double().flatten() for t in found.values()]).norm()
        assert bound * (1 - 1e-5) <= float(total) <= bound * (1 + 2.0**-20)
