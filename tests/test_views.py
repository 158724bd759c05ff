"""Several views of a sample: their gradients are added up first, and clipped once."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_engine import small_model
from test_layers import Odd, Tied, convolutions
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.layers import RootForward, Tape, build_layers, part_from_samples
from adaclip.layers.ws_conv import WSConv2d
from adaclip.testing import clipped_sum, private_step, relative_error, sample_grads, square_loss

BACKENDS = ["cpp", "reference"]


def folded(model, x, y, views, *, backend="auto", between=lambda layer, use: use):
    """{name: rows' layer parts} of one backward, and the norms of every sample's summed gradient [B].

    Rows of x and y are views, V of each sample. The loss is the mean over all rows, as the engine sees it.
    """
    names = {p: n for n, p in model.named_parameters()}
    wanted = {p for p in model.parameters() if p.requires_grad}
    parts = []

    def finish():
        loose = {}
        owners = Counter(p for layer in layers for p in layer.parameters())
        for layer in layers:
            uses = [between(layer, layer.fold(use, views)) for use in layer.slot.uses]
            if not uses:
                continue
            assert {layer.rows(use) for use in uses} == {x.shape[0] // views}
            mine = wanted.intersection(layer.trainable())
            whole = layer.merge(uses)
            shared = [p for p in mine if owners[p] > 1]
            if whole is not None and not shared:
                parts.append(layer.measure(whole, mine))
                continue
            for use in uses:
                for p, grads in layer.sample_grads(use, mine).items():
                    loose[p] = loose[p] + grads if p in loose else grads
        parts.extend(part_from_samples({p: g}, backend) for p, g in loose.items())

    tape = Tape(finish)
    layers = build_layers(model, tape, backend)
    for layer in layers:
        layer.attach()
    root = RootForward(model, tape)
    root.attach()
    try:
        square_loss(model(x), y).backward()
    finally:
        for replaced in (root, *layers):
            replaced.detach()
    norms = sum(part.sqnorms for part in parts).sqrt() * x.shape[0] / views

    def weigh(factors):
        return {names[p]: total for part in parts for p, total in part.weigh(factors)}

    return norms, weigh


def check(model, x, views, *, tolerance=1e-5, **options):
    with torch.no_grad():
        shape = model(x).shape
    y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # A mean over a sample's own rows: the mean over its views.
    truth = sample_grads(model, x, y, square_loss, views=views)
    samples = x.shape[0] // views
    exact = torch.stack([g.flatten(1).square().sum(1) for g in truth.values()]).sum(0).sqrt()
    norms, weigh = folded(model, x, y, views, **options)
    assert norms.shape == (samples,)
    assert relative_error(norms, exact) < tolerance
    factors = torch.rand(samples, generator=torch.Generator().manual_seed(2))
    factors[-1] = 0
    expected = torch.cat([torch.tensordot(factors.double(), g, dims=1).flatten() for g in truth.values()])
    found = weigh(factors)
    ours = torch.cat([found[name].flatten() for name in truth]).double() * samples
    assert float((ours - expected).norm() / expected.norm().clamp_min(1e-30)) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank, backend):
    @settings(max_examples=15, deadline=None)
    @given(convolutions(rank), st.integers(2, 4))
    def run(case, views):
        module, x = case
        # A lone weight's gradient cancels too often to be told from its bound.
        assume(module.weight.numel() > 2)
        check(nn.Sequential(module), torch.randn(2 * views, *x.shape[1:]), views, backend=backend)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 7), (6,)),
        (nn.Linear(6, 7, bias=False), (5, 6)),
        (nn.Linear(40, 40), (3, 2, 40)),
        (nn.GroupNorm(2, 6), (6, 5)),
        (nn.InstanceNorm2d(6, affine=True), (6, 4, 5)),
        (nn.LayerNorm(5), (4, 5)),
        (nn.Conv2d(32, 64, 3, padding=1), (32, 2, 2)),
        (nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), (3, 6, 6)),
        (WSConv2d(3, 8, 3), (3, 6, 6)),
        (WSConv2d(32, 64, 3, padding=1), (32, 2, 2)),
        (WSConv2d(64, 32, 3, padding=1, groups=2, bias=False, stride=2), (64, 3, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_layers(module, shape, views, backend):
    model = nn.Sequential(copy.deepcopy(module))
    for p in model.parameters():
        nn.init.normal_(p)
    check(model, torch.randn(3 * views, *shape), views, backend=backend)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(7,), ()])
def test_embedding(padding_idx, shape):
    model = nn.Sequential(nn.Embedding(5, 6, padding_idx=padding_idx), nn.Linear(6, 3))
    check(model, torch.randint(0, 5, (6, *shape)), 3)


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.PReLU(), (3, 6)),
        (nn.Sequential(nn.Linear(6, 6), Odd()), (6,)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 5, 5)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_generic_fallback(module, shape):
    check(module, torch.randn(6, *shape), 3)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 6), (4, 6)), (WSConv2d(4, 4, 3, padding=1), (4, 6, 6)), (nn.GroupNorm(2, 6), (6, 5))],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_layer_used_twice(layer, shape):
    check(Twice(copy.deepcopy(layer)), torch.randn(6, *shape), 2)


def test_parameter_shared_by_two_modules():
    check(Tied(), torch.randint(0, 8, (6, 5)), 2)


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias"], ["1.bias"], ["2.weight"]], ids="+".join)
def test_frozen_parameters(frozen):
    model = nn.Sequential(WSConv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 2))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    check(model, torch.randn(6, 3, 6, 6), 2)


def test_a_kept_standardized_gradient_after_folding():
    """Few positions favor the Gram form, and eight times as many the gradient itself."""
    model = nn.Sequential(WSConv2d(16, 32, 3, padding=1))
    seen = []

    def noting(layer, use):
        seen.append(len(use.tensors))
        return use

    check(model, torch.randn(64, 16, 3, 3), 32, between=noting)
    assert seen == [3]


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.GroupNorm(2, 4)], ids=["linear", "norm"])
def test_views_that_cancel_leave_nothing_to_clip(layer):
    """The norm is that of the sum. Clipped one by one, the views would have been large."""
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(3, 1, 4).expand(3, 2, 4).reshape(6, 4)
    y = torch.randn(3, 1, model(x).shape[1])
    # Gradients y + 0.2 out of opposite signs.
    out = model(x).detach().reshape(3, 2, -1)
    y = torch.stack([y[:, 0], -y[:, 0] - 0.4 * out[:, 0]], 1).flatten(0, 1)
    norms, _ = folded(model, x, y, 2)
    apart, _ = folded(model, x, y, 1)
    assert float(norms.max()) < 1e-3 * float(apart.min())


def test_rows_that_are_not_whole_samples_are_refused():
    with pytest.raises(RuntimeError, match=r"has seen 5 rows, which must be 2 views of every sample"):
        folded(nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5, 3), 2)


# ---- in the engine


def rolled(x, generator):
    """View v of an image: the image rolled by v pixels, and darker."""
    v = torch.arange(x.shape[0]) % 3
    moved = torch.stack([torch.roll(x, i, -1) for i in range(3)])
    return moved[v, torch.arange(x.shape[0])] * (1 - 0.3 * v).reshape(-1, *[1] * (x.dim() - 1))


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
