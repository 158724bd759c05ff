"""Clipped sums of every layer kind against a float64 per-sample loop."""

import copy
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from adaclip.layers.ws_conv import WSConv2d
from adaclip.testing import clipped_sum, private_step, relative_error, sample_grads, square_loss

BACKENDS = ["cpp", "reference"]
slow = settings(max_examples=25, deadline=None)


def check(model, x, *, tolerance=1e-5, backend="auto", **options):
    """Compare the engine's clipped sum with the loop, at a norm that clips about half the samples."""
    with torch.no_grad():
        shape = model(x).shape
    y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    truth = sample_grads(model, x, y, square_loss)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in truth.values()]).sum(0).sqrt()
    bound = float(norms.median())
    expected = clipped_sum(truth, bound)
    found, seen = private_step(model, x, y, square_loss, max_grad_norm=bound, backend=backend, **options)
    assert relative_error(seen, norms) < tolerance
    total = torch.cat([t.flatten() for t in expected.values()])
    ours = torch.cat([found[k].flatten() for k in expected])
    assert float((ours.double() - total).norm() / total.norm()) < tolerance
    return found


def sizes(rank):
    return st.tuples(*[st.integers(5, 9)] * rank)


@st.composite
def convolutions(draw, rank):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    cin, cout = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * rank))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * rank))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    padding = draw(st.one_of(st.just("same"), st.just("valid"), st.tuples(*[st.integers(0, 2)] * rank)))
    stride = (1,) * rank if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * rank))
    if not isinstance(padding, str):
        # torch needs room for a reflected border
        padding = tuple(min(p, 2) for p in padding)
    bias = draw(st.booleans())
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    torch.manual_seed(draw(st.integers(0, 99)))
    module = kind(
        cin,
        cout,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )
    spatial = draw(sizes(rank))
    batch = draw(st.integers(1, 5))
    return module, torch.randn(batch, cin, *spatial)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank, backend):
    @slow
    @given(convolutions(rank))
    def run(case):
        module, x = case
        # A lone weight's gradients cancel within samples (the norm is a bound then) and between two of them.
        assume(module.weight.numel() > 2)
        check(nn.Sequential(module), x, backend=backend)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 2, 6), (1, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias, backend):
    check(nn.Sequential(nn.Linear(6, 7, bias=bias)), torch.randn(4, *shape), backend=backend)


@slow
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_linear_shapes(batch, positions, wide, out):
    check(nn.Linear(wide, out), torch.randn(batch, positions, wide))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.GroupNorm(3, 6), (6, 5, 4)),
        (nn.GroupNorm(2, 6), (6,)),
        (nn.GroupNorm(1, 6), (6, 9)),
        (nn.LayerNorm(5), (4, 5)),
        (nn.LayerNorm((4, 5)), (4, 5)),
        (nn.LayerNorm(5, bias=False), (5,)),
        (nn.InstanceNorm1d(6, affine=True), (6, 7)),
        (nn.InstanceNorm2d(6, affine=True), (6, 4, 5)),
        (nn.InstanceNorm3d(6, affine=True), (6, 3, 4, 2)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_norms(norm, shape, backend):
    norm = copy.deepcopy(norm)
    for p in norm.parameters():
        nn.init.normal_(p)
    # A layer below shows that the input gradient is right as well.
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), norm) if len(shape) > 1 else nn.Sequential(norm)
    check(model, torch.randn(5, *shape), backend=backend)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(7,), (3, 4), ()])
def test_embedding(padding_idx, shape):
    model = nn.Sequential(nn.Embedding(5, 6, padding_idx=padding_idx), nn.Linear(6, 3))
    check(model, torch.randint(0, 5, (4, *shape)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_standardized_convolution(bias, groups):
    conv = WSConv2d(4, 8, 3, padding=1, groups=groups, bias=bias)
    # The worst case of what rounding does to the outputs that norms are made of is some 1e-7 a weight.
    model = nn.Sequential(conv, nn.GroupNorm(2, 8), nn.ReLU(), WSConv2d(8, 6, 3))
    check(model, torch.randn(5, 4, 8, 7), tolerance=5e-5)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 6), (6,)),
        (nn.Linear(6, 6), (4, 6)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 6, 6)),
        (nn.GroupNorm(2, 6), (6, 5)),
        (nn.PReLU(4), (4, 3)),
        (WSConv2d(4, 4, 3, padding=1), (4, 6, 6)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_layer_used_twice(layer, shape):
    check(Twice(copy.deepcopy(layer)), torch.randn(4, *shape))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def test_parameter_shared_by_two_modules():
    check(Tied(), torch.randint(0, 8, (4, 5)))


class Odd(nn.Module):
    """Parameters of its own, a child, and two outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.inner = nn.Linear(6, 6)

    def forward(self, x, *, shift=0.0):
        return self.inner(x * self.scale) + shift


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.PReLU(), (3, 6)),
        (nn.Sequential(nn.Linear(6, 6), Odd()), (6,)),
        (nn.RMSNorm(6), (4, 6)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 5, 5)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (6,)),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (5, 6)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_generic_fallback(module, shape):
    check(module, torch.randn(4, *shape))


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_an_in_place_activation_may_follow_the_fallback():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 2))
    check(model, torch.randn(4, 3, 5, 5))


def test_fallback_is_announced_once():
    model = nn.Sequential(nn.PReLU(), nn.PReLU())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        private_step(model, torch.randn(4, 3), torch.randn(4, 3), square_loss, max_grad_norm=1.0)
    assert sum("no fast per-sample gradient" in str(w.message) for w in seen) == 1


class Mixing(nn.Module):
    """Lets samples see each other: the gradient of one depends on the others."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * (x - x.mean(0))


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_fallback_refuses_a_module_that_mixes_samples():
    with pytest.raises(RuntimeError, match="mixes samples"):
        private_step(Mixing(), torch.randn(4, 3), torch.randn(4, 3), square_loss, max_grad_norm=1.0)


class SamplesSecond(nn.Module):
    """Returns something beside its output that keeps the samples along dimension 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * x, (self.scale * x).T


class FirstOf(nn.Sequential):
    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_fallback_refuses_an_output_with_the_samples_elsewhere():
    with pytest.raises(RuntimeError, match=r"0 \(SamplesSecond\) cannot be run one sample at a time"):
        private_step(
            FirstOf(SamplesSecond()), torch.randn(4, 3), torch.randn(4, 3), square_loss, max_grad_norm=1.0
        )


@pytest.mark.parametrize(
    "frozen", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], ["1.bias"], ["2.weight"]], ids="+".join
)
def test_frozen_parameters(frozen):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 2))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found = check(model, torch.randn(4, 3, 6, 6))
    assert not set(frozen) & set(found)


def test_float64_runs_on_the_reference():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)).double()
    check(model, torch.randn(4, 3, 6, 6, dtype=torch.float64), tolerance=1e-6)


def test_sum_reduction():
    model = nn.Linear(5, 3)
    x, y = torch.randn(6, 5), torch.randn(6, 3)

    def total(out, target):
        return square_loss(out, target) * out.shape[0]

    truth = clipped_sum(sample_grads(model, x, y, square_loss), 0.5)
    found, _ = private_step(model, x, y, total, max_grad_norm=0.5, reduction="sum")
    for name, t in truth.items():
        assert relative_error(found[name], t) < 1e-5
