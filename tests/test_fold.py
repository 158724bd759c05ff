"""Layers with several views of a sample: their gradients are added up before anything is measured."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_layers import Odd, Tied, convolutions
from torch import nn

from adaclip.clipping import clip_factors
from adaclip.layers import RootForward, Tape, Use, build_layers, part_from_samples
from adaclip.layers.ws_conv import WSConv2d
from adaclip.testing import relative_error, sample_grads, square_loss

BACKENDS = ["cpp", "reference"]


def folded(model, x, y, views, *, backend="auto", between=lambda layer, use: use):
    """The norms [B] of every sample's averaged gradient, and factors [B] -> {name: their weighted sum}, of a backward.

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
    # Norms of standardized convolutions are upper bounds, for the worst rounding of their outputs.
    tolerance = 1e-4 if isinstance(module, WSConv2d) else 1e-5
    check(model, torch.randn(3 * views, *shape), views, backend=backend, tolerance=tolerance)


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


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["conv", "wide conv", "standardized", "linear"]),
    st.integers(1, 8),
    st.sampled_from([1.0, 1e3, 1e6]),
    st.integers(0, 1000),
)
def test_the_norm_bounds_what_is_added_where_views_cancel(kind, pairs, scale, seed):
    """Adversarial: x large and nearly the same in all views, g opposite in every second one."""
    torch.manual_seed(seed)
    module, size = {
        "conv": (nn.Conv2d(4, 6, 3, padding=1), [4, 4]),
        "wide conv": (nn.Conv2d(64, 64, 3, padding=1), [2, 2]),
        "standardized": (WSConv2d(64, 64, 3, padding=1), [2, 2]),
        "linear": (nn.Linear(40, 48), []),
    }[kind]
    inputs, outputs = module.weight.shape[1], module.weight.shape[0]
    samples, views = 3, 2 * pairs
    x = torch.randn(samples, 1, inputs, *size) * scale + torch.randn(samples, views, inputs, *size)
    g = torch.randn(samples, pairs, outputs, *size)
    tensors = [x.flatten(0, 1), torch.cat([g, -g.flip(1)], 1).flatten(0, 1)]
    (layer,) = build_layers(nn.Sequential(module), Tape(lambda: None), "auto")
    if kind == "standardized" and layer.saves_output(tensors[0]):
        out = module(tensors[0]).detach()
        tensors.append((out * tensors[1]).flatten(2).sum(2, dtype=torch.float64))
    part = layer.measure(layer.fold(Use(tensors, 1), views), {module.weight})
    norms = part.sqnorms.sqrt()
    for bound in (float(norms.median()) / 2, float(norms.max())):
        for b in range(samples):
            factors = torch.zeros(samples)
            factors[b] = clip_factors(norms[b], bound)
            share = torch.cat([t.double().flatten() for _, t in part.weigh(factors)])
            assert float(share.norm()) <= bound * (1 + 2.0**-20)


def test_rows_that_are_not_whole_samples_are_refused():
    with pytest.raises(RuntimeError, match=r"has seen 5 rows, which must be 2 views of every sample"):
        folded(nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5, 3), 2)
